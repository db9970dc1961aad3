"""One flush: events become rows, leaves and keys in one transaction, on a connection that is handed in.

While the head's row is locked nobody else appends, so the next ids are ours, dense and in commit order,
recorded_at can be kept from falling, and a key that is not known will not become known meanwhile.
"""

import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from io import StringIO
from typing import Any

import orjson
from psycopg2 import Binary
from psycopg2.extensions import connection as Connection
from psycopg2.extensions import cursor as Cursor

import ledger
from schemas import EventIn

# The head, and with it the right to append until the transaction ends. One row, by its primary key.
_LOCK_HEAD = "BEGIN; SELECT first_id, size, frontier, recorded_at, clock_timestamp() FROM ledger_head FOR UPDATE"
_COPY_EVENTS = (
    "COPY audit_events (id, recorded_at, event_type, actor, timestamp, tenant, resource, outcome, source,"
    " source_ip, trace_id, metadata, nonce, personal_hash) FROM STDIN"
)
# Which keys were answered before. Index: idempotency_keys_pkey.
_KNOWN_KEYS = (
    "SELECT tenant, key, event_id, request_hash FROM idempotency_keys"
    " WHERE (tenant, key) IN (SELECT * FROM unnest(%s::text[], %s::text[]))"
)
_INSERT_KEYS = (
    "INSERT INTO idempotency_keys (tenant, key, event_id, request_hash, recorded_at)"
    " SELECT *, %s FROM unnest(%s::text[], %s::text[], %s::bigint[], %s::bytea[])"
)
_INSERT_TILE = "INSERT INTO ledger_tiles (level, tile_index, hashes) VALUES (%s, %s, %s)"
# Leaves of the tile under way that earlier flushes appended. Index: audit_events_pkey.
_ROWS_OF_LEAVES = (
    "SELECT id, event_type, timestamp, recorded_at, tenant, outcome, source, trace_id, personal_hash"
    " FROM audit_events WHERE id >= %s AND id < %s ORDER BY id"
)
_ROW_OF_LEAVES_NAMES = (
    "id",
    "event_type",
    "timestamp",
    "recorded_at",
    "tenant",
    "outcome",
    "source",
    "trace_id",
    "personal_hash",
)
# The full tiles under a tile one level up. Index: ledger_tiles_pkey.
_TILES_BELOW = (
    "SELECT hashes FROM ledger_tiles WHERE level = %s AND tile_index >= %s AND tile_index < %s ORDER BY tile_index"
)
_UPDATE_HEAD = "UPDATE ledger_head SET size = %s, frontier = %s::bytea[], recorded_at = %s"

_TO_ESCAPE = re.compile(r"[\\\t\n\r]")
_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})


@dataclass(frozen=True, slots=True)
class Prepared:
    """An event ready to append but for its id and the moment: all that can be made before the lock is held."""

    members: Mapping[str, Any]  # as EventIn has them, timestamp as text and filled in, plus personal_hash
    copy_line: str  # the row in COPY's text format, after id and recorded_at
    idempotency_key: str | None
    request_hash: bytes | None  # of a keyed event: tells a repetition from another event under the same key


@dataclass(frozen=True, slots=True)
class Appended:
    """Where a submission's events stand in the log. Ids of repeated keys are those of the first time."""

    ids: Sequence[int]
    recorded_at: str  # RFC 3339
    replayed: frozenset[int] = field(default_factory=frozenset)  # indexes of events that were known already


@dataclass(frozen=True, slots=True)
class KeyConflict:
    """Nothing of the submission was stored: the key of this event came before, with another event."""

    index: int


Submission = Sequence[Prepared]
Outcome = Appended | KeyConflict


@dataclass(slots=True)
class _Head:
    first_id: int
    size: int
    frontier: list[bytes]
    recorded_at: str  # RFC 3339: of this flush, and not before that of the last one

    @property
    def next_id(self) -> int:
        return self.first_id + self.size


