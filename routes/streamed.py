"""An answer in pieces, of any length, that ends in time: where the client is gone, or takes nothing for too long."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing, suppress
from typing import Any

from fastapi import Response
from starlette.types import Receive, Scope, Send

from problems import Problem

logger = logging.getLogger("audit.streamed")

STALL_S = 60
SLICE_BYTES = 64 * 1024  # what a client has to take within STALL_S, however large the pieces are


class Streamed(Response):
    """Sends the pieces as the client takes them.

    An answer that is cut has no last chunk (RFC 9112 section 7.1), so that an HTTP client notices. `on_end` is
    called once, however it ends. `watch` is given cut(), and runs for as long as the answer does.
    """

    def __init__(
        self,
        pieces: AsyncGenerator[bytes, None],
        on_end: Callable[[], None],
        media_type: str,
        headers: Mapping[str, str],
        watch: Callable[[Callable[[], None]], Coroutine[Any, Any, None]],
    ) -> None:
        self.status_code = 200
        self.background = None
        self.media_type = media_type
        self.init_headers(headers)
        self._pieces = pieces
        self._on_end = on_end
        self._watch = watch
        self._limit = asyncio.timeout(None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watching = [asyncio.create_task(watch) for watch in (self._cut_when_gone(receive), self._watch(self.cut))]
        try:
            async with self._limit, aclosing(self._pieces):
                await self._send_pieces(send)
        except TimeoutError:
            pass  # cut
        except Problem as problem:
            logger.warning("an answer was cut: %s", problem.detail)
        finally:
            for task in watching:
                task.cancel()
            self._on_end()

    def cut(self) -> None:
        """End the answer now, if it has not ended."""
        with suppress(RuntimeError):  # ended already
            self._limit.reschedule(0)

    async def _send_pieces(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for piece in self._pieces:
            for start in range(0, len(piece), SLICE_BYTES):
                await _send_slice(send, piece[start : start + SLICE_BYTES])
        await send({"type": "http.response.body", "body": b""})

    async def _cut_when_gone(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.cut()


async def _send_slice(send: Send, body: bytes) -> None:
    try:
        async with asyncio.timeout(STALL_S):
            await send({"type": "http.response.body", "body": body, "more_body": True})
            await asyncio.sleep(0)  # it leaves, and the next one waits where the client is slow
    except TimeoutError:
        logger.warning("an answer was cut: its client took less than %s bytes in %s s", SLICE_BYTES, STALL_S)
        raise
