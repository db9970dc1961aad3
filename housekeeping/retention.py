"""Retention: expired partitions are dropped whole, oldest first, up to the first that a legal hold keeps.

A drop and the event that records it are one transaction, under a lock that a hold would need: whatever was
dropped is in the log, and a hold that was answered before the drop is honoured.
"""

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, text

from db import Database
from housekeeping import partitions
from housekeeping.partitions import Partition
from ingest.records import own_event, record
from ledger.entries import format_timestamp
from schemas import EventIn

_NEWEST_KEPT = 256  # events, however old: the flush reads those of the tile under way again

# Index: the partition's primary key.
_IS_BEHIND_THE_NEWEST = """
    SELECT coalesce(max(id) + :newest < (SELECT first_id + size FROM ledger_head), true) FROM {partition}
"""
# Holds are few: these three read the table whole.
_HOLDS_IN_FORCE = text("SELECT coalesce(array_agg(id), '{}') FROM legal_holds WHERE released_at IS NULL")
_HOLD_SINCE = text("SELECT min(id) FROM legal_holds WHERE released_at IS NULL AND id <> ALL(:known)")
_HOLD_KNOWN_TO_KEEP = text("SELECT min(id) FROM legal_holds WHERE released_at IS NULL AND keeps = :partition")
# The oldest hold that keeps the partition. Index: (actor, timestamp, id), one look a hold; those by tenant cost one
# scan of the partition together, those by resource another, and the outcome is remembered in `keeps` or by the drop.
_OLDEST_HOLD_ON = """
    SELECT min(id) FROM (
        SELECT hold.id FROM legal_holds AS hold CROSS JOIN LATERAL (
            SELECT FROM {partition} AS event
            WHERE event.actor = hold.actor AND (hold.tenant IS NULL OR event.tenant = hold.tenant)
              AND (hold.resource IS NULL OR event.resource = hold.resource) LIMIT 1
        ) AS found WHERE released_at IS NULL AND hold.actor IS NOT NULL
        UNION ALL
        SELECT hold.id FROM legal_holds AS hold JOIN {partition} AS event
            ON event.tenant = hold.tenant AND (hold.resource IS NULL OR event.resource = hold.resource)
        WHERE released_at IS NULL AND hold.actor IS NULL
        UNION ALL
        SELECT hold.id FROM legal_holds AS hold JOIN {partition} AS event ON event.resource = hold.resource
        WHERE released_at IS NULL AND hold.actor IS NULL AND hold.tenant IS NULL
    ) AS keeping
"""
_KEEP = text("UPDATE legal_holds SET keeps = :partition WHERE id = :hold AND released_at IS NULL")  # legal_holds_pkey
_CONTENT = "SELECT count(*), min(id), max(id), min(timestamp), max(timestamp) FROM {partition}"


def apply_retention(database: Database, keep_for: timedelta | None, now: datetime) -> Iterator[str]:
    """Drop what was recorded longer ago, unless another replica is at it; yield each partition's name once it is gone.

    None keeps for ever, and puts back what was on its way out. Raises DatabaseUnavailable where a long query
    holds a partition; the next call resumes.
    """
    with database.exclusive_session(partitions.UPKEEP_LOCK) as connection:
        while connection is not None and (existing := partitions.list_partitions(connection)):
            oldest = existing[0]
            holds: Sequence[int] = connection.scalar(_HOLDS_IN_FORCE) or ()
            if not _is_expired(connection, oldest, keep_for, now) or _is_kept(database, connection, oldest):
                partitions.reattach(connection, oldest)
                return
            partitions.detach(connection, oldest)
            if _drop(database, oldest, _describe(connection, oldest), holds):
                yield oldest.name


def _is_expired(connection: Connection, partition: Partition, keep_for: timedelta | None, now: datetime) -> bool:
    if keep_for is None or not partition.is_sealed or partition.upper_bound > now - keep_for:
        return False
    statement = text(_IS_BEHIND_THE_NEWEST.format(partition=partition.name))
    return bool(connection.scalar(statement, {"newest": _NEWEST_KEPT}))


def _is_kept(database: Database, connection: Connection, partition: Partition) -> bool:
    """Whether a hold in force keeps the partition. The first time it is found to, that is recorded."""
    if connection.scalar(_HOLD_KNOWN_TO_KEEP, {"partition": partition.name}) is not None:
        return True
    # Without it PostgreSQL takes the holds for a handful, and scans the partition for each.
    connection.exec_driver_sql("ANALYZE legal_holds")
    hold = connection.scalar(text(_OLDEST_HOLD_ON.format(partition=partition.name)))
    if hold is None:
        return False
    with database.transaction() as transaction:
        if transaction.execute(_KEEP, {"partition": partition.name, "hold": hold}).rowcount:
            record(transaction, _event("keep", partition, {"legal_hold": hold}))
    return True


def _describe(connection: Connection, partition: Partition) -> dict[str, Any]:
    count, first_id, last_id, earliest, latest = connection.execute(
        text(_CONTENT.format(partition=partition.name))
    ).one()
    content: dict[str, Any] = {"count": count, "recorded_before": format_timestamp(partition.upper_bound)}
    if count:
        content |= {"first_id": first_id, "last_id": last_id}
        content |= {"earliest": format_timestamp(earliest), "latest": format_timestamp(latest)}
    return content


def _drop(database: Database, partition: Partition, content: dict[str, Any], known_holds: Sequence[int]) -> bool:
    """Drop the detached partition, unless a hold was placed since the known ones were looked at."""
    with database.transaction() as connection:
        # Whoever places a hold writes to this table: before us, and then we see it, or after the drop.
        connection.exec_driver_sql("LOCK TABLE legal_holds IN SHARE MODE")
        if connection.scalar(_HOLD_SINCE, {"known": list(known_holds)}) is not None:
            return False
        connection.exec_driver_sql(f"DROP TABLE {partition.name}")
        record(connection, _event("drop", partition, content))
    return True


def _event(verb: str, partition: Partition, metadata: dict[str, Any]) -> EventIn:
    return own_event(f"audit.retention.{verb}", resource=f"partitions/{partition.name}", metadata=metadata)
