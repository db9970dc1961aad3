"""/events: what is accepted, what is refused, and what comes back."""

import base64
import json
import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fields import MAX_METADATA_BYTES
from routes.bodies import MAX_BODY_BYTES

LOGIN = {"event_type": "LOGIN", "actor": "alice"}
FULL = {
    "event_type": "order.create",
    "actor": "ålice 🦊",
    "timestamp": "2026-01-02T03:04:05.678901+02:00",
    "tenant": "acme",
    "resource": "order/1234",
    "outcome": "success",
    "source": "shop",
    "source_ip": "2001:db8::1",
    "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736",
    "metadata": {"amount": 99.5, "nested": {"list": [1, None, True, "x"]}},
}


def post(client: httpx.Client, body: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return client.post("/events", content=content, headers={"Content-Type": "application/json"})


def stored(client: httpx.Client) -> int:
    return len(client.get("/events", params={"limit": 1000}).json()["events"])


def locations(response: httpx.Response) -> list[str]:
    return [error["location"] for error in response.json()["errors"]]


def test_an_event_goes_in_and_comes_out(client: httpx.Client) -> None:
    before = datetime.now(UTC)
    response = post(client, LOGIN)
    assert response.status_code == 201
    event = response.json()
    assert (event["id"], event["event_type"], event["actor"]) == (1, "LOGIN", "alice")
    assert before - timedelta(seconds=1) < datetime.fromisoformat(event["timestamp"]) < datetime.now(UTC)
    assert response.headers["Location"] == "/events/1"
    assert client.get(response.headers["Location"]).json() == event
    assert client.get("/events").json() == {"events": [event], "next_cursor": None}


def test_every_field_comes_back_as_sent(client: httpx.Client) -> None:
    event = post(client, FULL).json()
    assert event.pop("id") == 1
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", event.pop("recorded_at"))
    assert event == {**FULL, "timestamp": "2026-01-02T01:04:05.678901Z", "redacted_at": None}


def test_ids_are_dense_and_a_refused_event_takes_none(client: httpx.Client) -> None:
    assert [post(client, LOGIN).json()["id"], post(client, {}).status_code, post(client, LOGIN).json()["id"]] == [
        1,
        422,
        2,
    ]


def test_recorded_at_rises_with_the_id(client: httpx.Client) -> None:
    moments = [post(client, LOGIN).json()["recorded_at"] for _ in range(5)]
    assert moments == sorted(moments)


@pytest.mark.parametrize(
    ("body", "location"),
    [
        ({"actor": "alice"}, "body.event_type"),
        ({"event_type": "LOGIN"}, "body.actor"),
        ({**LOGIN, "actor": ""}, "body.actor"),
        ({**LOGIN, "actor": "a" * 256}, "body.actor"),
        ({**LOGIN, "actor": 7}, "body.actor"),
        ({**LOGIN, "actor": None}, "body.actor"),
        ({**LOGIN, "actor": ["alice"]}, "body.actor"),
        ({**LOGIN, "event_type": "LOG\0IN"}, "body.event_type"),
        ({**LOGIN, "event_type": "x" * 256}, "body.event_type"),
        ({**LOGIN, "evnt_type": "LOGIN"}, "body.evnt_type"),
        ({**LOGIN, "id": 5}, "body.id"),
        ({**LOGIN, "timestamp": "2026-01-02T03:04:05"}, "body.timestamp"),
        ({**LOGIN, "timestamp": "2026-01-02"}, "body.timestamp"),
        ({**LOGIN, "timestamp": "2026-13-02T03:04:05Z"}, "body.timestamp"),
        ({**LOGIN, "timestamp": "1700000000"}, "body.timestamp"),
        ({**LOGIN, "timestamp": 1700000000}, "body.timestamp"),
        ({**LOGIN, "timestamp": "0001-01-01T00:00:00+05:00"}, "body.timestamp"),
        ({**LOGIN, "timestamp": "9999-12-31T23:59:59-05:00"}, "body.timestamp"),
        ({**LOGIN, "tenant": ""}, "body.tenant"),
        ({**LOGIN, "resource": "r" * 1025}, "body.resource"),
        ({**LOGIN, "outcome": "maybe"}, "body.outcome"),
        ({**LOGIN, "source_ip": "10.0.0.0/8"}, "body.source_ip"),
        ({**LOGIN, "source_ip": "fe80::1%eth0"}, "body.source_ip"),
        ({**LOGIN, "trace_id": "4BF92F3577B34DA6A3CE929D0E0E4736"}, "body.trace_id"),
        ({**LOGIN, "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736\n"}, "body.trace_id"),
        ({**LOGIN, "metadata": [1]}, "body.metadata"),
        ({**LOGIN, "metadata": {"a\0b": 1}}, "body.metadata"),
        ({**LOGIN, "metadata": {"a": ["\0"]}}, "body.metadata"),
        ({**LOGIN, "metadata": {"a": 2**53}}, "body.metadata"),
        ({**LOGIN, "metadata": {"a": float("nan")}}, "body.metadata"),
        ({**LOGIN, "metadata": {"a": float("inf")}}, "body.metadata"),
        ({**LOGIN, "metadata": {"a": "x" * 65_536}}, "body"),
        ({**LOGIN, "metadata": {"a": "🦊" * 16_384}}, "body"),
        ([LOGIN], "body"),
        ("LOGIN", "body"),
        (None, "body"),
    ],
)
def test_a_wrong_field_is_named_and_nothing_is_stored(client: httpx.Client, body: Any, location: str) -> None:
    response = post(client, body)
    assert response.status_code == 422
    assert response.headers["Content-Type"] == "application/problem+json"
    assert locations(response) == [location]
    assert stored(client) == 0


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"event_type": "LOGIN", "actor": "alice"',
        b'{"event_type": "LOGIN", "actor": "\\ud800"}',
        b'{"event_type": "LOGIN", "actor": "\\udc00x"}',
        b'{"event_type": "LOGIN", "actor": "\xff"}',
        b'{"event_type": "LOGIN", "actor": "\xed\xa0\x80"}',
        b'{"event_type": "LOGIN", "actor": "alice"} x',
        b"event_type=LOGIN&actor=alice",
        b'{"event_type": "LOGIN", "actor": "alice", "metadata": ' + b'{"a":' * 5000 + b"1" + b"}" * 5001,
    ],
)
def test_a_malformed_body_is_a_400_and_nothing_is_stored(client: httpx.Client, body: bytes) -> None:
    response = post(client, body)
    assert response.status_code == 400
    assert response.json()["type"] == "urn:audit:problem:malformed-body"
    assert stored(client) == 0


