"""The short way of POST /events: it answers as the usual way does, whatever a client sends and however it comes."""

import asyncio
import gc
import json
import re
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import API_KEY, eventually, execute, running_app, served, settings_for
from sqlalchemy import create_engine
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from config import Rate
from db import Database
from edge import connections
from edge.direct import DirectProtocol, Request
from ingest import writer
from ingest.append import Appended, prepare_event
from ingest.records import SERVICE
from ingest.writer import Writer
from problems import Problem
from routes.writes import Writes
from schemas import EventIn

LOGIN = {"event_type": "LOGIN", "actor": "alice", "timestamp": "2026-11-24T09:30:00Z", "metadata": {"a": 1.5}}
EVENT = json.dumps(LOGIN).encode()
KEY = b"X-API-Key: " + API_KEY.encode() + b"\r\n"
JSON = b"Content-Type: application/json\r\n"
LONG_AGO = datetime(2026, 1, 1, tzinfo=UTC)
CLOUD_EVENT = json.dumps(
    {"specversion": "1.0", "id": "7", "source": "/shop", "type": "LOGIN", "time": "2026-01-01T00:00:00Z"}
    | {"data": {"actor": "alice"}}
).encode()


def post(fields: bytes, body: bytes = EVENT, version: bytes = b"1.1") -> bytes:
    return b"POST /events HTTP/%b\r\nHost: test\r\n%bContent-Length: %d\r\n\r\n%b" % (version, fields, len(body), body)


REQUESTS = {
    "an event": post(KEY + JSON),
    "an event without a media type": post(KEY),
    "a request id": post(KEY + JSON + b"X-Request-ID: mine\r\n"),
    "a trace": post(KEY + b"traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\n"),
    "a key": post(KEY + b"Idempotency-Key: once\r\n"),
    "a key again": post(KEY + b"Idempotency-Key: once\r\n"),
    "a key of another event": post(KEY + b"Idempotency-Key: once\r\n", b'{"event_type":"LOGIN","actor":"bob"}'),
    "a key too long": post(KEY + b"Idempotency-Key: " + b"k" * 256 + b"\r\n"),
    "the last one of a connection": post(KEY + b"Connection: close\r\n"),
    "HTTP/1.0": post(KEY, version=b"1.0"),
    "no key": post(JSON),
    "a wrong key": post(b"X-API-Key: wrong\r\n"),
    "no JSON": post(KEY, b"{"),
    "no body": post(KEY, b""),
    "a wrong field": post(KEY, b'{"event_type":"","actor":7,"more":1}'),
    "the future": post(KEY, b'{"event_type":"LOGIN","actor":"alice","timestamp":"2999-01-01T00:00:00Z"}'),
    "our own source": post(KEY, json.dumps({**LOGIN, "source": SERVICE}).encode()),
    "another media type": post(KEY + b"Content-Type: text/plain\r\n"),
    "a CloudEvent": post(KEY + b"Content-Type: application/cloudevents+json\r\n", CLOUD_EVENT),
    "CloudEvents": post(KEY + b"Content-Type: application/cloudevents-batch+json\r\n", b"[" + CLOUD_EVENT + b"]"),
    "100-continue": post(KEY + b"Expect: 100-continue\r\n"),
    "an upgrade": post(KEY + b"Connection: upgrade\r\nUpgrade: h2c\r\n"),
    "a query": post(KEY).replace(b"/events", b"/events?a=b"),
    "chunks": b"POST /events HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n"
    + KEY
    + b"\r\n%x\r\n%b\r\n0\r\nIdempotency-Key: trailer\r\n\r\n" % (len(EVENT), EVENT),
    "another call": b"GET /events/count HTTP/1.1\r\nHost: test\r\n" + KEY + b"\r\n",
}


@pytest.fixture
def service(database_url: URL) -> Iterator[httpx.Client]:
    with running_app(settings_for(database_url)) as client:
        yield client


def exchange(client: httpx.Client, *pieces: bytes, answers: int = 1) -> list[bytes]:
    """So many answers to what is sent over one connection, or fewer where the service ends it."""
    whole = re.compile(rb"HTTP/1\.1 [2-5].*?\r\ncontent-length: (\d+)\r\n.*?\r\n\r\n", re.DOTALL | re.IGNORECASE)
    received = b""
    found: list[bytes] = []
    with socket.create_connection(("127.0.0.1", client.base_url.port), timeout=60) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            connection.sendall(piece)
        while len(found) < answers:
            if (head := whole.search(received)) and len(received) >= (end := head.end() + int(head[1])):
                found.append(received[:end])
                received = received[end:]
            elif chunk := connection.recv(65536):
                received += chunk
            else:
                break
    return found


