"""The write path: batches, keys, neighbours, replicas, limits. Each test's log is checked whole at its end."""

import ipaddress
import json
import os
import resource
import select
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from conftest import eventually, execute, running_app, settings_for
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool
from verify import assert_ledger_consistent

from config import Settings
from db import Database
from housekeeping.rounds import purge_keys
from ingest import writer
from main import create_app

LOGIN = {"event_type": "LOGIN", "actor": "alice"}
KEY = {"name": "shop", "scopes": ["write"]}


def keyed(key: str, **members: Any) -> dict[str, Any]:
    return {**LOGIN, **members, "idempotency_key": key}


def post_batch(client: httpx.Client, events: Any) -> httpx.Response:
    return client.post("/events/batch", json=events)


def post_lines(client: httpx.Client, *lines: str) -> httpx.Response:
    content = "\n".join(lines).encode()
    return client.post("/events/batch", content=content, headers={"Content-Type": "application/x-ndjson"})


def stored(client: httpx.Client) -> int:
    return len(client.get("/events", params={"limit": 1000}).json()["events"])


def locations(response: httpx.Response) -> list[str]:
    return [error["location"] for error in response.json()["errors"]]


@pytest.fixture
def own_client(database_url: URL) -> Iterator[httpx.Client]:
    with running_app(settings_for(database_url)) as client:
        yield client
    assert_ledger_consistent(database_url)


def test_a_batch_is_appended_in_its_order(client: httpx.Client) -> None:
    response = post_batch(client, [{**LOGIN, "actor": f"user-{n}"} for n in range(5)])
    assert response.status_code == 201
    assert response.json() == {"count": 5, "first_id": 1, "last_id": 5, "ids": [1, 2, 3, 4, 5], "replayed": 0}
    assert [event["actor"] for event in client.get("/events").json()["events"][::-1]] == [f"user-{n}" for n in range(5)]


def test_ndjson_is_a_batch_too(client: httpx.Client) -> None:
    response = post_lines(client, json.dumps(LOGIN), "", json.dumps({**LOGIN, "actor": "böb"}), "")
    assert response.json()["ids"] == [1, 2]
    assert client.get("/events/2").json()["actor"] == "böb"


def test_batches_fill_tiles_of_two_levels(own_client: httpx.Client, database_url: URL) -> None:
    """65,536 leaves fill 256 tiles and the one above them; pieces of odd sizes cross their borders."""
    for length in (1, 255, 257, 10_000, 9_999, 10_000, 10_000, 10_000, 10_000, 5_200):
        assert post_batch(own_client, [LOGIN] * length).status_code == 201
    assert execute(database_url, "SELECT count(*) FROM ledger_tiles WHERE level = 1") == 1


@pytest.mark.parametrize(
    ("events", "named"),
    [
        ([LOGIN, {}, LOGIN], ["body.1.event_type", "body.1.actor"]),
        ([LOGIN, "x"], ["body.1"]),
        ({"events": []}, ["body"]),
        ([], ["body"]),
        ([{**LOGIN, "timestamp": "9998-01-01T00:00:00Z"}, LOGIN], ["body.0.timestamp"]),
        ([{**LOGIN, "timestamp": "9998-01-01T00:00:00Z"}], ["body.0.timestamp"]),
        ([{**LOGIN, "source": "audit-service"}], ["body.0.source"]),
    ],
)
def test_one_wrong_event_fails_its_batch_by_index(client: httpx.Client, events: Any, named: list[str]) -> None:
    response = post_batch(client, events)
    assert response.status_code == 422
    assert locations(response) == named
    assert stored(client) == 0


def test_a_wrong_line_is_named(client: httpx.Client) -> None:
    assert locations(post_lines(client, json.dumps(LOGIN), '{"actor": "x"}')) == ["body.1.event_type"]
    assert post_lines(client, json.dumps(LOGIN), "{").status_code == 400
    assert stored(client) == 0


def test_batches_are_bounded_by_count_and_by_bytes(client: httpx.Client) -> None:
    assert post_batch(client, [LOGIN] * 10_001).status_code == 413
    padding = " " * (16 * 1024 * 1024)
    assert client.post("/events/batch", content=f"[{padding}]").status_code == 413
    assert stored(client) == 0


