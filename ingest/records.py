"""Events about the service itself: what was done to the log is in the log."""

from datetime import UTC, datetime
from typing import Any

from psycopg2.extensions import connection as DriverConnection
from sqlalchemy import Connection

from ingest.append import append_submissions, prepare_event, submission_of
from schemas import EventIn

SERVICE = "audit-service"  # the source of these events, and the actor of what nobody asked for


def own_event(event_type: str, actor: str = SERVICE, **members: Any) -> EventIn:
    """An event of the service's own, about what the actor had it do."""
    return EventIn(event_type=event_type, actor=actor, outcome="success", source=SERVICE, **members)


def record(connection: Connection, event: EventIn) -> None:
    """Append an event in the caller's transaction, so that it commits with what it tells of, or not at all.

    Comes last before the commit: from here on nobody else can append.
    """
    driver_connection = connection.connection.driver_connection
    assert isinstance(driver_connection, DriverConnection)  # noqa: S101 - for mypy; SQLAlchemy knows it as Any
    append_submissions(driver_connection, [submission_of([prepare_event(event, datetime.now(UTC))])])
