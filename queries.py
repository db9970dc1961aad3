"""All reads of audit_events: one event, and pages of events by filter.

Pages are keyset pages over (timestamp, id): page 1,000 costs what page 1 costs.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, select, tuple_

from db import Database
from models import audit_events
from problems import EventNotFound, InvalidCursor
from schemas import EventFilter

_CURSOR_VERSION = 1

_columns = audit_events.c


@dataclass(frozen=True)
class Page:
    """Rows of audit_events, newest first, and the cursor of the next page, if there is one."""

    events: Sequence[Row[Any]]
    next_cursor: str | None


def get_event(connection: Connection, event_id: int) -> Row[Any]:
    """The event with this id; raises EventNotFound. Index: audit_events_pkey."""
    row = connection.execute(select(audit_events).where(_columns.id == event_id)).one_or_none()
    if row is None:
        raise EventNotFound(f"There is no event with the id {event_id}.")
    return row


def find_event(database: Database, event_id: int) -> Row[Any]:
    """get_event in a transaction of its own."""
    with database.transaction() as connection:
        return get_event(connection, event_id)


def list_events(connection: Connection, wanted: EventFilter) -> Page:
    """A page of events, newest first.

    Indexes: audit_events_actor_timestamp_id, audit_events_event_type_timestamp_id, audit_events_timestamp_id.
    """
    newest_first = (_columns.timestamp.desc(), _columns.id.desc())
    statement = select(audit_events).where(*_conditions(wanted)).order_by(*newest_first).limit(wanted.limit + 1)
    rows = connection.execute(statement).all()
    events = rows[: wanted.limit]
    more = len(rows) > len(events)
    return Page(events, _encode_cursor(wanted, events[-1]) if more else None)


def _conditions(wanted: EventFilter) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    if wanted.actor is not None:
        conditions.append(_columns.actor == wanted.actor)
    if wanted.event_type is not None:
        conditions.append(_columns.event_type == wanted.event_type)
    if wanted.start is not None:
        conditions.append(_columns.timestamp >= wanted.start)
    if wanted.end is not None:
        conditions.append(_columns.timestamp < wanted.end)
    if wanted.cursor is not None:
        conditions.append(tuple_(_columns.timestamp, _columns.id) < _decode_cursor(wanted))
    return conditions


def _encode_cursor(wanted: EventFilter, last: Row[Any]) -> str:
    content = [_CURSOR_VERSION, _fingerprint(wanted), last.timestamp.isoformat(), last.id]
    return base64.urlsafe_b64encode(json.dumps(content).encode()).decode().rstrip("=")


def _decode_cursor(wanted: EventFilter) -> tuple[datetime, int]:
    """The (timestamp, id) after which the page begins; raises InvalidCursor."""
    cursor = wanted.cursor or ""
    try:
        version, fingerprint, timestamp, event_id = json.loads(
            base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        )
        position = datetime.fromisoformat(timestamp), int(event_id)
    except (binascii.Error, ValueError, TypeError):
        raise InvalidCursor() from None
    if version != _CURSOR_VERSION or position[0].tzinfo is None or not 0 <= position[1] < 2**63:
        raise InvalidCursor()
    if fingerprint != _fingerprint(wanted):
        raise InvalidCursor("This cursor belongs to other filters: a cursor continues the query that gave it.")
    return position


def _fingerprint(wanted: EventFilter) -> str:
    """The same for the same filters, whatever the page and its size."""
    filters = wanted.model_dump_json(exclude={"cursor", "limit"})
    return hashlib.sha256(filters.encode()).hexdigest()[:16]
