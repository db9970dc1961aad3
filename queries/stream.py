"""The live stream: each listener gets the events that meet its filters, in the order of ids, from one poll for all.

Ids are dense and in the order of commits, so whoever follows them misses nothing. A listener that is behind catches
up in pages, joins the feed, and then costs no query: PostgreSQL says of each new event which filters it meets.
"""

import asyncio
import logging
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from prometheus_client import Gauge
from sqlalchemy import (
    ARRAY,
    BindParameter,
    ColumnElement,
    Connection,
    Integer,
    Select,
    and_,
    bindparam,
    func,
    select,
    true,
)
from sqlalchemy.dialects.postgresql import array
from sqlalchemy.sql.visitors import replacement_traverse

from models import audit_events
from problems import DatabaseUnavailable, Problem, ShuttingDown, TooManyReaders, TooManyStreams
from queries.filters import conditions
from queries.lines import SSE_FRAME
from queries.pages import Selection, read_newest_id, read_pages
from queries.reader import Reader
from schemas import EventFilter

logger = logging.getLogger("audit.stream")

MAX_LISTENERS = 10_000  # in one process
MAX_NEWS = 1_000  # events a poll
MAX_WAITING_BYTES = 1024 * 1024  # for one listener that does not take them; events are shared between listeners
CATCH_UP_BYTES = 64 * 1024  # what a page aims at: there may be thousands of listeners
MIN_PAUSE_S, MAX_PAUSE_S = 0.05, 1.0  # between polls: short while there is news, longer the longer there is none
HEARTBEAT_S = 15
HEARTBEAT = b": heartbeat\n"

_columns = audit_events.c


@dataclass
class _Group:
    """The listeners that want the same events."""

    wanted: EventFilter
    tenant: str | None  # the one that its listeners are bound to
    listeners: set["Listener"] = field(default_factory=set)


@dataclass(frozen=True)
class _News:
    """Events as (id, frame, tenant, numbers of the filters met, from 1), and the id up to which they go."""

    events: Sequence[tuple[int, str, str | None, list[int]]]
    position: int


