"""The Merkle tree: published vectors, and against RFC 6962 section 2.1 word for word (tests/verify.py)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_ledger import LEAVES, ROOTS
from verify import tree_hash

from ledger import tree

SIZES = st.one_of(st.integers(1, 300), st.sampled_from([255, 256, 257, 511, 512, 513, 66_000]))
HASHES = [tree.hash_leaf(number.to_bytes(4)) for number in range(66_000)]


def tiles_of(size: int) -> dict[tree.TileId, bytes]:
    """All tiles of the tree over the first HASHES, the partial ones too."""
    tiles: dict[tree.TileId, bytes] = {}
    level, hashes = 0, HASHES[:size]
    while hashes:
        for start in range(0, len(hashes), tree.TILE_WIDTH):
            tiles[tree.TileId(level, start // tree.TILE_WIDTH)] = b"".join(hashes[start : start + tree.TILE_WIDTH])
        full = len(hashes) // tree.TILE_WIDTH
        hashes = [tree_hash(hashes[n * 256 : n * 256 + 256]) for n in range(full)]
        level += 1
    return tiles


@pytest.mark.parametrize("size", range(1, 9))
def test_the_published_roots(size: int) -> None:
    assert tree.hash_tree([tree.hash_leaf(leaf) for leaf in LEAVES[:size]]).hex() == ROOTS[size - 1]


def test_the_empty_tree() -> None:
    assert tree.root_of([]).hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@given(SIZES)
def test_the_root_is_that_of_the_recursive_definition(size: int) -> None:
    root = tree_hash(HASHES[:size])
    assert tree.hash_tree(HASHES[:size]) == root
    assert tree.hash_span(tree.span(0, size), tiles_of(size)) == root


@given(st.data())
def test_every_leaf_has_a_path_that_leads_to_the_root_and_to_no_other(data: st.DataObject) -> None:
    size = data.draw(SIZES)
    index = data.draw(st.integers(0, size - 1))
    path = tree.hash_path(tree.inclusion_path(index, size), tiles_of(size))
    root = tree_hash(HASHES[:size])
    assert tree.root_from_inclusion(HASHES[index], index, size, path) == root
    assert tree.root_from_inclusion(HASHES[index], index, size, [*path, HASHES[0]]) is None
    assert tree.root_from_inclusion(HASHES[index + 1], index, size, path) != root
    if path:
        assert tree.root_from_inclusion(HASHES[index], index, size, path[:-1]) is None
        changed = data.draw(st.integers(0, len(path) - 1))
        wrong = [*path[:changed], HASHES[-1], *path[changed + 1 :]]
        assert tree.root_from_inclusion(HASHES[index], index, size, wrong) != root


@given(st.data())
def test_a_tree_begins_with_each_that_it_was(data: st.DataObject) -> None:
    size = data.draw(SIZES)
    old_size = data.draw(st.integers(0, size))
    path = tree.hash_path(tree.consistency_path(old_size, size), tiles_of(size))
    old_root = tree_hash(HASHES[:old_size])
    root = tree_hash(HASHES[:size])
    assert tree.proves_consistency(old_size, old_root, size, root, path)
    assert not tree.proves_consistency(old_size, HASHES[-1], size, root, path)
    assert not tree.proves_consistency(old_size, old_root, size, root, [*path, HASHES[0]])
    if 0 < old_size < size:
        assert not tree.proves_consistency(old_size, old_root, size, HASHES[-1], path)
        assert not tree.proves_consistency(old_size, old_root, size, root, path[:-1])


@given(st.data())
def test_a_path_needs_few_tiles_and_no_hash_beyond_the_tree(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 2**40))
    index = data.draw(st.integers(0, size - 1))
    tiles = tree.tiles_for(tree.inclusion_path(index, size))
    assert all(tree.tile_width(tile, size) > 0 for tile in tiles)
    assert len(tiles) <= 2 * 6  # two a level, of which 2^40 leaves have five full ones and one begun


@pytest.mark.parametrize(("index", "size"), [(0, 0), (1, 1), (-1, 5), (5, 5)])
def test_a_leaf_that_is_not_there_has_no_path(index: int, size: int) -> None:
    with pytest.raises(ValueError):
        tree.inclusion_path(index, size)
    assert tree.root_from_inclusion(HASHES[0], index, size, []) is None
