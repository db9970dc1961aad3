"""A tree that grows by whole leaf tiles, and what can be said of it at any size. Pure functions, no I/O."""

from collections.abc import Callable, Sequence
from hashlib import sha256

from ledger.tree import TILE_HEIGHT, TILE_WIDTH, TileId, hash_node, root_of

Heights = Sequence[Sequence[bytes]]  # the full subtrees over some leaves, those of each height


def fold(leaves: Sequence[bytes]) -> Heights:
    """All full subtrees over these leaves, which begin a tile: the leaves themselves first."""
    heights = [leaves]
    while len(heights[-1]) > 1:
        pairs = iter(heights[-1])
        # hash_node(), a call less a node: half of all that is hashed is hashed here.
        heights.append([sha256(b"\x01" + left + right).digest() for left, right in zip(pairs, pairs, strict=False)])
    return heights


def edge_of(heights: Heights, width: int) -> list[bytes]:
    """The full subtrees that make up the first so many of the leaves, the largest first."""
    edge, start = [], 0
    for height in reversed(range(width.bit_length())):
        if width >> height & 1:
            edge.append(heights[height][start >> height])
            start += 1 << height
    return edge


class GrowingTree:
    """The tree above the leaf tiles, grown by one tile's root at a time; tells of each higher tile that is full."""

    def __init__(self, on_tile: Callable[[TileId, bytes], None]) -> None:
        self.tiles = 0  # of leaves
        self.edge: list[bytes] = []  # complete subtrees, the largest first
        self._on_tile = on_tile
        self._open: list[list[bytes]] = []  # hashes of the unfinished tile of each level, from level 1 on

    def resume(self, tiles: int, prefixes: Sequence[Sequence[bytes]]) -> None:
        """Go on from so many leaf tiles, with the hashes that each level's unfinished tile has, from level 1 on."""
        self.tiles = tiles
        self._open = [list(prefix) for prefix in prefixes]
        self.edge = [node for hashes in reversed(self._open) for node in edge_of(fold(hashes), len(hashes))]

    def append(self, root: bytes) -> None:
        node, count = root, self.tiles
        self._collect(0, node, count)
        height = 0
        while count & 1:
            node = hash_node(self.edge.pop(), node)
            count >>= 1
            height += 1
            if height % TILE_HEIGHT == 0:
                self._collect(height // TILE_HEIGHT, node, count)
        self.edge.append(node)
        self.tiles += 1

    def root(self, behind: Sequence[bytes] = ()) -> bytes:
        """The root at this size, or with the subtrees behind it that no tile is full of."""
        return root_of([*self.edge, *behind])

    def open_tiles(self) -> list[tuple[TileId, list[bytes]]]:
        """The unfinished tiles above the leaves that have hashes."""
        counts = [self.tiles >> TILE_HEIGHT * (above + 1) for above in range(len(self._open))]
        return [
            (TileId(above + 1, index), hashes)
            for above, (index, hashes) in enumerate(zip(counts, self._open, strict=True))
            if hashes
        ]

    def _collect(self, above: int, node: bytes, index: int) -> None:
        if above == len(self._open):
            self._open.append([])
        hashes = self._open[above]
        hashes.append(node)
        if len(hashes) == TILE_WIDTH:
            self._on_tile(TileId(above + 1, index // TILE_WIDTH), b"".join(hashes))
            hashes.clear()
