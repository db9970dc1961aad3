"""POST /events on the short way (edge/direct.py): as routes/writes.py answers it, without a task and ASGI's messages.

What is wrong with a request is said on the usual way.
"""

import asyncio
import logging
from functools import partial
from typing import NamedTuple

from fastapi import FastAPI
from starlette.requests import Request as StarletteRequest

import problems
from auth import Key, admit_at_once
from edge.direct import Request
from edge.headers import Headers
from ingest.append import Appended
from ingest.writer import Room
from problems import IdempotencyConflict, InternalError, Problem
from routes import writes
from telemetry import Telemetry

logger = logging.getLogger("audit.errors")


class _Taken(NamedTuple):
    """A request whose event is with the writer."""

    request: Request
    started: float
    caller: Key
    one: writes.One
    room: Room


class DirectWrites:
    """Appends single events. Lives on the event loop.

    Requests are first read, all that have come, and then worked on, one after the other: code that has just run runs
    in half the time, and every read and every pause drives it out of the processor's caches.
    """

    path = b"/events"

    def __init__(self, app: FastAPI, telemetry: Telemetry) -> None:
        self._app = app
        self._telemetry = telemetry
        self._loop = asyncio.get_running_loop()
        self._offered: list[Request] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def offer(self, request: Request) -> None:
        """See edge.direct.Direct."""
        if not self._offered:
            self._loop.call_soon(self._take_offered)
        self._offered.append(request)

    def expects(self, request: Request) -> bool:
        """See edge.direct.Direct."""
        request.scope["app"] = self._app
        try:
            caller = admit_at_once(request.scope, dict(request.scope["headers"]))
        except Problem:
            return False
        return caller is not None and "write" in caller.scopes

    def _take_offered(self) -> None:
        offered, self._offered = self._offered, []
        for request in offered:
            try:
                is_taken = self._take(request)
            except Problem:
                is_taken = False
            except Exception:
                logger.exception("an event could not be taken the short way")
                is_taken = False
            if not is_taken:
                request.decline()

    def _take(self, request: Request) -> bool:
        """Whether its event is with the writer now."""
        state, scope = self._app.state, request.scope
        scope["app"] = self._app
        started = self._telemetry.begin(scope)
        scope["state"]["route"] = scope["path"]
        headers = dict(scope["headers"])
        caller = admit_at_once(scope, headers)
        parse = writes.parser_of_one(headers)
        if caller is None or parse is None or len(request.body) > writes.MAX_INLINE_BYTES:
            return False
        caller.require("write")
        one = writes.prepare_one(state, caller, headers, parse(request.body))
        with state.writer.room(caller.id) as room:
            room(len(request.body))
            state.writer.submit([one.prepared], partial(self._settle, _Taken(request, started, caller, one, room)))
            room.keep()
        request.body = b""
        return True

    def _settle(self, taken: _Taken, result: Appended | Problem) -> None:
        taken.room.release()
        try:
            self._conclude(taken, result)
        except Exception:
            self._fail(taken)

    def _conclude(self, taken: _Taken, result: Appended | Problem) -> None:
        if isinstance(result, IdempotencyConflict):
            result = IdempotencyConflict()  # which event it was needs no saying
        if isinstance(result, Problem):
            self._refuse(taken, result)
        elif result.replayed:
            task = self._loop.create_task(self._replay(taken, result.ids[0]))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            self._app.state.metrics.events.inc()
            self._answer(taken, taken.one.created(result))

    async def _replay(self, taken: _Taken, event_id: int) -> None:
        try:
            self._answer(taken, await writes.replay(self._app.state, taken.caller, event_id))
        except Problem as problem:
            self._refuse(taken, problem)
        except Exception:
            self._fail(taken)

    def _fail(self, taken: _Taken) -> None:
        request_id = taken.request.scope["state"]["request_id"]
        logger.exception("unhandled exception", extra={"fields": {"request_id": request_id}})
        self._refuse(taken, InternalError())

    def _refuse(self, taken: _Taken, problem: Problem) -> None:
        response = problems.respond_to(StarletteRequest(taken.request.scope), problem)
        self._finish(taken, response.status_code, response.raw_headers, bytes(response.body))

    def _answer(self, taken: _Taken, answer: writes.Answer) -> None:
        status, headers, body = answer
        self._finish(taken, status, [*headers, *writes.json_fields(body)], body)

    def _finish(self, taken: _Taken, status: int, headers: Headers, body: bytes) -> None:
        scope = taken.request.scope
        taken.request.answer(status, [*headers, *self._telemetry.fields(scope, status)], body)
        self._telemetry.record(scope, status, taken.started)
