"""How many events, when, and of what: counts, histograms and most frequent values, for the same filters as pages."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Row, Select, bindparam, func, literal, select, true, union
from sqlalchemy.dialects.postgresql import INTERVAL

from fields import Interval
from models import audit_events
from problems import InvalidFields
from queries.filters import conditions
from queries.listing import find_edge
from queries.reader import Reader
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

_columns = audit_events.c


def count_events(reader: Reader, wanted: EventFilter, limit: int) -> tuple[int, bool]:
    """How many events there are, and whether the counting stopped at the limit."""
    found = select(true()).select_from(audit_events).where(*conditions(wanted)).limit(limit + 1).subquery()
    count: int = reader.search(select(func.count()).select_from(found))[0][0]
    return min(count, limit), count > limit


def count_by_time(reader: Reader, wanted: HistogramQuery) -> Sequence[Row[Any]]:
    """Start and count of every bucket in the range, empty ones too; raises InvalidFields where they are too many.

    An end of the range that is not given is where the first or last of the events is.
    """
    first = wanted.start or find_edge(reader, wanted, "asc")
    last = wanted.end - _INSTANT if wanted.end is not None else find_edge(reader, wanted, "desc")
    if first is None or last is None:
        return []
    shortest, _ = _LENGTHS[wanted.interval]
    buckets = (
        reader.search(histogram_statement(wanted, first, last)) if (last - first) / shortest < MAX_BUCKETS * 2 else None
    )
    if buckets is None or len(buckets) > MAX_BUCKETS:
        message = f"makes more than {MAX_BUCKETS} buckets of this range: choose a longer one, or narrow start and end"
        raise InvalidFields(errors=[{"location": "query.interval", "message": message}])
    return buckets


def histogram_statement(wanted: HistogramQuery, first: datetime, last: datetime) -> Select[Any]:
    """Every bucket from the first moment's to the last's, with its count.

    PostgreSQL's own rules of the time zone make the buckets, those of the events and the empty ones alike:
    so a day on which clocks change has 23 or 25 hours, and one that a zone skipped has no bucket.
    Indexes: those of the filters, and of the time range.
    """
    _, step = _LENGTHS[wanted.interval]

    def bucket(moment: Any) -> Any:
        return func.date_trunc(literal(wanted.interval), moment, literal(wanted.time_zone)).label("start")

    moment = func.generate_series(bucket(first), last, bindparam("step", step, INTERVAL)).column_valued("moment")
    buckets = union(select(bucket(moment)), select(bucket(last))).subquery("buckets")
    counted = (
        select(bucket(_columns.timestamp), func.count().label("count"))
        .where(*conditions(wanted))
        .group_by("start")
        .subquery("counted")
    )
    return (
        select(buckets.c.start, func.coalesce(counted.c.count, 0).label("count"))
        .select_from(buckets.outerjoin(counted, buckets.c.start == counted.c.start))
        .order_by(buckets.c.start)
        .limit(MAX_BUCKETS + 1)
    )


def count_by_value(reader: Reader, wanted: TopQuery) -> Sequence[Row[Any]]:
    """The most frequent values of one field and their counts, the most frequent first.

    Reads all that the filters select. Indexes: those of the filters; without any, of actors and event types, their own.
    """
    value = _columns[wanted.field].label("value")
    count = func.count().label("count")
    statement = select(value, count).where(value.is_not(None), *conditions(wanted)).group_by(value)
    return reader.search(statement.order_by(count.desc(), value.collate("C")).limit(wanted.n))