def test_a_large_batch_leaves_others_their_turns(client: httpx.Client) -> None:
    """Lists of numbers are what takes longest to check, a second and more; the last event is wrong."""
    event = json.dumps(keyed("k", metadata={"list": [1] * 16_000}), separators=(",", ":"))
    content = f"[{','.join([event] * 250)},{{}}]"
    waits = []
    with ThreadPoolExecutor(1) as pool:
        start = time.monotonic()
        answer = pool.submit(client.post, "/events/batch", content=content)
        while not answer.done():
            asked = time.monotonic()
            assert client.get("/health").status_code == 200
            waits.append(time.monotonic() - asked)
        took = time.monotonic() - start
    assert answer.result().status_code == 422
    assert max(waits) < took / 2


def test_a_repeated_key_answers_200_with_the_first_event(client: httpx.Client) -> None:
    first = client.post("/events", json=keyed("k", metadata={"a": 1, "b": 2}))
    again = client.post("/events", json=keyed("k", metadata={"b": 2, "a": 1}))
    assert (first.status_code, again.status_code) == (201, 200)
    assert "Idempotent-Replay" not in first.headers
    assert again.headers["Idempotent-Replay"] == "true"
    assert again.headers["Location"] == first.headers["Location"]
    assert again.json() == first.json()
    assert stored(client) == 1


def test_header_and_body_are_one_key(client: httpx.Client) -> None:
    assert client.post("/events", json=LOGIN, headers={"Idempotency-Key": "k"}).status_code == 201
    assert client.post("/events", json=keyed("k")).status_code == 200
    assert client.post("/events", json=keyed("k"), headers={"Idempotency-Key": "other"}).status_code == 422
    assert client.post("/events", json=LOGIN, headers={"Idempotency-Key": "x" * 256}).status_code == 422


def test_a_key_in_the_header_is_read_as_utf_8_like_that_in_the_body(client: httpx.Client) -> None:
    headers = {b"Idempotency-Key": "bestellung-größe-🦊".encode()}
    assert client.post("/events", json=LOGIN, headers=headers).status_code == 201
    assert client.post("/events", json=keyed("bestellung-größe-🦊")).status_code == 200
    assert client.post("/events", json=LOGIN, headers={b"Idempotency-Key": ("🦊" * 255).encode()}).status_code == 201
    refused = client.post("/events", json=LOGIN, headers={b"Idempotency-Key": "größe".encode("latin-1")})
    assert (refused.status_code, locations(refused)) == (422, ["headers.Idempotency-Key"])
    assert stored(client) == 2


@pytest.mark.parametrize("media_type", ["application/json", "application/x-ndjson"])
def test_a_batch_takes_no_key_in_the_header(client: httpx.Client, media_type: str) -> None:
    content = json.dumps(LOGIN) if "ndjson" in media_type else json.dumps([LOGIN])
    headers = {"Content-Type": media_type, "Idempotency-Key": "k"}
    response = client.post("/events/batch", content=content, headers=headers)
    assert (response.status_code, locations(response)) == (422, ["headers.Idempotency-Key"])
    assert "each has an idempotency_key of its own" in response.json()["errors"][0]["message"]
    assert stored(client) == 0


def test_a_key_with_another_event_is_a_409(client: httpx.Client) -> None:
    client.post("/events", json=keyed("k"))
    response = client.post("/events", json=keyed("k", actor="mallory"))
    assert response.status_code == 409
    assert response.json()["type"] == "urn:audit:problem:idempotency-conflict"
    assert "errors" not in response.json()
    assert stored(client) == 1


def test_keys_are_per_tenant(client: httpx.Client) -> None:
    answers = [client.post("/events", json=keyed("k", tenant=tenant)).status_code for tenant in ("a", "b", "a")]
    assert answers == [201, 201, 200]


def test_keys_in_a_batch_behave_as_on_a_single_post(client: httpx.Client) -> None:
    client.post("/events", json=keyed("old"))
    response = post_batch(client, [keyed("new"), keyed("old"), LOGIN, keyed("new")])
    assert response.status_code == 201
    assert response.json() == {"count": 4, "first_id": 1, "last_id": 3, "ids": [2, 1, 3, 2], "replayed": 2}
    again = post_batch(client, [keyed("new"), keyed("old")])
    assert (again.json()["ids"], again.headers["Idempotent-Replay"]) == ([2, 1], "true")
    assert stored(client) == 3


