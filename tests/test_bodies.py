"""How much of a body is read, and of whom: held for every call that takes one."""

import socket
from collections.abc import Iterator

import httpx
import pytest
from conftest import API_KEY

from main import app
from routes.bodies import MAX_BODY_BYTES
from routes.writes import MAX_BATCH_BYTES

CALLS = [
    (method.upper(), path)
    for path, methods in app.openapi()["paths"].items()
    for method, operation in methods.items()
    if "requestBody" in operation
]


def limit_of(path: str) -> int:
    return MAX_BATCH_BYTES if path == "/events/batch" else MAX_BODY_BYTES


def spaces(count: int) -> Iterator[bytes]:
    """A body whose length is not announced."""
    while count > 0:
        yield b" " * min(count, 65_536)
        count -= 65_536


@pytest.mark.parametrize(("method", "path"), CALLS)
def test_a_body_that_is_too_large_is_refused_whether_or_not_it_says_so(
    client: httpx.Client, method: str, path: str
) -> None:
    for content in (b" " * (limit_of(path) + 1), spaces(limit_of(path) + 65_536)):
        answer = client.request(method, path, content=content, headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["type"]) == (413, "urn:audit:problem:body-too-large")


@pytest.mark.parametrize(("method", "path"), CALLS)
@pytest.mark.parametrize("key", ["", "X-API-Key: wrong\r\n"], ids=["no key", "a wrong key"])
def test_without_a_key_an_answer_does_not_wait_for_the_body(
    client: httpx.Client, method: str, path: str, key: str
) -> None:
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\n{key}Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", client.base_url.port or 0), timeout=30) as connection:
        connection.sendall(head.encode())
        assert connection.recv(65_536).startswith(b"HTTP/1.1 401 ")


def test_a_body_that_ends_early_changes_nothing(client: httpx.Client) -> None:
    body = b'{"name": "shop", "scopes": ["write"]}'
    head = f"POST /keys HTTP/1.1\r\nHost: x\r\nX-API-Key: {API_KEY}\r\nContent-Length: {len(body) + 1}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", client.base_url.port or 0), timeout=30) as connection:
        connection.sendall(head.encode() + body)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65_536):
            pass
    assert client.get("/keys").json()["keys"] == []