def prepare_event(event: EventIn, now: datetime) -> Prepared:
    """Hash the personal part and write the row's text; `now` stands in for a timestamp that was not sent."""
    members = dict(event.__dict__)
    key = members.pop("idempotency_key")
    request_hash = None
    if key is not None:
        request_hash = sha256(ledger.canonical_json(event.model_dump(mode="json", exclude_none=True))).digest()
    members["timestamp"] = ledger.format_timestamp(event.timestamp or now)
    nonce = secrets.token_bytes(ledger.NONCE_BYTES)
    members["personal_hash"] = ledger.hash_personal_part(nonce, ledger.personal_part(members))
    return Prepared(members, _copy_line(members, nonce), key, request_hash)


def flush(connection: Connection, submissions: Sequence[Submission]) -> list[Outcome]:
    """Append the submissions in their order, each whole or not at all, up to but not including the COMMIT.

    Raises the driver's error where PostgreSQL refuses; the caller ends the transaction either way.
    """
    with connection.cursor() as cursor:
        head = _lock_head(cursor)
        known = _find_known_keys(cursor, submissions)
        events: list[Prepared] = []
        outcomes = [_place(submission, head, events, known) for submission in submissions]
        if events:
            _store(cursor, head, events)
        return outcomes


def _lock_head(cursor: Cursor) -> _Head:
    cursor.execute(_LOCK_HEAD)
    row = cursor.fetchone()
    if row is None:
        raise RuntimeError("ledger_head is empty: restore it from a backup; it must not be made anew by hand")
    first_id, size, frontier, recorded_at, now = row
    return _Head(first_id, size, [bytes(node) for node in frontier], ledger.format_timestamp(max(recorded_at, now)))


def _find_known_keys(cursor: Cursor, submissions: Sequence[Submission]) -> dict[tuple[str, str], tuple[int, bytes]]:
    """(tenant, key) → (event id, request hash), of those keys of the submissions that were used before."""
    keys = {_scoped_key(event) for events in submissions for event in events if event.idempotency_key is not None}
    if not keys:
        return {}
    tenants, names = zip(*keys, strict=True)
    cursor.execute(_KNOWN_KEYS, (list(tenants), list(names)))
    return {(tenant, key): (event_id, bytes(digest)) for tenant, key, event_id, digest in cursor.fetchall()}


def _scoped_key(event: Prepared) -> tuple[str, str]:
    return event.members["tenant"] or "", event.idempotency_key or ""


def _place(
    submission: Submission,
    head: _Head,
    events: list[Prepared],
    known: dict[tuple[str, str], tuple[int, bytes]],
) -> Outcome:
    """Give each event its id: the next one, or that of the event which its key stands for."""
    ids: list[int] = []
    replayed: set[int] = set()
    fresh: list[Prepared] = []
    fresh_keys: dict[tuple[str, str], tuple[int, bytes]] = {}
    for index, event in enumerate(submission):
        if event.request_hash is not None:
            before = fresh_keys.get(_scoped_key(event)) or known.get(_scoped_key(event))
            if before is not None:
                if before[1] != event.request_hash:
                    return KeyConflict(index)
                ids.append(before[0])
                replayed.add(index)
                continue
        event_id = head.next_id + len(events) + len(fresh)
        if event.request_hash is not None:
            fresh_keys[_scoped_key(event)] = event_id, event.request_hash
        ids.append(event_id)
        fresh.append(event)
    events += fresh
    known |= fresh_keys
    return Appended(ids, head.recorded_at, frozenset(replayed))


