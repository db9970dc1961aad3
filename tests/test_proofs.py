"""/ledger and /events/{id}/proof over HTTP: byte for byte what c2sp.org/tlog-tiles asks for, and proofs that hold."""

import base64
import gzip
import json
from typing import Any

import httpx
import pytest
from conftest import SIGNER, execute, running_app, settings_for
from months import append_events
from sqlalchemy.engine import URL
from verify import tree_hash

from db import Database
from ledger import tree
from ledger.notes import TreeHead, open_checkpoint

LOGIN = {"event_type": "LOGIN", "actor": "alice"}
SIZE = 70_000 // 100 + 33  # more than two full tiles, and a partial one


def post_batch(client: httpx.Client, count: int, **members: Any) -> int:
    answer = client.post("/events/batch", json=[{**LOGIN, "resource": f"r/{n}", **members} for n in range(count)])
    assert answer.status_code == 201
    return int(answer.json()["last_id"])


def checkpoint_of(client: httpx.Client, at_least: int = 0) -> TreeHead:
    """The newest checkpoint, once it has so many leaves; its signature holds."""
    if at_least:
        assert client.get(f"/events/{at_least}/proof").status_code == 200  # waits for it
    answer = client.get("/ledger/checkpoint")
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    return open_checkpoint(answer.text, SIGNER.verifier)[0]


