"""A body that trickles in, a byte a second, for ever: each call lets go of it when its time is over."""

import socket
import time
from pathlib import Path

import pytest
from conftest import API_KEY, served
from sqlalchemy.engine import URL

from edge.connections import BODY_TIMEOUT_S, SWEEP_S

pytestmark = pytest.mark.security

CALLS = ["/events", "/events/batch", "/keys", "/legal-holds", "/redactions"]
LATE_S = 5  # how much later than due, on a busy machine


def trickle(connection: socket.socket) -> bool:
    """Send one more byte; whether the service still takes it."""
    try:
        connection.send(b" ")
        connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return True
    except ConnectionError:
        pass
    return False


def test_a_body_that_never_ends_is_refused_when_its_time_is_over(one_database_url: URL, tmp_path: Path) -> None:
    with served(one_database_url, tmp_path / "service.log") as client:
        waiting = {path: socket.create_connection(("127.0.0.1", client.base_url.port or 0)) for path in CALLS}
        for path, connection in waiting.items():
            fields = "Host: x\r\nContent-Type: application/json\r\nContent-Length: 1000"
            connection.sendall(f"POST {path} HTTP/1.1\r\n{fields}\r\nX-API-Key: {API_KEY}\r\n\r\n".encode())
        started, took, answers = time.monotonic(), {}, {}
        while waiting and time.monotonic() < started + BODY_TIMEOUT_S + LATE_S:
            time.sleep(1)
            for path in [path for path, connection in waiting.items() if not trickle(connection)]:
                took[path] = time.monotonic() - started
                with waiting.pop(path) as connection:
                    answers[path] = connection.recv(12)
        assert answers == dict.fromkeys(CALLS, b"HTTP/1.1 408")
        assert min(took.values()) >= BODY_TIMEOUT_S - SWEEP_S
        assert client.get("/events/count").json()["count"] == 0
