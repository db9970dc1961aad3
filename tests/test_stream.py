"""/events/stream: every event that meets the filters, once, in the order of ids, over cuts and restarts."""

import asyncio
import json
import re
import resource
import socket
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import API_KEY, eventually, execute, running_app, served, settings_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from months import append_events
from prometheus_client import CollectorRegistry, Gauge
from sqlalchemy.engine import URL
from test_db import assert_unavailable

import migrations
from cluster import Cluster
from db import Database
from queries import stream
from queries.reader import Reader
from queries.stream import Feed
from schemas import EventFilter

LOGIN = {"event_type": "LOGIN", "actor": "alice"}


class Stream:
    """One open stream, read event by event."""

    def __init__(self, response: httpx.Response) -> None:
        self._chunks = response.iter_raw()
        self._text = ""
        assert next(self._chunks).startswith(b": ")  # the server has answered: from here on nothing is missed

    def next(self) -> dict[str, Any]:
        while "\n\n" not in self._text:
            self._text += next(self._chunks).decode()
        frame, _, self._text = self._text.partition("\n\n")
        id_line, data_line = (line for line in frame.split("\n") if not line.startswith(":"))
        event: dict[str, Any] = json.loads(data_line.removeprefix("data: "))
        assert id_line == f"id: {event['id']}"
        return event

    def ids(self, count: int) -> list[int]:
        return [self.next()["id"] for _ in range(count)]


@contextmanager
def listening(client: httpx.Client, after: int | None = None, **filters: Any) -> Iterator[Stream]:
    headers = {} if after is None else {"Last-Event-ID": str(after)}
    with client.stream("GET", "/events/stream", params=filters, headers=headers) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["Content-Type"].startswith("text/event-stream")
        yield Stream(response)


def post(client: httpx.Client, **members: Any) -> int:
    event_id: int = client.post("/events", json={**LOGIN, **members}).json()["id"]
    return event_id


def post_all(client: httpx.Client, events: list[dict[str, Any]]) -> None:
    assert client.post("/events/batch", json=events).status_code == 201


def test_a_new_event_arrives_as_get_shows_it(client: httpx.Client) -> None:
    post(client)
    with listening(client) as events:
        event_id = post(client, resource="a\nb", metadata={"n": 1.5})
        assert events.next() == client.get(f"/events/{event_id}").json()


def test_events_come_once_and_in_order_behind_the_last_one_received(client: httpx.Client) -> None:
    post_all(client, [LOGIN] * 20)
    with listening(client, after=7) as events:
        assert events.ids(13) == list(range(8, 21))
        post_all(client, [LOGIN] * 3)
        assert events.ids(3) == [21, 22, 23]


def test_nothing_is_missed_or_repeated_by_a_listener_that_keeps_leaving(client: httpx.Client) -> None:
    done = threading.Event()

    def write() -> None:
        while not done.is_set():
            post_all(client, [LOGIN] * 37)

    post_all(client, [LOGIN] * 3_000)
    writing = threading.Thread(target=write)
    writing.start()
    seen = [0]
    try:
        for _ in range(8):
            with listening(client, after=seen[-1]) as events:
                seen += events.ids(900)
    finally:
        done.set()
        writing.join()
    assert seen == list(range(7_201))


def test_a_stream_goes_on_over_a_restart_of_the_database_and_of_the_service(own_cluster: Cluster) -> None:
    own_cluster.create_database("audit")
    url = own_cluster.url("audit")
    migrations.upgrade(url)
    with running_app(settings_for(url)) as client:
        with listening(client) as events:
            post(client)
            own_cluster.stop("immediate")
            assert client.get("/events/stream").status_code == 503
            own_cluster.start()
            eventually(lambda: client.post("/events", json=LOGIN).status_code == 201)
            assert events.ids(2) == [1, 2]
        post(client)
    with running_app(settings_for(url)) as client, listening(client, after=2) as events:
        post(client)
        assert events.ids(2) == [3, 4]


def test_before_the_migration_a_stream_is_refused(empty_database_url: URL) -> None:
    with running_app(settings_for(empty_database_url)) as client:
        assert_unavailable(client.get("/events/stream"), "schema-not-ready")


