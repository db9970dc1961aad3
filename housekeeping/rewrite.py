"""Takes erased data out of the database's files: PostgreSQL marks old rows as free, and overwrites nothing.

VACUUM FULL writes a table and its indexes anew, and ANALYZE the most common values that the planner keeps of it.
What is still to do stands in rewrites_due, in the transaction that erased.
"""

from collections.abc import Iterator

from sqlalchemy import Connection, text

from db import Database
from housekeeping import partitions

# What everybody writes to is rewritten while they wait, some 2 s at this size. A larger month is, when it is over.
MOST_BYTES_IN_USE = 256 * 1024 * 1024

_FORGET_DROPPED = text("DELETE FROM rewrites_due WHERE to_regclass(relation) IS NULL")
# pg_statistic last: the others' ANALYZE leaves old values there.
_DUE = text(
    "SELECT relation, pg_total_relation_size(to_regclass(relation)) AS size_bytes FROM rewrites_due"
    " ORDER BY relation = 'pg_statistic', relation"
)
# VACUUM FULL leaves a row that an open transaction may still see. Its relfrozenxid tells: every transaction before
# that one had ended for all. A number from the future comes from another server's dump.
_DONE = text(
    """
    DELETE FROM rewrites_due USING pg_class
    WHERE relation = :relation AND pg_class.oid = to_regclass(relation) AND (
        age(relfrozenxid) < age(erased_by::text::xid8::xid)
        OR erased_by >= pg_snapshot_xmax(pg_current_snapshot())::text::bigint
    )
    """
)
_STATISTICS_DUE = text(
    "INSERT INTO rewrites_due VALUES ('pg_statistic', pg_current_xact_id()::text::bigint)"
    " ON CONFLICT (relation) DO UPDATE SET erased_by = excluded.erased_by"
)
_HAS_PARENT_STATISTICS = text(
    "SELECT EXISTS (SELECT FROM pg_stats WHERE tablename = 'audit_events' AND schemaname = current_schema())"
)


def rewrite_erased(database: Database) -> Iterator[str]:
    """Rewrite each table that is due and not in use at such a size, unless another replica is at it; yield its name.

    A table stays due where an open transaction may still see what was erased. Raises DatabaseUnavailable where
    somebody uses one for more than a second; the next call resumes.
    """
    with database.exclusive_session(partitions.UPKEEP_LOCK, partitions.UPKEEP_WAIT_S) as session:
        if session is None:
            return
        session.execute(_FORGET_DROPPED)
        finished = {each.name for each in partitions.list_partitions(session) if each.is_over}
        due = {row.relation: row.size_bytes for row in session.execute(_DUE)}
        for relation, size_bytes in due.items():
            if relation != "pg_statistic" and (relation in finished or size_bytes <= MOST_BYTES_IN_USE):
                if _rewrite(session, relation, "FULL, ANALYZE"):
                    yield relation
                session.execute(_STATISTICS_DUE)
        if due:
            if session.scalar(_HAS_PARENT_STATISTICS):
                session.exec_driver_sql("ANALYZE audit_events")
                session.execute(_STATISTICS_DUE)
            _rewrite(session, "pg_statistic", "FULL")


def relations_due(database: Database) -> list[str]:
    """The tables whose files still hold something that was erased."""
    with database.transaction() as connection:
        return list(connection.scalars(text("SELECT relation FROM rewrites_due ORDER BY relation")))


def _rewrite(session: Connection, relation: str, options: str) -> bool:
    """Whether nothing that was erased is left in it."""
    session.exec_driver_sql("SET lock_timeout = '1s'")  # others queue behind us meanwhile
    session.exec_driver_sql(f"VACUUM ({options}) {relation}")
    session.exec_driver_sql("SET lock_timeout = '5s'")
    return session.execute(_DONE, {"relation": relation}).rowcount == 1
