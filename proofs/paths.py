"""Inclusion and consistency proofs (RFC 6962 sections 2.1.1 and 2.1.2), out of the tiles that hold their hashes."""

from ledger.tree import consistency_path, hash_path, inclusion_path, tiles_for
from proofs.tiles import Source, read_tiles


def prove_inclusion(source: Source, leaf_index: int, size: int) -> list[bytes]:
    """The path from a leaf to the root of the tree of this size; raises TileNotFound."""
    path = inclusion_path(leaf_index, size)
    return hash_path(path, read_tiles(source, tiles_for(path), size))


def prove_consistency(source: Source, old_size: int, size: int) -> list[bytes]:
    """That the tree of this size begins with the one of the old size; raises TileNotFound."""
    path = consistency_path(old_size, size)
    return hash_path(path, read_tiles(source, tiles_for(path), size))
