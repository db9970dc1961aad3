"""/events/export: every event, once, in order, and a reader can tell that it is all."""

import csv
import gzip
import io
import json
import re
import socket
import time
from collections.abc import Iterator
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from conftest import API_KEY, eventually, execute, running_app, served, settings_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool
from uvicorn.config import HTTP_PROTOCOLS
from verify import assert_ledger_consistent, leaf_of, tree_hash

import migrations
import routes.streamed
from cluster import Cluster
from models import audit_events
from queries import exports, pages
from queries.lines import EXPORTED_FIELDS, NDJSON_LINE
from queries.pages import Selection, read_page
from schemas import EventFilter

LOGIN = {"event_type": "LOGIN", "actor": "alice"}
FULL = {
    "event_type": "order.create",
    "actor": "ålice 🦊",
    "timestamp": "0001-01-02T03:04:05.500000Z",
    "tenant": 'ac"me',
    "resource": "order\\1234\r\n",
    "outcome": "success",
    "source": "=shop",
    "source_ip": "::ffff:10.0.0.1",
    "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736",
    "metadata": {"amount": 99.5, "nested": {"list": [1, None, True, 'x"', 1e22, 1e-7, -0.0]}},
}
# README: what a spreadsheet could take for a formula has one more ' in front.
GUARDED = re.compile(r"'+[-=+@\t\r\n＝＋－＠]")  # noqa: RUF001


def post_all(client: httpx.Client, events: list[dict[str, Any]]) -> None:
    assert client.post("/events/batch", json=events).status_code == 201


def export_lines(client: httpx.Client, **query: Any) -> list[str]:
    response = client.get("/events/export", params=query)
    assert response.status_code == 200, response.text
    assert response.headers["Content-Type"] == "application/x-ndjson"
    *lines, nothing = response.text.split("\n")  # not splitlines(), for which U+0085 ends a line, too
    assert nothing == ""
    return lines


def exported_ids(client: httpx.Client, **query: Any) -> list[int]:
    *events, last = map(json.loads, export_lines(client, **query))
    assert last == {"complete": True, "count": len(events), "snapshot": last["snapshot"]}
    return [event["id"] for event in events]


def csv_records(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text, newline=""), strict=True))


def without_guard(field: str) -> str:
    return field[1:] if GUARDED.match(field) else field


def test_an_export_has_every_event_as_get_shows_it_and_says_that_it_is_complete(client: httpx.Client) -> None:
    post_all(client, [LOGIN, FULL, {**LOGIN, "actor": "bob"}])
    *events, last = map(json.loads, export_lines(client))
    assert last == {"complete": True, "count": 3, "snapshot": 3}
    for event in events:
        assert tuple(event) == EXPORTED_FIELDS
        shown = client.get(f"/events/{event['id']}").json()
        assert json.dumps({name: event[name] for name in shown}) == json.dumps(shown)
        assert event["redacted_at"] is None


def test_an_empty_log_is_a_complete_export(client: httpx.Client) -> None:
    assert export_lines(client) == ['{"complete":true,"count":0,"snapshot":0}']


def test_columns_are_exported_all(client: httpx.Client) -> None:
    assert set(EXPORTED_FIELDS) == set(audit_events.c.keys())


_texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40)
_starts = st.sampled_from(["=", "+", "-", "@", "\t", "\r", "\n", "'", "''=", "＝", "'@"])  # noqa: RUF001
_formulas = st.builds(str.__add__, _starts, _texts)
_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.floats(allow_nan=False, allow_infinity=False),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(_texts, children, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actor=_texts | _formulas, resource=_texts | _formulas, metadata=st.dictionaries(_texts, _json, max_size=3))
def test_any_text_and_metadata_come_out_of_both_formats_as_get_shows_them(
    client: httpx.Client, actor: str, resource: str, metadata: dict[str, Any]
) -> None:
    body = {**LOGIN, "actor": actor, "resource": resource, "metadata": metadata}
    event_id = client.post("/events", json=body).json()["id"]
    shown = client.get(f"/events/{event_id}").json()
    event = json.loads(export_lines(client, after=event_id - 1)[0])
    assert json.dumps({name: event[name] for name in shown}) == json.dumps(shown)
    text = client.get("/events/export", params={"format": "csv", "after": event_id - 1}).content.decode()
    record = dict(zip(EXPORTED_FIELDS, csv_records(text)[0], strict=True))
    assert without_guard(record["actor"]) == actor
    assert without_guard(record["resource"]) == resource
    assert json.dumps(json.loads(record["metadata"])) == json.dumps(shown["metadata"])
    assert not any(re.match(r"[-=+@\t\r\n＝＋－＠]", field) for field in record.values())  # noqa: RUF001


