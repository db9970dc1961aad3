"""The short way: a request may be answered without ASGI, its task and its messages.

Requests that came together are handed on together. What the app does not take, or what is slow to come, goes the
usual way.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from edge.connections import BoundedProtocol, answer_bytes
from edge.headers import Headers

MAX_AWAITED_BYTES = 16 * 1024  # of a body that nobody counts yet


def _over(*_: object) -> None:
    """In the place of a callback that was called: once is enough, and it would keep its connection in memory."""


@dataclass(slots=True, eq=False)
class Request:
    """A request for the app. Stands in the place of uvicorn's RequestResponseCycle, as far as that is asked."""

    scope: Any
    keep_alive: bool
    _answer: Callable[["Request", int, Headers, bytes], None]
    _decline: Callable[["Request"], None]
    body: bytes = b""  # once it is whole
    pieces: list[bytes] = field(default_factory=list)  # of a body, as they came; chunks may have a byte each
    more_body: bool = True
    response_started: bool = False
    response_complete: bool = False
    disconnected: bool = False
    message_event: asyncio.Event = field(default_factory=asyncio.Event)

    def answer(self, status: int, headers: Headers, body: bytes) -> None:
        """Answer it, if it was not answered yet; nobody may be there any more to hear it."""
        answer = self._answer
        self.let_go()
        answer(self, status, headers, body)

    def decline(self) -> None:
        """Let the app answer it as usual: nothing was done."""
        decline = self._decline
        self.let_go()
        decline(self)

    def let_go(self) -> None:
        """Of the connection, which has it no more."""
        self._answer = self._decline = _over


class Direct(Protocol):
    """What an app puts into its lifespan's state as `direct`."""

    path: bytes  # of the POST requests that it wants

    def offer(self, request: Request) -> None:
        """Take the request, which is whole: answer() or decline() it later, on the event loop."""

    def expects(self, request: Request) -> bool:
        """Whether its caller may send the rest of the body."""


class DirectProtocol(BoundedProtocol):
    """Offers the app each request that it wants, once it is whole."""

    _coming: Request | None = None  # whose body is not whole yet
    _swept: Request | None = None  # the one that was coming at the last sweep

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        coming = self._coming
        if coming is not None and not (_is_short(coming) and self.app_state["direct"].expects(coming)):
            self._go_the_usual_way(coming)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._coming is not None:
            self._go_the_usual_way(self._coming)

    def overdue(self, now: float) -> bool:
        if self._coming is not None and self._coming is self._swept:
            self._go_the_usual_way(self._coming)  # where what trickles in is counted
        self._swept = self._coming
        return super().overdue(now)

    def start_request(self) -> None:
        direct: Direct | None = self.app_state.get("direct")
        if direct is None or not self._is_wanted(direct):
            super().start_request()
            return
        scope: Any = self.scope
        scope["method"] = "POST"
        scope["path"], scope["raw_path"], scope["query_string"] = direct.path.decode(), direct.path, b""
        self._coming = Request(scope, self.parser.should_keep_alive(), self._answer, self._go_the_usual_way)
        self.cycle = self._coming  # type: ignore[assignment]

    def on_body(self, body: bytes) -> None:
        if self._coming is None:
            super().on_body(body)
        else:
            self._head_bytes = 0
            self._coming.pieces.append(body)

    def on_message_complete(self) -> None:
        if (request := self._coming) is None:
            super().on_message_complete()
        else:
            self._coming = None
            request.more_body = False
            request.body = b"".join(request.pieces)
            request.pieces.clear()
            self.app_state["direct"].offer(request)

    def _is_wanted(self, direct: Direct) -> bool:
        return (
            self.url == direct.path
            and (self.cycle is None or self.cycle.response_complete)  # no other request is under way
            and not self.flow.write_paused
            and not self.expect_100_continue
            and self.parser.get_method() == b"POST"
            and self.parser.get_http_version() == "1.1"
            and not self.parser.should_upgrade()
        )

    def _answer(self, request: Request, status: int, headers: Headers, body: bytes) -> None:
        request.response_complete = True
        if request.disconnected or self.transport.is_closing():
            return
        headers = [*self.server_state.default_headers, *headers]
        self.transport.writelines([answer_bytes(status, headers, body, is_last=not request.keep_alive)])
        if not request.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def _go_the_usual_way(self, request: Request) -> None:
        """With as much of it as has come."""
        request.let_go()
        self._coming = self._swept = None
        cycle = RequestResponseCycle(
            scope=request.scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=request.message_event,
            expect_100_continue=False,
            keep_alive=request.keep_alive,
            on_response=self.on_response_complete,
        )
        cycle.body += request.body or b"".join(request.pieces)
        cycle.more_body = request.more_body
        cycle.disconnected = request.disconnected
        if cycle.body or not request.more_body:
            cycle.message_event.set()
        if self.cycle is request:  # type: ignore[comparison-overlap]  # and not one that came behind it
            self.cycle = cycle
        self._start_asgi_task(cycle, self.app)


def _is_short(request: Request) -> bool:
    lengths = [value for name, value in request.scope["headers"] if name == b"content-length"]
    return bool(lengths) and int(lengths[0]) <= MAX_AWAITED_BYTES
