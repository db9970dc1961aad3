"""Logs of several months, for the tests: the head's moment is moved on, and the flush goes along."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool

from db import Database
from housekeeping.partitions import Partition, list_partitions
from ingest.append import append_submissions, prepare_event, submission_of
from schemas import EventIn


def _connect(url: URL) -> Connection:
    return create_engine(url, poolclass=NullPool, connect_args={"options": "-c timezone=UTC"}).connect()


def partitions_of(url: URL) -> list[Partition]:
    """All, oldest first: the adopted one, this month, and the three to come."""
    with _connect(url) as connection:
        return list(list_partitions(connection))


def append_events(database: Database, *events: dict[str, Any], recorded_at: datetime | None = None) -> None:
    """Append events through the flush; its moment is no earlier than the given one."""
    with database.transaction() as connection:
        move_head = text("UPDATE ledger_head SET recorded_at = greatest(recorded_at, :moment)")
        connection.execute(move_head, {"moment": recorded_at})
    if not events:
        return
    dedicated = database.dedicated_connection()
    now = datetime.fromisoformat("2026-01-01T00:00:00Z")
    prepared = [prepare_event(EventIn.model_validate(members), now) for members in events]
    append_submissions(dedicated, [submission_of(prepared)])
    dedicated.close()


def fill_months(database: Database, *months: list[dict[str, Any]]) -> list[str]:
    """One list of events a month, this month first; return the names of these months' partitions."""
    existing = partitions_of(database.url)[1 : 1 + len(months)]
    for partition, events in zip(existing, months, strict=True):
        append_events(database, *events, recorded_at=partition.upper_bound - timedelta(days=1))
    return [partition.name for partition in existing]


class Interruption(Exception):
    """Stands for whatever ends the process between two statements."""


@contextmanager
def interrupted_before(statement_number: int) -> Iterator[None]:
    """Raise Interruption before that statement, counted from 0, of those that change something."""
    seen = 0

    def stop(_c: Connection, _cursor: Any, statement: str, *_: Any) -> None:
        nonlocal seen
        if re.match(r"\s*(SELECT|WITH|SET|SHOW)\b", statement):
            return
        if seen == statement_number:
            raise Interruption()
        seen += 1

    event.listen(Engine, "before_cursor_execute", stop)
    try:
        yield
    finally:
        event.remove(Engine, "before_cursor_execute", stop)


def plan(url: URL, statement: str) -> str:
    """What PostgreSQL would do, as it says it."""
    with _connect(url) as connection:
        return "\n".join(line for (line,) in connection.execute(text(f"EXPLAIN {statement}")))


def partitions_read(url: URL, statement: str) -> set[str]:
    return set(re.findall(r" on (audit_events_\w+)", plan(url, statement)))
