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

from sqlalchemy import ColumnElement, Connection, Row, cast, func, or_, select, tuple_
from sqlalchemy.dialects.postgresql import INET

from db import Database
from models import audit_events
from problems import EventNotFound, InvalidCursor
from schemas import EventFilter, EventListing

_CURSOR_VERSION = 1

_columns = audit_events.c
_KEY = (_columns.timestamp, _columns.id)
_EXACT_FIELDS = ("tenant", "resource", "outcome", "source", "trace_id")
_PATTERN_FIELDS = ("actor", "event_type")


@dataclass(frozen=True)
class Page:
    """Rows of audit_events in the order asked for, and the cursor of the next page, if there is one."""

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


def list_events(connection: Connection, wanted: EventListing) -> Page:
    """A page of events, newest first unless oldest first is asked for.

    Indexes: audit_events_actor_timestamp_id, audit_events_event_type_timestamp_id, audit_events_timestamp_id.
    """
    order = [column.desc() if wanted.order == "desc" else column.asc() for column in _KEY]
    narrowed = [*conditions(wanted), *_after_cursor(wanted)]
    rows = connection.execute(select(audit_events).where(*narrowed).order_by(*order).limit(wanted.limit + 1)).all()
    events = rows[: wanted.limit]
    more = len(rows) > len(events)
    return Page(events, _encode_cursor(wanted, events[-1]) if more else None)


def conditions(wanted: EventFilter) -> list[ColumnElement[bool]]:
    """What an event has to meet, for every read that takes filters; all of them hold together."""
    found = [_columns[name] == getattr(wanted, name) for name in _EXACT_FIELDS if getattr(wanted, name) is not None]
    found += [_matches(_columns[name], getattr(wanted, name)) for name in _PATTERN_FIELDS if getattr(wanted, name)]
    if wanted.start is not None:
        found.append(_columns.timestamp >= wanted.start)
    if wanted.end is not None:
        found.append(_columns.timestamp < wanted.end)
    if wanted.source_ip is not None:
        found.append(_columns.source_ip.op("<<=", is_comparison=True)(cast(wanted.source_ip, INET)))
    if wanted.metadata is not None:
        found.append(_columns.metadata.contains(wanted.metadata))
    return found


def _matches(column: ColumnElement[str], patterns: Sequence[str]) -> ColumnElement[bool]:
    """starts_with() takes its argument literally, where LIKE would need escapes."""
    exact = [pattern for pattern in patterns if not pattern.endswith("*")]
    prefixes = [pattern[:-1] for pattern in patterns if pattern.endswith("*")]
    return or_(*([column.in_(exact)] if exact else []), *(func.starts_with(column, prefix) for prefix in prefixes))


def _after_cursor(wanted: EventListing) -> list[ColumnElement[bool]]:
    if wanted.cursor is None:
        return []
    position = _decode_cursor(wanted)
    return [tuple_(*_KEY) < position if wanted.order == "desc" else tuple_(*_KEY) > position]


def _encode_cursor(wanted: EventListing, last: Row[Any]) -> str:
    content = [_CURSOR_VERSION, _fingerprint(wanted), last.timestamp.isoformat(), last.id]
    return base64.urlsafe_b64encode(json.dumps(content).encode()).decode().rstrip("=")


def _decode_cursor(wanted: EventListing) -> tuple[datetime, int]:
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


def _fingerprint(wanted: EventListing) -> str:
    """The same for the same filters and order, whatever the page and its size."""
    filters = wanted.model_dump_json(exclude={"cursor", "limit"})
    return hashlib.sha256(filters.encode()).hexdigest()[:16]