def test_a_body_over_one_mebibyte_is_a_413(client: httpx.Client) -> None:
    padding = b" " * (MAX_BODY_BYTES - len(json.dumps(LOGIN)))
    assert post(client, json.dumps(LOGIN).encode() + padding).status_code == 201
    assert post(client, json.dumps(LOGIN).encode() + padding + b" ").status_code == 413
    assert stored(client) == 1


def test_another_content_type_is_a_415(client: httpx.Client) -> None:
    response = client.post("/events", data=LOGIN)
    assert response.status_code == 415
    assert "application/json" in response.json()["detail"]
    assert stored(client) == 0


def test_deep_metadata_is_refused_and_shallow_kept(client: httpx.Client) -> None:
    def nested(depth: int) -> Any:
        return {"a": nested(depth - 1)} if depth else "end"

    assert post(client, {**LOGIN, "metadata": nested(31)}).status_code == 201
    assert locations(post(client, {**LOGIN, "metadata": nested(32)})) == ["body.metadata"]


@pytest.mark.parametrize("number", [1e308, -1e308, 5e-324, 1.2345e-300, 1e16, 9.9e-5])
def test_metadata_is_as_large_as_it_is_read_back(client: httpx.Client, number: float) -> None:
    def with_numbers(count: int) -> dict[str, Any]:
        return {**LOGIN, "metadata": {"n": [number] * count}}

    length = len(format(Decimal(repr(number)), "f"))
    most = (MAX_METADATA_BYTES - len('{"n": []}') + 2) // (length + 2)
    posted = post(client, with_numbers(most))
    assert posted.status_code == 201
    text = client.get(f"/events/{posted.json()['id']}").text
    printed = text[text.index('{"n"') : text.index("]}") + 2]
    assert MAX_METADATA_BYTES - length - 2 < len(printed) <= MAX_METADATA_BYTES
    assert locations(post(client, with_numbers(most + 1))) == ["body.metadata"]


def test_metadata_has_at_most_a_thousand_keys_over_all_its_objects(client: httpx.Client) -> None:
    many = {f"key-{number}": number for number in range(996)}
    within = {"a": [many, {"x": 1}], "b": {"c": {}}}
    assert post(client, {**LOGIN, "metadata": within}).status_code == 201
    answer = post(client, {**LOGIN, "metadata": {**within, "d": None}})
    assert answer.json()["errors"] == [{"location": "body.metadata", "message": "must not have more than 1000 keys"}]
    answer = client.get("/events", params={"metadata": json.dumps({**within, "d": None})})
    assert answer.json()["errors"][0]["location"] == "query.metadata"


_texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=255)
_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.floats(-1e15, 1e15) | _texts,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(_texts, children, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(event_type=_texts, actor=_texts, metadata=st.dictionaries(_texts, _json, max_size=3))
def test_any_valid_text_and_metadata_survive_the_round_trip(
    client: httpx.Client, event_type: str, actor: str, metadata: dict[str, Any]
) -> None:
    response = post(client, {"event_type": event_type, "actor": actor, "metadata": metadata})
    assert response.status_code == 201, response.text
    event = client.get(response.headers["Location"]).json()
    assert (event["event_type"], event["actor"], event["metadata"]) == (event_type, actor, metadata)


def fill(client: httpx.Client) -> None:
    """Six events: actors a and b in turn, one a day from 1 January, two types."""
    for day in range(6):
        event_type = "LOGIN" if day < 3 else "LOGOUT"
        body = {"event_type": event_type, "actor": "ab"[day % 2], "timestamp": f"2026-01-0{day + 1}T00:00:00Z"}
        assert post(client, body).status_code == 201


@pytest.mark.parametrize(
    ("filters", "ids"),
    [
        ({}, [6, 5, 4, 3, 2, 1]),
        ({"actor": "a"}, [5, 3, 1]),
        ({"event_type": "LOGOUT"}, [6, 5, 4]),
        ({"actor": "b", "event_type": "LOGIN"}, [2]),
        ({"start": "2026-01-03T00:00:00Z"}, [6, 5, 4, 3]),
        ({"end": "2026-01-03T00:00:00Z"}, [2, 1]),
        ({"start": "2026-01-02T01:00:00+01:00", "end": "2026-01-04T00:00:00Z"}, [3, 2]),
        ({"limit": 2}, [6, 5]),
        ({"actor": "nobody"}, []),
        ({"actor": "%"}, []),
    ],
)
def test_filters_select(client: httpx.Client, filters: dict[str, str], ids: list[int]) -> None:
    fill(client)
    assert [event["id"] for event in client.get("/events", params=filters).json()["events"]] == ids


def test_events_of_one_moment_come_newest_id_first(client: httpx.Client) -> None:
    for _ in range(3):
        post(client, {**LOGIN, "timestamp": "2026-01-01T00:00:00Z"})
    assert [event["id"] for event in client.get("/events").json()["events"]] == [3, 2, 1]


@pytest.mark.parametrize(
    ("query", "location"),
    [
        ("actr=a", "query.actr"),
        ("actor=", "query.actor.0"),
        ("actor=%00", "query.actor.0"),
        ("actor=" + "a" * 256, "query.actor.0"),
        ("start=2026-01-01", "query.start"),
        ("start=2026-01-01T00:00:00", "query.start"),
        ("end=yesterday", "query.end"),
        ("start=2026-01-02T00:00:00Z&end=2026-01-01T00:00:00Z", "query"),
        ("limit=0", "query.limit"),
        ("limit=1001", "query.limit"),
        ("limit=ten", "query.limit"),
    ],
)
def test_a_wrong_parameter_is_named(client: httpx.Client, query: str, location: str) -> None:
    response = client.get(f"/events?{query}")
    assert response.status_code == 422
    assert locations(response) == [location]


def test_pages_follow_one_another_while_events_arrive(client: httpx.Client) -> None:
    fill(client)
    page = client.get("/events", params={"limit": 2, "end": "2026-02-01T00:00:00Z"})
    seen = [event["id"] for event in page.json()["events"]]
    while "next" in page.links:
        post(client, LOGIN)
        assert page.json()["next_cursor"] in page.links["next"]["url"]
        page = client.get(page.links["next"]["url"])
        seen += [event["id"] for event in page.json()["events"]]
    assert seen == [6, 5, 4, 3, 2, 1]
    assert page.json()["next_cursor"] is None


def test_a_cursor_with_other_filters_is_a_400_that_says_so(client: httpx.Client) -> None:
    fill(client)
    cursor = client.get("/events", params={"limit": 1, "actor": "a"}).json()["next_cursor"]
    assert client.get("/events", params={"limit": 3, "actor": "a", "cursor": cursor}).status_code == 200
    response = client.get("/events", params={"limit": 1, "actor": "b", "cursor": cursor})
    assert response.status_code == 400
    assert "other filters" in response.json()["detail"]


@pytest.mark.parametrize("cursor", ["x", "AAAA", "bnVsbA", "WzFd", "WzEsMiwzLDRd", "é"])
def test_a_made_up_cursor_is_a_400(client: httpx.Client, cursor: str) -> None:
    response = client.get("/events", params={"cursor": cursor})
    assert response.status_code == 400
    assert response.json()["type"] == "urn:audit:problem:invalid-cursor"


@pytest.mark.parametrize("when", ["0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "2026-01-01T00:00:00"])
@pytest.mark.parametrize("event_id", ["Infinity", "NaN", "1e400", "9223372036854775808", "[]", "1"])
def test_a_cursor_of_impossible_numbers_is_a_400(client: httpx.Client, when: str, event_id: str) -> None:
    fill(client)
    given = client.get("/events", params={"limit": 1}).json()["next_cursor"]
    _, fingerprint, *_ = json.loads(base64.urlsafe_b64decode(given + "=="))
    forged = base64.urlsafe_b64encode(f'[1, "{fingerprint}", "{when}", {event_id}]'.encode()).decode()
    response = client.get("/events", params={"cursor": forged.rstrip("=")})
    assert response.status_code == 400
    assert response.json()["type"] == "urn:audit:problem:invalid-cursor"


@pytest.mark.parametrize(("path", "status"), [("999", 404), ("0", 404), ("-1", 404), ("x", 422), ("9" * 30, 422)])
def test_an_id_that_is_not_there(client: httpx.Client, path: str, status: int) -> None:
    response = client.get(f"/events/{path}")
    assert response.status_code == status
    assert response.headers["Content-Type"] == "application/problem+json"
