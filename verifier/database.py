"""The database, checked whole: every row hashed anew, every tile, the head, and all that vouches for it.

One snapshot, over as many processes as the machine has cores; nobody who writes waits for it.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing import get_context
from typing import Any

from psycopg2.extensions import connection as Connection
from sqlalchemy.engine import URL

from db import Database
from ledger.notes import Verifier
from ledger.tree import TILE_HEIGHT, TILE_WIDTH, TileId, span, split_hashes
from verifier import records
from verifier.adopted import check_adopted, count_older
from verifier.differences import Difference, in_order, named
from verifier.promises import Promise, broken_promises, read_stored
from verifier.ranges import Checked, Range, check_range, within
from verifier.rows import SESSION, Run, add_runs
from verifier.tree import GrowingTree, edge_of, fold

RANGE_LEAVES = 64 * TILE_WIDTH  # some 5 MB of rows

_SNAPSHOT = (
    "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY;"
    " SET LOCAL statement_timeout = '10min'; SET LOCAL idle_in_transaction_session_timeout = 0"
)
_HEAD = "SELECT first_id, size, frontier FROM ledger_head"
_TILE = "SELECT hashes, root FROM ledger_tiles WHERE level = %s AND tile_index = %s"  # index: ledger_tiles_pkey
_TILE_COUNTS = "SELECT level, count(*) FROM ledger_tiles GROUP BY level"

_connection: Connection  # of a process of the pool: its own, in the snapshot that all share


@dataclass
class Verdict:
    """What was found. Nothing differs where `differences` and `complaints` are empty."""

    first_id: int
    size: int
    root: bytes = b""
    checkpoints: int = 0  # that the database keeps
    dropped: int = 0  # leaves without rows, by the log's own account of retention
    redacted: int = 0
    adopted: int = 0  # rows from before the ledger
    adoption: records.Adoption | None = None  # what vouches for them
    differences: Sequence[Difference] = ()
    complaints: list[str] = field(default_factory=list)  # of the tree as a whole, in a sentence each


def verify_database(
    url: URL,
    kept: Sequence[Promise],
    advance: Callable[[int, int], object],
    key: Verifier | None = None,
    jobs: int | None = None,
) -> Verdict:
    """Check this database's log; `advance` is told of rows done, and how many there are. Raises what Database does.

    `kept`: checkpoints from outside; those that the database keeps are checked, too, their signatures with the key.
    """
    with closing(open_snapshot(url)) as connection, connection.cursor() as cursor:
        cursor.execute(_HEAD)
        heads = cursor.fetchall()
        if len(heads) != 1:
            return Verdict(1, 0, complaints=[f"ledger_head has {len(heads)} rows, and must have one."])
        first_id, size, frontier = heads[0]
        told = records.read_records(cursor, first_id)
        dropped, older = records.count_dropped(cursor, first_id, told.drops), count_older(cursor, first_id)
        adopted = check_adopted(connection, first_id, told, lambda count: advance(count, size - dropped + older))
        stored, complaints = read_stored(cursor, key)
        promises = [*kept, *stored]
        walk = _Walk(connection, first_id, sorted({promise.head.size for promise in promises}))
        for checked in _check_ranges(url, connection, _ranges(first_id, size, dropped, walk.sizes), jobs):
            walk.take(checked)
            advance(checked.count, size - dropped + older)
        walk.check_head(size, [bytes(node) for node in frontier])
        add_runs(walk.redacted, adopted.redacted)
        doubtful = named(walk.differences)
        walk.differences += [
            *adopted.differences,
            *records.find_missing(first_id, dropped, told.drops, doubtful),
            *records.find_unrecorded(told.redactions, walk.redacted, doubtful),
        ]
        return Verdict(
            first_id,
            size,
            walk.root(),
            len(stored),
            dropped,
            sum(run.count for run in walk.redacted.values()),
            adopted.count,
            adopted.recorded,
            list(in_order(walk.differences)),
            [
                *complaints,
                *adopted.complaints,
                *walk.check_tile_counts(size),
                *broken_promises(promises, size, walk.roots),
            ],
        )


def open_snapshot(url: URL, snapshot: str | None = None) -> Connection:
    """A connection in one snapshot of the database: a new one, or that which another connection has exported."""
    with closing(Database(url)) as database:
        connection = database.dedicated_connection()
    with connection.cursor() as cursor:
        cursor.execute(f"{SESSION}; {_SNAPSHOT}")
        if snapshot is not None:
            cursor.execute("SET TRANSACTION SNAPSHOT %s", (snapshot,))
    return connection


def _ranges(first_id: int, size: int, dropped: int, sizes: Sequence[int]) -> list[Range]:
    """At least one, for there may be rows where there should be none."""
    bounds = [*range(0, size, RANGE_LEAVES), size] if size else [0, 0]
    return [
        Range(first_id, start, end, dropped, end == size, within(sizes, start + 1, end))
        for start, end in pairwise(bounds)
    ]


def _check_ranges(url: URL, connection: Connection, ranges: Sequence[Range], jobs: int | None) -> Iterator[Checked]:
    """In their order; where there is one, without the second that it takes to start processes."""
    if len(ranges) == 1:
        yield check_range(connection, ranges[0])
        return
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_export_snapshot()")
        ((snapshot,),) = cursor.fetchall()
    workers = min(jobs or os.cpu_count() or 1, len(ranges))
    with ProcessPoolExecutor(workers, get_context("spawn"), _join_snapshot, (url, snapshot)) as pool:
        yield from pool.map(_check_here, ranges)


def _join_snapshot(url: URL, snapshot: str) -> None:
    global _connection
    _connection = open_snapshot(url, snapshot)


def _check_here(wanted: Range) -> Checked:
    return check_range(_connection, wanted)


class _Walk:
    """The tree as it grows over the ranges, and what was found on the way."""

    def __init__(self, connection: Connection, first_id: int, sizes: Sequence[int]) -> None:
        self.sizes = sizes  # of which somebody knows the root
        self.roots: dict[int, bytes] = {}  # by size
        self.redacted: dict[str, Run] = {}  # by redacted_at
        self.differences: list[Difference] = []
        self._connection = connection
        self._first_id = first_id
        self._tree = GrowingTree(self._check_tile)
        self._is_known = True  # until a tile has neither rows nor hashes
        self._rest: list[bytes] = []

    def take(self, checked: Checked) -> None:
        self.differences += checked.differences
        add_runs(self.redacted, checked.redacted)
        for root in checked.roots:
            self._note_roots(checked)
            self._is_known &= root is not None
            if root is not None and self._is_known:
                self._tree.append(root)
        self._note_roots(checked)
        self._rest = checked.rest

    def root(self) -> bytes:
        return self._tree.root(edge_of(fold(self._rest), len(self._rest)))

    def check_head(self, size: int, frontier: Sequence[bytes]) -> None:
        """Hold the frontier against the tree's right edge, as far as that is known."""
        nodes = span(0, size)
        edge = [*self._tree.edge, *edge_of(fold(self._rest), len(self._rest))] if self._is_known else []
        stored = [*frontier, *[b""] * len(nodes)]
        for node, computed, known in zip(nodes, edge, stored, strict=False):
            if computed != known:
                self._differ(
                    node.index << node.height, 1 << node.height, "one of them changed, or ledger_head.frontier"
                )

    def check_tile_counts(self, size: int) -> Iterator[str]:
        with self._connection.cursor() as cursor:
            cursor.execute(_TILE_COUNTS)
            counts = dict(cursor.fetchall())
        for level, count in sorted(counts.items()):
            if count > (full := size >> TILE_HEIGHT * (level + 1)):
                yield f"ledger_tiles has {count} tiles of level {level}, and a log of {size} events has {full}."

    def _note_roots(self, checked: Checked) -> None:
        """The roots of those sizes that somebody knows and that the tree has come to."""
        if not self._is_known:
            return
        start = self._tree.tiles * TILE_WIDTH
        for size in self.sizes:
            if size == start or (size in checked.edges and start < size < start + TILE_WIDTH):
                self.roots[size] = self._tree.root([checked.edges[size]] if size > start else [])

    def _check_tile(self, tile: TileId, hashes: bytes) -> None:
        """A tile above the leaves: its hashes are the roots of those below."""
        leaves = 1 << TILE_HEIGHT * tile.level  # below each hash
        start = tile.index * TILE_WIDTH * leaves
        with self._connection.cursor() as cursor:
            cursor.execute(_TILE, (tile.level, tile.index))
            stored = cursor.fetchone()
        if stored is None:
            self._differ(start, TILE_WIDTH * leaves, f"their tile of level {tile.level} is missing in ledger_tiles")
            return
        computed, known = split_hashes(hashes), split_hashes(bytes(stored[0]))
        for place, (ours, theirs) in enumerate(zip(computed, known, strict=True)):
            if ours != theirs:
                self._differ(start + place * leaves, leaves, f"one of them changed, or a tile of level {tile.level}")
        if fold(known)[-1] != [bytes(stored[1])]:
            self._differ(start, TILE_WIDTH * leaves, f"the root of their tile of level {tile.level} is not the tile's")

    def _differ(self, start: int, count: int, what: str) -> None:
        first_id: Any = self._first_id + start
        self.differences.append(Difference(first_id, first_id + count - 1, what))
