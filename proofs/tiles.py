"""Tiles and entry bundles (c2sp.org/tlog-tiles), read from what the flushes stored. Waits for no lock of theirs.

Full tiles are stored. A partial one, at the tree's right edge, is made of the newest rows, or of the roots of the
tiles below it. Of a leaf that retention pruned the hash stays, in a full tile; the entry is gone.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from sqlalchemy import Connection, LargeBinary, Row, bindparam, literal_column, select

from ledger.tree import HASH_BYTES, TILE_WIDTH, TileId, Tiles, tile_width
from models import audit_events
from problems import TileNotFound
from queries.reader import DIALECT
from queries.seals import Seal, recorded_condition, recorded_values

_columns = audit_events.c

_FIRST_ID = "SELECT first_id FROM ledger_head"  # one row; it stays as the ledger's migration made it
_SIZE = "SELECT size FROM ledger_head"  # one row
# Index: ledger_tiles_pkey, one look a tile.
_FULL_TILES = """
    SELECT wanted.level, wanted.tile_index, tile.hashes
    FROM unnest(%(levels)s::smallint[], %(indexes)s::bigint[]) AS wanted (level, tile_index)
    CROSS JOIN LATERAL (
        SELECT hashes FROM ledger_tiles
        WHERE ledger_tiles.level = wanted.level AND ledger_tiles.tile_index = wanted.tile_index
    ) AS tile
"""
# Index: ledger_tiles_pkey.
_ROOTS = """
    SELECT root FROM ledger_tiles
    WHERE level = %(level)s AND tile_index >= %(start)s AND tile_index < %(end)s ORDER BY tile_index
"""


def _of_each_row(expression: str) -> str:
    """The expression over each event of a run of ids. Index: audit_events_pkey, of the partitions that have them."""
    statement = (
        select(literal_column(expression, LargeBinary))
        .select_from(audit_events)
        .where(_columns.id >= bindparam("start"), _columns.id < bindparam("end"))
        .where(recorded_condition(_columns.recorded_at))
        .order_by(_columns.id)
    )
    return str(statement.compile(dialect=DIALECT))


# Functions: alembic/versions/0005_append_events.py.
_LEAVES = _of_each_row("audit_leaf(audit_events)")
_ENTRIES = _of_each_row(
    "audit_entry(id, event_type, audit_moment(timestamp), audit_moment(recorded_at), tenant, outcome, source,"
    " trace_id, encode(personal_hash, 'hex'))"
)


class Source(Protocol):
    """Who answers single statements: a Reader, or a transaction of the caller's."""

    def walk(self, sql: str, values: Mapping[str, Any]) -> Sequence[Row[Any]]: ...

    def seals(self) -> Sequence[Seal]: ...


class TransactionSource:
    """Reads within a transaction, and so what is true under the locks that it holds."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def walk(self, sql: str, values: Mapping[str, Any]) -> Sequence[Row[Any]]:
        return self._connection.exec_driver_sql(sql, dict(values)).all()

    def seals(self) -> Sequence[Seal]:
        return ()


def read_first_id(source: Source) -> int:
    """The id of the event whose leaf has the index 0."""
    return int(source.walk(_FIRST_ID, {})[0][0])


def require_size(source: Source, size: int) -> None:
    """Raises TileNotFound where the tree has not grown so far: of some sizes a proof needs no tile."""
    if size > source.walk(_SIZE, {})[0][0]:
        raise TileNotFound()


def read_tiles(source: Source, tiles: Collection[TileId], size: int) -> Tiles:
    """The tiles as a tree of this size has them; raises TileNotFound."""
    found = _read_full(source, tiles)
    return {tile: found.get(tile) or _read_partial(source, tile, tile_width(tile, size)) for tile in tiles}


def read_tile(source: Source, tile: TileId, width: int = TILE_WIDTH) -> bytes:
    """The first hashes of a tile, as many as asked for; raises TileNotFound where the tree does not have them."""
    full = _read_full(source, [tile]).get(tile)
    return full[: width * HASH_BYTES] if full else _read_partial(source, tile, width)


def read_bundle(source: Source, index: int, width: int = TILE_WIDTH) -> bytes:
    """The entries of as many leaves, from index * 256 on, each behind its length; raises TileNotFound.

    Pruned is what lies below the first event that is kept, rounded up to whole bundles.
    """
    entries = _read_rows(source, _ENTRIES, read_first_id(source) + index * TILE_WIDTH, width)
    return b"".join(len(entry).to_bytes(2) + entry for entry in entries)


def read_entry(source: Source, event_id: int) -> bytes:
    """The entry of one event; raises TileNotFound."""
    return _read_rows(source, _ENTRIES, event_id, 1)[0]


def _read_full(source: Source, tiles: Collection[TileId]) -> Tiles:
    if not tiles:
        return {}
    levels, indexes = [tile.level for tile in tiles], [tile.index for tile in tiles]
    rows = source.walk(_FULL_TILES, {"levels": levels, "indexes": indexes})
    return {TileId(row.level, row.tile_index): bytes(row.hashes) for row in rows}


def _read_partial(source: Source, tile: TileId, width: int) -> bytes:
    start = tile.index * TILE_WIDTH
    if tile.level == 0:
        return b"".join(_read_rows(source, _LEAVES, read_first_id(source) + start, width))
    rows = source.walk(_ROOTS, {"level": tile.level - 1, "start": start, "end": start + width})
    return b"".join(_require(rows, width))


def _read_rows(source: Source, sql: str, start: int, count: int) -> list[bytes]:
    """What the SQL makes of so many events, from the one with the id `start` on; raises TileNotFound."""
    end = start + count
    recorded = recorded_values(source.seals(), lambda seal: seal.first_id < end and start <= seal.last_id)
    return _require(source.walk(sql, {"start": start, "end": end, **recorded}), count)


def _require(rows: Sequence[Row[Any]], count: int) -> list[bytes]:
    if count == 0 or len(rows) != count:
        raise TileNotFound()
    return [bytes(row[0]) for row in rows]
