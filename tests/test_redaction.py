"""Redaction: personal data is gone from answers, tables and files; what the tree vouches for is what it was."""

import base64
import json
from pathlib import Path
from typing import Any

import httpx
import psycopg2
import pytest
from conftest import API_KEY, SIGNER, execute, run_cli, running_app, served, settings_for
from months import append_events, fill_months
from sqlalchemy import Engine, event, text
from sqlalchemy.engine import URL
from test_proofs import path_of
from verify import assert_ledger_consistent, leaf_of

import migrations
from cluster import Cluster
from db import Database
from housekeeping import holds, redaction, rewrite
from housekeeping.partitions import detach, list_partitions, seal_finished_months
from housekeeping.rounds import do_round
from ledger import tree
from ledger.notes import TreeHead, open_checkpoint
from problems import DatabaseUnavailable, InternalError
from schemas import LegalHoldIn, RedactionIn
from telemetry import Metrics

PERSONAL: dict[str, Any] = {
    "actor": "alice-pfaffenhofen",
    "resource": "customer/alice-resource",
    "source_ip": "203.0.113.77",
    "metadata": {"mail": "alice-mail@example.org"},
}
EVENT: dict[str, Any] = {"event_type": "LOGIN", "tenant": "acme", "outcome": "success", "source": "shop", **PERSONAL}
BOB: dict[str, Any] = {"event_type": "LOGIN", "actor": "bob"}
ERASED = {"actor": "[redacted]", "resource": None, "source_ip": None, "metadata": None}
REASON = "Request 2026-31"


def redact(client: httpx.Client, **members: Any) -> dict[str, Any]:
    response = client.post("/redactions", json={"reason": REASON, **members})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def post(client: httpx.Client, *events: dict[str, Any]) -> list[int]:
    response = client.post("/events/batch", json=list(events))
    assert response.status_code == 201, response.text
    ids: list[int] = response.json()["ids"]
    return ids


def get(client: httpx.Client, event_id: int) -> dict[str, Any]:
    event: dict[str, Any] = client.get(f"/events/{event_id}").json()
    return event


def records(client: httpx.Client) -> list[dict[str, Any]]:
    page = client.get("/events", params={"event_type": "audit.redaction", "order": "asc"}).json()
    events: list[dict[str, Any]] = page["events"]
    return events


def test_a_dry_run_counts_and_changes_nothing(client: httpx.Client) -> None:
    ids = post(client, EVENT, BOB, EVENT)
    before = client.get("/events").json()
    assert redact(client, actor=EVENT["actor"]) == {
        "redaction": None,
        "dry_run": True,
        "count": 2,
        "held": 0,
        "remaining": 2,
    }
    assert redact(client, ids=[ids[1], 999])["count"] == 1
    assert client.get("/events").json() == before


def test_every_reader_says_redacted(client: httpx.Client) -> None:
    ids = post(client, EVENT, BOB, EVENT)
    answer = redact(client, actor=EVENT["actor"], dry_run=False)
    assert (answer["count"], answer["held"], answer["remaining"]) == (2, 0, 0)
    for event_id in (ids[0], ids[2]):
        event = get(client, event_id)
        assert event["redacted_at"] is not None
        assert {name: event[name] for name in ERASED} == ERASED
        assert (event["tenant"], event["outcome"], event["source"]) == ("acme", "success", "shop")
    assert get(client, ids[1])["redacted_at"] is None
    listed = client.get("/events", params={"actor": "[redacted]"}).json()["events"]
    assert [event["id"] for event in listed] == [ids[2], ids[0]]
    exported = [json.loads(line) for line in client.get("/events/export").text.splitlines()]
    assert {name: exported[0][name] for name in (*ERASED, "nonce")} == {**ERASED, "nonce": None}
    assert len(exported[0]["personal_hash"]) == 64
    for path in ("/events", "/events/export", "/events/export?format=csv", "/events/top?field=actor"):
        assert "alice" not in client.get(path).text


def test_it_is_recorded_without_what_was_erased(client: httpx.Client) -> None:
    ids = post(client, EVENT, BOB, EVENT)
    answer = redact(client, actor=EVENT["actor"], dry_run=False)
    (record,) = records(client)
    assert (record["actor"], record["resource"]) == ("root", answer["redaction"])
    assert record["metadata"] == {"count": 2, "first_id": ids[0], "last_id": ids[2], "reason": REASON}
    assert record["timestamp"] == get(client, ids[0])["redacted_at"]


