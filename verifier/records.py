"""What the log says of itself: what retention dropped, what was redacted, which older rows it vouches for.

Only events of the tree say it, and only while nothing is wrong with them: all else can be put there by SQL.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from psycopg2.extensions import cursor as Cursor

from verifier.differences import MISSING, Difference
from verifier.rows import COPY_ROWS, Lines, Run, parse_row

UNRECORDED = "redacted, and no audit.redaction event says so"

_OLDEST = "SELECT min(id) FROM audit_events WHERE id >= %s"  # index: audit_events_pkey
# Index: audit_events_event_type_timestamp_id. Nobody but the service can append events of this source.
_OF_TYPE = "event_type = '{event_type}' AND source = 'audit-service' AND id >= {first_id}"


@dataclass(frozen=True)
class Record:
    """An event of the service's own; of one that was redacted the metadata are gone."""

    event_id: int
    timestamp: str
    redacted_at: str | None
    metadata: Mapping[str, Any]

    def number(self, name: str) -> int | None:
        value = self.metadata.get(name)
        return value if type(value) is int else None


@dataclass(frozen=True)
class Records:
    """All of them that are in the tree, by id."""

    drops: Sequence[Record]
    redactions: Sequence[Record]
    adoptions: Sequence[Record]


@dataclass(frozen=True)
class Adoption:
    """What the log says of the rows from before the ledger."""

    event_id: int
    count: int
    root: bytes


def read_records(cursor: Cursor, first_id: int) -> Records:
    """What the log says, which begins with this id."""
    types = ("audit.retention.drop", "audit.redaction", "audit.ledger.adopt")
    return Records(*(list(_read(cursor, event_type, first_id)) for event_type in types))


def adoption_of(record: Record) -> Adoption | None:
    """None where it does not say of which rows."""
    count, root = record.number("count"), str(record.metadata.get("root"))
    if count is None or not re.fullmatch("[0-9a-f]{64}", root):
        return None
    return Adoption(record.event_id, count, bytes.fromhex(root))


def count_dropped(cursor: Cursor, first_id: int, drops: Sequence[Record]) -> int:
    """How many leaves have no rows any more, by that account. Locks the partitions, so that none goes meanwhile."""
    cursor.execute(_OLDEST, (first_id,))
    ((oldest,),) = cursor.fetchall()
    end = _end_of(drops, first_id)
    return max(0, (end if oldest is None else min(end, oldest)) - first_id)


def find_missing(
    first_id: int, dropped: int, drops: Sequence[Record], doubtful: Collection[int]
) -> Iterator[Difference]:
    """Of the leaves without rows those that are accounted for by doubtful events only."""
    end = _end_of([record for record in drops if record.event_id not in doubtful], first_id)
    if end < first_id + dropped:
        yield Difference(max(end, first_id), first_id + dropped - 1, MISSING)


def find_unrecorded(
    redactions: Sequence[Record], redacted: Mapping[str, Run], doubtful: Collection[int]
) -> Iterator[Difference]:
    """Redactions of more events, or others, than their records tell of, which came after them.

    A record that was redacted itself tells no number, and counts where its own redaction is accounted for.
    """
    told: dict[str, list[Record]] = {}
    for record in redactions:
        if record.event_id not in doubtful:
            told.setdefault(record.timestamp, []).append(record)
    accounted: set[str | None] = set()
    # From the newest on: whatever redacted a record has a higher id than the record, and is decided before it.
    for moment, run in sorted(redacted.items(), key=lambda item: item[1].last_id, reverse=True):
        records = [record for record in told.get(moment, ()) if record.event_id > run.last_id]
        unrecorded = 0 if any(each.redacted_at in accounted for each in records) else _beyond(run, records)
        if unrecorded:
            what = UNRECORDED if run.first_id == run.last_id else f"{unrecorded} of them {UNRECORDED}"
            yield Difference(run.first_id, run.last_id, what)
        else:
            accounted.add(moment)


def _beyond(run: Run, records: Sequence[Record]) -> int:
    """How many of the run no record that can be read tells of: at least."""
    intact = [record for record in records if record.redacted_at is None]
    count = sum(record.number("count") or 0 for record in intact)
    first_ids = [first_id for record in intact if (first_id := record.number("first_id")) is not None]
    last_ids = [last_id for record in intact if (last_id := record.number("last_id")) is not None]
    outside = (run.first_id < min(first_ids, default=run.first_id)) + (run.last_id > max(last_ids, default=run.last_id))
    return max(run.count - count, outside, 0)


def _end_of(drops: Sequence[Record], first_id: int) -> int:
    """The id behind the newest event that retention dropped, by the log's own account."""
    return max((last_id + 1 for record in drops if (last_id := record.number("last_id")) is not None), default=first_id)


def _read(cursor: Cursor, event_type: str, first_id: int) -> Iterator[Record]:
    lines = Lines()
    condition = _OF_TYPE.format(event_type=event_type, first_id=first_id)
    cursor.copy_expert(COPY_ROWS.format(condition=condition, limit="ALL"), lines)
    for event in map(parse_row, lines.rows):
        metadata = event["metadata"] if isinstance(event["metadata"], dict) else {}
        yield Record(event["id"], event["timestamp"], event["redacted_at"], metadata)