_few = st.sampled_from(["a", "a.b", "b", "B", "%", "_", "a*"])
_events = st.fixed_dictionaries(
    {"event_type": _few, "actor": _few},
    optional={
        "tenant": _few,
        "outcome": st.sampled_from(["success", "denied"]),
        "source_ip": st.sampled_from(["10.0.0.1", "10.1.0.1", "::1", "::ffff:10.0.0.1"]),
        "metadata": st.sampled_from([{"k": 1}, {"k": 1.0}, {"k": True}, {"k": [1, "x"]}, {"k": {"l": 1}}]),
    },
)
_filters = st.fixed_dictionaries(
    {},
    optional={
        "event_type": st.lists(st.sampled_from(["a", "a.*", "b*", "_", "%*"]), min_size=1),
        "actor": st.lists(st.sampled_from(["a", "a.*", "b", "%"]), min_size=1),
        "tenant": _few,
        "outcome": st.sampled_from(["success", "denied"]),
        "source_ip": st.sampled_from(["10.0.0.1", "10.0.0.0/16", "::/0", "0.0.0.0/0"]),
        "metadata": st.sampled_from(['{"k":1}', '{"k":[1]}', '{"k":{}}', "{}", '{"k":true}']),
    },
)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=st.lists(_events, min_size=1, max_size=12), filters=st.lists(_filters, min_size=1, max_size=4))
def test_live_and_afterwards_a_filter_means_what_it_means_in_a_list(
    client: httpx.Client, events: list[dict[str, Any]], filters: list[dict[str, Any]]
) -> None:
    last = {**LOGIN, "actor": "a", "event_type": "a.last"}
    start = post(client)
    for wanted in filters:
        wanted_ids = None
        with listening(client, **wanted) as live:
            receipt = client.post("/events/batch", json=[*events, last]).json()
            listed = client.get("/events", params={**wanted, "order": "asc", "limit": 1000}).json()["events"]
            wanted_ids = [event["id"] for event in listed if event["id"] >= receipt["first_id"]]
            assert live.ids(len(wanted_ids)) == wanted_ids
        expected = [event["id"] for event in listed if event["id"] > start]
        with listening(client, after=start, **wanted) as later:
            assert later.ids(len(expected)) == expected


def test_an_idle_stream_has_heartbeats(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "HEARTBEAT_S", 0.05)
    with client.stream("GET", "/events/stream") as response:
        chunks = response.iter_raw()
        assert [next(chunks) for _ in range(4)] == [b": heartbeat\n"] * 4


def test_a_listener_that_does_not_read_is_cut_and_the_others_are_not(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "MAX_WAITING_BYTES", 200_000)
    request = b"GET /events/stream HTTP/1.1\r\nHost: x\r\nX-API-Key: " + API_KEY.encode() + b"\r\n\r\n"
    with socket.socket() as stalled, listening(client) as events:
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.connect((client.base_url.host, client.base_url.port))
        stalled.sendall(request)
        assert stalled.recv(15).startswith(b"HTTP/1.1 200")
        eventually(lambda: open_streams(client) == 2)
        while open_streams(client) == 2:
            post_all(client, [{**LOGIN, "metadata": {"padding": "x" * 1000}}] * 50)
            events.ids(50)
        received = b"".join(iter(lambda: stalled.recv(1 << 20), b""))
    assert not received.endswith(b"0\r\n\r\n")


def test_a_cut_listener_costs_the_others_nothing(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stream, "HEARTBEAT_S", 0.01)
    monkeypatch.setattr(stream, "MAX_WAITING_BYTES", 2_500)  # two events, and not three
    event = {**LOGIN, "metadata": {"padding": "x" * 800}}
    registry = CollectorRegistry()
    gauge = Gauge("streams", "those that are open", registry=registry)

    async def hear(frames: AsyncGenerator[bytes, None], last: int) -> list[int]:
        heard: list[int] = []
        while last not in heard:
            heard += map(int, re.findall(r"^id: (\d+)$", (await anext(frames)).decode(), re.MULTILINE))
        return heard

    async def follow() -> None:
        feed = Feed(reader, database, gauge, 8)
        listeners = [await feed.listen(EventFilter(), None, "key", None) for _ in range(8)]
        streams = [listener.frames() for listener in listeners]
        for frames in streams:
            assert [await anext(frames), await anext(frames)] == [stream.HEARTBEAT] * 2  # the second is of the feed
        slow = streams[:4]  # the other four take nothing any more
        for number in (1, 2):
            append_events(database, event)
            assert [await hear(frames, number) for frames in slow] == [[number]] * 4
        append_events(database, event)
        while registry.get_sample_value("streams") != 4:
            await asyncio.sleep(0.01)
        for event_id in (2, 3):
            listeners[0].tell(event_id, b"id: %d\n" % event_id)  # as after a poll that failed half-way
        append_events(database, event)
        assert [await hear(frames, 4) for frames in slow] == [[3, 4]] * 4
        feed.stop()
        for frames in streams:
            await frames.aclose()

    with closing(Reader(database, database.url, timedelta(seconds=10))) as reader:
        asyncio.run(follow())
    assert "unforeseen" not in caplog.text