def test_from_an_export_alone_anyone_recomputes_the_tree(client: httpx.Client) -> None:
    post_all(client, [FULL, LOGIN] * 150)
    *events, _ = map(json.loads, export_lines(client))
    rows = [
        {
            **event,
            "nonce": bytes.fromhex(event["nonce"]),
            "personal_hash": bytes.fromhex(event["personal_hash"]),
            **{name: datetime.fromisoformat(event[name]) for name in ("timestamp", "recorded_at")},
        }
        for event in events
    ]
    assert len(tree_hash([leaf_of(row) for row in rows])) == 32  # leaf_of asserts that personal_hash recomputes


def test_csv_is_as_rfc_4180_has_it(client: httpx.Client) -> None:
    post_all(client, [LOGIN, FULL])
    response = client.get("/events/export?format=csv")
    assert response.headers["Content-Type"] == "text/csv; charset=utf-8"
    assert 'filename="events.csv"' in response.headers["Content-Disposition"]
    header, login, full, last = csv_records(response.content.decode())
    assert tuple(header) == EXPORTED_FIELDS
    shown = [client.get(f"/events/{event_id}").json() for event_id in (1, 2)]
    for record, event in zip((login, full), shown, strict=True):
        fields = dict(zip(header, record, strict=True))
        for name in set(event) - {"metadata"}:
            assert without_guard(fields[name]) == ("" if event[name] is None else str(event[name]))
    assert json.loads(full[header.index("metadata")]) == FULL["metadata"]
    assert full[header.index("source")] == "'=shop"
    totals = dict(zip(header, last, strict=True))
    assert (totals["id"], totals["event_type"]) == ("", "export.complete")
    assert json.loads(totals["metadata"]) == {"count": 2, "snapshot": 2}
    assert response.content.count(b"\r\n") == 4 + 1  # the records, and one within FULL's resource


@pytest.mark.parametrize(
    ("query", "ids"),
    [
        ({}, [1, 2, 3, 4]),
        ({"actor": "b*"}, [2, 4]),
        ({"actor": ["alice", "bert"]}, [1, 3, 4]),
        ({"metadata": '{"n": 3}'}, [3]),
        ({"start": "2026-01-01T00:00:00Z", "end": "2026-01-02T00:00:00Z"}, [2, 3]),
        ({"actor": "nobody"}, []),
        ({"snapshot": 2}, [1, 2]),
        ({"after": 3}, [4]),
        ({"after": 4}, []),
        ({"after": 1, "snapshot": 3, "actor": "b*"}, [2]),
    ],
)
def test_filters_and_ends_select(client: httpx.Client, query: dict[str, Any], ids: list[int]) -> None:
    moments = ("2026-03-01", "2026-01-01", "2026-01-01", "2025-01-01")
    actors = ("alice", "bob", "alice", "bert")
    post_all(
        client,
        [
            {**LOGIN, "actor": actor, "timestamp": f"{moment}T00:00:00Z", "metadata": {"n": n}}
            for n, (actor, moment) in enumerate(zip(actors, moments, strict=True), 1)
        ],
    )
    assert exported_ids(client, **query) == ids


@pytest.mark.parametrize(
    ("query", "location"),
    [
        ("format=xml", "query.format"),
        ("after=x", "query.after"),
        ("snapshot=-1", "query.snapshot"),
        ("limit=10", "query.limit"),
        ("cursor=x", "query.cursor"),
        ("format=csv&format=csv", "query.format"),
    ],
)
def test_a_wrong_parameter_is_named(client: httpx.Client, query: str, location: str) -> None:
    response = client.get(f"/events/export?{query}")
    assert response.status_code == 422
    assert [error["location"] for error in response.json()["errors"]] == [location]


@pytest.mark.parametrize("format_", ["ndjson", "csv"])
def test_a_cut_export_goes_on_where_it_was_cut(client: httpx.Client, format_: str) -> None:
    post_all(client, [{**LOGIN, "metadata": {"n": n}} for n in range(1, 1501)])
    query = {"format": format_}
    whole = client.get("/events/export", params=query)
    post_all(client, [LOGIN])
    for received in (1, 250, 777, 1500):
        first = whole.text.splitlines(keepends=True)[: received + (format_ == "csv")]
        resumed = {**query, "after": received, "snapshot": whole.headers["Audit-Snapshot"]}
        rest = client.get("/events/export", params=resumed).text.splitlines(keepends=True)
        assert [*first, *rest[:-1]] == whole.text.splitlines(keepends=True)[:-1]
        assert f"{1500 - received}" in rest[-1]


