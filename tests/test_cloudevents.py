"""CloudEvents 1.0 in its three HTTP modes."""

import json
from typing import Any

import httpx
import pytest

EVENT = {
    "specversion": "1.0",
    "id": "a-1",
    "source": "/shop/orders",
    "type": "order.create",
    "time": "2026-01-02T03:04:05Z",
    "subject": "order/1234",
    "actor": "älice",
    "tenant": "acme",
    "outcome": "success",
    "sourceip": "203.0.113.7",
    "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    "datacontenttype": "application/json",
    "data": {"amount": 99.5},
}
STORED = {
    "event_type": "order.create",
    "actor": "älice",
    "timestamp": "2026-01-02T03:04:05.000000Z",
    "tenant": "acme",
    "resource": "order/1234",
    "outcome": "success",
    "source": "/shop/orders",
    "source_ip": "203.0.113.7",
    "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736",
    "metadata": {"amount": 99.5},
}


def post(client: httpx.Client, body: Any, media_type: str = "application/cloudevents+json") -> httpx.Response:
    headers = {"Content-Type": f"{media_type}; charset=utf-8"}
    return client.post("/events", content=httpx.Request("POST", "http://x", json=body).content, headers=headers)


def assert_stored(event: dict[str, Any]) -> None:
    assert {name: value for name, value in event.items() if name not in ("id", "recorded_at")} == {
        **STORED,
        "redacted_at": None,
    }


def test_structured(client: httpx.Client) -> None:
    response = post(client, EVENT)
    assert response.status_code == 201, response.text
    assert_stored(response.json())


def test_binary(client: httpx.Client) -> None:
    headers = {f"ce-{name}": str(value) for name, value in EVENT.items() if name not in ("data", "datacontenttype")}
    headers["ce-actor"] = "%C3%A4lice"  # percent-encoded UTF-8, HTTP binding section 3.1.3.2
    response = client.post("/events", json=EVENT["data"], headers=headers)
    assert response.status_code == 201, response.text
    assert_stored(response.json())


def test_batch(client: httpx.Client) -> None:
    response = post(client, [EVENT, {**EVENT, "id": "a-2"}], "application/cloudevents-batch+json")
    assert response.status_code == 201, response.text
    assert response.json()["ids"] == [1, 2]
    assert_stored(client.get("/events/2").json())


def test_source_and_id_together_are_the_idempotency_key_in_every_mode(client: httpx.Client) -> None:
    assert post(client, EVENT).status_code == 201
    assert post(client, EVENT).status_code == 200
    assert post(client, [EVENT, {**EVENT, "id": "2"}], "application/cloudevents-batch+json").json()["ids"] == [1, 2]
    assert post(client, {**EVENT, "source": "/other"}).status_code == 201
    assert post(client, {**EVENT, "type": "another"}).status_code == 409


def test_a_key_in_the_header_is_refused_for_an_event_that_has_one(client: httpx.Client) -> None:
    structured, batch = "application/cloudevents+json", "application/cloudevents-batch+json"
    binary = {f"ce-{name}": str(EVENT[name]) for name in ("specversion", "id", "source", "type")} | {"ce-actor": "a"}
    for path, body, headers in (
        ("/events", EVENT, {"Content-Type": structured}),
        ("/events", {}, binary),
        ("/events", [EVENT], {"Content-Type": batch}),
        ("/events/batch", [EVENT], {"Content-Type": batch}),
    ):
        response = client.post(path, json=body, headers={**headers, "Idempotency-Key": "k"})
        assert response.status_code == 422
        assert response.json()["errors"] == [
            {
                "location": "headers.Idempotency-Key",
                "message": "goes with a plain event: the key of a CloudEvent is its source and id",
            }
        ]
        assert client.post(path, json=body, headers=headers).status_code in (200, 201)


@pytest.mark.parametrize(
    ("header", "subject"),
    [
        (b"order/1234", "order/1234"),
        (b"%C3%A4%20%22b%22", 'ä "b"'),
        ("ä".encode(), "ä"),
        (b'"two words"', "two words"),
        (b'"a \\"b\\" \\\\ %41"', 'a "b" \\ A'),
        (b"%2541", "%41"),
        (b'%22a%22 "', '"a" "'),
        (b'an "inner" one', 'an "inner" one'),
    ],
)
def test_a_header_is_unquoted_and_then_percent_decoded_once(client: httpx.Client, header: bytes, subject: str) -> None:
    """HTTP binding section 3.1.3.2."""
    attributes = {b"ce-specversion": b"1.0", b"ce-id": b"1", b"ce-source": b"shop", b"ce-type": b"T", b"ce-actor": b"a"}
    response = client.post("/events", headers={**attributes, b"ce-subject": header})
    assert response.status_code == 201, response.text
    assert response.json()["resource"] == subject


