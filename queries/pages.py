"""Any number of events in the order of their ids, as text, in pages of bounded size.

The log grows only at its end, so one number is a snapshot of it: all events up to that id. Each page is read in
a short transaction of its own: however slow the reader's client is, it holds no transaction and no connection.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from functools import partial

from sqlalchemy import ColumnElement, Connection, Select, select, text

from models import audit_events
from problems import DatabaseUnavailable
from queries.filters import conditions
from queries.reader import Reader
from schemas import EventFilter

PAGE_BYTES = 4 * 1024 * 1024  # what a page of an export aims at; it ends at twice as much
FETCH_ROWS = 250  # some 24 MB, were every event as large as jsonb can print one
MAX_WINDOW = 1_000_000  # ids that one page looks through, where it is not known how few events have them
AHEAD_EVENTS = 10_000  # of which an empty page finds out what ids they have
READ_AHEAD = 3  # pages of one export that are read at the same time

_columns = audit_events.c

_NEWEST_ID = text("SELECT first_id + size - 1 FROM ledger_head")  # one row
_OLDEST_ID = text("SELECT min(id) FROM audit_events")  # index: audit_events_pkey of each partition
# The same index, and nothing else where it was vacuumed: 1 to 2 ms.
_END_OF_NEXT = text(
    "SELECT max(id) FROM"
    " (SELECT id FROM audit_events WHERE id > :after AND id <= :until ORDER BY id LIMIT :most) AS following"
)


@dataclass(frozen=True)
class Selection:
    """Which events, up to and including the one with the id `until`, and the SQL that writes each as text."""

    wanted: EventFilter
    line: ColumnElement[str]
    until: int
    page_bytes: int = PAGE_BYTES
    read_ahead: int = READ_AHEAD  # 1: a page is read when the one before is gone


@dataclass(frozen=True)
class Page:
    """The text of some events, in pieces; all events behind `after` and up to `position` have been looked at."""

    after: int
    position: int
    count: int
    pieces: Sequence[bytes]

    def following_window(self, page_bytes: int) -> int:
        """How many ids should make a page of so many bytes, judged by this one."""
        size = sum(map(len, self.pieces))
        window = (self.position - self.after) * min(2.0, page_bytes / max(size, 1))
        return max(FETCH_ROWS, min(int(window), MAX_WINDOW))


async def read_pages(reader: Reader, selection: Selection, after: int) -> AsyncGenerator[Page, None]:
    """The selected events behind the id `after`, in order; the pages to come are read meanwhile."""
    reading: deque[tuple[int, asyncio.Task[Page]]] = deque()  # each with the end of its window
    window = FETCH_ROWS

    def start(after: int, end: int) -> tuple[int, asyncio.Task[Page]]:
        return end, asyncio.create_task(reader.scan(partial(read_page, selection, after, end)))

    try:
        while True:
            while len(reading) < selection.read_ahead and after < selection.until:
                end = min(after + window, selection.until)
                reading.append(start(after, end))
                after = end
            if not reading:
                return
            end, task = reading.popleft()
            page = await task
            if page.position < end:
                reading.appendleft(start(page.position, end))
            window = page.following_window(selection.page_bytes)
            if not page.count and after < selection.until:
                # Ids from before the ledger may lie far apart. Of everybody's events: a tenant's may be few.
                find_end = partial(_end_of_next, after, selection.until)
                window = max(window, await reader.seen_by(None).scan(find_end) - after)
            yield page
    finally:
        for _, task in reading:
            task.cancel()


def read_page(selection: Selection, after: int, end: int, connection: Connection) -> Page:
    """The selected ones of the events behind `after` and up to `end`, as far as twice `page_bytes` go.

    Raises DatabaseUnavailable where the database is a replica that has not reached the selection's end.
    Indexes: audit_events_pkey for the ids, or that of a filter which selects less. Sealed partitions outside
    the ids or the filter's time range are not touched.
    """
    statement = (
        select(_columns.id, selection.line)
        .where(_columns.id > after, _columns.id <= end, *conditions(selection.wanted))
        .order_by(_columns.id)
    )
    if read_newest_id(connection) < selection.until:
        raise DatabaseUnavailable(f"The log has not reached event {selection.until} here.")
    return _fetch(connection, statement, (after, end), 2 * selection.page_bytes)


def _end_of_next(after: int, until: int, connection: Connection) -> int:
    """Up to which id the next AHEAD_EVENTS events behind `after` go; `until` where there are none."""
    end = connection.scalar(_END_OF_NEXT, {"after": after, "until": until, "most": AHEAD_EVENTS})
    return until if end is None else int(end)


def _fetch(connection: Connection, statement: Select[int, str], ids: tuple[int, int], most_bytes: int) -> Page:
    pieces: list[bytes] = []
    count = size = 0
    # By a cursor, for the number of rows does not bound their bytes.
    with connection.execution_options(yield_per=FETCH_ROWS).execute(statement) as result:
        for rows in result.partitions():
            pieces.append("".join([line for _, line in rows]).encode())
            count += len(rows)
            size += len(pieces[-1])
            if size >= most_bytes:
                return Page(ids[0], rows[-1][0], count, pieces)
    return Page(*ids, count, pieces)


def read_newest_id(connection: Connection) -> int:
    """The newest event's id; all events up to it can be read."""
    newest: int = connection.scalars(_NEWEST_ID).one()
    return newest


def read_bounds(connection: Connection) -> tuple[int, int]:
    """The ids of the oldest and the newest event; of an empty log 1 and 0."""
    newest = read_newest_id(connection)
    return connection.scalar(_OLDEST_ID) or newest + 1, newest
