"""The group-commit writer: one flush at a time, and whatever arrives meanwhile goes into the next one.

A request is acknowledged only after the commit of the flush that holds its events. What waits is bounded by
count, and by bytes from the first that is read, of which one key has three quarters at the most; past it the answer
is 503 at once. The writer's thread owns its connection; the event loop owns the totals; the deque between them is
appended to by one and popped by the other.
"""

import asyncio
import copy
import logging
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Self

import psycopg2
from psycopg2.extensions import connection as Connection

from db import Database, is_outage, problem_of
from housekeeping import partitions
from ingest.append import (
    Appended,
    KeyConflict,
    Outcome,
    Prepared,
    Submission,
    append_submissions,
    conflict_at,
    submission_of,
)
from problems import DatabaseUnavailable, InternalError, OutcomeUnknown, Problem, QueueFull, ShuttingDown

logger = logging.getLogger("audit.ingest")

MAX_QUEUED_EVENTS = 20_000
MAX_HELD_BYTES = 32 * 1024 * 1024  # of bodies, from their first byte to their answer; parsed they take six times that
# Keep the head's lock for some 30 to 70 ms; of 300 flushes, of five kinds of events, the longest took 93. A larger
# batch goes alone.
MAX_FLUSH_EVENTS = 2_000
MAX_FLUSH_WEIGHT = 1024 * 1024

# A flush whose outcome is unknown is sent again until it is known, for as long as a client may be kept waiting.
_RESOLVE_S = 5.0
_RESOLVE_INTERVAL_S = 0.1
# Clients that were just answered send their next event at once: a flush waits for as many as the last one had, so
# that it does not begin with the first of them and leave the rest behind. It waits for no longer than half of what
# that one took, and never for longer than this.
_MAX_LINGER_S = 0.005

# After a pause the connection is tried before a flush is entrusted to it, and the log's end is read anew.
_IDLE_S = 1.0

# lock_timeout: how long others may hold the head. The plans: append_events() is planned once, by its indexes, for
# statistics of an empty table would have it read a full one whole; and compiling it would cost more than it takes.
_SESSION = (
    "SET lock_timeout = '10s'; SET statement_timeout = '30s'; SET synchronous_commit = on;"
    " SET plan_cache_mode = force_generic_plan; SET enable_seqscan = off; SET jit = off"
)
_NEXT_ID = "SELECT first_id + size FROM ledger_head"
_BACKEND = "SELECT pid, backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid()"
# False where it is still there after so many ms; no row where it is gone already.
_END_BACKEND = "SELECT pg_terminate_backend(pid, %s) FROM pg_stat_activity WHERE (pid, backend_start) = (%s, %s)"
_END_BACKEND_MS = 2_000


Settle = Callable[[Appended | Problem], None]


@dataclass(slots=True)
class _Waiting:
    """A submission and who is told what became of it."""

    submission: Submission
    settle: Settle


class Room:
    """A context: called in it with the size of what is about to be held, raises QueueFull where that is too much."""

    __slots__ = ("_charged", "_held", "_is_kept", "_key_id", "_writer")

    def __init__(self, writer: "Writer", key_id: str) -> None:
        self._writer = writer
        self._key_id = key_id
        self._held = 0
        self._charged = 0
        self._is_kept = False

    def __enter__(self) -> Self:
        return self

    def __call__(self, size_bytes: int) -> None:
        if self._writer.held_bytes + size_bytes > MAX_HELD_BYTES // 4:
            self._charge(size_bytes)
        self._writer.held_bytes += size_bytes
        self._held += size_bytes

    def _charge(self, size_bytes: int) -> None:
        """Beyond the first quarter, which is anybody's, count for whom: bodies that trickle in take half at most."""
        charged = self._writer.charged_bytes.get(self._key_id, 0) + size_bytes
        if charged > MAX_HELD_BYTES // 2:
            raise QueueFull("This key sends more at the same time than one key may. Nothing was stored; try again.")
        if self._writer.held_bytes + size_bytes > MAX_HELD_BYTES:
            raise QueueFull()
        self._writer.charged_bytes[self._key_id] = charged
        self._charged += size_bytes

    def __exit__(self, *_: object) -> None:
        if not self._is_kept:
            self.release()

    def keep(self) -> None:
        """Leaving the context releases nothing: release() will."""
        self._is_kept = True

    def release(self) -> None:
        """Nothing is held any more."""
        self._writer.held_bytes -= self._held
        if self._charged:
            charged = self._writer.charged_bytes.pop(self._key_id) - self._charged
            if charged:
                self._writer.charged_bytes[self._key_id] = charged


