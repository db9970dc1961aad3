"""What a process remembers of keys: for 5 s at the most, so that a revoked key dies within that everywhere.

A key in use is asked for again before that, in the background, so its requests never wait for the database.
One look-up is under way at a time, for all ids that came meanwhile: whoever makes ids up costs one small statement
at a time, however fast he does it. Lives on the event loop.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from anyio import CapacityLimiter, to_thread
from sqlalchemy import Row

from db import Database
from keys import store
from problems import DatabaseUnavailable, InternalError, Problem

logger = logging.getLogger("audit.keys")

MAX_AGE_S = 5.0
REFRESH_AGE_S = 2.0
MAX_REMEMBERED = 10_000  # keys, and as many ids that there are not
MAX_LOOKED_UP = 500  # ids a statement
MAX_WAITING = 5_000  # ids
USES_INTERVAL_S = 30.0


@dataclass(frozen=True, slots=True)
class Remembered:
    """A key as it was when it was asked for, or None where there is no such id."""

    row: Row[Any] | None
    asked_at: float  # monotonic, before the question


@dataclass
class KeyMemory:
    """The keys of one database, and when they were used."""

    database: Database
    clock: Callable[[], float] = time.monotonic
    _known: dict[str, Remembered] = field(default_factory=dict)
    _unknown: dict[str, Remembered] = field(default_factory=dict)
    _waiting: dict[str, "asyncio.Future[Row[Any] | None]"] = field(default_factory=dict)
    _looking: "asyncio.Task[None] | None" = None
    _uses: dict[str, int] = field(default_factory=dict)
    _thread: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(1))  # nobody else's work keeps it

    def recall(self, key_id: str) -> Remembered | None:
        """What is known of the id now, without asking; None where that is nothing, or too old."""
        remembered = self._known.get(key_id) or self._unknown.get(key_id)
        if remembered is None:
            return None
        age_s = self.clock() - remembered.asked_at
        if age_s >= MAX_AGE_S:
            return None
        if age_s >= REFRESH_AGE_S and remembered.row is not None and key_id not in self._waiting:
            self._ask(key_id)  # nobody waits for it: it has time yet, and the next request finds out
        return remembered

    async def look_up(self, key_id: str) -> Row[Any] | None:
        """The key, or None where there is none; raises DatabaseUnavailable, and what a transaction raises."""
        if key_id not in self._waiting and len(self._waiting) >= MAX_WAITING:
            raise DatabaseUnavailable("More API keys wait to be looked up than this service holds. Try again.")
        return await asyncio.shield(self._waiting.get(key_id) or self._ask(key_id))

    def note_use(self, key_id: str, moment_s: float) -> None:
        """The key was used at this moment, in Unix time; kept to the minute, and written later."""
        minute = int(moment_s // 60)
        if self._uses.get(key_id) != minute:
            self._uses[key_id] = minute

    async def write_uses_now_and_then(self) -> None:
        """For ever, in the background."""
        while True:
            await asyncio.sleep(USES_INTERVAL_S)
            await self.write_uses()

    async def write_uses(self) -> None:
        """Write when keys were used since the last time, all in one statement; what fails is kept for the next time."""
        uses, self._uses = self._uses, {}
        moments = {key_id: datetime.fromtimestamp(minute * 60, UTC) for key_id, minute in uses.items()}
        try:
            if moments:
                await to_thread.run_sync(store.mark_used, self.database, moments, limiter=self._thread)
        except Problem as problem:
            logger.warning("when keys were used is written later: %s", problem.detail)
            self._uses = {**uses, **self._uses}

    async def stop(self) -> None:
        """Write what is not written yet, and ask no more."""
        if self._looking is not None:
            self._looking.cancel()
        await self.write_uses()

    def _ask(self, key_id: str) -> "asyncio.Future[Row[Any] | None]":
        asked: asyncio.Future[Row[Any] | None] = asyncio.get_running_loop().create_future()
        asked.add_done_callback(_hear)
        self._waiting[key_id] = asked
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        return asked

    async def _look(self) -> None:
        while self._waiting:
            ids = list(self._waiting)[:MAX_LOOKED_UP]
            asked_at = self.clock()
            problem: Problem | None = None
            found: dict[str, Row[Any]] = {}
            try:
                found = await to_thread.run_sync(store.find_keys, self.database, ids, limiter=self._thread)
            except Problem as raised:
                problem = raised
            except Exception:
                logger.exception("keys could not be looked up, in an unforeseen way")
                problem = InternalError()
            for key_id in ids:
                asked = self._waiting.pop(key_id)
                if problem is not None:
                    asked.set_exception(type(problem)(problem.detail))
                    continue
                self._remember(key_id, Remembered(found.get(key_id), asked_at))
                asked.set_result(found.get(key_id))

    def _remember(self, key_id: str, remembered: Remembered) -> None:
        self._known.pop(key_id, None)
        self._unknown.pop(key_id, None)
        memory = self._unknown if remembered.row is None else self._known
        memory[key_id] = remembered
        if len(memory) > MAX_REMEMBERED:
            del memory[next(iter(memory))]  # the oldest


def _hear(asked: "asyncio.Future[Row[Any] | None]") -> None:
    """Whoever asked may be gone: asyncio need not complain that nobody took the exception."""
    if not asked.cancelled():
        asked.exception()
