"""What a connection may do before a request is whole, tried with raw sockets on the service as it ships."""

import json
import re
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from conftest import API_KEY, execute, served
from sqlalchemy.engine import URL

HEAD = b"POST /events HTTP/1.1\r\nHost: test\r\nX-API-Key: " + API_KEY.encode() + b"\r\n"
BODY = b'{"event_type":"LOGIN","actor":"alice"}'


@pytest.fixture
def service(database_url: URL, tmp_path: Path) -> Iterator[httpx.Client]:
    with served(database_url, tmp_path / "log") as client:
        yield client


def exchange(client: httpx.Client, *pieces: bytes) -> tuple[int, bytes]:
    """The status of the first answer, and all that was received until the service closed the connection."""
    port = client.base_url.port
    with socket.create_connection(("127.0.0.1", port), timeout=120) as connection:
        for piece in pieces:
            connection.sendall(piece)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    return int(received.split(b" ", 2)[1]), received


def code_of(received: bytes) -> str:
    return str(json.loads(received.partition(b"\r\n\r\n")[2])["type"]).rpartition(":")[2]


@pytest.mark.parametrize(
    "head",
    [
        b"".join(b"X-%d: y\r\n" % number for number in range(101)),
        b"X: " + b"y" * 70_000 + b"\r\n",
        b"X: " + b"y" * 70_000,
    ],
    ids=["many fields", "a large field", "a large field without end"],
)
def test_a_head_too_large_is_refused(service: httpx.Client, head: bytes) -> None:
    status, received = exchange(service, HEAD + head + b"\r\n")
    assert (status, code_of(received)) == (431, "head-too-large")
    assert b"nosniff" in received


def test_a_head_within_the_bounds_is_taken(service: httpx.Client) -> None:
    fields = {f"X-{number}": "y" * 700 for number in range(80)}
    assert service.get("/events", headers=fields).status_code == 200


CHUNKED = b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNK = b"%x\r\n%b\r\n" % (len(BODY), BODY)
WITHOUT_KEY = b"POST /events HTTP/1.1\r\nHost: test\r\n"


@pytest.mark.parametrize(
    ("begun", "more"),
    [
        (CHUNK + b"0\r\n", b"a:\r\n" * 4_000),
        (CHUNK + b"0\r\na: ", b"y" * 16_000),
        (CHUNK + b"1;", b"y" * 16_000),
        (CHUNK + b"0\r\n\r\n", b"\r\n" * 8_000),
    ],
    ids=["trailers", "a trailer", "a chunk extension", "empty lines"],
)
def test_what_is_no_body_is_bounded_like_a_head_and_ends_the_connection(
    service: httpx.Client, begun: bytes, more: bytes
) -> None:
    was_answered = begun.endswith(b"\r\n\r\n")
    assert send_without_end(service, HEAD + CHUNKED + begun, more) == [201 if was_answered else 431]
    assert send_without_end(service, WITHOUT_KEY + CHUNKED + begun, more) == [401]
    assert service.get("/events/count").json()["count"] == was_answered


def send_without_end(client: httpx.Client, begun: bytes, more: bytes) -> list[int]:
    """Send more and more until the service closes the connection; the status of each answer."""
    received, sent = b"", 0
    address = "127.0.0.1", client.base_url.port
    with suppress(ConnectionError), socket.create_connection(address, timeout=0.05) as connection:
        connection.sendall(begun)
        while sent < 2 * 1024 * 1024:
            with suppress(TimeoutError):
                chunk = connection.recv(65536)
                if not chunk:
                    break
                received += chunk
            sent += connection.send(more)
    assert sent < 1024 * 1024
    return [int(status) for status in re.findall(rb"^HTTP/1.1 (\d+)", received, re.MULTILINE)]


def test_a_trailer_is_no_header(service: httpx.Client) -> None:
    trailers = b"X-API-Key: " + API_KEY.encode() + b"\r\nIdempotency-Key: a\r\n"
    whole = CHUNKED + CHUNK + b"0\r\n" + trailers + b"\r\n"
    for _ in range(2):
        status, received = exchange(service, HEAD + b"Connection: close\r\n" + whole)
        assert (status, b"idempotent-replay" in received) == (201, False)
    assert service.get("/events/count").json()["count"] == 2
    # The key comes before anybody has looked for one.
    assert exchange(service, WITHOUT_KEY + b"Connection: close\r\n" + whole)[0] == 401


def test_a_head_that_trickles_in_is_cut(service: httpx.Client) -> None:
    status, received = exchange(service, HEAD)
    assert (status, code_of(received)) == (408, "request-timeout")


def test_an_empty_line_after_an_answer_does_not_keep_the_connection(service: httpx.Client) -> None:
    status, received = exchange(service, b"GET /health HTTP/1.1\r\nHost: test\r\n\r\n", b"\r\n")
    assert (status, received.count(b"HTTP/1.1 ")) == (200, 1)


@pytest.mark.parametrize(
    "fields",
    [
        b"Content-Length: 38\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 38\r\n",
        b"Content-Length: 38\r\nContent-Length: 39\r\n",
        b"Content-Length: +38\r\n",
        b"Content-Length: 0x26\r\n",
        b"Content-Length : 38\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"X: a\rb\r\nContent-Length: 38\r\n",
        b"X: a\0b\r\nContent-Length: 38\r\n",
    ],
)
def test_what_another_server_could_read_differently_is_refused(
    service: httpx.Client, database_url: URL, fields: bytes
) -> None:
    status, received = exchange(service, HEAD + fields + b"\r\n" + BODY)
    assert (status, code_of(received)) == (400, "bad-request")
    assert execute(database_url, "SELECT count(*) FROM audit_events") == 0


def test_what_follows_a_request_never_answers_it(service: httpx.Client) -> None:
    whole = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    received = b""
    port = service.base_url.port
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(whole + b"garbage\r\n\r\n")
        while chunk := connection.recv(65536):
            received += chunk
    assert b" 400 " not in received.partition(b"\r\n")[0], "the answer to the second was given to the first"
