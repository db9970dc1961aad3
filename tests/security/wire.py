"""HTTP/1.1 as bytes over raw connections: client libraries refuse to send what is broken.

What comes back is read by the letter of RFC 9112: a header that was injected, or a body of another length, shows.
"""

import asyncio
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

_STATUS_LINE = re.compile(rb"HTTP/1\.1 ([1-5]\d\d) [\t\x20-\x7e]*")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+): ?([\t\x20-\x7e\x80-\xff]*)")
_CHUNK_SIZE = re.compile(rb"[0-9a-f]{1,8}")


class NotHttp(Exception):
    """The service answered with what is not HTTP/1.1."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer, whole; of a stream the head only."""

    status: int
    fields: dict[bytes, bytes]  # names in lower case
    body: bytes

    @property
    def ends_the_connection(self) -> bool:
        return self.fields.get(b"connection") == b"close" or self.is_stream

    @property
    def is_stream(self) -> bool:
        return self.fields.get(b"content-type", b"").startswith(b"text/event-stream")


def read_answer(received: bytes, *, has_body: bool = True) -> Answer | None:
    """The answer that was received, None while it is not whole; raises NotHttp."""
    head, separator, rest = received.partition(b"\r\n\r\n")
    if not separator:
        return None
    status_line, *lines = head.split(b"\r\n")
    matched = _STATUS_LINE.fullmatch(status_line)
    if matched is None:
        raise NotHttp(status_line)
    status = int(matched[1])
    if status == 100:  # Expect: 100-continue (RFC 9110 section 10.1.1): the answer is yet to come
        return read_answer(rest, has_body=has_body)
    fields = _read_fields(lines)
    answer = Answer(status, fields, b"")
    if answer.is_stream or not has_body or status == 304:  # RFC 9112 section 6.3: it ends with its head
        return answer
    body = _read_chunks(rest) if b"transfer-encoding" in fields else _read_length(rest, fields)
    return None if body is None else Answer(status, fields, body)


def _read_fields(lines: list[bytes]) -> dict[bytes, bytes]:
    fields: dict[bytes, bytes] = {}
    for line in lines:
        matched = _FIELD.fullmatch(line)
        if matched is None:
            raise NotHttp(line)
        fields[matched[1].lower()] = matched[2]
    return fields


def _read_length(rest: bytes, fields: dict[bytes, bytes]) -> bytes | None:
    if b"content-length" not in fields:
        raise NotHttp("neither Content-Length nor Transfer-Encoding")
    length = int(fields[b"content-length"])
    if len(rest) > length:
        raise NotHttp(rest[length:])
    return rest if len(rest) == length else None


def _read_chunks(rest: bytes) -> bytes | None:
    body = b""
    while True:
        size_line, separator, rest = rest.partition(b"\r\n")
        if not separator:
            return None
        if _CHUNK_SIZE.fullmatch(size_line) is None:
            raise NotHttp(size_line)
        size = int(size_line, 16)
        if len(rest) < size + 2:
            return None
        body, rest = body + rest[:size], rest[size + 2 :]
        if size == 0:
            return body


class Connection(asyncio.Protocol):
    """One connection, and the answer that is awaited on it."""

    def __init__(self) -> None:
        self._transport: Any = None
        self._received = b""
        self._awaited: asyncio.Future[Answer | None] | None = None
        self._has_body = True
        self.is_open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._awaited is None or self._awaited.done():
            return
        try:
            answer = read_answer(self._received, has_body=self._has_body)
        except NotHttp as error:
            self._awaited.set_exception(error)
            return
        if answer is not None:
            self._awaited.set_result(answer)

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        if self._awaited is not None and not self._awaited.done():
            self._awaited.set_result(None)

    async def exchange(self, request: bytes, *, has_body: bool = True, give_up_after_s: float = 60) -> Answer | None:
        """Send the bytes; the answer, or None where the connection ended without one.

        What is not answered in time is told that no more comes, which ends the connection. Raises NotHttp.
        """
        self._received, self._has_body = b"", has_body
        self._awaited = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        timer = asyncio.get_running_loop().call_later(give_up_after_s, self._give_up)
        try:
            return await self._awaited
        finally:
            timer.cancel()

    def _give_up(self) -> None:
        with suppress(OSError, RuntimeError):
            self._transport.write_eof()

    def close(self) -> None:
        self.is_open = False
        self._transport.abort()


async def connect(port: int) -> Connection:
    """A connection to the service."""
    make: Callable[[], Connection] = Connection
    _, connection = await asyncio.get_running_loop().create_connection(make, "127.0.0.1", port)
    return connection
