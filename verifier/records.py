"""What the log says of itself: what retention dropped, what was redacted, which older rows it vouches for."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from psycopg2.extensions import cursor as Cursor

from ledger.entries import format_timestamp
from verifier.differences import Difference
from verifier.rows import Run

UNRECORDED = "redacted, and no audit.redaction event says so"

_OLDEST = "SELECT min(id) FROM audit_events WHERE id >= %s"  # index: audit_events_pkey
# These: index audit_events_event_type_timestamp_id. Nobody but the service can append events of this source.
_DROPPED = """
    SELECT max((metadata ->> 'last_id')::bigint) FROM audit_events
    WHERE event_type = 'audit.retention.drop' AND source = 'audit-service'
"""
_REDACTIONS = """
    SELECT timestamp, sum((metadata ->> 'count')::bigint), bool_or(redacted_at IS NOT NULL) FROM audit_events
    WHERE event_type = 'audit.redaction' AND source = 'audit-service' GROUP BY timestamp
"""

# The first one counts: whoever changed rows could append another.
_ADOPTION = """
    SELECT id, metadata ->> 'count', metadata ->> 'root' FROM audit_events
    WHERE event_type = 'audit.ledger.adopt' AND source = 'audit-service' ORDER BY id LIMIT 1
"""


@dataclass(frozen=True)
class Adoption:
    """What the log says of the rows from before the ledger."""

    event_id: int
    count: int
    root: bytes


def find_adoption(cursor: Cursor) -> Adoption | None:
    cursor.execute(_ADOPTION)
    found = cursor.fetchone()
    return None if found is None else Adoption(found[0], int(found[1]), bytes.fromhex(found[2]))


def last_dropped(cursor: Cursor) -> int | None:
    """The newest event that retention dropped, by the log's own account."""
    cursor.execute(_DROPPED)
    ((dropped,),) = cursor.fetchall()
    return None if dropped is None else int(dropped)


def count_dropped(cursor: Cursor, first_id: int) -> int:
    """How many leaves have no rows any more, by that account. Locks the partitions, so that none goes meanwhile."""
    cursor.execute(_OLDEST, (first_id,))
    ((oldest,),) = cursor.fetchall()
    dropped = last_dropped(cursor)
    if dropped is None:
        return 0
    return max(0, min(dropped + 1, dropped + 1 if oldest is None else oldest) - first_id)


def find_unrecorded(cursor: Cursor, redacted: Mapping[str, Run]) -> Iterator[Difference]:
    """Redactions of more events than their records tell of; a record that was redacted itself tells no number."""
    cursor.execute(_REDACTIONS)
    told = {format_timestamp(moment): (int(count or 0), is_redacted) for moment, count, is_redacted in cursor}
    for moment, run in redacted.items():
        count, is_redacted = told.get(moment, (0, False))
        if run.count > count and not is_redacted:
            yield Difference(run.first_id, run.last_id, f"{run.count - count} of them {UNRECORDED}")
