"""One range of the log: its rows hashed anew and held against the leaf tiles that were stored when they came.

A stored tile tells which of its 256 events is wrong. Where both disagree the tile goes on into the tree, so that
what is wrong with a row is said once, and what is wrong with the tree is said of the tree.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator, Sequence, Set
from dataclasses import dataclass, field

from psycopg2.extensions import connection as Connection

from ledger.tree import TILE_WIDTH, root_of, split_hashes
from verifier import swaps
from verifier.differences import ADDED, MISSING, PERSONAL, ROW, TWICE, Difference, at, named
from verifier.rows import BETWEEN, COPY_ROWS, Hashed, Lines, Run, hash_rows
from verifier.tree import edge_of, fold

MAX_ID = 2**63 - 1

# Index: ledger_tiles_pkey.
_LEAF_TILES = """
    SELECT tile_index, hashes, root FROM ledger_tiles WHERE level = 0 AND tile_index >= %s AND tile_index < %s
"""


def within(sizes: Sequence[int], first: int, last: int) -> Sequence[int]:
    """Of sizes in order those from the first to the last."""
    return sizes[bisect_left(sizes, first) : bisect_right(sizes, last)]


@dataclass(frozen=True)
class Range:
    """Leaves to check, from a tile's first on."""

    first_id: int  # of the ledger
    start: int
    end: int
    kept: int  # rows below are not there any more, with good reason
    is_last: bool  # then nothing may come behind it
    sizes: Sequence[int] = ()  # in order, of trees that end in it, and whose roots somebody vouches for

    @property
    def ids(self) -> range:
        """Of the rows that must be there."""
        return range(self.first_id + min(max(self.start, self.kept), self.end), self.first_id + self.end)


@dataclass
class Checked:
    """What a range came to."""

    count: int  # of rows
    roots: list[bytes | None] = field(default_factory=list)  # of its full tiles; None of one that cannot be known
    rest: list[bytes] = field(default_factory=list)  # the leaves behind them; none where one of them is missing
    edges: dict[int, bytes] = field(default_factory=dict)  # of each size that ends in a tile: the hash over that part
    differences: list[Difference] = field(default_factory=list)
    redacted: dict[str, Run] = field(default_factory=dict)  # by redacted_at


def check_range(connection: Connection, wanted: Range) -> Checked:
    """Hash the rows of a range and compare."""
    lines = Lines()
    last_id = MAX_ID if wanted.is_last else wanted.first_id + wanted.end - 1
    with connection.cursor() as cursor:
        condition = BETWEEN.format(first_id=wanted.ids.start, last_id=last_id)
        cursor.copy_expert(COPY_ROWS.format(condition=condition, limit="ALL"), lines)
        cursor.execute(_LEAF_TILES, (wanted.start // TILE_WIDTH, wanted.end // TILE_WIDTH))
        stored = {index: (bytes(hashes), bytes(root)) for index, hashes, root in cursor}
    hashed = hash_rows(lines.rows)
    checked = Checked(len(hashed.ids), redacted=hashed.redacted)
    checked.differences = [at(event_id, PERSONAL) for event_id in hashed.changed]
    leaves = _place(wanted, hashed, checked)
    wrong: dict[int, bytes] = {}
    for start in range(wanted.start, wanted.end, TILE_WIDTH):
        hashes = leaves[start - wanted.start : start - wanted.start + TILE_WIDTH]
        if len(hashes) == TILE_WIDTH:
            tile = stored.get(start // TILE_WIDTH)
            wrong |= _compare(wanted, start, hashes, tile, checked)
            _grow(wanted, start, split_hashes(tile[0]) if tile else hashes, checked)
            if tile and checked.roots[-1] != tile[1]:
                what = "the root that ledger_tiles has of their tile is not the tile's"
                checked.differences.append(_of_tile(wanted, start, what))
        else:
            _grow(wanted, start, hashes, checked)
    if wrong:
        known = named(checked.differences)
        explained = list(swaps.explain(lines.rows, wrong, known))
        checked.differences += [*explained, *_unexplained(wanted, wrong, known, explained)]
    return checked


def _place(wanted: Range, hashed: Hashed, checked: Checked) -> list[bytes | None]:
    """The leaves, each at its place; None where there is no row."""
    below = [None] * (wanted.ids.start - wanted.first_id - wanted.start)
    if hashed.ids == list(wanted.ids):
        return [*below, *hashed.leaves]
    found: dict[int, bytes] = {}
    for event_id, leaf in zip(hashed.ids, hashed.leaves, strict=True):
        if event_id in found:
            checked.differences.append(at(event_id, TWICE))
        elif event_id not in wanted.ids:
            checked.differences.append(at(event_id, ADDED))
        found.setdefault(event_id, leaf)
    checked.differences += [at(event_id, MISSING) for event_id in wanted.ids if event_id not in found]
    return [*below, *(found.get(event_id) for event_id in wanted.ids)]


def _compare(
    wanted: Range, start: int, leaves: Sequence[bytes | None], tile: tuple[bytes, bytes] | None, checked: Checked
) -> dict[int, bytes]:
    """The stored hashes, by id, of the events of a tile whose rows come to another one."""
    if tile is None:
        checked.differences.append(_of_tile(wanted, start, "their tile is missing: ledger_tiles has none of them"))
        return {}
    if b"".join(filter(None, leaves)) == tile[0]:
        return {}
    pairs = enumerate(zip(leaves, split_hashes(tile[0]), strict=True), wanted.first_id + start)
    return {event_id: stored for event_id, (leaf, stored) in pairs if leaf is not None and leaf != stored}


def _unexplained(
    wanted: Range, wrong: Collection[int], known: Set[int], explained: Sequence[Difference]
) -> Iterator[Difference]:
    """The wrong events of each tile of which nothing is said, whatever the reason: that they differ is certain."""
    tiles: dict[int, list[int]] = {}
    for event_id in wrong:
        tiles.setdefault((event_id - wanted.first_id) // TILE_WIDTH, []).append(event_id)
    for ids in tiles.values():
        said = (each.first_id <= event_id <= each.last_id for each in explained for event_id in ids)
        if known.isdisjoint(ids) and not any(said):
            yield from (at(event_id, ROW) for event_id in ids)


def _of_tile(wanted: Range, start: int, what: str) -> Difference:
    first_id = wanted.first_id + start
    return Difference(first_id, first_id + TILE_WIDTH - 1, what)


def _grow(wanted: Range, start: int, hashes: Sequence[bytes | None], checked: Checked) -> None:
    leaves = [each for each in hashes if each is not None]
    is_full = len(hashes) == TILE_WIDTH
    if len(leaves) < len(hashes):  # of a tile that is not stored a row is missing: nothing can be said of its tree
        checked.roots += [None] * is_full
        return
    heights = fold(leaves)
    if is_full:
        checked.roots += heights[-1]
    else:
        checked.rest = leaves
    for size in within(wanted.sizes, start + 1, start + len(leaves)):
        if size % TILE_WIDTH:
            checked.edges[size] = root_of(edge_of(heights, size - start))