def open_streams(client: httpx.Client) -> int:
    (line,) = [line for line in client.get("/metrics").text.splitlines() if line.startswith("audit_streams_open ")]
    return int(float(line.split()[1]))


def test_thousands_of_listeners_share_one_poller(database_url: URL) -> None:
    number = 2_000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 3 * number)), hard))

    async def listen(client: httpx.Client, index: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
        request = f"GET /events/stream?actor=user-{index % 500} HTTP/1.1\r\nHost: x\r\nX-API-Key: {API_KEY}\r\n\r\n"
        writer.write(request.encode())
        await reader.readuntil(b": heartbeat\n")
        return reader, writer

    async def listen_all(client: httpx.Client) -> None:
        connections = [await listen(client, index) for index in range(number)]
        assert open_streams(client) == number
        backends = execute(database_url, "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()")
        assert backends <= 8  # the counting one, the writer's, the poller's; a few of those that came in
        post_all(client, [{**LOGIN, "actor": f"user-{n}"} for n in range(500)])
        for index, (reader, writer) in enumerate(connections):
            assert b'"actor":"user-%d"' % (index % 500) in await reader.readuntil(b"}\n\n")
            writer.close()

    with running_app(settings_for(database_url)) as client:
        asyncio.run(listen_all(client))
        eventually(lambda: open_streams(client) == 0)


def test_one_stream_more_than_the_process_serves_is_told_to_wait(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "MAX_LISTENERS", 1)
    with listening(client) as events:
        assert_unavailable(client.get("/events/stream"), "too-many-readers")
        assert events.ids(0) == []
    eventually(lambda: open_streams(client) == 0)
    with listening(client) as events:
        assert events.ids(0) == []


@pytest.mark.parametrize("value", ["x", "-1", "1.5", "9" * 30])
def test_a_wrong_last_event_id_is_named(client: httpx.Client, value: str) -> None:
    response = client.get("/events/stream", headers={"Last-Event-ID": value})
    assert response.status_code == 422
    assert [error["location"] for error in response.json()["errors"]] == ["header.last-event-id"]


def test_beyond_the_newest_event_a_stream_is_refused(client: httpx.Client) -> None:
    post_all(client, [LOGIN] * 3)
    with listening(client, after=3) as events:
        with client.stream("GET", "/events/stream", headers={"Last-Event-ID": "4"}) as response:
            assert response.status_code == 422
            (error,) = json.loads(response.read())["errors"]
        assert error["location"] == "header.last-event-id"
        assert "beyond 3, the newest event" in error["message"]
        assert events.ids(0) == []
    eventually(lambda: open_streams(client) == 0)


def test_a_stop_of_the_service_ends_the_streams_at_once(database_url: URL, tmp_path: Path) -> None:
    with served(database_url, tmp_path / "log") as client:
        response = client.send(client.build_request("GET", "/events/stream"), stream=True)
        events = Stream(response)
        assert events.ids(0) == []
        told = time.monotonic()
    assert time.monotonic() - told < 5
    assert "without completing" not in (tmp_path / "log").read_text()
    response.close()


def test_a_stop_ends_a_stream_that_has_much_to_catch_up_with(database: Database) -> None:
    append_events(database, *[LOGIN] * 3_000)

    async def catch_up() -> None:
        feed = Feed(reader, database, Gauge("streams", "those that are open", registry=None), 1)
        frames = (await feed.listen(EventFilter(), 0, "key", None)).frames()
        assert await anext(frames) == stream.HEARTBEAT
        assert (await anext(frames)).startswith(b"id: 1\n")
        feed.end_streams()
        assert [rest async for rest in frames] == []
        feed.stop()

    with closing(Reader(database, database.url, timedelta(seconds=10))) as reader:
        asyncio.run(catch_up())


def test_a_key_has_so_many_streams_and_another_key_its_own(database_url: URL) -> None:
    with running_app(settings_for(database_url, max_streams_per_key=2)) as client:
        made = client.post("/keys", json={"name": "other", "scopes": ["read"]}).json()
        with listening(client) as first, listening(client) as second:  # one that nobody holds is closed
            with client.stream("GET", "/events/stream") as answer:
                assert (answer.status_code, answer.headers.get("Retry-After")) == (429, "5")
                assert json.loads(answer.read())["type"].endswith("too-many-streams")
            with client.stream("GET", "/events/stream", headers={"X-API-Key": made["key"]}) as response:
                assert response.status_code == 200
            posted = post(client)
            assert first.ids(1) == second.ids(1) == [posted]
        eventually(lambda: "audit_streams_open 0.0" in client.get("/metrics").text)
        with listening(client) as again:
            assert post(client) == again.next()["id"]