@pytest.mark.parametrize(
    ("change", "location"),
    [
        ({"specversion": "0.3"}, "body.specversion"),
        ({"id": ""}, "body.id"),
        ({"source": None}, "body.source"),
        ({"type": ""}, "body.type"),
        ({"actor": None}, "body.actor"),
        ({"time": "yesterday"}, "body.time"),
        ({"data": "text"}, "body.data"),
        ({"data_base64": "AAAA"}, "body.data_base64"),
        ({"partitionkey": "x"}, "body.partitionkey"),
    ],
)
def test_a_wrong_attribute_is_named_as_the_client_knows_it(
    client: httpx.Client, change: dict[str, Any], location: str
) -> None:
    response = post(client, {**EVENT, **change})
    assert response.status_code == 422
    assert [error["location"] for error in response.json()["errors"]] == [location]
    assert client.get("/events").json()["events"] == []


def test_an_event_without_an_actor_is_refused(client: httpx.Client) -> None:
    response = post(client, {name: value for name, value in EVENT.items() if name != "actor"})
    assert [error["location"] for error in response.json()["errors"]] == ["body.actor"]


def test_traceparent_of_a_plain_event_becomes_its_trace_id(client: httpx.Client) -> None:
    headers = {"traceparent": str(EVENT["traceparent"])}
    event = {"event_type": "LOGIN", "actor": "alice"}
    assert client.post("/events", json=event, headers=headers).json()["trace_id"] == STORED["trace_id"]
    assert client.post("/events", json=event, headers={"traceparent": "junk"}).json()["trace_id"] is None
    assert client.get("/events/1").json()["trace_id"] == STORED["trace_id"]


def test_traceparent_of_a_batch_is_of_each_event_that_says_none(client: httpx.Client) -> None:
    event = {"event_type": "LOGIN", "actor": "alice"}
    lines = [json.dumps(event), json.dumps({**event, "trace_id": "a" * 32})]
    untraced = {name: value for name, value in EVENT.items() if name != "traceparent"}
    for content, media_type in (
        (f"[{','.join(lines)}]", "application/json"),
        ("\n".join(lines), "application/x-ndjson"),
        (json.dumps([untraced, {**EVENT, "id": "b"}]), "application/cloudevents-batch+json"),
    ):
        headers = {"traceparent": f"00-{'b' * 32}-00f067aa0ba902b7-01", "Content-Type": media_type}
        assert client.post("/events/batch", content=content, headers=headers).status_code == 201
    traces = [event["trace_id"] for event in client.get("/events?order=asc").json()["events"]]
    assert sorted(traces) == sorted([*["b" * 32, "a" * 32] * 2, "b" * 32, str(STORED["trace_id"])])


def test_a_retry_in_another_trace_is_the_same_event(client: httpx.Client) -> None:
    def traced(trace: str) -> dict[str, str]:
        return {"traceparent": f"00-{trace * 32}-00f067aa0ba902b7-01"}

    event = {"event_type": "LOGIN", "actor": "alice", "idempotency_key": "k"}
    first = client.post("/events", json=event, headers=traced("a"))
    again = client.post("/events", json=event, headers=traced("b"))
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json() == first.json()
    assert client.post("/events/batch", json=[event], headers=traced("c")).json()["replayed"] == 1
    assert client.post("/events", json=event).status_code == 200
    assert client.post("/events", json={**event, "trace_id": "b" * 32}).status_code == 409


@pytest.mark.parametrize(
    "body",
    [
        json.dumps({**EVENT, "data": {"text": "\ud800"}}).encode(),
        json.dumps(EVENT).encode("utf-16"),
        b"[" * 100_000,
        b'{"id": ' + b"1" * 5_000 + b"}",
    ],
    ids=["half a surrogate pair", "UTF-16", "deep", "a long number"],
)
@pytest.mark.parametrize("media_type", ["application/cloudevents+json", "application/cloudevents-batch+json"])
def test_json_that_a_plain_event_may_not_be_is_refused_too(client: httpx.Client, media_type: str, body: bytes) -> None:
    body = b"[" + body + b"]" if "batch" in media_type else body
    response = client.post("/events", content=body, headers={"Content-Type": media_type})
    assert (response.status_code, response.json()["type"]) == (400, "urn:audit:problem:malformed-body")


@pytest.mark.parametrize("name", ["datacontenttype", "dataschema", "traceparent"])
def test_what_is_not_kept_must_be_what_it_says_all_the_same(client: httpx.Client, name: str) -> None:
    event = {"specversion": "1.0", "id": "1", "source": "shop", "type": "order.create", "actor": "alice"}
    headers = {"Content-Type": "application/cloudevents+json"}
    refused = client.post("/events", json={**event, name: 7}, headers=headers)
    assert (refused.status_code, refused.json()["errors"][0]["location"]) == (422, f"body.{name}")
    assert client.post("/events", json={**event, name: None}, headers=headers).status_code == 201
