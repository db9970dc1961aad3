"""How long and how large a request may be on the wire, before any of it reaches the app.

httptools, unlike h11, bounds neither the head of a request nor the time it takes. Costs the path of a good request
one comparison for each read and one for each head: the clock is looked at by a sweep, once a second for all.
"""

import json
from collections import deque
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from edge.headers import DATA_HEADERS, Headers
from problems import BadRequest, HeadTooLarge, Problem, RequestTimeout, document

MAX_HEAD_BYTES = 64 * 1024  # request line and fields together; or else what comes without any of the body
MAX_FIELDS = 100
HEAD_TIMEOUT_S = 10  # from connecting, from an answer to the next head, or from a head's first byte, to its last
BODY_TIMEOUT_S = 60  # from the end of the head to the end of the body
READ_TIMEOUT_S = 60  # in which a client takes nothing of what is waiting for it
SWEEP_S = 1

# Trailers: the app has the scope already, and RFC 9110 section 6.5.1 has none merged whose definition is not known.
_DROPPED: Any = deque(maxlen=0)
_CLOSE = b"connection: close\r\n"


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with a bound to every head, and to the time that head and body take."""

    _refusal: Problem | None = None
    _head_bytes = 0  # read since a head was complete or some of a body came: chunk extensions and trailers, too
    _stage: object = None  # what was being waited for at the last sweep
    _since = 0.0
    _unsent = 0  # bytes of answers that waited for the client at the last sweep
    _unsent_since = 0.0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if not getattr(self.server_state, "is_swept", False):
            self.server_state.is_swept = True  # type: ignore[attr-defined]
            self.loop.call_later(SWEEP_S, _sweep, self.server_state, self.loop)

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None:
            return
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.refuse(HeadTooLarge())

    def on_headers_complete(self) -> None:
        if len(self.headers) > MAX_FIELDS or (self._head_bytes > MAX_HEAD_BYTES and self._is_too_large()):
            self._refusal = HeadTooLarge()
            raise self._refusal
        self._head_bytes = 0
        self.start_request()
        self.headers = _DROPPED

    def start_request(self) -> None:
        """The head is complete and within its bounds."""
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        """What could not be parsed, or was refused while it was: a problem document, and the end."""
        self.refuse(self._refusal or BadRequest("This is not HTTP/1.1 as RFC 9112 has it."))

    def refuse(self, problem: Problem) -> None:
        """Answer with the problem, where an answer is this request's turn, and close the connection."""
        self._refusal = problem
        if self._may_answer():
            self.transport.write(_answer(problem))
        self.transport.close()

    def _may_answer(self) -> bool:
        # While an earlier request of the connection is at work, an answer would be taken for that one's.
        if self.pipeline:
            return False
        cycle = self.cycle
        if self._is_in_head():
            return cycle is None or cycle.response_complete
        return cycle.more_body and not cycle.response_started  # of each request one answer

    def overdue(self, now: float) -> bool:
        """Whether the client has kept us waiting for too long for what was awaited at the last sweep, too."""
        stage, limit_s = self._awaited()
        if stage is not self._stage:
            self._stage, self._since = stage, now
        return stage is not None and now - self._since > limit_s

    def is_stalled(self, now: float) -> bool:
        """Whether the client has taken nothing of its answers for too long: they are held until it does."""
        unsent = self.transport.get_write_buffer_size()
        if unsent == 0 or unsent != self._unsent:
            self._unsent, self._unsent_since = unsent, now
        return now - self._unsent_since > READ_TIMEOUT_S

    def _awaited(self) -> tuple[object, int]:
        if self._is_in_head():
            return (self.scope if self.scope is not None else self), HEAD_TIMEOUT_S
        if self.cycle is not None and self.cycle.more_body:
            return self.cycle, BODY_TIMEOUT_S
        if self.cycle is not None and self.cycle.response_complete:  # an empty line ends uvicorn's keep-alive timer
            return self.cycle.message_event, HEAD_TIMEOUT_S
        return None, 0

    def _is_in_head(self) -> bool:
        return self.cycle is None or self.scope is not self.cycle.scope

    def _is_too_large(self) -> bool:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > MAX_HEAD_BYTES


def _sweep(server_state: Any, loop: Any) -> None:
    now = loop.time()
    for connection in list(server_state.connections):
        if connection.is_stalled(now):
            connection.pipeline.clear()  # nobody hears the answers to what is in it
            connection.transport.abort()
        elif not connection.transport.is_closing() and connection.overdue(now):
            connection.refuse(RequestTimeout())
    if server_state.connections:
        loop.call_later(SWEEP_S, _sweep, server_state, loop)
    else:
        server_state.is_swept = False


def _answer(problem: Problem) -> bytes:
    body = json.dumps(document(problem, None)).encode()
    headers = [(b"content-type", b"application/problem+json"), (b"content-length", b"%d" % len(body)), *DATA_HEADERS]
    return answer_bytes(problem.status, headers, body, is_last=True)


def answer_bytes(status: int, headers: Headers, body: bytes, *, is_last: bool) -> bytes:
    """An answer as it goes over the wire; the last one says that the connection ends with it."""
    fields = b"".join([b"%b: %b\r\n" % field for field in headers])
    return b"%b%b%b\r\n%b" % (STATUS_LINE[status], fields, _CLOSE if is_last else b"", body)
