"""The group-commit writer: one flush at a time, and whatever arrives meanwhile goes into the next one.

A request is acknowledged only after the commit of the flush that holds its events. The queue is bounded by
count and by bytes; past it the answer is 503 at once. The writer's thread owns its connection; the event
loop owns the queue's totals; the deque between them is appended to by one and popped by the other.
"""

import asyncio
import copy
import logging
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import psycopg2
from psycopg2.extensions import connection as Connection

import partitions
from append import Appended, KeyConflict, Outcome, Prepared, flush
from db import Database, is_outage, problem_of
from problems import (
    DatabaseUnavailable,
    IdempotencyConflict,
    InternalError,
    OutcomeUnknown,
    Problem,
    QueueFull,
    ShuttingDown,
)

logger = logging.getLogger("audit.ingest")

MAX_QUEUED_EVENTS = 50_000
MAX_QUEUED_BYTES = 64 * 1024 * 1024
MAX_FLUSH_EVENTS = 2_000  # keeps the head's lock for some 50 ms; a larger batch goes alone

# The writer waits for the head longer than a holder that has stopped can live (idle_in_transaction below).
_SESSION = (
    "SET lock_timeout = '10s'; SET statement_timeout = '30s'; SET idle_in_transaction_session_timeout = '5s';"
    " SET synchronous_commit = on"
)


@dataclass(slots=True)
class _Waiting:
    """A submission and who waits for it."""

    events: Sequence[Prepared]
    size_bytes: int
    answer: "asyncio.Future[Appended]"

    @property
    def is_keyed(self) -> bool:
        return all(event.idempotency_key is not None for event in self.events)


class Writer:
    """Appends events to the log of one database. Made and used on the event loop; `stop` ends its thread."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._loop = asyncio.get_running_loop()
        self._queue: deque[_Waiting] = deque()
        self._queued_events = 0
        self._queued_bytes = 0
        self._wake = threading.Event()
        self._stopping = False
        self._connection: Connection | None = None
        self._thread = threading.Thread(target=self._run, name="audit-writer", daemon=True)
        self._thread.start()

    async def append(self, events: Sequence[Prepared], size_bytes: int) -> Appended:
        """Append the events, all or none; return when they are committed. `size_bytes` is their body's.

        Raises QueueFull and ShuttingDown at once; IdempotencyConflict, DatabaseUnavailable, SchemaNotReady,
        InternalError (nothing stored) or OutcomeUnknown later.
        """
        if self._stopping:
            raise ShuttingDown()
        if self._queued_events and (
            self._queued_events + len(events) > MAX_QUEUED_EVENTS or self._queued_bytes + size_bytes > MAX_QUEUED_BYTES
        ):
            raise QueueFull()
        waiting = _Waiting(events, size_bytes, self._loop.create_future())
        self._queued_events += len(events)
        self._queued_bytes += size_bytes
        self._queue.append(waiting)
        self._wake.set()
        try:
            return await waiting.answer
        finally:
            self._queued_events -= len(events)
            self._queued_bytes -= size_bytes

    async def stop(self) -> None:
        """Refuse what comes from now on, finish what was accepted, and close the connection."""
        self._stopping = True
        self._wake.set()
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            while piece := self._take_piece():
                results = self._flush_piece(piece)
                self._loop.call_soon_threadsafe(_answer, piece, results)
            if self._stopping and not self._queue:
                self._disconnect()
                return

    def _take_piece(self) -> list[_Waiting]:
        """The oldest submissions, as many as one flush should hold; at least one, whatever its size."""
        piece: list[_Waiting] = []
        events = 0
        while self._queue and (not piece or events + len(self._queue[0].events) <= MAX_FLUSH_EVENTS):
            piece.append(self._queue.popleft())
            events += len(piece[-1].events)
        return piece

    def _flush_piece(self, piece: Sequence[_Waiting]) -> list[Outcome | Problem]:
        """One result for each submission. What PostgreSQL refuses fails alone: the piece is halved around it."""
        try:
            return self._commit(piece)
        except Problem as problem:
            return [problem] * len(piece)
        except psycopg2.Error as error:
            self._roll_back()
            if _lacks_partition(error):
                partitions.create_coming_months(self._database)
            elif is_outage(error) or len(piece) == 1:
                return [problem_of(error)] * len(piece)
            middle = (len(piece) + 1) // 2
            return [*self._flush_piece(piece[:middle]), *(self._flush_piece(piece[middle:]) if piece[middle:] else [])]
        except Exception:
            logger.exception("a flush failed in an unforeseen way")
            self._disconnect()
            return [InternalError()] * len(piece)

    def _commit(self, piece: Sequence[_Waiting]) -> list[Outcome | Problem]:
        connection = self._connect()
        outcomes = flush(connection, [waiting.events for waiting in piece])
        try:
            with connection.cursor() as cursor:
                cursor.execute("COMMIT")
        except psycopg2.Error as error:
            if not is_outage(error):
                raise  # refused by a deferred constraint: rolled back, and known to be
            return self._resolve_unknown(piece, error)
        return list(outcomes)

    def _resolve_unknown(self, piece: Sequence[_Waiting], error: psycopg2.Error) -> list[Outcome | Problem]:
        """The connection was lost in COMMIT. Keyed events are sent again, and their keys tell what happened.

        The lock on the head, which the lost transaction held to its end, makes the second try wait for it.
        """
        logger.error("connection lost during a commit: %s", type(error).__name__)
        self._disconnect()
        results: list[Outcome | Problem] = []
        for waiting in piece:
            result = self._flush_piece([waiting])[0] if waiting.is_keyed else OutcomeUnknown()
            results.append(OutcomeUnknown() if isinstance(result, DatabaseUnavailable) else result)
        return results

    def _connect(self) -> Connection:
        if self._connection is None or self._connection.closed:
            self._connection = self._database.dedicated_connection()
            with self._connection.cursor() as cursor:
                cursor.execute(_SESSION)
        return self._connection

    def _roll_back(self) -> None:
        try:
            if self._connection is not None:
                with self._connection.cursor() as cursor:
                    cursor.execute("ROLLBACK")
        except psycopg2.Error:
            self._disconnect()

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None


def _lacks_partition(error: psycopg2.Error) -> bool:
    refused = isinstance(error, psycopg2.errors.CheckViolation)
    return refused and "no partition of relation" in (error.diag.message_primary or "")


def _answer(piece: Sequence[_Waiting], results: Sequence[Outcome | Problem]) -> None:
    """On the event loop: wake each request with its result. One whose client went away has nobody to wake."""
    for waiting, result in zip(piece, results, strict=True):
        if waiting.answer.done():
            continue
        if isinstance(result, Problem):
            waiting.answer.set_exception(copy.copy(result))  # each request raises one of its own
        elif isinstance(result, KeyConflict):
            waiting.answer.set_exception(_conflict(waiting, result))
        else:
            waiting.answer.set_result(result)


def _conflict(waiting: _Waiting, conflict: KeyConflict) -> IdempotencyConflict:
    if len(waiting.events) == 1:
        return IdempotencyConflict()
    location = f"body.{conflict.index}.idempotency_key"
    return IdempotencyConflict(errors=[{"location": location, "message": "was used before, with another event"}])
