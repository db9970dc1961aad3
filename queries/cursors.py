"""Cursors: opaque to clients, versioned, and bound to the filters and the order they were given with."""

import base64
import hashlib
import json
from datetime import UTC, datetime

from problems import InvalidCursor
from schemas import MAX_ID, EventListing

_VERSION = 1

Position = tuple[datetime, int]  # timestamp and id of an event: where it stands in a listing


def encode_cursor(wanted: EventListing, position: Position) -> str:
    """The cursor of the page that begins after this event."""
    timestamp, event_id = position
    content = [_VERSION, _fingerprint(wanted), timestamp.astimezone(UTC).isoformat(), event_id]
    return base64.urlsafe_b64encode(json.dumps(content).encode()).decode().rstrip("=")


def decode_cursor(wanted: EventListing) -> Position | None:
    """The event after which the page begins; raises InvalidCursor."""
    if wanted.cursor is None:
        return None
    try:
        version, fingerprint, timestamp, event_id = json.loads(
            base64.b64decode(wanted.cursor + "=" * (-len(wanted.cursor) % 4), altchars=b"-_", validate=True)
        )
        when = datetime.fromisoformat(timestamp)
        position = when.astimezone(UTC), int(event_id)
    except (ValueError, TypeError, OverflowError):
        raise InvalidCursor() from None
    if version != _VERSION or when.tzinfo is None or not -MAX_ID <= position[1] <= MAX_ID:
        raise InvalidCursor()
    if fingerprint != _fingerprint(wanted):
        raise InvalidCursor("This cursor belongs to other filters: a cursor continues the query that gave it.")
    return position


def _fingerprint(wanted: EventListing) -> str:
    """The same for the same filters and order, whatever the page and its size."""
    filters = json.dumps(wanted.model_dump(mode="json", exclude={"cursor", "limit"}), sort_keys=True)
    return hashlib.sha256(filters.encode()).hexdigest()[:16]