def test_a_snapshot_that_the_log_has_not_reached_is_a_503(client: httpx.Client) -> None:
    post_all(client, [LOGIN])
    response = client.get("/events/export?snapshot=2")
    assert response.status_code == 503
    assert "event 2" in response.json()["detail"]


@pytest.mark.parametrize(
    ("accepted", "is_compressed"),
    [("gzip", True), ("br, GZIP;q=0.5", True), ("gzip; q=0", False), ("identity", False), ("gzip;q=0.000", False)],
)
def test_gzip_where_it_is_accepted(client: httpx.Client, accepted: str, is_compressed: bool) -> None:
    post_all(client, [LOGIN] * 1000)
    with client.stream("GET", "/events/export", headers={"Accept-Encoding": accepted}) as response:
        raw = b"".join(response.iter_raw())
    assert response.headers["Vary"] == "Accept-Encoding"
    assert (response.headers.get("Content-Encoding") == "gzip") == is_compressed
    plain = gzip.decompress(raw) if is_compressed else raw
    assert plain.count(b"\n") == 1001
    assert (len(raw) < len(plain) / 4) == is_compressed


def test_a_page_ends_by_its_bytes_whatever_the_size_of_events(client: httpx.Client, database_url: URL) -> None:
    with running_app(settings_for(database_url)) as own_client:
        for _ in range(3):
            post_all(own_client, [{**LOGIN, "metadata": {"padding": "x" * 60_000}}] * 200)
        with create_engine(database_url, poolclass=NullPool).connect() as connection:
            first = read_page(Selection(EventFilter(), NDJSON_LINE, 600), 0, 600, connection)
        assert (first.count, first.position) == (pages.FETCH_ROWS, pages.FETCH_ROWS)
        assert exported_ids(own_client) == list(range(1, 601))
    assert_ledger_consistent(database_url)


@pytest.fixture
def large_log(database_url: URL) -> Iterator[httpx.Client]:
    """A service with 30,000 events, whose export of 36 MB is more than the buffers of a connection hold."""
    with running_app(settings_for(database_url)) as client:
        for _ in range(3):
            post_all(client, [{**LOGIN, "metadata": {"padding": "x" * 800}}] * 10_000)
        yield client


def make_key(client: httpx.Client) -> dict[str, Any]:
    answer = client.post("/keys", json={"name": "reader", "scopes": ["read"]})
    assert answer.status_code == 201
    made: dict[str, Any] = answer.json()
    return made


def open_export(client: httpx.Client, key: str = API_KEY) -> socket.socket:
    """A connection that has asked for an export, has received its beginning, and reads no more."""
    connection = socket.create_connection((client.base_url.host, client.base_url.port), timeout=30)
    connection.sendall(b"GET /events/export HTTP/1.1\r\nHost: x\r\nX-API-Key: " + key.encode() + b"\r\n\r\n")
    assert connection.recv(1000).startswith(b"HTTP/1.1 200 OK")
    return connection