def test_leaves_and_tiles_are_what_they_were(client: httpx.Client, _shared_app: tuple[httpx.Client, URL]) -> None:
    url = _shared_app[1]
    ids = post(client, *[EVENT, BOB] * 150)
    leaves = [leaf_of(row) for row in _rows(url)]
    stored = "SELECT string_agg(audit_leaf(audit_events), '' ORDER BY id) FROM audit_events WHERE id <= 300"
    tiles = "SELECT string_agg(hashes, '' ORDER BY level, tile_index) FROM ledger_tiles"
    before = bytes(execute(url, tiles))
    assert bytes(execute(url, stored)) == b"".join(leaves)
    assert redact(client, actor=EVENT["actor"], dry_run=False)["count"] == 150
    assert [leaf_of(row) for row in _rows(url)[: len(ids)]] == leaves
    assert bytes(execute(url, stored)) == b"".join(leaves)
    assert bytes(execute(url, tiles)) == before


def test_bundles_tiles_and_proofs_over_http_are_what_they_were_and_hold(
    client: httpx.Client, _shared_app: tuple[httpx.Client, URL], tmp_path: Path
) -> None:
    size = 600  # two full tiles, and a partial one
    ids = post(client, *[EVENT, BOB] * (size // 2))
    proved = [ids[index] for index in (0, 1, 254, 255, 256, 512, 513, 598, 599)]
    old, *_ = [_prove(client, event_id) for event_id in reversed(proved)]
    tiles = [path_of(0), path_of(1), path_of(2, size % 256)]
    paths = [f"/ledger/tile/{kind}/{tile}" for kind in ("entries", "0") for tile in tiles]
    paths += [f"/ledger/tile/1/{path_of(0, 2)}", f"/ledger/consistency?from=300&to={size}"]

    def served_now() -> list[bytes]:
        answers = [client.get(path) for path in paths]
        assert {answer.status_code for answer in answers} == {200}
        entries = [client.get(f"/events/{event_id}/proof").json()["entry"].encode() for event_id in proved]
        return [answer.content for answer in answers] + entries

    before = served_now()
    kept = tmp_path / "checkpoint"
    kept.write_text(client.get("/ledger/checkpoint").text)
    assert redact(client, actor=EVENT["actor"], dry_run=False)["count"] == size // 2
    assert get(client, ids[0])["redacted_at"] and get(client, ids[598])["redacted_at"]
    new = _prove(client, size + 1)  # of the event that records it
    assert served_now() == before
    for event_id in proved:
        _prove(client, event_id)
    answer = client.get("/ledger/consistency", params={"from": old.size, "to": new.size}).json()
    path = [base64.b64decode(node) for node in answer["consistency_path"]]
    assert tree.proves_consistency(old.size, old.root, new.size, new.root, path)
    key = ["--key", str(SIGNER.verifier), "--checkpoint", str(kept)]
    for options in (key, [*key, "--url", str(client.base_url), "--all"]):
        status, said, complaints = run_cli(_shared_app[1], "verify", *options, API_KEY=API_KEY)
        assert status == 0, complaints
        assert said[0].startswith(f"{size + 1} events" if options is key else f"{SIGNER.name}: {size + 1} events")


def _prove(client: httpx.Client, event_id: int) -> TreeHead:
    """The checkpoint whose tree has the event, by the proof that is served."""
    proof = client.get(f"/events/{event_id}/proof").json()
    head, _ = open_checkpoint(proof["checkpoint"], SIGNER.verifier)
    leaf = tree.hash_leaf(proof["entry"].encode())
    path = [base64.b64decode(node) for node in proof["inclusion_path"]]
    assert tree.root_from_inclusion(leaf, proof["leaf_index"], head.size, path) == head.root
    return head


def _rows(url: URL) -> list[dict[str, Any]]:
    database = Database(url)
    try:
        with database.transaction() as connection:
            rows = connection.execute(text("SELECT * FROM audit_events ORDER BY id")).mappings()
            return [dict(row) for row in rows]
    finally:
        database.close()


def test_of_two_tenants_one_is_meant(client: httpx.Client) -> None:
    acme, other = post(client, EVENT, {**EVENT, "tenant": "other"})
    assert redact(client, actor=EVENT["actor"], tenant="other", dry_run=False)["count"] == 1
    assert get(client, acme)["actor"] == EVENT["actor"]
    assert get(client, other)["actor"] == "[redacted]"


def test_a_legal_hold_keeps_its_events(client: httpx.Client) -> None:
    mine, held = post(client, {**EVENT, "resource": "case/0"}, {**EVENT, "resource": "case/1"})
    hold = client.post("/legal-holds", json={"actor": EVENT["actor"], "resource": "case/1", "reason": "Case 1"}).json()
    # The hold's own event names the person too, and stays for as long as the hold.
    answer = redact(client, actor=EVENT["actor"], dry_run=False)
    assert (answer["count"], answer["held"], answer["remaining"]) == (1, 2, 0)
    assert get(client, mine)["actor"] == "[redacted]"
    assert get(client, held)["actor"] == EVENT["actor"]
    assert redact(client, ids=[held], dry_run=False)["held"] == 1

    client.delete(f"/legal-holds/{hold['id']}")
    assert redact(client, actor=EVENT["actor"], dry_run=False)["count"] == 2
    released = client.get(f"/legal-holds/{hold['id']}").json()
    assert (released["actor"], released["resource"], released["reason"]) == ("[redacted]", None, "[redacted]")
    assert {"legal_holds": 1, "reason": REASON} in [record["metadata"] for record in records(client)]
    everything = client.get("/events").text + client.get("/legal-holds").text
    assert "alice" not in everything


def test_a_hold_placed_meanwhile_keeps_what_is_not_erased_yet(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("housekeeping.redaction.BATCH_EVENTS", 2)
    append_events(database, *[EVENT] * 5)
    wanted = RedactionIn(actor=EVENT["actor"], reason=REASON)
    batches = redaction.redact(database, wanted, "root", "redactions/1")
    assert next(batches) == 2
    holds.place_hold(database, LegalHoldIn(tenant="acme", reason="Case 1"), "root")
    assert list(batches) == []
    assert execute(database.url, "SELECT count(*) FROM audit_events WHERE redacted_at IS NOT NULL") == 2


def test_recorded_reads_about_the_person_go_too(database_url: URL) -> None:
    with running_app(settings_for(database_url, audit_reads=True)) as client:
        post(client, EVENT)
        client.get("/events", params={"actor": EVENT["actor"]})
    database = Database(database_url)
    wanted = RedactionIn(actor=EVENT["actor"], reason=REASON)
    assert sum(redaction.redact(database, wanted, "root", "redactions/1")) == 2
    database.close()
    assert execute(database_url, "SELECT count(*) FROM audit_events WHERE audit_events::text LIKE '%alice%'") == 0
    assert_ledger_consistent(database_url)


def test_the_name_of_a_key_goes_when_the_key_works_no_more(
    client: httpx.Client, _shared_app: tuple[httpx.Client, URL]
) -> None:
    def make(name: str, **members: Any) -> dict[str, Any]:
        key: dict[str, Any] = client.post("/keys", json={"name": name, "scopes": ["admin"], **members}).json()
        return key

    def names() -> list[tuple[str, str, str | None]]:
        keys = client.get("/keys").json()["keys"]
        return sorted((key["name"], key["created_by"], key["revoked_by"]) for key in keys)

    alice, bob = make("alice-the-clerk"), make("bob", tenant="acme")
    as_alice = {"X-API-Key": alice["key"]}
    client.post("/keys", json={"name": "carol", "scopes": ["read"]}, headers=as_alice)
    client.delete(f"/keys/{bob['id']}", headers=as_alice)
    # What she did with her key, and that it was made.
    answer = redact(client, actor="alice-the-clerk", dry_run=False)
    assert answer["count"] == 3
    assert names() == [("alice-the-clerk", "root", None), ("bob", "root", "[redacted]"), ("carol", "[redacted]", None)]
    assert client.get("/keys", headers=as_alice).status_code == 200, "it works on"
    assert {"api_keys": 2, "reason": REASON} in [record["metadata"] for record in records(client)]

    client.delete(f"/keys/{alice['id']}")
    assert redact(client, actor="alice-the-clerk", tenant="acme", dry_run=False)["redaction"] is None
    assert redact(client, actor="alice-the-clerk", dry_run=False)["redaction"] is not None
    assert names()[0] == ("[redacted]", "root", "root")
    assert redact(client, actor="alice-the-clerk", dry_run=False)["redaction"] is None, "nothing is left to erase"
    assert "alice" not in client.get("/keys").text + client.get("/events").text
    due = execute(_shared_app[1], "SELECT array_agg(relation) FROM rewrites_due")
    assert "api_keys" in due
    assert redact(client, actor="bob", tenant="acme", dry_run=False)["count"] == 1
    assert "bob" not in client.get("/keys").text + client.get("/events").text


def test_a_retry_makes_no_second_event_and_its_hash_is_gone(
    client: httpx.Client, _shared_app: tuple[httpx.Client, URL]
) -> None:
    keyed = {**EVENT, "idempotency_key": "k1"}
    first = client.post("/events", json=keyed).json()
    bob = client.post("/events", json={**BOB, "idempotency_key": "k2"}).json()
    redact(client, actor=EVENT["actor"], dry_run=False)
    hashes = "SELECT array_agg(request_hash IS NULL ORDER BY key) FROM idempotency_keys"
    assert execute(_shared_app[1], hashes) == [True, False]
    for repeated in (keyed, {**keyed, "actor": "mallory"}):
        answer = client.post("/events", json=repeated)
        assert (answer.status_code, answer.headers["Idempotent-Replay"]) == (200, "true")
        assert (answer.json()["id"], answer.json()["actor"]) == (first["id"], "[redacted]")
    batch = client.post("/events/batch", json=[keyed, BOB]).json()
    assert (batch["ids"], batch["replayed"]) == ([first["id"], bob["id"] + 2], 1)
    assert client.post("/events", json={**BOB, "actor": "eve", "idempotency_key": "k2"}).status_code == 409


def test_a_call_erases_so_many_and_the_next_goes_on(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("routes.redactions.MOST_EVENTS_A_CALL", 3)
    monkeypatch.setattr("housekeeping.redaction.BATCH_EVENTS", 2)
    post(client, *[EVENT] * 4)
    answers = [redact(client, actor=EVENT["actor"], dry_run=False) for _ in range(3)]
    assert [(answer["count"], answer["remaining"]) for answer in answers] == [(3, 1), (1, 0), (0, 0)]
    assert [answer["redaction"] is None for answer in answers] == [False, False, True]
    assert [record["metadata"]["count"] for record in records(client)] == [2, 1, 1]


def test_memory_does_not_depend_on_how_many_events_an_actor_has(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("housekeeping.redaction.BATCH_EVENTS", 2)
    rows_of: list[int] = []

    def count(_connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if "audit_events AS event" in statement:
            rows_of.append(cursor.rowcount)

    post(client, *[EVENT] * 9)
    event.listen(Engine, "after_cursor_execute", count)
    try:
        assert redact(client, actor=EVENT["actor"])["remaining"] == 9
        assert redact(client, actor=EVENT["actor"], dry_run=False)["count"] == 9
    finally:
        event.remove(Engine, "after_cursor_execute", count)
    assert len(rows_of) > 5 and max(rows_of) == 2


def test_events_are_found_whatever_their_timestamps_and_those_that_land_meanwhile_later(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("housekeeping.redaction.BATCH_EVENTS", 2)
    moments = ["2026-03-01", "2026-01-01", "2026-02-01", "2026-01-01", "0001-01-01"]
    append_events(database, *[{**EVENT, "timestamp": f"{moment}T00:00:00Z"} for moment in moments])
    wanted = RedactionIn(actor=EVENT["actor"], reason=REASON)
    batches = redaction.redact(database, wanted, "root", "redactions/1")
    assert next(batches) == 2
    append_events(database, EVENT)
    assert list(batches) == [2, 1]
    assert redaction.measure(database, wanted, "root") == redaction.Extent(1, 0)
    assert list(redaction.redact(database, wanted, "root", "redactions/2")) == [1]


def test_a_batch_whose_record_cannot_be_written_is_not_redacted(database: Database) -> None:
    append_events(database, *[EVENT] * 2)
    execute(database.url, "ALTER TABLE audit_events ADD CONSTRAINT none CHECK (event_type <> 'audit.redaction')")
    wanted = RedactionIn(actor=EVENT["actor"], reason=REASON)
    with pytest.raises(InternalError):
        list(redaction.redact(database, wanted, "root", "redactions/1"))
    assert execute(database.url, "SELECT count(*) FROM audit_events WHERE redacted_at IS NOT NULL") == 0
    execute(database.url, "ALTER TABLE audit_events DROP CONSTRAINT none")
    assert sum(redaction.redact(database, wanted, "root", "redactions/1")) == 2


@pytest.mark.parametrize(
    ("members", "location"),
    [
        ({}, "body"),
        ({"actor": "alice", "ids": [1]}, "body"),
        ({"ids": [1], "tenant": "acme"}, "body"),
        ({"actor": "alice", "reason": "The customer ALICE asked"}, "body"),
        ({"ids": []}, "body.ids"),
        ({"ids": [0.5]}, "body.ids.0"),
        ({"ids": [2**63]}, "body.ids.0"),
        ({"actor": ""}, "body.actor"),
        ({"actor": "alice", "reason": ""}, "body.reason"),
        ({"actor": "alice", "until": "2030"}, "body.until"),
        ({"actor": "alice", "dry_run": "no"}, "body.dry_run"),
        ({"actor": "audit-service"}, "body.actor"),
        ({"actor": "[redacted]"}, "body.actor"),
        ({"actor": "root"}, "body.actor"),
    ],
)
def test_what_is_not_clear_is_refused_by_the_fields_name(
    client: httpx.Client, members: dict[str, Any], location: str
) -> None:
    response = client.post("/redactions", json={"reason": REASON, **members})
    assert response.status_code == 422
    assert [error["location"] for error in response.json()["errors"]] == [location]


def test_a_reason_must_not_name_whom_the_ids_belong_to(client: httpx.Client) -> None:
    ids = post(client, EVENT)
    response = client.post("/redactions", json={"ids": ids, "reason": f"For {EVENT['actor']}", "dry_run": False})
    assert response.status_code == 422
    assert response.json()["errors"][0]["location"] == "body.reason"
    assert "alice" not in response.text


def test_redaction_needs_a_key(client: httpx.Client) -> None:
    wrong = {"X-API-Key": "wrong"}
    assert client.post("/redactions", json={"actor": "a", "reason": "b"}, headers=wrong).status_code == 401


def test_events_of_a_partition_on_its_way_out_are_not_overlooked(database: Database) -> None:
    first, *_ = fill_months(database, [EVENT] * 3, [BOB])
    with database.exclusive_session(1) as connection:
        assert connection is not None
        (partition,) = [each for each in list_partitions(connection) if each.name == first]
        detach(connection, partition)
        with pytest.raises(DatabaseUnavailable, match="on its way out"):
            list(redaction.redact(database, RedactionIn(actor="x", reason=REASON), "root", "redactions/1"))
        connection.exec_driver_sql(f"ALTER TABLE audit_events ATTACH PARTITION {first} {partition.bounds}")
        connection.exec_driver_sql(f"COMMENT ON TABLE {first} IS NULL")


def test_sealed_months_are_redacted_and_rewritten(database: Database) -> None:
    first, *_ = fill_months(database, [EVENT] * 3, [BOB])
    list(seal_finished_months(database))
    wanted = RedactionIn(actor=EVENT["actor"], reason=REASON)
    assert sum(redaction.redact(database, wanted, "root", "redactions/1")) == 3
    assert rewrite.relations_due(database) == [first]
    assert list(rewrite.rewrite_erased(database)) == [first]
    assert rewrite.relations_due(database) == []


def test_what_everybody_writes_to_is_rewritten_when_small_or_over(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    append_events(database, EVENT)
    wanted = RedactionIn(actor=EVENT["actor"], reason=REASON)
    list(redaction.redact(database, wanted, "root", "redactions/1"))
    (month,) = rewrite.relations_due(database)
    monkeypatch.setattr("housekeeping.rewrite.MOST_BYTES_IN_USE", 0)
    assert list(rewrite.rewrite_erased(database)) == []
    assert rewrite.relations_due(database) == [month]
    fill_months(database, [BOB])
    append_events(database, BOB, recorded_at=_bound_of(database, month))
    do_round(database, settings_for(database.url), Metrics(), lambda _: _bound_of(database, month))
    assert rewrite.relations_due(database) == []


def _bound_of(database: Database, name: str) -> Any:
    with database.transaction() as connection:
        return next(each.upper_bound for each in list_partitions(connection) if each.name == name)


def test_a_rewrite_is_done_when_no_open_transaction_can_see_the_old_rows(database: Database) -> None:
    append_events(database, EVENT)
    reader = psycopg2.connect(database.url.set(drivername="postgresql").render_as_string(hide_password=False))
    reader.set_session(isolation_level="REPEATABLE READ")
    reader.cursor().execute("SELECT txid_current()")
    list(redaction.redact(database, RedactionIn(actor=EVENT["actor"], reason=REASON), "root", "redactions/1"))
    assert list(rewrite.rewrite_erased(database)) == []
    due = rewrite.relations_due(database)
    assert len(due) == 2  # the month, and the planner's statistics
    reader.close()
    assert [*rewrite.rewrite_erased(database)] == due[:1]
    assert rewrite.relations_due(database) == []


def found_in_files(cluster: Cluster, *needles: bytes) -> set[bytes]:
    """Which of them stand anywhere under the data directory, but for the WAL."""
    execute(cluster.url(), "CHECKPOINT")
    files = [path for path in cluster.data_dir.rglob("*") if path.is_file() and "pg_wal" not in path.parts]
    return {needle for path in files for needle in needles if needle in path.read_bytes()}


def test_nothing_is_left_in_files_and_logs(own_cluster: Cluster, tmp_path: Path) -> None:
    own_cluster.create_database("audit")
    url = own_cluster.url("audit")
    migrations.upgrade(url)
    log = tmp_path / "service.log"
    with served(url, log, LOG_LEVEL="DEBUG", LOG_WRITES="true") as client:
        events = [{**EVENT, "metadata": {"mail": f"alice-mail-{n}@example.org"}} for n in range(300)]
        post(client, *[{**each, "idempotency_key": f"k{n}"} for n, each in enumerate(events)], *[BOB] * 300)
        execute(url, "ANALYZE")
        secrets = "SELECT nonce, (SELECT request_hash FROM idempotency_keys WHERE key = 'k0') FROM audit_events"
        nonce, request_hash = _first_row(url, f"{secrets} WHERE id = 1")
        needles = (b"alice-", nonce, request_hash)
        assert found_in_files(own_cluster, *needles) == set(needles), "the search finds what is there"
        client.get("/events", params={"actor": EVENT["actor"]})
        assert redact(client, actor=EVENT["actor"], dry_run=False)["count"] == 300
        database = Database(url)
        assert "idempotency_keys" in list(rewrite.rewrite_erased(database))
        database.close()
        assert client.get("/events").status_code == 200
    assert found_in_files(own_cluster, *needles) == set()
    assert "alice" not in log.read_text()
    assert API_KEY not in log.read_text()
    assert_ledger_consistent(url)


def _first_row(url: URL, statement: str) -> tuple[bytes, bytes]:
    database = Database(url)
    with database.transaction() as connection:
        first, second = connection.execute(text(statement)).one()
    database.close()
    return bytes(first), bytes(second)


def test_redaction_from_the_command_line(database: Database) -> None:
    append_events(database, EVENT, BOB, EVENT)
    holds.place_hold(database, LegalHoldIn(actor="bob", reason="Case 1"), "carol")

    def run(*arguments: str) -> tuple[int, list[str], str]:
        return run_cli(database.url, "redact", "--reason", REASON, "--by", "carol", *arguments)

    status, said, _ = run("--actor", EVENT["actor"])
    assert (status, said[0]) == (0, "2 events to redact, 0 kept by legal holds")
    assert run("--id", "2")[1][0] == "0 events to redact, 1 kept by legal holds"
    assert execute(database.url, "SELECT count(*) FROM audit_events WHERE redacted_at IS NOT NULL") == 0
    status, said, progress = run("--actor", EVENT["actor"], "--yes")
    assert status == 0, progress
    assert said[1].startswith("Recorded as redactions/")
    assert "redacting: 100%" in progress
    assert "alice" not in progress
    assert run("--actor", EVENT["actor"], "--yes")[1] == [
        "0 events to redact, 0 kept by legal holds",
        "Nothing was found to erase, and nothing recorded.",
    ]
    records = "SELECT count(*) FROM audit_events WHERE event_type = 'audit.redaction'"
    assert execute(database.url, records) == 1
    released = holds.place_hold(database, LegalHoldIn(actor="dave", reason="Case 2"), "carol")
    holds.release_hold(database, released.id, "carol")
    assert run("--actor", "dave", "--yes")[1][1].startswith("Recorded as redactions/")
    assert run("--actor", "carol")[::2] == (
        1,
        "audit-service: actor asks for it: somebody else must, for the record names who did\n",
    )
    assert run("--id", "1", "--tenant", "acme")[0] == 2
