"""Who read what: with AUDIT_READS every query, export and stream leaves an `audit.read` event, after its answer.

The events wait in memory and go through the ordinary writer. Where more wait than are held, or the writer fails for
another reason than an outage, they are dropped and counted: a read never waits for its record.
"""

import asyncio
import json
import logging
from collections import deque
from datetime import UTC, datetime
from functools import partial
from typing import Any

from pydantic import ValidationError

from auth import Key
from ingest.append import prepare_event
from ingest.records import own_event
from ingest.writer import Writer
from problems import OutcomeUnknown, Problem, Unavailable
from schemas import EventFilter, EventIn
from telemetry import Metrics

logger = logging.getLogger("audit.reads")

MAX_WAITING = 10_000
_BATCH = 500
_RETRY_S = 1.0


class ReadLog:
    """Records reads where the settings ask for it. Made on the event loop; record() may be called in any thread."""

    def __init__(self, writer: Writer, metrics: Metrics, *, is_on: bool) -> None:
        self._writer = writer
        self._metrics = metrics
        self._is_on = is_on
        self._waiting: deque[EventIn] = deque()
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._is_stopping = False
        self._task = asyncio.create_task(self._write())

    def record(self, caller: Key, call: str, wanted: EventFilter | None, count: int, **more: Any) -> None:
        """The caller has been answered with `count` events, or what was made of them."""
        if self._is_on:
            self._loop.call_soon_threadsafe(self._keep, _event(caller, call, wanted, {"count": count, **more}))

    async def stop(self) -> None:
        """Write what waits, as far as the writer takes it."""
        self._is_stopping = True
        self._wake.set()
        await self._task

    def _keep(self, event: EventIn) -> None:
        if len(self._waiting) >= MAX_WAITING:
            self._metrics.reads_dropped.inc()
            return
        self._waiting.append(event)
        self._wake.set()

    async def _write(self) -> None:
        while not self._is_stopping:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                if not await self._append([self._waiting[index] for index in range(min(_BATCH, len(self._waiting)))]):
                    if self._is_stopping:
                        self._metrics.reads_dropped.inc(len(self._waiting))
                        return
                    await asyncio.sleep(_RETRY_S)

    async def _append(self, events: list[EventIn]) -> bool:
        """Whether these, the oldest, wait no more."""
        try:
            await self._writer.append([prepare_event(event, datetime.now(UTC)) for event in events])
            self._metrics.events.inc(len(events))
        except Problem as problem:
            if isinstance(problem, Unavailable) and not isinstance(problem, OutcomeUnknown):
                return False
            logger.error("%d reads were not recorded: %s", len(events), problem.detail)
            self._metrics.reads_dropped.inc(len(events))
        for _ in events:
            self._waiting.popleft()
        return True


def _event(caller: Key, call: str, wanted: EventFilter | None, totals: dict[str, Any]) -> EventIn:
    filters = {} if wanted is None else wanted.model_dump(mode="json", exclude_defaults=True)
    if "metadata" in filters:
        filters["metadata"] = json.dumps(filters["metadata"])  # as it was sent: it may be as deep as metadata can be
    event = partial(own_event, "audit.read", caller.name, tenant=caller.tenant, timestamp=datetime.now(UTC))
    try:
        return event(metadata={"call": call, "filters": filters, **totals})
    except ValidationError:  # larger than an event may be
        return event(metadata={"call": call, "filter_names": sorted(filters), **totals})