def told(answer: bytes) -> bytes:
    """The answer without what differs between any two: ids, moments, and names of ours."""
    answer = re.sub(rb"(?<=x-request-id: )[0-9a-f]{32}|(?<=\"request_id\": \")[0-9a-f]{32}", b"-", answer)
    answer = re.sub(rb"(?<=\ndate: )[^\r]*|(?<=\"recorded_at\":\")[^\"]*", b"-", answer)
    answer = re.sub(rb"(?<=\nlocation: /events/)\d+|(?<=\"id\":)\d+|(?<=_id\":)\d+|(?<=ids\":\[)\d+", b"-", answer)
    return re.sub(rb"(?<=\ncontent-length: )\d+", b"-", answer)  # ids have more or fewer digits


@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_both_ways_answer_alike(server: Any, database_url: URL, pieces: int) -> None:
    with server.database("audit_test_template") as other_url:
        with (
            running_app(settings_for(database_url)) as short,
            running_app(settings_for(other_url), protocol=HttpToolsProtocol) as usual,
        ):
            for name, request in REQUESTS.items():
                size = -(-len(request) // pieces)
                parts = [request[at : at + size] for at in range(0, len(request), size)]
                (answer,), (expected,) = exchange(short, *parts), exchange(usual, *parts)
                assert told(answer) == told(expected), name
        counts = [execute(url, "SELECT count(*) FROM audit_events") for url in (database_url, other_url)]
    assert counts[0] == counts[1] > 0


def test_events_come_the_short_way(service: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Writes, "__call__")
    assert service.post("/events", json=LOGIN).status_code == 201
    assert service.post("/events", json=LOGIN, headers={"Idempotency-Key": "a"}).status_code == 201
    assert service.post("/events", json=LOGIN, headers={"Idempotency-Key": "a"}).status_code == 200
    monkeypatch.undo()
    assert service.get("/events/count").json()["count"] == 2


def test_requests_that_are_sent_at_once_are_answered_in_their_order(service: httpx.Client) -> None:
    actors = [f"user-{number}" for number in range(60)]
    bodies = [json.dumps({"event_type": "LOGIN", "actor": actor}).encode() for actor in actors]
    bodies[20] = b"{"
    answers = exchange(service, b"".join(post(KEY, body) for body in bodies), answers=60)
    said = [json.loads(answer.partition(b"\r\n\r\n")[2]).get("actor") for answer in answers]
    assert said == [*actors[:20], None, *actors[21:]]


def test_a_wrong_body_takes_one_request_of_the_quota(database_url: URL) -> None:
    settings = settings_for(database_url, rate_limit=Rate(3, 60))
    with running_app(settings) as client:
        answers = [client.post("/events", content=body) for body in (EVENT, b"{", EVENT, EVENT, b"{")]
    assert [answer.status_code for answer in answers] == [201, 400, 201, 429, 429]
    assert [re.search(r"r=(\d)", answer.headers["ratelimit"])[1] for answer in answers] == list("21000")  # type: ignore[index]


def test_behind_a_proxy_an_address_that_was_wrong_too_often_is_refused(database_url: URL, tmp_path: Path) -> None:
    with served(database_url, tmp_path / "log", TRUSTED_PROXIES="127.0.0.1") as client:
        wrong = {"X-API-Key": "wrong", "X-Forwarded-For": "203.0.113.7"}
        statuses = [client.post("/events", json=LOGIN, headers=wrong).status_code for _ in range(61)]
        assert statuses == [401] * 60 + [429]
        right = {"X-Forwarded-For": "203.0.113.7"}
        assert client.post("/events", json=LOGIN, headers=right).status_code == 429
        assert client.post("/events", json=LOGIN).status_code == 201


def test_an_event_whose_client_has_gone_is_stored_and_keeps_nobody(service: httpx.Client, database_url: URL) -> None:
    with create_engine(database_url, poolclass=NullPool).begin() as connection:
        connection.exec_driver_sql("SELECT * FROM ledger_head FOR UPDATE")
        with socket.create_connection(("127.0.0.1", service.base_url.port)) as gone:
            gone.sendall(post(KEY))
        statuses: list[int] = []
        waiting = threading.Thread(target=lambda: statuses.append(service.post("/events", json=LOGIN).status_code))
        waiting.start()
        waiting.join(0.5)
        assert not statuses
    waiting.join()
    assert statuses == [201]
    eventually(lambda: execute(database_url, "SELECT count(*) FROM audit_events") == 2)


def test_what_fails_in_one_answer_keeps_it_from_nobody_else(database: Database) -> None:
    def fail(_: Appended | Problem) -> None:
        raise RuntimeError

    async def append_two() -> Appended | Problem:
        loop = asyncio.get_running_loop()
        writer, told = Writer(database, database), loop.create_future()
        prepared = prepare_event(EventIn(event_type="LOGIN", actor="alice"), LONG_AGO)
        writer.submit([prepared], fail)
        writer.submit([prepare_event(EventIn(event_type="LOGIN", actor="bob"), LONG_AGO)], told.set_result)
        try:
            return await asyncio.wait_for(told, 30)
        finally:
            await writer.stop()

    assert isinstance(asyncio.run(append_two()), Appended)


def test_the_writer_goes_on_when_it_was_woken_for_nothing(database: Database) -> None:
    async def append_after_a_false_alarm() -> Appended:
        writer = Writer(database, database)
        writer._wake.set()
        while writer._wake.is_set():
            await asyncio.sleep(0.01)
        try:
            event = EventIn(event_type="LOGIN", actor="alice")
            return await asyncio.wait_for(writer.append([prepare_event(event, LONG_AGO)]), 30)
        finally:
            await writer.stop()

    assert asyncio.run(append_after_a_false_alarm()).ids == [1]


def test_who_has_no_key_is_told_before_the_body_has_come(
    service: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "SWEEP_S", 3600)
    head = b"POST /events HTTP/1.1\r\nHost: test\r\nX-API-Key: wrong\r\nContent-Length: 100\r\n\r\n{"
    (answer,) = exchange(service, head)
    assert answer.startswith(b"HTTP/1.1 401 ")


def test_who_may_not_write_is_told_before_the_body_has_come(
    service: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = service.post("/keys", json={"name": "reports", "scopes": ["read"]}).json()["key"].encode()
    head = b"POST /events HTTP/1.1\r\nHost: test\r\nX-API-Key: %b\r\nContent-Length: 100\r\n\r\n" % reader
    assert exchange(service, head)[0].startswith(b"HTTP/1.1 403 ")  # once the key is looked up
    monkeypatch.setattr(connections, "SWEEP_S", 3600)
    (answer,) = exchange(service, head + b"{")
    assert answer.startswith(b"HTTP/1.1 403 ")


def test_an_event_in_front_of_garbage_is_counted(service: httpx.Client) -> None:
    behind = b"GET /events/count HTTP/1.1\r\nHost: test\r\n" + KEY + b"\r\n" + b"\0\0"
    assert exchange(service, post(KEY) + behind, answers=2) == []
    line = 'audit_http_requests_total{method="POST",route="/events",status="201"} 1.0'
    eventually(lambda: line in service.get("/metrics").text)
    assert service.get("/events/count").json()["count"] == 1


def test_a_request_is_answered_once() -> None:
    answers: list[int] = []
    request = Request({}, True, lambda _, status, *__: answers.append(status), lambda _: answers.append(0))
    request.answer(201, (), b"")
    request.answer(500, (), b"")
    request.decline()
    assert answers == [201]


def test_a_connection_that_is_over_leaves_nothing_to_the_garbage_collector(service: httpx.Client) -> None:
    def alive() -> int:
        return sum(isinstance(each, DirectProtocol | Request) for each in gc.get_objects())

    exchange(service, post(KEY + b"Connection: close\r\n"))
    gc.collect()
    before = alive()
    gc.disable()
    try:
        for _ in range(5):
            exchange(service, post(KEY + b"Connection: close\r\n"))
        eventually(lambda: alive() <= before)
    finally:
        gc.enable()


def test_a_body_that_trickles_in_is_counted(service: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "MAX_HELD_BYTES", 40_000)
    begun = b"POST /events HTTP/1.1\r\nHost: test\r\n%bContent-Length: 16000\r\n\r\n" % KEY + b" " * 15_000
    with ExitStack() as stack:
        address = service.base_url.host, service.base_url.port
        slow = [stack.enter_context(socket.create_connection(address, timeout=30)) for _ in range(2)]
        for connection in slow:
            connection.sendall(begun)
        readable, _, _ = select.select(slow, [], [], 30)
        refused = readable[0].recv(65_536)
        assert refused.startswith(b"HTTP/1.1 503 ") and b"This key sends" in refused
        assert service.post("/events", json=LOGIN).status_code == 201


def test_a_client_that_goes_in_the_middle_of_its_body_is_counted(service: httpx.Client) -> None:
    with socket.create_connection((service.base_url.host, service.base_url.port)) as gone:
        gone.sendall(post(KEY)[:-1])
    line = 'audit_http_requests_total{method="POST",route="/events",status="None"} 1.0'
    eventually(lambda: line in service.get("/metrics").text)
