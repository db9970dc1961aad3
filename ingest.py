"""The write path: events become rows, acknowledged only after their commit.

Ids are dense and rise in commit order: the next ones are taken under a lock that is held to the commit.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, func, insert, select, text

from db import Database
from models import audit_events
from schemas import EventIn

# Held from reading the highest id to the commit. Any constant will do; all writers must use the same one.
_APPEND_LOCK = 0x617070656E64  # "append"


def append_events(database: Database, events: Sequence[EventIn]) -> Sequence[Row[Any]]:
    """Store the events in their order and return their rows, committed. Raises what transaction() raises."""
    with database.transaction() as connection:
        return _insert_events(connection, events)


def _insert_events(connection: Connection, events: Sequence[EventIn]) -> Sequence[Row[Any]]:
    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _APPEND_LOCK})
    last_id, recorded_at = _next_position(connection)
    rows = [
        {
            **event.model_dump(),
            "id": last_id + offset,
            "recorded_at": recorded_at,
            "timestamp": event.timestamp or recorded_at,
        }
        for offset, event in enumerate(events, start=1)
    ]
    return connection.execute(insert(audit_events).returning(*audit_events.c), rows).all()


def _next_position(connection: Connection) -> tuple[int, Any]:
    """The highest id so far and the moment to record, which never falls, whatever the clock does.

    Index: audit_events_pkey, one probe a partition.
    """
    newest = select(audit_events.c.id, audit_events.c.recorded_at).order_by(audit_events.c.id.desc()).limit(1)
    last = newest.subquery()
    statement = select(
        func.coalesce(select(last.c.id).scalar_subquery(), 0),
        func.greatest(func.clock_timestamp(), select(last.c.recorded_at).scalar_subquery()),
    )
    last_id, recorded_at = connection.execute(statement).one()
    return last_id, recorded_at