class Feed:
    """Follows the log for all listeners of this process, while there are any."""

    def __init__(self, reader: Reader, gauge: Gauge, most_a_key: int) -> None:
        self._reader = reader
        self._gauge = gauge
        self._most_a_key = most_a_key
        self._open: Counter[str] = Counter()  # by the id of the key
        self._groups: dict[tuple[str | None, str], _Group] = {}
        self._joining: list[tuple[Listener, asyncio.Future[int]]] = []
        self._listeners: set[Listener] = set()
        self._position = 0
        self._wake = asyncio.Event()
        self._is_stopping = False
        self._task = asyncio.create_task(self._follow())

    async def listen(self, wanted: EventFilter, after: int | None, key_id: str, tenant: str | None) -> "Listener":
        """A listener that gets what comes behind the event `after`, or from now on. It is to be closed.

        `tenant`: the one that the caller's key is bound to, if any; the filter is, too.
        Raises TooManyStreams, TooManyReaders or ShuttingDown.
        """
        if self._is_stopping:
            raise ShuttingDown()
        if len(self._listeners) >= MAX_LISTENERS:
            raise TooManyReaders("As many streams are open as this process serves at a time.")
        if self._open[key_id] >= self._most_a_key:
            raise TooManyStreams()
        self._open[key_id] += 1  # before anybody else gets a turn
        try:
            newest = await self._reader.scan(read_newest_id)
        except BaseException:
            self._forget(key_id)
            raise
        listener = Listener(self, self._reader, wanted, newest if after is None else after, key_id, tenant)
        self._listeners.add(listener)
        self._gauge.inc()
        return listener

    async def join(self, listener: "Listener") -> int:
        """From the next poll on the listener is told of new events: of those behind the id that this returns."""
        joined: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._joining.append((listener, joined))
        self._wake.set()
        return await joined

    def leave(self, listener: "Listener") -> None:
        if listener in self._listeners:
            self._listeners.discard(listener)
            self._forget(listener.key_id)
            self._gauge.dec()
        group = self._groups.get(listener.key)
        if group is not None:
            group.listeners.discard(listener)
            if not group.listeners:
                del self._groups[listener.key]

    def _forget(self, key_id: str) -> None:
        self._open[key_id] -= 1
        if not self._open[key_id]:
            del self._open[key_id]

    def end_streams(self) -> None:
        """The service stops: streams end now, so that nobody waits for them."""
        self._is_stopping = True
        for listener in self._listeners:
            listener.end()

    def stop(self) -> None:
        self.end_streams()
        self._task.cancel()

    async def _follow(self) -> None:
        pause_s = MIN_PAUSE_S
        while True:
            if not self._groups and not self._joining:
                await self._wake.wait()
            self._wake.clear()
            try:
                pause_s = MIN_PAUSE_S if await self._poll() else min(2 * pause_s, MAX_PAUSE_S)
            except Problem as problem:
                logger.warning("the stream waits: %s", problem.detail)
                pause_s = MAX_PAUSE_S
            except Exception:
                logger.exception("a poll of the stream failed in an unforeseen way")
                pause_s = MAX_PAUSE_S
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._wake.wait()

    async def _poll(self) -> bool:
        """Tell everybody what is new; return whether anything was."""
        if not self._groups:
            self._position = await self._reader.scan(read_newest_id)
        self._admit()
        bound = [group for group in self._groups.values() if group.tenant is not None]
        unbound = [group for group in self._groups.values() if group.tenant is None]
        news = await self._read(unbound, None)
        if bound and news.position > self._position:
            news_of_tenants = await self._read(bound, news.position)
            _tell(bound, news_of_tenants)
        _tell(unbound, news)
        had_news = news.position > self._position
        self._position = news.position
        return had_news

    async def _read(self, groups: Sequence[_Group], until: int | None) -> _News:
        """What is new for these groups, of which all or none are bound to tenants."""
        wanted = [group.wanted for group in groups]
        tenants = {group.tenant for group in groups} or {None}
        return await self._reader.seen_by(*tenants).scan(partial(_read_news, self._position, until, wanted))

    def _admit(self) -> None:
        """Between two polls, so that no event falls between what a listener catches up with and what it is told."""
        for listener, joined in self._joining:
            if not joined.done():
                self._groups.setdefault(listener.key, _Group(listener.wanted, listener.tenant)).listeners.add(listener)
                joined.set_result(self._position)
        self._joining.clear()