class Writer:
    """Appends events to the log of one database. Made and used on the event loop; `stop` ends its thread."""

    def __init__(self, database: Database, owner: Database) -> None:
        self._database = database
        self._owner = owner  # who makes a month that is missing
        self._loop = asyncio.get_running_loop()
        self._queue: deque[_Waiting] = deque()
        self._queued_events = 0
        self.held_bytes = 0
        self.charged_bytes: dict[str, int] = {}  # of those, by key
        self._wake = threading.Event()  # set where the thread has something to do
        self._enough = 1  # submissions in the queue, for it to be woken
        self._stopping = False
        self._connection: Connection | None = None
        self._backend: tuple[int, datetime] | None = None  # the server's process at the other end
        self._next_id = 0  # the log's next id when it was last heard of, at this moment:
        self._heard_at = 0.0
        self._thread = threading.Thread(target=self._run, name="audit-writer", daemon=True)
        self._thread.start()

    def room(self, key_id: str) -> "Room":
        """What one request's body may take of the bytes that are bounded, until it is answered."""
        return Room(self, key_id)

    async def append(self, events: Sequence[Prepared]) -> Appended:
        """Append the events, all or none; return when they are committed.

        Raises what submit() raises, and the problems that it settles with.
        """
        answer: asyncio.Future[Appended] = self._loop.create_future()
        self.submit(events, partial(_settle_future, answer))
        return await answer

    def submit(self, events: Sequence[Prepared], settle: Settle) -> None:
        """Take the events; settle() is called on the event loop once they are committed, all of them, or none is.

        Raises QueueFull, ShuttingDown and IdempotencyConflict at once. Settles with IdempotencyConflict,
        DatabaseUnavailable, SchemaNotReady, InternalError (nothing stored) or OutcomeUnknown.
        """
        if self._stopping:
            raise ShuttingDown()
        if self._queued_events and self._queued_events + len(events) > MAX_QUEUED_EVENTS:
            raise QueueFull()
        self._queue.append(_Waiting(submission_of(events), settle))
        self._queued_events += len(events)
        if len(self._queue) >= self._enough and not self._wake.is_set():
            self._wake.set()

    async def stop(self) -> None:
        """Refuse what comes from now on, finish what was accepted, and close the connection."""
        self._stopping = True
        self._wake.set()
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        expected = 0
        took_s = 0.0
        while self._queue or not self._stopping:
            self._await_submissions(1, None)
            self._await_submissions(expected, min(took_s / 2, _MAX_LINGER_S))
            if not self._queue:
                continue  # woken for what was in the last flush already, or to stop
            piece = self._take_piece()
            started = time.monotonic()
            self._loop.call_soon_threadsafe(self._tell, piece, self._results_of(piece))
            took_s = time.monotonic() - started
            expected = len(piece)
            del piece  # and with it those whom it told
        self._disconnect()

    def _await_submissions(self, enough: int, timeout_s: float | None) -> None:
        """Return when so many are in the queue, when the time is over, or at once when told to stop."""
        self._wake.clear()
        self._enough = enough
        if len(self._queue) < enough and not self._stopping:  # what comes after this look wakes us
            self._wake.wait(timeout_s)

    def _tell(self, piece: Sequence[_Waiting], results: Sequence[Outcome | Problem]) -> None:
        """On the event loop: what became of each submission. One who fails to hear it must not keep it from others."""
        for waiting, result in zip(piece, results, strict=True):
            self._queued_events -= len(waiting.submission.places)
            try:
                waiting.settle(_as_settled(result))
            except Exception:
                logger.exception("an answer could not be given")

    def _take_piece(self) -> list[_Waiting]:
        """The oldest submissions, as many as one flush should hold; at least one, whatever its size.

        A key comes once in a flush: what repeats it waits for the next one, and finds it stored or not.
        """
        piece: list[_Waiting] = []
        events = weight = 0
        keys: set[tuple[str, str]] = set()
        while self._queue:
            submission = self._queue[0].submission
            events += len(submission.events)
            weight += submission.weight
            is_full = events > MAX_FLUSH_EVENTS or weight > MAX_FLUSH_WEIGHT
            if piece and (is_full or not keys.isdisjoint(submission.keys)):
                break
            piece.append(self._queue.popleft())
            keys |= submission.keys
        return piece

    def _results_of(self, piece: Sequence[_Waiting], retried_from: int | None = None) -> list[Outcome | Problem]:
        """One result for each submission, whatever happens: nobody waits for ever."""
        try:
            return self._flush_piece(piece, retried_from)
        except Problem as problem:
            return [problem] * len(piece)
        except Exception:
            logger.exception("a flush failed in an unforeseen way")
            self._disconnect()
            return [InternalError()] * len(piece)

    def _flush_piece(self, piece: Sequence[_Waiting], retried_from: int | None) -> list[Outcome | Problem]:
        try:
            return self._append(piece, retried_from)
        except psycopg2.Error as error:
            if _is_lost(error):
                return self._resolve(piece, self._next_id if retried_from is None else retried_from)
            if is_outage(error):
                raise problem_of(error) from None
            return self._isolate(piece, error, retried_from)

    def _isolate(
        self, piece: Sequence[_Waiting], refusal: psycopg2.Error, retried_from: int | None
    ) -> list[Outcome | Problem]:
        """What PostgreSQL refuses fails alone: the piece is halved around it. A month is missing for all of it."""
        if len(piece) == 1 or _lacks_partition(refusal):
            raise problem_of(refusal) from None
        middle = len(piece) // 2
        return [*self._results_of(piece[:middle], retried_from), *self._results_of(piece[middle:], retried_from)]

    def _append(self, piece: Sequence[_Waiting], retried_from: int | None) -> list[Outcome | Problem]:
        """One flush, and once more where a month was missing that can be made."""
        try:
            return self._append_once(piece, retried_from)
        except psycopg2.Error as error:
            if not _lacks_partition(error):
                raise
            partitions.create_coming_months(self._owner)
            return self._append_once(piece, retried_from)

    def _append_once(self, piece: Sequence[_Waiting], retried_from: int | None) -> list[Outcome | Problem]:
        submissions = [waiting.submission for waiting in piece]
        outcomes, self._next_id = append_submissions(self._require_connection(), submissions, retried_from)
        self._heard_at = time.monotonic()
        return list(outcomes)

    def _resolve(self, piece: Sequence[_Waiting], retried_from: int) -> list[Outcome | Problem]:
        """The connection was lost with a flush in it. Send it again: append_events() finds what it did store.

        Not before the first one has ended for sure: the server may go on with it, long after we lost it. Where the
        rows are refused then, they were not stored before, for those that were are not stored again.
        """
        logger.error("connection lost during a flush")
        lost = [self._backend]
        deadline = time.monotonic() + _RESOLVE_S
        while True:
            self._disconnect()
            try:
                self._end_backends(self._require_connection(), lost)
                return self._append(piece, retried_from)
            except (psycopg2.DataError, psycopg2.IntegrityError) as error:
                return self._isolate(piece, error, retried_from)
            except (psycopg2.Error, Problem) as error:
                if time.monotonic() > deadline:
                    logger.error("the outcome of a flush stays unknown: %s", type(error).__name__)
                    return [OutcomeUnknown()] * len(piece)
                if self._connection is not None:
                    lost.append(self._backend)
            time.sleep(_RESOLVE_INTERVAL_S)

    def _end_backends(self, connection: Connection, lost: Sequence[tuple[int, datetime] | None]) -> None:
        """Make sure that none of these server processes is left; raises DatabaseUnavailable while one is."""
        with connection.cursor() as cursor:
            for backend in filter(None, lost):
                cursor.execute(_END_BACKEND, (_END_BACKEND_MS, *backend))
                if cursor.fetchone() == (False,):
                    raise DatabaseUnavailable()

    def _require_connection(self) -> Connection:
        """A connection that answered within the last second; raises Problem before anything is sent."""
        if self._connection is not None and _has_ended(self._connection):
            self._disconnect()
        if self._connection is not None and time.monotonic() - self._heard_at > _IDLE_S:
            try:
                self._hear(self._connection)
            except psycopg2.Error:
                self._disconnect()
        if self._connection is None:
            connection = self._database.dedicated_connection()
            try:
                with connection.cursor() as cursor:
                    cursor.execute(_SESSION)
                    cursor.execute(_BACKEND)
                    self._backend = cursor.fetchone()
                self._hear(connection)
            except psycopg2.Error as error:
                connection.close()
                raise problem_of(error) from None
            self._connection = connection
        return self._connection

    def _hear(self, connection: Connection) -> None:
        with connection.cursor() as cursor:
            cursor.execute(_NEXT_ID)
            (self._next_id,) = cursor.fetchone() or (0,)
        self._heard_at = time.monotonic()

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None