def _store(cursor: Cursor, head: _Head, events: Sequence[Prepared]) -> None:
    lines = [
        f"{event_id}\t{head.recorded_at}\t{event.copy_line}" for event_id, event in enumerate(events, head.next_id)
    ]
    cursor.copy_expert(_COPY_EVENTS, StringIO("".join(lines)))
    _store_keys(cursor, head, events)
    leaves = [
        ledger.hash_leaf(ledger.entry({**event.members, "id": event_id, "recorded_at": head.recorded_at}))
        for event_id, event in enumerate(events, head.next_id)
    ]
    _store_tiles(cursor, head, leaves)
    frontier = ledger.append_leaves(head.frontier, head.size, leaves)
    cursor.execute(_UPDATE_HEAD, (head.size + len(leaves), [Binary(node) for node in frontier], head.recorded_at))


def _store_keys(cursor: Cursor, head: _Head, events: Sequence[Prepared]) -> None:
    keyed = [
        (*_scoped_key(event), event_id, Binary(event.request_hash))
        for event_id, event in enumerate(events, head.next_id)
        if event.request_hash is not None
    ]
    if keyed:
        cursor.execute(_INSERT_KEYS, (head.recorded_at, *map(list, zip(*keyed, strict=True))))


def _store_tiles(cursor: Cursor, head: _Head, leaves: Sequence[bytes]) -> None:
    """Store the tiles, of every level, that these leaves fill."""
    end = head.size + len(leaves)
    start = head.size - head.size % ledger.TILE_WIDTH
    if end - start < ledger.TILE_WIDTH:
        return
    hashes = [*_read_leaves(cursor, head.first_id + start, head.next_id), *leaves]
    for offset in range(0, len(hashes) - ledger.TILE_WIDTH + 1, ledger.TILE_WIDTH):
        _store_tile(cursor, 0, (start + offset) // ledger.TILE_WIDTH, hashes[offset : offset + ledger.TILE_WIDTH])


def _store_tile(cursor: Cursor, level: int, tile_index: int, hashes: Sequence[bytes]) -> None:
    """Store a full tile, and where it is the last of 256, the one above it."""
    cursor.execute(_INSERT_TILE, (level, tile_index, Binary(b"".join(hashes))))
    parent_index, position = divmod(tile_index, ledger.TILE_WIDTH)
    if position == ledger.TILE_WIDTH - 1:
        cursor.execute(_TILES_BELOW, (level, tile_index - position, tile_index + 1))
        roots = [ledger.tile_root(bytes(tile)) for (tile,) in cursor.fetchall()]
        _store_tile(cursor, level + 1, parent_index, roots)


def _read_leaves(cursor: Cursor, start_id: int, end_id: int) -> Iterable[bytes]:
    """Leaf hashes of events that stand in the log already, recomputed from their rows."""
    cursor.execute(_ROWS_OF_LEAVES, (start_id, end_id))
    rows = (dict(zip(_ROW_OF_LEAVES_NAMES, row, strict=True)) for row in cursor.fetchall())
    return [ledger.hash_leaf(ledger.entry(_with_texts(row))) for row in rows]


def _with_texts(row: dict[str, Any]) -> dict[str, Any]:
    moments = {name: ledger.format_timestamp(row[name]) for name in ("timestamp", "recorded_at")}
    return {**row, **moments, "personal_hash": bytes(row["personal_hash"])}


def _copy_line(members: Mapping[str, Any], nonce: bytes) -> str:
    metadata = members["metadata"]
    fields = (
        members["event_type"],
        members["actor"],
        members["timestamp"],
        members["tenant"],
        members["resource"],
        members["outcome"],
        members["source"],
        members["source_ip"],
        members["trace_id"],
        None if metadata is None else orjson.dumps(metadata).decode(),
    )
    text = "\t".join("\\N" if value is None else _escape(value) for value in fields)
    return f"{text}\t\\\\x{nonce.hex()}\t\\\\x{members['personal_hash'].hex()}\n"


def _escape(value: str) -> str:
    """COPY's text format (PostgreSQL, COPY, File Formats)."""
    return value.translate(_ESCAPES) if _TO_ESCAPE.search(value) else value
