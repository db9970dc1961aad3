"""Pages of events by filter: keyset pages over (timestamp, id), so page 10,000 costs what page 1 costs.

A page is a walk: an index that has the order is read from the cursor on until the page is full. Where another
index could find a rare value sooner, the walk looks at so many events at the most; if the page is not full by
then, it is searched for instead, in one stretch of time after the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, Literal

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    FromClause,
    Row,
    Select,
    Text,
    and_,
    any_,
    bindparam,
    cast,
    func,
    or_,
    select,
    tuple_,
)
from sqlalchemy.dialects.postgresql import array

from models import audit_events
from queries.cursors import Position, decode_cursor, encode_cursor
from queries.filters import PATTERN_FIELDS, conditions, is_prefix, time_conditions, values_of
from queries.lines import EVENT_JSON
from queries.reader import DIALECT, Reader
from queries.seals import Seal, recorded_condition, recorded_values
from schemas import EventFilter, EventListing

WALKED_EVENTS = 5_000  # takes 2 ms; of several walks 4, for they are numbered
DENSE_EVENTS = 20_000  # found in one stretch: sorting more takes longer than looking at less
FETCHED_EVENTS = 250  # at a time, for what is fetched is held whole: see pages.FETCH_ROWS
PAGE_LENGTH = 4 * 1024 * 1024  # characters of JSON with which a page ends
_FIRST_STRETCH = timedelta(days=30)
_SHORTEST_STRETCH = timedelta(minutes=1)
_AFTER: Position = (datetime.max, 0)  # any: a statement's text has parameters, not values
_EARLIEST, _LATEST = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)

_columns = audit_events.c


@dataclass(frozen=True)
class Page:
    """Events as JSON objects in the order asked for, and the cursor of the next page, if there is one."""

    events: Sequence[str]
    next_cursor: str | None


def list_events(reader: Reader, wanted: EventListing) -> Page:
    """A page of events, newest first unless oldest first is asked for; raises InvalidCursor.

    It ends before it has as many as are wanted once it has PAGE_LENGTH.
    """
    events: list[Row[Any]] = []
    length, after, more = 0, decode_cursor(wanted), True
    while more and len(events) < wanted.limit and length < PAGE_LENGTH:
        part = wanted.model_copy(update={"limit": min(FETCHED_EVENTS, wanted.limit - len(events))})
        rows = _read(reader, part, after)
        taken = _take(rows[: part.limit], PAGE_LENGTH - length)
        more = len(rows) > len(taken)
        events += taken
        length += sum(len(row.json) for row in taken)
        after = (events[-1].timestamp, events[-1].id) if events else None
    next_cursor = encode_cursor(wanted, after) if more and after is not None else None
    return Page([row.json for row in events], next_cursor)


def _take(rows: Sequence[Row[Any]], room: int) -> Sequence[Row[Any]]:
    """The first rows, up to the one that fills the room."""
    for number, row in enumerate(rows, 1):
        room -= len(row.json)
        if room <= 0:
            return rows[:number]
    return rows


def find_edge(reader: Reader, wanted: EventFilter, order: Literal["asc", "desc"]) -> datetime | None:
    """The timestamp of the earliest (asc) or latest (desc) of the events, if there is any."""
    listing = EventListing.model_construct(**dict(wanted), limit=1, order=order)
    rows = _read(reader, listing, None)
    return rows[0].timestamp if rows else None


def _read(reader: Reader, wanted: EventListing, after: Position | None) -> Sequence[Row[Any]]:
    """The events of the page, and one more where there is one."""
    is_bounded = can_search(wanted)
    rows = _walk(reader, wanted, after, is_bounded)
    if not is_bounded:
        return rows
    is_cut = any(row.is_cut for row in rows) if _has_several_walks(wanted) else len(rows) <= wanted.limit
    return _search(reader, wanted, after) if is_cut else rows


def _walked_field(wanted: EventListing) -> str | None:
    """The field whose index has the order, for each of its values."""
    for name in PATTERN_FIELDS:
        patterns = getattr(wanted, name)
        if patterns and not any(map(is_prefix, patterns)):
            return name
    return None if wanted.tenant is None else "tenant"


def _has_several_walks(wanted: EventListing) -> bool:
    name = _walked_field(wanted)
    return name in PATTERN_FIELDS and len(getattr(wanted, name)) > 1


def can_search(wanted: EventListing) -> bool:
    """Whether an index other than the walked one selects by these filters."""
    walked = _walked_field(wanted)
    indexed = ("metadata", "tenant", *PATTERN_FIELDS)
    return any(getattr(wanted, name) for name in indexed if name != walked)


def _walk(reader: Reader, wanted: EventListing, after: Position | None, is_bounded: bool) -> Sequence[Row[Any]]:
    """The page from an index in its order; bounded, it looks at WALKED_EVENTS or little more.

    Of several walks each that was cut short has a row there that `is_cut` and is none of the page's: what follows it
    has gaps.
    """
    return reader.walk(*walk_statement(wanted, after, is_bounded, reader.seals()))


def walk_statement(
    wanted: EventListing, after: Position | None, is_bounded: bool, seals: Sequence[Seal]
) -> tuple[str, dict[str, Any]]:
    """The SQL of a walk, and its parameters by name."""
    values = values_of(wanted) | {"limit": wanted.limit + 1}
    walked = _walked_field(wanted)
    if walked == "tenant":
        values["tenant"] = [wanted.tenant]
    start, end = _time_range(wanted, after)
    if start is not None or end is not None:
        values |= recorded_values(seals, lambda seal: seal.meets(start, end))
    if after is not None:
        values |= {"after_timestamp": after[0], "after_id": after[1]}
    if is_bounded:
        walks = 1 if walked is None else len(values[walked])
        values |= {"most": max(WALKED_EVENTS // walks, wanted.limit + 1) + 1}  # the last tells that there are more
    return _walk_sql(_Shape(wanted.order, tuple(values), _has_several_walks(wanted), wanted)), values


def _time_range(wanted: EventListing, after: Position | None) -> tuple[datetime | None, datetime | None]:
    """Within what, both ends included, the timestamps of a page lie: a cursor has left the time before it behind."""
    start, end = wanted.start, wanted.end
    if after is None:
        return start, end
    moment, _ = after
    return (start, min(end or moment, moment)) if wanted.order == "desc" else (max(start or moment, moment), end)


@dataclass(frozen=True)
class _Shape:
    """What of a listing makes its statement, so that the next one of the same shape is spared the making."""

    order: str
    parameters: tuple[str, ...]
    has_several_walks: bool
    example: EventListing = field(compare=False)

    @property
    def is_bounded(self) -> bool:
        return "most" in self.parameters

    @property
    def after(self) -> Position | None:
        return _AFTER if "after_id" in self.parameters else None


@lru_cache(maxsize=1000)
def _walk_sql(shape: _Shape) -> str:
    """The page from an index in its order.

    Indexes: audit_events_actor_timestamp_id, audit_events_event_type_timestamp_id,
    audit_events_tenant_timestamp_id, else audit_events_timestamp_id.
    Each value of the walked field has a walk of its own, and they are merged: one `= ANY` of all would lose the order.
    """
    wanted = shape.example
    name = _walked_field(wanted)
    if name is None:
        events: FromClause = _walk_one(shape, wanted, select(audit_events), ()).subquery("event")
        return str(_page(wanted, events).compile(dialect=DIALECT))
    given = func.unnest(cast(bindparam(name), ARRAY(Text))).table_valued("value").render_derived("given")
    # `= ANY` of one, and sorted by it: a plain `=` would let PostgreSQL read audit_events_timestamp_id and filter,
    # which looks at everything where the value is rarer than it thinks.
    walked = select(audit_events).where(_columns[name] == any_(array([given.c.value]))).correlate(given)
    others = wanted.model_copy(update={name: None if name == "tenant" else []})
    events = _walk_one(shape, others, walked, (name,)).lateral("event")
    return str(_page(wanted, events, given).compile(dialect=DIALECT))


def _walk_one(shape: _Shape, wanted: EventListing, walked: Select[Any], sorted_by: tuple[str, ...]) -> Select[Any]:
    """The first events that meet all conditions; bounded, among the first `most` of the walked ones.

    Of several walks the `most`th event comes, too, and `is_cut`, whatever it meets: others may go on behind it, and
    this one does not. To number the events costs as much as to walk to them, and one walk has no need of it.
    """
    in_range = [*_beyond(wanted, shape.after), *time_conditions(wanted)]
    if in_range:
        in_range.append(recorded_condition(_columns.recorded_at))
    walked = walked.where(*in_range)
    if not shape.is_bounded:
        return _in_order(wanted, walked.where(*conditions(wanted)), _columns, sorted_by)
    looked_at = _in_order(wanted, walked, _columns, sorted_by).limit(bindparam("most")).lateral("looked_at")
    if not shape.has_several_walks:
        return _in_order(wanted, select(looked_at).where(*conditions(wanted, looked_at.c)), looked_at.c, sorted_by)
    number = func.row_number().over(order_by=_sort_key(wanted, looked_at.c, sorted_by))
    numbered = select(looked_at, (number == bindparam("most")).label("is_cut")).lateral("numbered")
    found = select(numbered).where(or_(numbered.c.is_cut, and_(*conditions(wanted, numbered.c))))
    return _in_order(wanted, found, numbered.c, sorted_by)


def _page(wanted: EventListing, events: FromClause, *others: Any) -> Select[Any]:
    """What a page needs of these events."""
    columns = [events.c.timestamp, events.c.id, EVENT_JSON.label("json")]
    columns += [events.c.is_cut] if "is_cut" in events.c else []
    return _in_order(wanted, select(*columns).select_from(*others, events), events.c)


def _in_order(
    wanted: EventListing, statement: Select[Any], columns: Any, sorted_by: tuple[str, ...] = ()
) -> Select[Any]:
    """Sorted as asked for, with one event more than the page holds, which tells whether there is a next one."""
    return statement.order_by(*_sort_key(wanted, columns, sorted_by)).limit(bindparam("limit", wanted.limit + 1))


def _sort_key(wanted: EventListing, columns: Any, sorted_by: tuple[str, ...]) -> list[ColumnElement[Any]]:
    """The order asked for, before that the columns that an index begins with.

    They ascend where timestamp and id descend.
    """
    is_newest_first = wanted.order == "desc"
    leading = [columns[name].asc() if is_newest_first else columns[name].desc() for name in sorted_by]
    return leading + [column.desc() if is_newest_first else column.asc() for column in (columns.timestamp, columns.id)]


def _beyond(wanted: EventListing, after: Position | None) -> list[ColumnElement[bool]]:
    if after is None:
        return []
    key = tuple_(_columns.timestamp, _columns.id)
    position = tuple_(bindparam("after_timestamp", after[0]), bindparam("after_id", after[1]))
    return [key < position if wanted.order == "desc" else key > position]


def _search(reader: Reader, wanted: EventListing, after: Position | None) -> list[Row[Any]]:
    """The page, where its events are rare: stretch by stretch of time, each twice as long as the one before.

    A stretch that holds very many after all is tried again in shorter ones, and walked where it gets too short.
    """
    found: list[Row[Any]] = []
    length, remaining = _FIRST_STRETCH, wanted
    while len(found) <= wanted.limit and (nearest := reader.search(_nearest(remaining, after))):
        stretch, behind = _split(remaining, nearest[0].timestamp, length)
        rows = reader.search(_find(stretch, after))
        if rows and rows[0].matches > DENSE_EVENTS:
            if length > _SHORTEST_STRETCH:
                length /= 8
                continue
            rows = list(_walk(reader, stretch, after, is_bounded=False))
        found += rows
        length, remaining = length * 2, behind
    return found[: wanted.limit + 1]


def _nearest(wanted: EventListing, after: Position | None) -> Select[Any]:
    """Where to go on: no stretch of time is searched that is empty. Index: audit_events_timestamp_id."""
    statement = select(_columns.timestamp).where(*_beyond(wanted, after), *time_conditions(wanted))
    return _in_order(wanted, statement, _columns).limit(1)


def _split(wanted: EventListing, nearest: datetime, length: timedelta) -> tuple[EventListing, EventListing]:
    """The stretch that begins at the nearest event, and what lies behind it."""
    if wanted.order == "asc":
        if length >= _LATEST - nearest:  # no end, which is exclusive, lies behind the last moment there is
            return wanted, wanted.model_copy(update={"start": _LATEST, "end": _LATEST})
        cut = nearest + length
        cut = min(cut, wanted.end or cut)
        return wanted.model_copy(update={"end": cut}), wanted.model_copy(update={"start": cut})
    cut = nearest - min(length, nearest - _EARLIEST)
    cut = max(cut, wanted.start or cut)
    return wanted.model_copy(update={"start": cut}), wanted.model_copy(update={"end": cut})


def _find(stretch: EventListing, after: Position | None) -> Select[Any]:
    """The page from this stretch, and how many events it was chosen from, DENSE_EVENTS + 1 at the most.

    The inner limit keeps PostgreSQL from walking for the order. Indexes: whichever selects best,
    audit_events_metadata among them.
    """
    matching = select(audit_events).where(*_beyond(stretch, after), *conditions(stretch)).limit(DENSE_EVENTS + 1)
    events = matching.subquery("event")
    return _page(stretch, events).add_columns(func.count().over().label("matches"))