def _has_ended(connection: Connection) -> bool:
    """Whether the server has closed it: nothing else is there to read while nothing was asked."""
    if connection.closed:
        return True
    poll = select.poll()  # select() takes no descriptor beyond 1,023
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(0))


def _is_lost(error: psycopg2.Error) -> bool:
    """Whether nobody knows if the statement was carried out: PostgreSQL did not get to say that it was not.

    A crash shutdown may interrupt a commit that is durable already; an administrator's cannot.
    """
    if isinstance(error, psycopg2.errors.CrashShutdown):
        return True
    return error.pgcode is None and is_outage(error)


def _lacks_partition(error: psycopg2.Error) -> bool:
    refused = isinstance(error, psycopg2.errors.CheckViolation)
    return refused and "no partition of relation" in (error.diag.message_primary or "")


def _as_settled(result: Outcome | Problem) -> Appended | Problem:
    if isinstance(result, Problem):
        return copy.copy(result)  # each request raises one of its own
    return conflict_at(result.index) if isinstance(result, KeyConflict) else result


def _settle_future(answer: "asyncio.Future[Appended]", result: Appended | Problem) -> None:
    if answer.done():  # its client went away
        return
    if isinstance(result, Problem):
        answer.set_exception(result)
    else:
        answer.set_result(result)
