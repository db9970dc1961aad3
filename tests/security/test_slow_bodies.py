"""A body that trickles in, a byte a second, for ever: each call lets go of it when its time is over."""

import re
import socket
import time
from pathlib import Path

import httpx
import pytest
from conftest import API_KEY, served
from sqlalchemy.engine import URL

from edge.connections import BODY_TIMEOUT_S, SWEEP_S

pytestmark = pytest.mark.security

CALLS = ["/events", "/events/batch", "/keys", "/legal-holds", "/redactions"]
LATE_S = 5  # how much later than due, on a busy machine

FRAMINGS = {"Content-Length: 1000": b" ", "Transfer-Encoding: chunked": b"1\r\n \r\n"}
Call = tuple[str, str, str]  # path, framing, key


def begin(client: httpx.Client, call: Call) -> socket.socket:
    """A connection on which a head was sent, and a body is awaited."""
    path, framing, key = call
    connection = socket.create_connection(("127.0.0.1", client.base_url.port or 0))
    fields = f"Host: x\r\nContent-Type: application/json\r\n{framing}\r\nX-API-Key: {key}"
    connection.sendall(f"POST {path} HTTP/1.1\r\n{fields}\r\n\r\n".encode())
    connection.setblocking(False)
    return connection


def trickle(connection: socket.socket, piece: bytes) -> bytes | None:
    """Send one more byte of a body; what was received, and None once the service has closed the connection."""
    try:
        connection.send(piece)
        return connection.recv(65536) or None
    except BlockingIOError:
        return b""
    except ConnectionError:
        return None


def test_a_body_that_never_ends_is_let_go_of_when_its_time_is_over(one_database_url: URL, tmp_path: Path) -> None:
    """Who has a key is told so then; who has none was told at once, and nothing again."""
    with served(one_database_url, tmp_path / "service.log") as client:
        calls = [(path, framing, key) for path in CALLS for framing in FRAMINGS for key in (API_KEY, "wrong")]
        waiting = {call: begin(client, call) for call in calls}
        received = dict.fromkeys(calls, b"")
        started = time.monotonic()
        answered: dict[Call, float] = {}
        took: dict[Call, float] = {}
        while waiting and time.monotonic() < started + BODY_TIMEOUT_S + LATE_S:
            time.sleep(1)
            for call, connection in list(waiting.items()):
                piece = trickle(connection, FRAMINGS[call[1]])
                if piece:
                    answered.setdefault(call, time.monotonic() - started)
                    received[call] += piece
                if piece is None:
                    took[call] = time.monotonic() - started
                    waiting.pop(call).close()
        for connection in waiting.values():
            connection.close()
        assert not waiting
        statuses = {call: re.findall(rb"HTTP/1.1 (\d+)", answers) for call, answers in received.items()}
        assert statuses == {call: [b"408" if call[2] == API_KEY else b"401"] for call in calls}
        assert max(took_s for call, took_s in answered.items() if call[2] == "wrong") < LATE_S
        assert min(took.values()) >= BODY_TIMEOUT_S - SWEEP_S
        assert client.get("/events/count").json()["count"] == 0
