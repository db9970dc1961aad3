"""What the seals of finished months say, so that a prepared statement leaves out the partitions it need not read.

PostgreSQL compares a CHECK with a query's values only where it plans for them, and planning takes longer than a page.
For a prepared statement it can leave out partitions by their key, recorded_at. So the recorded_at that a time range
or an id can have is made a condition of its own. An old copy of the seals does no harm: no row can break one.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import takewhile
from typing import Any

from sqlalchemy import ColumnElement, Row, and_, bindparam, or_, text

_EARLIEST = datetime.min.replace(tzinfo=UTC)

# Every partition, oldest first, with the bounds of its recorded_at and, where it is sealed, those of its seal.
# An empty month is sealed with infinite timestamps: they become NULL.
SEALS = text(
    """
    SELECT substring(bounds FROM $$FROM \\('([^']+)'\\)$$)::timestamptz AS recorded_from,
           substring(bounds FROM $$TO \\('([^']+)'\\)$$)::timestamptz AS recorded_to,
           substring(seal FROM $$id >= '?(-?\\d+)$$)::bigint AS first_id,
           substring(seal FROM $$id <= '?(-?\\d+)$$)::bigint AS last_id,
           nullif(substring(seal FROM $$timestamp" >= '([^']+)'$$), 'infinity')::timestamptz AS earliest,
           nullif(substring(seal FROM $$timestamp" <= '([^']+)'$$), '-infinity')::timestamptz AS latest
    FROM (
        SELECT pg_get_expr(relpartbound, pg_class.oid) AS bounds, pg_get_constraintdef(pg_constraint.oid) AS seal
        FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid
        LEFT JOIN pg_constraint ON conrelid = pg_class.oid AND convalidated AND conname = 'audit_events_month_is_over'
        WHERE inhparent = 'audit_events'::regclass
    ) AS partitions ORDER BY recorded_to
    """
)


@dataclass(frozen=True, slots=True)
class Seal:
    """When the events of one partition were recorded, and within what their ids and timestamps lie."""

    recorded_from: datetime | None
    recorded_to: datetime  # exclusive
    first_id: int
    last_id: int
    earliest: datetime | None  # None in an empty partition
    latest: datetime | None

    def meets(self, start: datetime | None, end: datetime | None) -> bool:
        """Whether it may hold events of this time range, both ends included."""
        if self.earliest is None or self.latest is None:
            return False
        return (start is None or start <= self.latest) and (end is None or self.earliest <= end)


def sealed_months(rows: Iterable[Row[Any]]) -> Sequence[Seal]:
    """The seals from the oldest partition on, up to the first that has none."""
    return [Seal(**row._mapping) for row in takewhile(lambda row: row.first_id is not None, rows)]


def recorded_values(seals: Sequence[Seal], is_met: Callable[[Seal], bool]) -> dict[str, datetime]:
    """When events can have been recorded: in the partitions from the first that is met to the last, or after all."""
    met = [seal for seal in seals if is_met(seal)]
    open_from = seals[-1].recorded_to if seals else _EARLIEST
    return {
        "recorded_from": (met[0].recorded_from or _EARLIEST) if met else open_from,
        "recorded_to": met[-1].recorded_to if met else open_from,
        "open_from": open_from,
    }


def recorded_condition(recorded_at: ColumnElement[datetime]) -> ColumnElement[bool]:
    """The condition that recorded_values() has the values for."""
    return or_(
        and_(recorded_at >= bindparam("recorded_from"), recorded_at < bindparam("recorded_to")),
        recorded_at >= bindparam("open_from"),
    )