def test_a_conflict_in_a_batch_stores_none_of_it(client: httpx.Client) -> None:
    client.post("/events", json=keyed("k"))
    response = post_batch(client, [LOGIN, keyed("k", actor="mallory")])
    assert response.status_code == 409
    assert locations(response) == ["body.1.idempotency_key"]
    assert locations(post_batch(client, [keyed("k", actor="mallory")])) == ["body.0.idempotency_key"]
    assert post_batch(client, [keyed("n"), keyed("n", actor="mallory")]).status_code == 409
    assert stored(client) == 1


def test_one_key_from_many_clients_at_once_is_one_event(database_url: URL) -> None:
    with ExitStack() as stack, ThreadPoolExecutor(16) as pool:
        replicas = [stack.enter_context(running_app(settings_for(database_url))) for _ in range(2)]
        answers = list(pool.map(lambda n: replicas[n % 2].post("/events", json=keyed(f"k{n // 8}")), range(80)))
    assert sorted(answer.status_code for answer in answers) == [200] * 70 + [201] * 10
    assert len({answer.json()["id"] for answer in answers}) == 10
    assert assert_ledger_consistent(database_url) == 10


def test_replicas_make_one_dense_log(database_url: URL) -> None:
    with ExitStack() as stack, ThreadPoolExecutor(16) as pool:
        replicas = [stack.enter_context(running_app(settings_for(database_url))) for _ in range(3)]
        ids = list(pool.map(lambda n: replicas[n % 3].post("/events", json=LOGIN).json()["id"], range(600)))
    assert sorted(ids) == list(range(1, 601))
    assert assert_ledger_consistent(database_url) == 600


def test_an_event_that_the_database_refuses_fails_alone(own_client: httpx.Client, database_url: URL) -> None:
    execute(database_url, "ALTER TABLE audit_events ADD CONSTRAINT no_mallory CHECK (actor <> 'mallory')")
    actors = ["mallory" if n % 7 == 3 else f"user-{n}" for n in range(70)]
    with ThreadPoolExecutor(35) as pool:
        answers = list(pool.map(lambda a: own_client.post("/events", json={**LOGIN, "actor": a}).status_code, actors))
    assert answers == [500 if actor == "mallory" else 201 for actor in actors]


def test_a_flush_makes_the_month_that_is_missing(own_client: httpx.Client, database_url: URL) -> None:
    months = execute(
        database_url,
        "SELECT array_agg(inhrelid::regclass::text) FROM pg_inherits WHERE inhparent = 'audit_events'::regclass"
        " AND inhrelid <> 'audit_events_adopted'::regclass",
    )
    execute(database_url, f"DROP TABLE {', '.join(months)}")
    assert own_client.post("/events", json=LOGIN).status_code == 201


def test_a_month_that_cannot_be_made_is_tried_once(
    own_client: httpx.Client, database_url: URL, caplog: pytest.LogCaptureFixture
) -> None:
    """A hole in the middle: months are made behind the newest one."""
    first = own_client.post("/events", json=keyed("k"))
    month = execute(database_url, "SELECT tableoid::regclass::text FROM audit_events")
    bounds = execute(
        database_url, f"SELECT pg_get_expr(relpartbound, oid) FROM pg_class WHERE oid = '{month}'::regclass"
    )
    execute(database_url, f"ALTER TABLE audit_events DETACH PARTITION {month}")
    assert [own_client.post("/events", json=LOGIN).status_code for _ in range(2)] == [500, 500]
    assert "unforeseen" not in caplog.text
    execute(database_url, f"ALTER TABLE audit_events ATTACH PARTITION {month} {bounds}")
    assert own_client.post("/events", json=keyed("k")).json() == first.json()
    assert own_client.post("/events", json=LOGIN).json()["id"] == 2


@contextmanager
def held_head(url: URL) -> Iterator[None]:
    """Nobody appends while the block runs, however long."""
    with create_engine(url, poolclass=NullPool).begin() as connection:
        connection.exec_driver_sql("SELECT * FROM ledger_head FOR UPDATE")
        yield


@pytest.fixture
def own_app(database_url: URL) -> Iterator[tuple[httpx.Client, FastAPI]]:
    """A service, and what it is made of."""
    app = create_app(settings_for(database_url))
    with running_app(settings_for(database_url), app) as client:
        yield client, app
    assert_ledger_consistent(database_url)


