"""The examples of the OpenAPI document: what the service takes, what it answers, and a log whose proofs hold."""

import json
from base64 import b64decode
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from ledger.notes import parse_note, parse_tree_head
from ledger.tree import hash_leaf, proves_consistency, root_from_inclusion
from main import app
from queries.cursors import encode_cursor
from routes import examples
from schemas import EVENT_EXAMPLE, EventListing

CALLS = [
    (method.upper(), path, call) for path, methods in app.openapi()["paths"].items() for method, call in methods.items()
]


NEW_KEY = {"name": "shop", "scopes": ["write"], "tenant": "acme", "event_types": ["order.", "LOGIN"]}


def answers_of(call: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (media_type, content)
        for status, answer in call["responses"].items()
        if status.startswith("2")
        for media_type, content in answer["content"].items()
    ]


def shape_of(value: Any) -> Any:
    """Names and nesting; of a list that of its first member; metadata is whatever its sender made it."""
    if isinstance(value, dict):
        return {name: shape_of(member) for name, member in value.items() if name != "metadata"}
    return [shape_of(value[0])] if isinstance(value, list) and value else None


def test_every_call_has_an_example_of_its_answer() -> None:
    missing = [
        (method, path, media_type)
        for method, path, call in CALLS
        for media_type, content in answers_of(call)
        if "example" not in content and media_type != "application/octet-stream"
    ]
    assert missing == []


def test_what_the_examples_send_is_taken(client: httpx.Client) -> None:
    sent = []
    for method, path, call in CALLS:
        for media_type, content in call.get("requestBody", {}).get("content", {}).items():
            schema = content["schema"]
            if "$ref" in schema:
                schema = app.openapi()["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
            for example in schema.get("examples", []):
                answer = client.request(method, path, content=json.dumps(example), headers={"Content-Type": media_type})
                assert answer.is_success, answer.text
                sent.append(path)
    assert set(sent) == {"/events", "/keys", "/legal-holds", "/redactions"}


@pytest.mark.parametrize(
    ("path", "example"),
    [
        ("/events", examples.EVENTS),
        ("/events/1", examples.EVENT),
        ("/events/count", examples.COUNT),
        ("/events/histogram?interval=day", examples.HISTOGRAM),
        ("/events/top?field=actor", examples.TOP),
        ("/events/2/proof", examples.PROOF),
        ("/ledger/consistency?from=1&to=2", examples.CONSISTENCY),
        ("/ready", examples.READY),
        ("/keys", examples.KEYS),
        ("/legal-holds", examples.HOLDS),
        ("/legal-holds/{hold}", examples.HOLD),
    ],
)
def test_the_examples_are_like_what_is_answered(client: httpx.Client, path: str, example: Any) -> None:
    assert client.post("/keys", json=NEW_KEY).status_code == 201
    hold = client.post("/legal-holds", json={"actor": "alice", "reason": "Case"}).json()["id"]
    events = [{**EVENT_EXAMPLE, "event_type": "LOGIN"}, EVENT_EXAMPLE]
    assert client.post("/events/batch", json=events).status_code == 201
    answer = client.get(path.format(hold=hold))
    assert shape_of(example) == shape_of(answer.json())


def test_the_examples_of_changes_are_like_what_is_answered(client: httpx.Client) -> None:
    made = client.post("/keys", json=NEW_KEY).json()
    hold = client.post("/legal-holds", json={"actor": "alice", "reason": "Case"}).json()
    revoked = client.delete(f"/keys/{made['id']}").json()
    released = client.delete(f"/legal-holds/{hold['id']}").json()
    redaction = client.post("/redactions", json={"actor": "alice", "reason": "Request"}).json()
    receipt = client.post("/events/batch", json=[EVENT_EXAMPLE]).json()
    assert shape_of([made]) == shape_of([examples.NEW_KEY])
    assert shape_of(revoked) == shape_of(examples.REVOKED_KEY)
    assert shape_of(released) == shape_of(examples.RELEASED_HOLD)
    assert shape_of(redaction) == shape_of(examples.REDACTION)
    assert shape_of(receipt) == shape_of(examples.RECEIPT)


@pytest.mark.parametrize(("written", "example"), [("ndjson", examples.EXPORT_NDJSON), ("csv", examples.EXPORT_CSV)])
def test_the_examples_of_exports_are_like_what_is_answered(client: httpx.Client, written: str, example: str) -> None:
    assert client.post("/events", json=EVENT_EXAMPLE).status_code == 201
    lines, told = client.get("/events/export", params={"format": written}).text.splitlines(), example.splitlines()
    assert len(lines) == len(told)
    if written == "csv":
        assert lines[0] == told[0]
    else:
        assert [list(json.loads(line)) for line in lines] == [list(json.loads(line)) for line in told]


def test_the_proofs_of_the_examples_hold() -> None:
    head = parse_tree_head(parse_note(examples.CHECKPOINT).text)
    proof, consistency = examples.PROOF, examples.CONSISTENCY
    leaf, path = hash_leaf(proof["entry"].encode()), [b64decode(node) for node in proof["inclusion_path"]]
    assert root_from_inclusion(leaf, proof["leaf_index"], head.size, path) == head.root
    path = [b64decode(node) for node in consistency["consistency_path"]]
    first = b64decode(proof["inclusion_path"][0])  # of a tree of one leaf that is the root
    assert proves_consistency(consistency["from"], first, consistency["to"], head.root, path)


def test_the_cursor_of_the_examples_is_one() -> None:
    event = examples.EVENT
    position = datetime.fromisoformat(event["timestamp"]).astimezone(UTC), event["id"]
    assert examples.EVENTS["next_cursor"] == encode_cursor(EventListing(), position)
