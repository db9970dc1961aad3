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
from psycopg2.extensions import cursor as Cursor
from sqlalchemy.engine import URL

from db import Database
from ledger.notes import Verifier
from ledger.tree import TILE_HEIGHT, TILE_WIDTH, TileId, span, split_hashes
from problems import DatabaseUnavailable
from verifier import records
from verifier.adopted import check_adopted, count_older
from verifier.differences import Difference, in_order, named
from verifier.promises import Keeping, Promise, Roots, read_stored, stored_sizes
from verifier.ranges import Checked, Range, check_range, within
from verifier.rows import SESSION, Run, add_runs
from verifier.tree import GrowingTree, edge_of, fold

RANGE_LEAVES = 64 * TILE_WIDTH  # some 5 MB of rows

_SNAPSHOT = (
    "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY;"
    " SET LOCAL statement_timeout = '10min'; SET LOCAL idle_in_transaction_session_timeout = 0"
)
# Partitions that retention has taken out and neither dropped nor put back: their rows are not to be seen, and no event
# says why. With the table locked none goes out that the snapshot does not show to be on its way.
_LOCK = "LOCK TABLE audit_events IN ACCESS SHARE MODE"
_ON_ITS_WAY_OUT = """
    SELECT min(relname) FROM pg_class LEFT JOIN pg_inherits ON inhrelid = pg_class.oid
    WHERE inhparent = 'audit_events'::regclass AND inhdetachpending
       OR inhrelid IS NULL AND relkind = 'r' AND relname LIKE 'audit\\_events\\_%'
          AND obj_description(pg_class.oid, 'pg_class') LIKE 'expired, to be dropped by the audit service%'
"""
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
    """Check this database's log; `advance` is told of rows done, and how many there are.

    Raises what Database does, and DatabaseUnavailable while a partition is on its way out: nothing can be told then.

    `kept`: checkpoints from outside; those that the database keeps are checked, too, their signatures with the key.
    """
    with closing(open_snapshot(url)) as connection, connection.cursor() as cursor:
        _require_all_partitions(cursor)
        cursor.execute(_HEAD)
        heads = cursor.fetchall()
        if len(heads) != 1:
            return Verdict(1, 0, complaints=[f"ledger_head has {len(heads)} rows, and must have one."])
        first_id, size, frontier = heads[0]
        told = records.read_records(cursor, first_id)
        dropped, older = records.count_dropped(cursor, first_id, told.drops), count_older(cursor, first_id)
        adopted = check_adopted(connection, first_id, told, lambda count: advance(count, size - dropped + older))
        more = [promise.head.size for promise in kept if promise.head.size <= size]
        roots = Roots(stored_sizes(connection, size), more)
        walk = _Walk(connection, first_id, roots)
        for checked in _check_ranges(url, connection, _ranges(first_id, size, dropped, roots.sizes), jobs):
            walk.take(checked)
            advance(checked.count, size - dropped + older)
        walk.check_head(size, [bytes(node or b"") for node in frontier])
        add_runs(walk.redacted, adopted.redacted)
        doubtful = named(walk.differences)
        walk.differences += [
            *adopted.differences,
            *records.find_missing(first_id, dropped, told.drops, doubtful),
            *records.find_unrecorded(told.redactions, walk.redacted, doubtful),
        ]
        stored, complaints = _check_promises(connection, kept, key, size, roots)
        return Verdict(
            first_id,
            size,
            walk.root(),
            stored,
            dropped,
            sum(run.count for run in walk.redacted.values()),
            adopted.count,
            adopted.recorded,
            list(in_order(walk.differences)),
            [
                *complaints,
                *adopted.complaints,
                *walk.complaints,
                *walk.check_tile_counts(size),
            ],
        )


def _require_all_partitions(cursor: Cursor) -> None:
    cursor.execute(_LOCK)
    cursor.execute(_ON_ITS_WAY_OUT)
    ((partition,),) = cursor.fetchall()
    if partition is not None:
        raise DatabaseUnavailable(
            f"Partition {partition} is on its way out, and the event that says so is not recorded yet."
            " Try again in a minute. Where that lasts, see what keeps housekeeping from it, in the service's log."
        )


def _check_promises(
    connection: Connection, kept: Sequence[Promise], key: Verifier | None, size: int, roots: Roots
) -> tuple[int, list[str]]:
    """How many checkpoints the database keeps that are sound in themselves, and what is wrong with any."""
    keeping, unsound, stored = Keeping(size, roots), 0, 0
    complaints: list[str] = []
    for promise in kept:
        keeping.hold_against(promise)
    for found in read_stored(connection, key):
        if isinstance(found, str):
            unsound += 1
            complaints = complaints or [found]
            continue
        stored += 1
        keeping.hold_against(found)
    if unsound > 1:
        complaints.append(f"{unsound - 1} more checkpoints in ledger_checkpoints are not sound either.")
    return stored, [*complaints, *keeping.complaints()]


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

    def __init__(self, connection: Connection, first_id: int, roots: Roots) -> None:
        self.redacted: dict[str, Run] = {}  # by redacted_at
        self.differences: list[Difference] = []
        self.complaints: list[str] = []
        self._connection = connection
        self._first_id = first_id
        self._roots = roots
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
        if len(frontier) != len(nodes):
            self.complaints.append(
                f"ledger_head.frontier has {len(frontier)} hashes, and a log of {size} events has {len(nodes)}."
            )
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
        for size in within(self._roots.sizes, start, start + TILE_WIDTH - 1):
            if size == start or size in checked.edges:
                self._roots.keep(size, self._tree.root([checked.edges[size]] if size > start else []))

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