RICH = {**LOGIN, "metadata": {f"key-{n}": n for n in range(1_000)}}
LONG = {**LOGIN, "metadata": {"text": "x" * 60_000}}


@pytest.mark.parametrize(
    ("batches", "lengths"),
    [
        ([[LOGIN] * 900] * 5, [1_800, 1_800, 900]),
        ([[RICH]] * 30, [16, 14]),
        ([[LONG]] * 30, [17, 13]),
        ([[LOGIN], [RICH] * 100, [LOGIN]], [1, 100, 1]),
    ],
    ids=["by count", "by members", "by bytes", "one that is too large goes alone"],
)
def test_a_flush_is_bounded(
    own_app: tuple[httpx.Client, FastAPI], database_url: URL, batches: list[Any], lengths: list[int]
) -> None:
    client, app = own_app
    with ThreadPoolExecutor(len(batches) + 1) as pool:
        with held_head(database_url):
            answers = [pool.submit(post_batch, client, [LOGIN])]
            eventually(lambda: app.state.writer._queued_events == 1 and not app.state.writer._queue)
            for number, batch in enumerate(batches, 1):
                answers.append(pool.submit(post_batch, client, batch))
                eventually(lambda number=number: len(app.state.writer._queue) == number)  # type: ignore[misc]
        assert {answer.result().status_code for answer in answers} == {201}
    flushes = "SELECT recorded_at, count(*) FROM audit_events WHERE id > 1 GROUP BY recorded_at ORDER BY recorded_at"
    counts = execute(database_url, f"SELECT array_agg(count) FROM ({flushes}) AS flush")
    assert counts == lengths


def test_recorded_at_never_falls_behind_the_head(own_client: httpx.Client, database_url: URL) -> None:
    """A head that is ahead of the clock, as after a clock was set back, holds recorded_at where it is."""
    ahead = datetime.now(UTC) + timedelta(minutes=3)
    execute(database_url, "UPDATE ledger_head SET recorded_at = '" + ahead.isoformat() + "'")
    for _ in range(2):
        event = own_client.post("/events", json=LOGIN).json()
        assert datetime.fromisoformat(event["recorded_at"]) == ahead


