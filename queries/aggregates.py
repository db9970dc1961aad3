"""How many events, when, and of what: counts, histograms and most frequent values, for the same filters as pages.

Where one index holds all that a count or histogram asks for, its statement is prepared, once a connection: planning
it for its values would choose that index too, and take as long as counting some thousand events.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any

from sqlalchemy import Row, Select, Text, and_, bindparam, case, cast, func, literal_column, select, true, union

from fields import Interval
from models import audit_events
from problems import InvalidFields
from queries.filters import UNINDEXED_FIELDS, conditions, values_of
from queries.lines import BUCKET_JSON
from queries.listing import find_edge
from queries.reader import DIALECT, Reader
from schemas import EventFilter, HistogramQuery, TopQuery

MAX_BUCKETS = 2_000

# Of each interval: the shortest bucket there is, and a step that skips none (offsets change by quarters of an hour).
_LENGTHS: dict[Interval, tuple[timedelta, timedelta]] = {
    "minute": (timedelta(minutes=1), timedelta(minutes=1)),
    "hour": (timedelta(hours=1), timedelta(minutes=15)),
    "day": (timedelta(hours=23), timedelta(hours=6)),
    "week": (timedelta(days=6), timedelta(days=2)),
    "month": (timedelta(days=27), timedelta(days=7)),
}
_INSTANT = timedelta(microseconds=1)  # PostgreSQL's resolution
_LEADING_COLUMNS = ("actor", "event_type", "tenant")  # of the indexes that go on with timestamp

_columns = audit_events.c


def count_events(reader: Reader, wanted: EventFilter, limit: int) -> tuple[int, bool]:
    """How many events there are, and whether the limit was reached before all were looked at: there may be more."""
    (found,) = _ask(reader, _count, wanted, {"most": limit + 1})
    return min(found.met, limit), found.looked_at > limit


def _count(wanted: EventFilter) -> Select[Any]:
    """How many events were looked at, `most` at the most, and how many of them meet the filters without an index too.

    Indexes: those of the other filters.
    """
    given = {name: value for name in UNINDEXED_FIELDS if (value := getattr(wanted, name)) is not None}
    indexed = wanted.model_copy(update=dict.fromkeys(given))
    columns: list[Any] = [_columns[name] for name in given] or [true()]
    looked_at = (
        select(*columns).select_from(audit_events).where(*conditions(indexed)).limit(bindparam("most")).subquery()
    )
    count: Any = func.count()
    met = count.filter(*conditions(EventFilter().model_copy(update=given), looked_at.c)) if given else count
    return select(count.label("looked_at"), met.label("met")).select_from(looked_at)


def count_by_time(reader: Reader, wanted: HistogramQuery) -> Sequence[Row[Any]]:
    """`events`, how many, and `json` of every bucket in the range, empty ones too; raises InvalidFields for too many.

    An end of the range that is not given is where the first or last of the events is.
    """
    first = wanted.start or find_edge(reader, wanted, "asc")
    if first is None:
        return []
    last = wanted.end - _INSTANT if wanted.end is not None else find_edge(reader, wanted, "desc")
    if last is None:
        return []
    shortest, _ = _LENGTHS[wanted.interval]
    is_possible = (last - first) / shortest < MAX_BUCKETS * 2
    buckets = _ask(reader, _histogram, wanted, _histogram_values(wanted, first, last)) if is_possible else None
    if buckets is None or len(buckets) > MAX_BUCKETS:
        message = f"makes more than {MAX_BUCKETS} buckets of this range: choose a longer one, or narrow start and end"
        raise InvalidFields(errors=[{"location": "query.interval", "message": message}])
    return buckets


def histogram_statement(wanted: HistogramQuery, first: datetime, last: datetime) -> tuple[str, dict[str, Any]]:
    """The SQL of a histogram from the first moment to the last, and its parameters by name."""
    return _statement(_histogram, wanted, _histogram_values(wanted, first, last))


def _histogram_values(wanted: HistogramQuery, first: datetime, last: datetime) -> dict[str, Any]:
    _, step = _LENGTHS[wanted.interval]
    own = {"interval": wanted.interval, "time_zone": wanted.time_zone, "first": first, "last": last, "step": step}
    return {**own, "most": MAX_BUCKETS + 1}


def _histogram(wanted: EventFilter) -> Select[Any]:
    """Every bucket from the first moment's to the last's, with its count.

    PostgreSQL's own rules of the time zone make the buckets, those of the events and the empty ones alike:
    so a day on which clocks change has 23 or 25 hours, and one that a zone skipped has no bucket.
    Where clocks go back to midnight PostgreSQL's day begins at the second one, but it counts the hour before.
    Indexes: those of the filters, and of the time range.
    """

    def bucket(moment: Any) -> Any:
        return func.date_trunc(bindparam("interval"), moment, bindparam("time_zone")).label("start")

    def zoned(moment: Any) -> Any:
        return func.timezone(bindparam("time_zone"), moment)

    first: Any = bindparam("first")
    last: Any = bindparam("last")
    moment = func.generate_series(bucket(first), last, bindparam("step")).column_valued("moment")
    buckets = union(select(bucket(moment)), select(bucket(last))).subquery("buckets")
    counted = (
        select(bucket(_columns.timestamp), func.count().label("events"))
        .where(*conditions(wanted))
        .group_by("start")
        .subquery("counted")
    )
    filled = (
        select(buckets.c.start, func.coalesce(counted.c.events, literal_column("0")).label("events"))
        .select_from(buckets.outerjoin(counted, buckets.c.start == counted.c.start))
        .order_by(buckets.c.start)
        .limit(bindparam("most"))
        .subquery("filled")
    )
    instant: Any = literal_column("interval '1 microsecond'")
    gone_back = zoned(filled.c.start - instant) + instant - zoned(filled.c.start)
    is_dated = and_(*(cast(bindparam("interval"), Text) != literal_column(f"'{each}'") for each in ("hour", "minute")))
    start = case(
        (is_dated, filled.c.start - func.greatest(gone_back, literal_column("interval '0'"))), else_=filled.c.start
    )
    bucket_of = select(start.label("start"), filled.c.events).subquery("bucket")
    return select(bucket_of.c.events, BUCKET_JSON.label("json")).order_by(bucket_of.c.start)


def count_by_value(reader: Reader, wanted: TopQuery) -> Sequence[Row[Any]]:
    """The most frequent values of one field and their counts, the most frequent first.

    Reads all that the filters select. Indexes: those of the filters; without any, of actors and event types, their own.
    """
    value = _columns[wanted.field].label("value")
    count = func.count().label("count")
    statement = select(value, count).where(value.is_not(None), *conditions(wanted)).group_by(value)
    return reader.search(statement.order_by(count.desc(), value.collate("C")).limit(wanted.n))


def _ask(
    reader: Reader, make: Callable[[EventFilter], Select[Any]], wanted: EventFilter, values: dict[str, Any]
) -> Sequence[Row[Any]]:
    """What this statement finds, prepared or planned for its values; `values`: of its own parameters."""
    if _is_covered(wanted):
        return reader.walk(*_statement(make, wanted, values))
    return reader.search(make(wanted).params(values))


def _is_covered(wanted: EventFilter) -> bool:
    """Whether one index has all that the filter looks at."""
    columns = values_of(wanted).keys() - {"start", "end"}
    return len(columns) <= 1 and columns <= set(_LEADING_COLUMNS)


def _statement(
    make: Callable[[EventFilter], Select[Any]], wanted: EventFilter, values: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    values = values_of(wanted) | values
    return _sql(_Shape(make, tuple(values), wanted)), values


@dataclass(frozen=True)
class _Shape:
    """What of a question makes its statement's text, so that the next one of the same shape is spared the making."""

    make: Callable[[EventFilter], Select[Any]]
    parameters: tuple[str, ...]
    example: EventFilter = field(compare=False)


@lru_cache(maxsize=100)
def _sql(shape: _Shape) -> str:
    return str(shape.make(shape.example).compile(dialect=DIALECT))
