"""The Merkle tree of RFC 6962 section 2.1 over SHA-256: roots, paths, and how both are checked. Pure functions, no I/O.

A tree is seen as full subtrees: the node (height, index) stands for the leaves from index * 2^height on, 2^height of
them. A path is worked out in two steps: which nodes each of its hashes is made of, and, once the caller has fetched
the tiles that hold them (c2sp.org/tlog-tiles), the hashes themselves.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

HASH_BYTES = 32
TILE_HEIGHT = 8  # a tile is a subtree of this height; its 256 hashes are the leaves of that subtree
TILE_WIDTH = 1 << TILE_HEIGHT
EMPTY_ROOT = hashlib.sha256(b"").digest()


@dataclass(frozen=True, slots=True)
class Node:
    """A full subtree."""

    height: int
    index: int


@dataclass(frozen=True, slots=True)
class TileId:
    """Where a tile stands: its hashes are those of the nodes of height 8 * level, from index * 256 on."""

    level: int
    index: int


Span = Sequence[Node]  # nodes side by side, which one hash of a path stands for: the largest first
Tiles = Mapping[TileId, bytes]  # a tile's hashes, as many as the tree has or more


def hash_leaf(entry: bytes) -> bytes:
    return hashlib.sha256(b"\x00" + entry).digest()


def hash_node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def root_of(frontier: Sequence[bytes]) -> bytes:
    """The hash over these full subtrees side by side, the largest first: a tree's root, where they are all of it."""
    if not frontier:
        return EMPTY_ROOT
    return reduce(lambda right, left: hash_node(left, right), reversed(frontier))


def span(start: int, end: int) -> Span:
    """The largest full subtrees that make up the leaves from start to end (exclusive)."""
    nodes = []
    while start < end:
        height = (end - start).bit_length() - 1
        if start:
            height = min(height, (start & -start).bit_length() - 1)
        nodes.append(Node(height, start >> height))
        start += 1 << height
    return nodes


def inclusion_path(index: int, size: int) -> list[Span]:
    """PATH(index, D[size]) of RFC 6962 section 2.1.1: the spans whose hashes it consists of, from the leaf upwards."""
    if not 0 <= index < size:
        raise ValueError(f"a tree of {size} leaves has none with the index {index}")
    path = []
    start, end = 0, size
    while end - start > 1:
        split = start + _largest_power_below(end - start)
        if index < split:
            path.append(span(split, end))
            end = split
        else:
            path.append(span(start, split))
            start = split
    return path[::-1]


def consistency_path(old_size: int, size: int) -> list[Span]:
    """PROOF(old_size, D[size]) of RFC 6962 section 2.1.2; empty where either is the empty tree or both are the same."""
    if not 0 <= old_size <= size:
        raise ValueError(f"a tree of {size} leaves was never one of {old_size}")
    if old_size in (0, size):
        return []
    path = []
    start, end, is_known = 0, size, True  # known: the verifier has this subtree's hash, it is the old root
    while end != old_size:
        split = start + _largest_power_below(end - start)
        if old_size <= split:
            path.append(span(split, end))
            end = split
        else:
            path.append(span(start, split))
            start, is_known = split, False
    if not is_known:
        path.append(span(start, end))
    return path[::-1]


def tile_of(node: Node) -> TileId:
    """The tile whose hashes this node is made of."""
    level, rise = divmod(node.height, TILE_HEIGHT)
    return TileId(level, node.index << rise >> TILE_HEIGHT)


def tiles_for(path: Iterable[Span]) -> set[TileId]:
    """All tiles that the hashes of a path are made of."""
    return {tile_of(node) for nodes in path for node in nodes}


def tile_width(tile: TileId, size: int) -> int:
    """How many of a tile's hashes a tree of this size has: 256 in a full one, 0 where there is no such tile."""
    return max(0, min((size >> TILE_HEIGHT * tile.level) - tile.index * TILE_WIDTH, TILE_WIDTH))


def hash_span(nodes: Span, tiles: Tiles) -> bytes:
    """The hash over the span; raises KeyError or ValueError where the tiles do not hold it."""
    return root_of([_hash_of(node, tiles[tile_of(node)]) for node in nodes])


def hash_path(path: Iterable[Span], tiles: Tiles) -> list[bytes]:
    """The hashes of a path; raises what hash_span() raises."""
    return [hash_span(nodes, tiles) for nodes in path]


def hash_tree(hashes: Sequence[bytes]) -> bytes:
    """The root over leaf hashes, or over those of one tile."""
    return root_of([_fold(hashes[n.index << n.height : n.index + 1 << n.height]) for n in span(0, len(hashes))])


def split_hashes(hashes: bytes) -> list[bytes]:
    """A tile's bytes as its hashes."""
    return [hashes[start : start + HASH_BYTES] for start in range(0, len(hashes), HASH_BYTES)]


def root_from_inclusion(leaf: bytes, index: int, size: int, path: Sequence[bytes]) -> bytes | None:
    """The root of which this path proves the leaf a part; None where the path has not the right length.

    RFC 9162 section 2.1.3.2, steps 1 to 4.
    """
    if not 0 <= index < size:
        return None
    at, last, root = index, size - 1, leaf
    for sibling in path:
        if last == 0:
            return None
        if at & 1 or at == last:
            root = hash_node(sibling, root)
            while not at & 1 and at:
                at, last = at >> 1, last >> 1
        else:
            root = hash_node(root, sibling)
        at, last = at >> 1, last >> 1
    return root if last == 0 else None


def proves_consistency(old_size: int, old_root: bytes, size: int, root: bytes, path: Sequence[bytes]) -> bool:
    """Whether the path proves that the tree of `size` leaves begins with that of `old_size`.

    RFC 9162 section 2.1.4.2. Every tree begins with the empty one, whose root is known.
    """
    if old_size == size:
        return not path and old_root == root
    if old_size == 0:
        return not path and old_root == EMPTY_ROOT
    if not 0 < old_size < size or not path:
        return False
    if old_size & old_size - 1 == 0:
        path = [old_root, *path]
    at, last = old_size - 1, size - 1
    while at & 1:
        at, last = at >> 1, last >> 1
    first = second = path[0]
    for sibling in path[1:]:
        if last == 0:
            return False
        if at & 1 or at == last:
            first, second = hash_node(sibling, first), hash_node(sibling, second)
            while not at & 1 and at:
                at, last = at >> 1, last >> 1
        else:
            second = hash_node(second, sibling)
        at, last = at >> 1, last >> 1
    return last == 0 and first == old_root and second == root


def _largest_power_below(count: int) -> int:
    """The largest power of two smaller than count, which is at least 2."""
    return 1 << (count - 1).bit_length() - 1


def _hash_of(node: Node, hashes: bytes) -> bytes:
    rise = node.height % TILE_HEIGHT
    start = (node.index << rise) % TILE_WIDTH
    part = split_hashes(hashes[start * HASH_BYTES : (start + (1 << rise)) * HASH_BYTES])
    if len(part) != 1 << rise:
        raise ValueError(f"the tile does not reach node {node.index} of height {node.height}")
    return _fold(part)


def _fold(hashes: Sequence[bytes]) -> bytes:
    """The root over 2^n hashes."""
    while len(hashes) > 1:
        hashes = [hash_node(*pair) for pair in zip(hashes[::2], hashes[1::2], strict=True)]
    return hashes[0]