def test_the_connection_may_have_any_descriptor(own_client: httpx.Client) -> None:
    """select() takes none beyond 1,023, and a service with so many open sockets is an ordinary one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2_048), hard))
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(1_100):
            stack.enter_context(open(os.devnull))
        assert [own_client.post("/events", json=LOGIN).status_code for _ in range(3)] == [201] * 3


def test_rows_from_before_the_ledger_are_not_in_the_tree(database_url: URL) -> None:
    execute(
        database_url,
        "INSERT INTO audit_events (id, event_type, actor, timestamp, recorded_at)"
        " SELECT n, 'OLD', 'bob', '2020-01-01', '2020-01-01' FROM generate_series(1, 41) AS n",
    )
    execute(database_url, "UPDATE ledger_head SET first_id = 42")
    with running_app(settings_for(database_url)) as client:
        assert client.post("/events", json=LOGIN).json()["id"] == 42
        assert client.get("/events/41").json()["actor"] == "bob"
    assert_ledger_consistent(database_url)


def test_the_future_begins_after_the_clocks_may_differ(own_client: httpx.Client, database_url: URL) -> None:
    skew = Settings.max_clock_skew
    soon = datetime.now(UTC) + skew - timedelta(seconds=30)
    late = datetime.now(UTC) + skew + timedelta(seconds=30)
    assert own_client.post("/events", json={**LOGIN, "timestamp": soon.isoformat()}).status_code == 201
    response = own_client.post("/events", json={**LOGIN, "timestamp": late.isoformat()})
    assert (response.status_code, locations(response)) == (422, ["body.timestamp"])
    assert own_client.post("/events", json={**LOGIN, "timestamp": "0001-01-01T00:00:00Z"}).status_code == 201


def test_a_full_queue_answers_503_at_once_and_drains(
    own_client: httpx.Client, database_url: URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "MAX_QUEUED_EVENTS", 10)
    engine = Database(database_url)
    with ThreadPoolExecutor(40) as pool:
        with engine.transaction() as connection:
            connection.exec_driver_sql("SELECT * FROM ledger_head FOR UPDATE")
            answers = [pool.submit(own_client.post, "/events", json=LOGIN) for _ in range(40)]
            refused: list[Any] = []
            while len(refused) < 30:
                refused = [answer for answer in answers if answer.done()]
        codes = [answer.result().status_code for answer in answers]
    engine.close()
    assert sorted(codes) == [201] * 10 + [503] * 30
    full = next(answer.result() for answer in answers if answer.result().status_code == 503)
    assert full.json()["type"] == "urn:audit:problem:queue-full"
    assert int(full.headers["Retry-After"]) > 0


def test_bodies_that_trickle_in_under_one_key_leave_room_to_others(
    own_client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "MAX_HELD_BYTES", 400_000)
    slow, other = ({"X-API-Key": own_client.post("/keys", json=KEY).json()["key"]} for _ in range(2))
    fields = f"Host: x\r\nX-API-Key: {slow['X-API-Key']}\r\nContent-Type: application/json\r\nContent-Length: 999999"
    begun = f"POST /events/batch HTTP/1.1\r\n{fields}\r\n\r\n".encode() + b" " * 190_000
    address = own_client.base_url.host, own_client.base_url.port
    with ExitStack() as stack:
        connections = [stack.enter_context(socket.create_connection(address, timeout=30)) for _ in range(2)]
        for connection in connections:
            connection.sendall(begun)
        readable, _, _ = select.select(connections, [], [], 30)
        refused = readable[0].recv(65_536)
        assert refused.startswith(b"HTTP/1.1 503 ") and b"This key sends" in refused
        batch = [{**LOGIN, "resource": "r" * 900}] * 50
        assert own_client.post("/events/batch", json=batch, headers=other).status_code == 201
    # What was held is given back.
    eventually(lambda: own_client.post("/events/batch", json=batch * 3, headers=slow).status_code == 201)


def test_a_stop_finishes_what_was_accepted(database_url: URL) -> None:
    engine = Database(database_url)
    accepted: list[int] = []
    with running_app(settings_for(database_url)) as client:
        with engine.transaction() as connection:
            connection.exec_driver_sql("SELECT * FROM ledger_head FOR UPDATE")
            thread = threading.Thread(target=lambda: accepted.append(client.post("/events", json=LOGIN).status_code))
            thread.start()
            thread.join(0.3)
            assert not accepted
        thread.join()
    engine.close()
    assert accepted == [201]
    assert assert_ledger_consistent(database_url) == 1


def test_keys_older_than_the_window_are_purged(database_url: URL) -> None:
    # The service's own housekeeping, at its start, must leave the key to the test.
    with running_app(settings_for(database_url, idempotency_window=timedelta(days=9999))) as client:
        for key in ("old", "new"):
            client.post("/events", json=keyed(key))
        execute(database_url, "UPDATE idempotency_keys SET recorded_at = now() - interval '31 days' WHERE key = 'old'")
        database = Database(database_url)
        assert purge_keys(database, timedelta(days=30)) == 1
        database.close()
        assert client.post("/events", json=keyed("old")).json()["id"] == 3
        assert client.post("/events", json=keyed("new")).json()["id"] == 2


_texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40)
_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | _texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts, inner, max_size=3),
    max_leaves=8,
)
_events = st.fixed_dictionaries(
    {"event_type": _texts, "actor": _texts},
    optional={
        "tenant": _texts,
        "resource": _texts,
        "outcome": st.sampled_from(["success", "failure", "denied", "unknown"]),
        "source": _texts,
        "source_ip": (st.ip_addresses() | st.integers(0, 2**49).map(ipaddress.IPv6Address)).map(str),
        "trace_id": st.from_regex(r"[0-9a-f]{32}", fullmatch=True),
        "timestamp": st.datetimes(datetime(1, 1, 2), datetime(2026, 1, 1), timezones=st.just(UTC)).map(
            lambda moment: moment.isoformat()
        ),
        "metadata": st.dictionaries(_texts, _json, max_size=3),
    },
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(_events, min_size=1, max_size=8))
def test_whatever_is_stored_gives_the_same_hashes_when_it_is_read_back(
    client: httpx.Client, events: list[dict[str, Any]]
) -> None:
    """The fixture recomputes every hash from the rows at the end."""
    response = post_batch(client, events)
    assert response.status_code == 201, response.text