class Listener:
    """One open stream. Events behind `position` are still to come."""

    def __init__(
        self, feed: Feed, reader: Reader, wanted: EventFilter, position: int, key_id: str, tenant: str | None
    ) -> None:
        self.wanted = wanted
        self.key_id = key_id
        self.tenant = tenant
        self.key = tenant, wanted.model_dump_json()
        self.position = position
        self.count = 0  # of events handed over
        self.cut: Callable[[], None] = self.end  # what to do with one that does not take what it is told
        self._feed = feed
        self._reader = reader
        self._waiting: deque[tuple[int, bytes]] = deque()
        self._waiting_bytes = 0
        self._is_over = False
        self._news = asyncio.Event()

    async def frames(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events, and a comment now and then, until the listener is ended."""
        yield HEARTBEAT
        while (head := await self._reader.scan(read_newest_id)) > self.position + MAX_NEWS:
            async for frames in self._catch_up(head):
                yield frames
            if self._is_over:
                return
        async for frames in self._catch_up(await self._feed.join(self)):
            yield frames
        while not self._is_over:
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    await self._news.wait()
            except TimeoutError:
                yield HEARTBEAT
                continue
            if frames := self._take():
                yield frames

    def tell(self, event_id: int, frame: bytes) -> None:
        """Keep the event until it is sent; cut a listener for which too much would have to be kept.

        Whatever it was told before is ignored: a poll that failed half-way tells it again.
        """
        if event_id <= (self._waiting[-1][0] if self._waiting else self.position):
            return
        self._waiting.append((event_id, frame))
        self._waiting_bytes += len(frame)
        self._news.set()
        if self._waiting_bytes > MAX_WAITING_BYTES:
            logger.warning("a listener was cut: it does not take what it asked for")
            self.close()
            self.cut()

    def end(self) -> None:
        """End the stream once what is being sent is sent."""
        self._is_over = True
        self._news.set()

    def close(self) -> None:
        self.end()
        self._waiting.clear()
        self._feed.leave(self)

    async def _catch_up(self, until: int) -> AsyncGenerator[bytes, None]:
        selection = Selection(self.wanted, SSE_FRAME, until, page_bytes=CATCH_UP_BYTES, read_ahead=1)
        async with aclosing(read_pages(self._reader.seen_by(self.tenant), selection, self.position)) as pages:
            async for page in pages:
                self.position = page.position
                self.count += page.count
                yield b"".join(page.pieces) or HEARTBEAT
                if self._is_over:
                    return

    def _take(self) -> bytes:
        frames = [frame for event_id, frame in self._waiting if event_id > self.position]
        if self._waiting:
            self.position = max(self.position, self._waiting[-1][0])
        self._waiting.clear()
        self._waiting_bytes = 0
        self._news.clear()
        self.count += len(frames)
        return b"".join(frames)


def _tell(groups: Sequence[_Group], news: _News) -> None:
    for event_id, frame, tenant, numbers in news.events:
        encoded = frame.encode()
        for group in (groups[number - 1] for number in numbers):
            if group.tenant is None or group.tenant == tenant:
                for listener in tuple(group.listeners):  # who is cut leaves
                    listener.tell(event_id, encoded)


def _read_news(after: int, until: int | None, wanted: Sequence[EventFilter], connection: Connection) -> _News:
    """What came behind the id `after`, up to `until` where that is given, and meets any of the filters.

    At the most MAX_NEWS events are looked at. Raises DatabaseUnavailable where `until` is not here yet.
    """
    newest = read_newest_id(connection)
    if until is not None and newest < until:  # of several standbys, one that is behind
        raise DatabaseUnavailable(f"The log has not reached event {until} here.")
    end = min(newest, after + MAX_NEWS) if until is None else until
    if end <= after:
        return _News([], after)
    if not wanted:
        return _News([], end)
    rows = connection.execute(_matching(after, end, wanted))
    return _News([(event_id, frame, tenant, numbers) for event_id, frame, tenant, numbers in rows], end)


def _matching(after: int, end: int, wanted: Sequence[EventFilter]) -> Select[int, str, str | None, list[int]]:
    """The events, each with the numbers of the filters that it meets. Index: audit_events_pkey."""
    filters = array([_with_own_parameters(and_(true(), *conditions(each))) for each in wanted])
    numbers = func.array_positions(filters, True, type_=ARRAY(Integer)).label("numbers")
    # OFFSET 0 keeps the two levels apart: only what somebody wants is written as text.
    events = select(audit_events, numbers).where(_columns.id > after, _columns.id <= end).offset(0).subquery()
    columns = events.c.id, SSE_FRAME, events.c.tenant, events.c.numbers
    return select(*columns).where(func.cardinality(events.c.numbers) > 0).order_by(events.c.id)


def _with_own_parameters(condition: ColumnElement[bool]) -> ColumnElement[bool]:
    """The condition, under names of parameters that no other filter in the statement uses."""

    def rename(element: Any, **_: Any) -> Any:
        is_parameter = isinstance(element, BindParameter)
        return bindparam(None, element.value, element.type, unique=True) if is_parameter else None

    return replacement_traverse(condition, {}, rename)
