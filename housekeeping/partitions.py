"""The monthly partitions of audit_events: made before they are needed, sealed when over, detached to be dropped.

What state each is in stands in PostgreSQL's catalogues and nowhere else, so whatever was interrupted resumes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, text

from db import Database

# Any constants will do. They are two, for a flush that lacks its month must not wait for a seal.
CREATION_LOCK = 0x706172746974  # "partit"
UPKEEP_LOCK = 0x75706B656570  # "upkeep": one replica at a time seals and drops
UPKEEP_WAIT_S = 5.0  # for a round of housekeeping, where somebody waits for it: most take less

_SEAL = "audit_events_month_is_over"
_MARK = "expired, to be dropped by the audit service, was: "  # a comment on the table, before its bounds

# The months from the newest partition's upper bound to three months from now: name, from, to.
_MISSING_MONTHS = text(
    """
    WITH newest AS (
        SELECT max(substring(pg_get_expr(relpartbound, pg_class.oid) FROM $$TO \\('([^']+)'\\)$$)::timestamptz) AS bound
        FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid
        WHERE inhparent = 'audit_events'::regclass
    )
    SELECT to_char(month, 'YYYY_MM'), greatest(month, bound)::text, (month + interval '1 month')::text
    FROM newest, generate_series(date_trunc('month', bound), now() + interval '3 months', interval '1 month') AS month
    WHERE month + interval '1 month' > bound
    """
)

# Every partition, oldest first, and those that retention has detached and not yet dropped. Once the head has
# passed a partition's bound, no flush can write into it: each begins by locking the head, and recorded_at never falls.
_PARTITIONS = text(
    """
    WITH candidate AS (
        SELECT pg_class.oid, inhrelid IS NOT NULL AS is_attached, coalesce(inhdetachpending, false) AS is_detaching,
               pg_get_expr(relpartbound, pg_class.oid) AS bounds,
               substring(obj_description(pg_class.oid, 'pg_class') FROM '^' || :mark || '(.*)') AS marked_bounds
        FROM pg_class LEFT JOIN pg_inherits ON inhrelid = pg_class.oid
        WHERE inhparent = 'audit_events'::regclass OR (inhrelid IS NULL AND relname LIKE 'audit\\_events\\_%')
    ), partition AS (
        SELECT oid, is_attached, is_detaching, coalesce(bounds, marked_bounds) AS bounds,
               substring(coalesce(bounds, marked_bounds) FROM $$TO \\('([^']+)'\\)$$)::timestamptz AS upper_bound,
               marked_bounds IS NOT NULL AS is_marked
        FROM candidate WHERE is_attached OR marked_bounds IS NOT NULL
    )
    SELECT partition.oid::regclass::text AS name, bounds, upper_bound, is_attached, is_detaching, is_marked,
           upper_bound <= ledger_head.recorded_at AS is_over,
           pg_constraint.oid IS NOT NULL AS has_seal, coalesce(convalidated, false) AS is_sealed
    FROM ledger_head, partition LEFT JOIN pg_constraint ON conrelid = partition.oid AND conname = :seal
    ORDER BY upper_bound
    """
)


@dataclass(frozen=True, slots=True)
class Partition:
    """One partition as the catalogues describe it."""

    name: str  # quoted where it has to be
    bounds: str  # FOR VALUES FROM … TO …
    upper_bound: datetime  # of recorded_at, exclusive
    is_attached: bool
    is_detaching: bool  # attached still, and no longer seen by new queries
    is_marked: bool  # as ours to drop
    is_over: bool  # no flush can write into it any more
    has_seal: bool  # perhaps not validated yet
    is_sealed: bool


def create_coming_months(database: Database) -> list[str]:
    """Create the partitions up to three months ahead; return their names. Replicas take turns."""
    with database.transaction() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": CREATION_LOCK})
        months = connection.execute(_MISSING_MONTHS).all()
        return [_create_partition(connection, f"audit_events_{name}", start, end) for name, start, end in months]


def _create_partition(connection: Connection, name: str, start: str, end: str) -> str:
    # Attaching a table takes a lock that reads and writes can live with; PARTITION OF would shut both out.
    connection.exec_driver_sql(f"CREATE TABLE {name} (LIKE audit_events INCLUDING DEFAULTS INCLUDING CONSTRAINTS)")
    connection.exec_driver_sql(
        f"ALTER TABLE audit_events ATTACH PARTITION {name} FOR VALUES FROM ('{start}') TO ('{end}')"
    )
    return name


def list_partitions(connection: Connection) -> Sequence[Partition]:
    """All partitions, oldest first."""
    rows = connection.execute(_PARTITIONS, {"seal": _SEAL, "mark": _MARK})
    return [Partition(**row) for row in rows.mappings()]


def seal_finished_months(database: Database) -> Iterator[str]:
    """Seal each month that is over, unless another replica is at it; yield its name once it is sealed.

    A seal is a CHECK with the lowest and highest id and timestamp, by which PostgreSQL leaves the partition
    out of queries for others. Raises DatabaseUnavailable where somebody reads the partition for too long.
    """
    with database.exclusive_session(UPKEEP_LOCK) as connection:
        if connection is None:
            return
        for partition in list_partitions(connection):
            if partition.is_over and partition.is_attached and not partition.is_sealed:
                _seal(connection, partition)
                yield partition.name


def _seal(connection: Connection, partition: Partition) -> None:
    if not partition.has_seal:
        check = connection.scalar(text(_CHECK_OF_A_SEAL.format(partition=partition.name)))
        # Shuts readers out while it waits and for some milliseconds more, so it must not wait long.
        connection.exec_driver_sql("SET lock_timeout = '100ms'")
        connection.exec_driver_sql(f"ALTER TABLE {partition.name} ADD CONSTRAINT {_SEAL} CHECK ({check}) NOT VALID")
        connection.exec_driver_sql("SET lock_timeout = '5s'")
    # Reads every row, and nobody waits for it meanwhile.
    connection.exec_driver_sql(f"ALTER TABLE {partition.name} VALIDATE CONSTRAINT {_SEAL}")


# Indexes: the partition's primary key, and the one on (timestamp, id). The lowest of nothing is the highest that
# there is, and the other way round: the seal of an empty month excludes everything.
_CHECK_OF_A_SEAL = """
    SELECT format('id >= %L AND id <= %L AND timestamp >= %L AND timestamp <= %L',
                  coalesce(min(id), 9223372036854775807), coalesce(max(id), -9223372036854775808),
                  coalesce(min(timestamp), 'infinity'), coalesce(max(timestamp), '-infinity'))
    FROM {partition}
"""


def detach(connection: Connection, partition: Partition) -> None:
    """Take the partition out of audit_events, marked so that it is found again. Needs a session in autocommit.

    New queries see it no more, old ones are waited for, and nobody waits for us. Raises DatabaseUnavailable
    where an old one takes too long; the next call resumes.
    """
    if partition.is_detaching:
        connection.exec_driver_sql(f"ALTER TABLE audit_events DETACH PARTITION {partition.name} FINALIZE")
    elif partition.is_attached:
        comment = connection.scalar(text("SELECT quote_literal(:comment)"), {"comment": _MARK + partition.bounds})
        connection.exec_driver_sql(f"COMMENT ON TABLE {partition.name} IS {comment}")
        connection.exec_driver_sql(f"ALTER TABLE audit_events DETACH PARTITION {partition.name} CONCURRENTLY")


def reattach(connection: Connection, partition: Partition) -> None:
    """Undo detach, however far it came. No row is read: detaching left a CHECK that proves the bounds."""
    if partition.is_detaching:
        detach(connection, partition)
    if partition.is_detaching or not partition.is_attached:
        connection.exec_driver_sql(f"ALTER TABLE audit_events ATTACH PARTITION {partition.name} {partition.bounds}")
    if partition.is_marked:
        connection.exec_driver_sql(f"COMMENT ON TABLE {partition.name} IS NULL")