def path_of(number: int, width: int | None = None) -> str:
    """c2sp.org/tlog-tiles, Merkle Tree: 1234067 is x001/x234/067."""
    digits = f"{number:03d}"
    digits = digits.zfill(-(-len(digits) // 3) * 3)
    groups = [digits[start : start + 3] for start in range(0, len(digits), 3)]
    return "/".join([f"x{group}" for group in groups[:-1]] + groups[-1:]) + (f".p/{width}" if width else "")


def entries_in(bundle: bytes) -> list[bytes]:
    entries = []
    while bundle:
        size = int.from_bytes(bundle[:2])
        entries.append(bundle[2 : 2 + size])
        bundle = bundle[2 + size :]
    return entries


def bundles_of(client: httpx.Client, size: int) -> list[bytes]:
    """Every entry, out of all bundles."""
    entries: list[bytes] = []
    for number in range(-(-size // 256)):
        width = size % 256 if (number + 1) * 256 > size else None
        answer = client.get(f"/ledger/tile/entries/{path_of(number, width)}")
        assert answer.status_code == 200
        entries += entries_in(answer.content)
    return entries


def test_the_tree_is_that_of_the_entries_that_are_served(client: httpx.Client) -> None:
    size = post_batch(client, SIZE)
    head = checkpoint_of(client, size)
    assert head.size == size
    leaves = [tree.hash_leaf(entry) for entry in bundles_of(client, size)]
    assert tree_hash(leaves) == head.root

    assert client.get(f"/ledger/tile/0/{path_of(0)}").content == b"".join(leaves[:256])
    assert client.get(f"/ledger/tile/0/{path_of(2, size % 256)}").content == b"".join(leaves[512:])
    above = b"".join(tree_hash(leaves[start : start + 256]) for start in (0, 256))
    assert client.get(f"/ledger/tile/1/{path_of(0, 2)}").content == above
    # What was partial once is served when it is full, too.
    assert client.get(f"/ledger/tile/0/{path_of(0, 7)}").content == b"".join(leaves[:7])


def test_entries_hold_what_was_sent_and_nothing_personal(client: httpx.Client) -> None:
    event = client.post("/events", json={**LOGIN, "tenant": "acme", "metadata": {"secret": "s3cret"}}).json()
    (entry,) = bundles_of(client, 1)
    members = json.loads(entry)
    assert members.pop("personal_hash")
    assert members == {name: event[name] for name in ("id", "event_type", "timestamp", "recorded_at", "tenant")}
    assert b"alice" not in entry and b"s3cret" not in entry


@pytest.mark.parametrize(
    "path",
    [
        "0/000",  # the tile under way is no full one
        "0/001.p/1",
        "0/000.p/4",  # of three leaves
        "0/000.p/0",
        "0/000.p/256",
        "0/000.p/03",
        "1/000.p/1",
        "64/000.p/1",
        "00/000.p/1",
        "-1/000.p/1",
        "0/0.p/1",
        "0/x000/000.p/1",
        "0/000.p/1/",
        "0/999",
        "63/x999/x999/x999/x999/999",
        "63/x999/x999/x999/x999/x999/999",
        "entries/000",
        "entries/000.p/4",
        "entries/001.p/1",
        "entries/x000/000.p/1",
        "data/000.p/1",
    ],
)
def test_a_tile_that_the_tree_does_not_have_is_not_found(client: httpx.Client, path: str) -> None:
    post_batch(client, 3)
    answer = client.get(f"/ledger/tile/{path}")
    assert (answer.status_code, answer.json()["type"]) == (404, "urn:audit:problem:tile-not-found")
    assert answer.headers["cache-control"] == "no-store"  # tomorrow there is one


def test_tiles_may_be_kept_for_ever_and_checkpoints_may_not(client: httpx.Client) -> None:
    post_batch(client, 256)
    for path in ("0/000", "entries/000"):
        answer = client.get(f"/ledger/tile/{path}")
        assert answer.headers.get_list("cache-control") == ["private, max-age=31536000, immutable"]
        assert answer.headers["content-type"] == "application/octet-stream"
        again = client.get(f"/ledger/tile/{path}", headers={"If-None-Match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    assert client.get("/ledger/checkpoint").headers.get_list("cache-control") == ["no-store"]


@pytest.mark.parametrize(
    ("known", "status"),
    [
        ("*", 304),
        ("{}", 304),
        ("W/{}", 304),
        ('"a,b", W/"c" ,{}', 304),
        ('"*"', 200),
        ('"{}"', 200),
        ("", 200),
        ('"x{}', 200),
    ],
)
def test_a_client_says_what_it_has_as_rfc_9110_has_it(client: httpx.Client, known: str, status: int) -> None:
    post_batch(client, 256)
    entity_tag = client.get("/ledger/tile/0/000").headers["etag"]
    again = client.get("/ledger/tile/0/000", headers={"If-None-Match": known.format(entity_tag)})
    assert again.status_code == status
    lines = [("If-None-Match", '"a"'), ("If-None-Match", entity_tag)]
    assert client.get("/ledger/tile/0/000", headers=lines).status_code == 304


def test_bundles_are_compressed_for_those_who_ask(client: httpx.Client) -> None:
    post_batch(client, 256)
    plain = client.get("/ledger/tile/entries/000", headers={"Accept-Encoding": "identity"})
    with client.stream("GET", "/ledger/tile/entries/000", headers={"Accept-Encoding": "gzip"}) as answer:
        raw = b"".join(answer.iter_raw())
    assert "content-encoding" not in plain.headers and answer.headers["content-encoding"] == "gzip"
    assert gzip.decompress(raw) == plain.content
    assert len(raw) < len(plain.content) / 2
    assert plain.headers["etag"] != answer.headers["etag"]


@pytest.mark.parametrize("event_id", [1, 256, 257, 600, SIZE])
def test_an_event_is_proved_to_be_in_the_tree(client: httpx.Client, event_id: int) -> None:
    post_batch(client, SIZE)
    proof = client.get(f"/events/{event_id}/proof").json()
    head, _ = open_checkpoint(proof["checkpoint"], SIGNER.verifier)
    assert (proof["event_id"], proof["leaf_index"], proof["tree_size"]) == (event_id, event_id - 1, head.size)
    assert json.loads(proof["entry"])["id"] == event_id
    leaf = tree.hash_leaf(proof["entry"].encode())
    path = [base64.b64decode(node) for node in proof["inclusion_path"]]
    assert tree.root_from_inclusion(leaf, event_id - 1, head.size, path) == head.root


def test_a_new_event_can_be_proved_at_once_and_costs_no_checkpoint_a_request(client: httpx.Client) -> None:
    for _ in range(3):
        event = client.post("/events", json=LOGIN).json()
        proof = client.get(f"/events/{event['id']}/proof").json()
        assert proof["tree_size"] >= event["id"]


def test_there_is_no_proof_of_an_event_that_there_is_not(client: httpx.Client) -> None:
    for event_id in (0, 1, -5, 2**62):
        answer = client.get(f"/events/{event_id}/proof")
        assert (answer.status_code, answer.json()["type"]) == (404, "urn:audit:problem:event-not-found")


def test_the_tree_of_one_size_begins_with_that_of_another(client: httpx.Client) -> None:
    heads = [checkpoint_of(client, post_batch(client, count)) for count in (1, 254, 3, 450)]
    for old in heads:
        for new in (head for head in heads if head.size >= old.size):
            answer = client.get("/ledger/consistency", params={"from": old.size, "to": new.size}).json()
            path = [base64.b64decode(node) for node in answer["consistency_path"]]
            assert (answer["from"], answer["to"]) == (old.size, new.size)
            assert tree.proves_consistency(old.size, old.root, new.size, new.root, path)


@pytest.mark.parametrize(
    ("query", "location"),
    [
        ("from=2&to=1", "query.from"),
        ("from=1&to=9", "query.to"),
        ("from=0&to=4", "query.to"),
        ("from=4&to=4", "query.to"),
        ("from=9223372036854775806&to=9223372036854775807", "query.to"),
        ("from=-1&to=1", "query.from"),
        ("from=1", "query.to"),
        ("from=1&to=1&size=1", "query.size"),
    ],
)
def test_sizes_that_make_no_proof_are_refused_by_name(client: httpx.Client, query: str, location: str) -> None:
    post_batch(client, 3)
    answer = client.get(f"/ledger/consistency?{query}")
    assert (answer.status_code, answer.json()["errors"][0]["location"]) == (422, location)


def test_rows_from_before_the_ledger_have_no_proof(server: Any, database: Database, database_url: URL) -> None:
    execute(
        database_url,
        "INSERT INTO audit_events (id, event_type, actor, timestamp, recorded_at)"
        " SELECT id, 'OLD', 'alice', now(), recorded_at - interval '1 h' FROM ledger_head, generate_series(1, 3) AS id",
    )
    execute(database_url, "UPDATE ledger_head SET first_id = 4")
    append_events(database, LOGIN)
    with running_app(settings_for(database_url)) as client:
        assert client.get("/events/3/proof").status_code == 404
        assert client.get("/events/4/proof").json()["leaf_index"] == 0
        assert json.loads(bundles_of(client, 1)[0])["id"] == 4


def test_what_an_adopted_log_does_not_have_is_told_of_whatever_its_number(database_url: URL) -> None:
    execute(database_url, "UPDATE ledger_head SET first_id = 60000")
    with running_app(settings_for(database_url)) as client:
        for path in ("0/x999/x999/x999/x999/999", "1/x999/x999/x999/x999/999.p/1", "entries/x999/x999/x999/x999/999"):
            assert client.get(f"/ledger/tile/{path}").json()["type"] == "urn:audit:problem:tile-not-found"
        for sizes in ((2**63 - 3588, 2**63 - 3333), (2**63 - 2, 2**63 - 1)):
            answer = client.get("/ledger/consistency", params=dict(zip(("from", "to"), sizes, strict=True)))
            assert (answer.status_code, answer.json()["errors"][0]["location"]) == (422, "query.to")