BUSY_READERS = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND state <> 'idle' AND pid <> pg_backend_pid()
"""


def test_a_client_that_stops_reading_holds_no_transaction_and_is_cut(
    large_log: httpx.Client, database_url: URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes.streamed, "STALL_S", 0.5)
    with open_export(large_log) as connection:
        eventually(lambda: execute(database_url, BUSY_READERS) == 0, 5)
        eventually(lambda: "audit_exports_open 0.0" in large_log.get("/metrics").text)
        received = b"".join(iter(lambda: connection.recv(1 << 20), b""))
    assert b'"complete"' not in received
    assert not received.endswith(b"0\r\n\r\n")


def test_a_client_that_reads_slowly_is_not_cut(database_url: URL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes.streamed, "STALL_S", 0.5)
    monkeypatch.setitem(HTTP_PROTOCOLS, "auto", "server:OneWriteProtocol")
    with running_app(settings_for(database_url)) as client:
        post_all(client, [{**LOGIN, "metadata": {"padding": "x" * 20_000}}] * pages.FETCH_ROWS)  # one piece
        with open_export(client) as connection:
            received = b""
            while not received.endswith(b"0\r\n\r\n") and (chunk := connection.recv(1 << 16)):
                received = received[-1000:] + chunk
                time.sleep(0.05)
    assert b'"complete":true' in received


def test_so_many_exports_are_open_and_the_next_is_told_to_wait(
    large_log: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exports, "MAX_OPEN_EXPORTS", 2)
    other = make_key(large_log)["key"]
    with open_export(large_log), open_export(large_log, other):
        response = large_log.get("/events/export")
        assert response.status_code == 503
        assert response.json()["type"] == "urn:audit:problem:too-many-readers"
        assert large_log.get("/events?limit=1").status_code == 200
        assert large_log.get("/ready").status_code == 200
    eventually(lambda: large_log.get("/events/export?snapshot=0").status_code == 200, 10)


def test_one_key_does_not_take_the_exports_of_others(large_log: httpx.Client) -> None:
    other = make_key(large_log)["key"]
    with open_export(large_log, other), open_export(large_log, other):
        response = large_log.get("/events/export", headers={"X-API-Key": other})
        assert (response.status_code, response.json()["type"]) == (503, "urn:audit:problem:too-many-readers")
        assert "This key has 2 exports open" in response.json()["detail"]
        assert large_log.get("/events/export?snapshot=0").status_code == 200
    again = {"X-API-Key": other}
    eventually(lambda: large_log.get("/events/export?snapshot=0", headers=again).status_code == 200, 10)


def test_an_export_is_cut_when_its_key_is_revoked(large_log: httpx.Client) -> None:
    made = make_key(large_log)
    with open_export(large_log), open_export(large_log, made["key"]) as connection:
        large_log.delete(f"/keys/{made['id']}")
        eventually(lambda: "audit_exports_open 1.0" in large_log.get("/metrics").text, 20)
        received = b"".join(iter(lambda: connection.recv(1 << 20), b""))
    assert b'"complete"' not in received
    assert not received.endswith(b"0\r\n\r\n")


def test_an_outage_cuts_the_export_so_that_the_client_notices(own_cluster: Cluster) -> None:
    own_cluster.create_database("audit")
    migrations.upgrade(own_cluster.url("audit"))
    with running_app(settings_for(own_cluster.url("audit"))) as client:
        for _ in range(3):
            post_all(client, [{**LOGIN, "metadata": {"padding": "x" * 800}}] * 10_000)
        with client.stream("GET", "/events/export", headers={"Accept-Encoding": "identity"}) as response:
            chunks = response.iter_raw()
            next(chunks)
            own_cluster.stop("immediate")
            with pytest.raises(httpx.RemoteProtocolError):
                for _ in chunks:
                    pass


def test_an_export_takes_the_same_memory_whatever_its_size(database_url: URL, tmp_path: Path) -> None:
    with served(database_url, tmp_path / "log") as client:
        (process,) = [
            child
            for child in psutil.Process().children()
            if str(client.base_url.port) in child.environ().get("PORT", "")
        ]
        for _ in range(6):
            post_all(client, [{**LOGIN, "metadata": {"padding": "x" * 800}}] * 10_000)
        export_lines(client, snapshot=20_000)
        before = process.memory_info().rss
        with client.stream("GET", "/events/export", headers={"Accept-Encoding": "identity"}) as response:
            size = sum(map(len, response.iter_raw()))
        assert size > 60_000_000
        assert process.memory_info().rss - before < 20_000_000


def test_an_export_from_far_below_the_oldest_event_begins_with_that(client: httpx.Client) -> None:
    post_all(client, [LOGIN] * 3)
    assert len(export_lines(client, after=-(2**63) + 1)) == 4


def test_ids_that_lie_far_apart_are_no_longer_way(empty_database_url: URL) -> None:
    execute(empty_database_url, "CREATE TABLE audit_events (id bigint PRIMARY KEY, event_type text, actor text)")
    execute(empty_database_url, "ALTER TABLE audit_events ADD timestamp timestamp DEFAULT '2024-01-01'")
    ids = [n << 40 for n in range(-1_500, 1_500)]
    execute(empty_database_url, f"INSERT INTO audit_events SELECT id, 'x', 'a' FROM unnest(ARRAY{ids}) AS id")
    migrations.upgrade(empty_database_url)
    with running_app(settings_for(empty_database_url)) as client:
        post_all(client, [LOGIN])
        assert exported_ids(client) == [*ids, ids[-1] + 1]
        assert exported_ids(client, actor="alice") == [ids[-1] + 1]
        with client.stream("GET", "/events/stream", headers={"Last-Event-ID": "0"}) as response:
            received = takewhile(lambda line: line != f"id: {ids[-1] + 1}", response.iter_lines())
            assert sum(line.startswith("id: ") for line in received) == 1_499
    assert_ledger_consistent(empty_database_url)
