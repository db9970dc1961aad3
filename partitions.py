"""The monthly partitions of audit_events: the coming ones exist before they are needed."""

from sqlalchemy import Connection, text

from db import Database

_PARTITION_LOCK = 0x706172746974  # "partit"; any constant will do

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


def create_coming_months(database: Database) -> list[str]:
    """Create the partitions up to three months ahead, unless another replica is at it; return their names."""
    with database.transaction() as connection:
        if not connection.scalar(text("SELECT pg_try_advisory_xact_lock(:key)"), {"key": _PARTITION_LOCK}):
            return []
        months = connection.execute(_MISSING_MONTHS).all()
        return [_create_partition(connection, f"audit_events_{name}", start, end) for name, start, end in months]


def _create_partition(connection: Connection, name: str, start: str, end: str) -> str:
    # Attaching a table takes a lock that reads and writes can live with; PARTITION OF would shut both out.
    connection.exec_driver_sql(f"CREATE TABLE {name} (LIKE audit_events INCLUDING DEFAULTS INCLUDING CONSTRAINTS)")
    connection.exec_driver_sql(
        f"ALTER TABLE audit_events ATTACH PARTITION {name} FOR VALUES FROM ('{start}') TO ('{end}')"
    )
    return name
