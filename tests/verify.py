"""Checks a log whole, from its rows up, with an encoder and a tree that the service does not use."""

import hashlib
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import psycopg2
import psycopg2.extras
import rfc8785
from sqlalchemy.engine import URL


@dataclass
class Checked:
    """The leaves of a log that were recomputed from their rows already: the next check begins after them."""

    leaves: list[bytes] = field(default_factory=list)
    recorded_at: datetime | None = None  # of the last of them


def moment(value: datetime) -> str:
    return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ").rjust(27, "0")


def doubles(value: Any) -> Any:
    """JSON numbers beyond 2^53 are the doubles nearest to them; jsonb writes those out as integers."""
    if isinstance(value, dict):
        return {key: doubles(member) for key, member in value.items()}
    if isinstance(value, list):
        return [doubles(member) for member in value]
    return float(value) if type(value) is int and abs(value) >= 2**53 else value


def tree_hash(hashes: list[bytes]) -> bytes:
    """MTH over leaf hashes, RFC 6962 section 2.1, word for word."""
    if len(hashes) < 2:
        return hashes[0] if hashes else hashlib.sha256(b"").digest()
    split = 1 << (len(hashes) - 1).bit_length() - 1
    return hashlib.sha256(b"\x01" + tree_hash(hashes[:split]) + tree_hash(hashes[split:])).digest()


def personal_hash_of(row: dict[str, Any]) -> bytes:
    """What the row commits to; of a redacted one nothing is left to recompute it from."""
    stored = bytes(row["personal_hash"])
    personal = {name: row[name] for name in ("actor", "resource", "source_ip", "metadata") if row[name] is not None}
    if row["redacted_at"] is not None:
        assert (personal, row["nonce"]) == ({"actor": "[redacted]"}, None), f"event {row['id']} is redacted in part"
        return stored
    computed = hashlib.sha256(bytes(row["nonce"]) + rfc8785.dumps(doubles(personal))).digest()
    assert computed == stored, f"event {row['id']}: {personal!r} does not recompute"
    return stored


def leaf_of(row: dict[str, Any]) -> bytes:
    personal_hash = personal_hash_of(row)
    names = ("id", "event_type", "tenant", "outcome", "source", "trace_id")
    entry: dict[str, Any] = {name: row[name] for name in names if row[name] is not None}
    entry |= {name: moment(row[name]) for name in ("timestamp", "recorded_at")}
    return hashlib.sha256(b"\x00" + rfc8785.dumps({**entry, "personal_hash": personal_hash.hex()})).digest()


def read(cursor: Any, statement: str, *values: Any) -> list[dict[str, Any]]:
    cursor.execute(statement, values)
    return [dict(row) for row in cursor.fetchall()]


def assert_ledger_consistent(url: URL, checked: Checked | None = None, pruned: int = 0) -> int:
    """Ids are dense, hashes recompute, the root is the frontier's, tiles are exactly the full ones; the size.

    Of the leaves that retention pruned, the first so many, only the hashes in the tiles are left.
    """
    checked = checked or Checked()
    connection = psycopg2.connect(url.set(drivername="postgresql").render_as_string(hide_password=False))
    connection.set_session(isolation_level="REPEATABLE READ", readonly=True)
    psycopg2.extras.register_default_jsonb(connection, loads=json.loads)
    cursor = connection.cursor(cursor_factory=psycopg2.extras.RealDictCursor)
    try:
        (head,) = read(cursor, "SELECT * FROM ledger_head")
        start_id = head["first_id"] + len(checked.leaves)
        rows = read(cursor, "SELECT * FROM audit_events WHERE id >= %s ORDER BY id", start_id)
        tiles = read(cursor, "SELECT * FROM ledger_tiles ORDER BY level, tile_index")
        keys = read(cursor, "SELECT * FROM idempotency_keys")
    finally:
        connection.close()
    end = head["first_id"] + head["size"]
    assert [row["id"] for row in rows] == list(range(start_id + pruned, end))
    recorded = [*filter(None, [checked.recorded_at]), *(row["recorded_at"] for row in rows), head["recorded_at"]]
    assert recorded == sorted(recorded)

    stored = b"".join(bytes(tile["hashes"]) for tile in tiles if tile["level"] == 0)
    leaves = checked.leaves + [stored[n * 32 : n * 32 + 32] for n in range(pruned)] + [leaf_of(row) for row in rows]
    frontier, start = [], 0
    for height in reversed(range(len(leaves).bit_length())):
        if len(leaves) >> height & 1:
            frontier.append(tree_hash(leaves[start : start + (1 << height)]))
            start += 1 << height
    assert [bytes(node) for node in head["frontier"]] == frontier

    expected, level, hashes = [], 0, leaves
    while full := len(hashes) // 256:
        parts = [hashes[n * 256 : n * 256 + 256] for n in range(full)]
        expected += [(level, n, b"".join(part)) for n, part in enumerate(parts)]
        level, hashes = level + 1, [tree_hash(part) for part in parts]
    assert [(tile["level"], tile["tile_index"], bytes(tile["hashes"])) for tile in tiles] == expected

    assert all(head["first_id"] <= key["event_id"] < end for key in keys)
    assert len({key["event_id"] for key in keys}) == len(keys)
    checked.leaves, checked.recorded_at = leaves, rows[-1]["recorded_at"] if rows else checked.recorded_at
    return len(leaves)
