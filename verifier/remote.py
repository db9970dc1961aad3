"""The log over HTTP, checked by somebody who trusts nothing but its public key and a checkpoint that he kept.

c2sp.org/tlog-tiles. Entries are hashed to leaves and leaves to the root; what the server has for proofs is not asked.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from ledger.notes import TreeHead, Verifier, decode_note, open_checkpoint
from ledger.tree import TILE_WIDTH, TileId, hash_leaf, split_hashes, tile_width
from verifier.tree import GrowingTree, edge_of, fold

_AT_ONCE = 24  # tiles on their way, each with its bundle
_TIMEOUT_S = 30
_LAST_PORT = 0xFFFF
_MOST_BYTES = TILE_WIDTH * (2 + 0xFFFF)  # of a bundle whose entries are as long as can be


class RemoteError(Exception):
    """The server does not answer as a log does: nothing can be told."""


@dataclass
class Seen:
    """What was found of the log."""

    head: TreeHead
    note: str  # its checkpoint
    start: int = 0  # the first leaf that was looked at
    pruned: int = 0  # leaves whose entries are not served, as was known of them
    complaints: list[str] = field(default_factory=list)


class _Log:
    """The log's resources."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def read_tile(self, tile: TileId, size: int) -> list[bytes] | None:
        """A tile's hashes, as many as a tree of this size has in it; None where they are not served as such."""
        width = tile_width(tile, size)
        served = await read_resource(self._client, f"tile/{tile.level}/{_path(tile.index, width)}")
        hashes = split_hashes(served or b"")
        return hashes if len(hashes) == width and len(hashes[-1]) == len(hashes[0]) else None

    async def read_entries(self, index: int, size: int) -> list[bytes] | None:
        width = tile_width(TileId(0, index), size)
        bundle = await read_resource(self._client, f"tile/entries/{_path(index, width)}")
        return None if bundle is None else _split_entries(bundle)


async def verify_remote(
    url: str,
    api_key: str,
    key: Verifier,
    old: TreeHead | None,
    advance: Callable[[int, int], object],
    *,
    pruned: int = 0,
    is_whole: bool = False,
) -> Seen:
    """Check that the log at the URL begins with the old tree, and what came since; or, where so asked, all of it.

    `pruned`: how many leaves, the first ones, may lack their entries. Only the caller knows what retention dropped.
    Raises RemoteError, and NoteError where the checkpoint is not one of this key's.
    """
    async with open_client(f"{url.rstrip('/')}/ledger/", api_key, _AT_ONCE) as client:
        note = decode_note(await read_resource(client, "checkpoint") or b"")
        seen = Seen(open_checkpoint(note, key)[0], note)
        if old is not None and old.size > seen.head.size:
            seen.complaints.append(f"You have a checkpoint of {old.size} events, and the log has {seen.head.size}.")
        else:
            await _Walk(_Log(client), seen, old, pruned).go(
                0 if old is None or is_whole else old.size // TILE_WIDTH, advance
            )
    return seen


def open_client(url: str, api_key: str, at_once: int) -> httpx.AsyncClient:
    """For so many requests at a time to what is below this URL; raises RemoteError where it is none."""
    limits = httpx.Limits(max_connections=at_once)
    try:
        if (httpx.URL(url).port or 0) > _LAST_PORT:
            raise ValueError(f"no port is higher than {_LAST_PORT}")
        return httpx.AsyncClient(base_url=url, headers={"X-API-Key": api_key}, limits=limits, timeout=_TIMEOUT_S)
    except (httpx.InvalidURL, ValueError) as error:
        raise RemoteError(f"{url}: {error}") from None


async def read_resource(client: httpx.AsyncClient, path: str) -> bytes | None:
    """The resource, decompressed; None where the server does not have it. Raises RemoteError."""
    body = bytearray()
    try:
        async with client.stream("GET", path) as answer:
            async for piece in answer.aiter_bytes():
                body += piece
                if len(body) > _MOST_BYTES:
                    raise RemoteError(f"{answer.url}: it is longer than {_MOST_BYTES} bytes")
    except (httpx.HTTPError, ValueError) as error:
        raise RemoteError(f"{client.base_url}: {str(error) or type(error).__name__}") from None
    if answer.status_code not in (200, 404):
        # On a terminal it must not say more than it does.
        said = "".join(filter(str.isprintable, body[:200].decode(errors="replace")))
        raise RemoteError(f"{answer.url}: {answer.status_code} {said}")
    return bytes(body) if answer.status_code == 200 else None


async def cancel(tasks: Collection[asyncio.Task[Any]]) -> None:
    """End what nobody waits for any more; what it fails with is of no interest."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class _Walk:
    """From the old tree to the new one, tile by tile."""

    def __init__(self, log: _Log, seen: Seen, old: TreeHead | None, pruned: int) -> None:
        self._log = log
        self._seen = seen
        self._old = old
        self._pruned = pruned
        self._size = seen.head.size
        self._has_entries = False  # seen so far
        self._missing: list[range] = []  # leaves without entries that should have them
        self._above: list[tuple[TileId, list[bytes]]] = []  # higher tiles as they come of those below
        self._tree = GrowingTree(lambda tile, hashes: self._above.append((tile, split_hashes(hashes))))

    async def go(self, first: int, advance: Callable[[int, int], object]) -> None:
        """Note what is wrong from this tile on; `advance` is told of entries done, and how many there are to do."""
        self._seen.start = first * TILE_WIDTH
        if not await self._resume(first):
            return
        rest: list[bytes] = []
        async for index, leaves, has_entries in self._leaves(first):
            self._has_entries = self._has_entries or has_entries
            if not has_entries:
                self._note_missing(range(index * TILE_WIDTH, index * TILE_WIDTH + len(leaves)))
            heights = fold(leaves)
            self._require_old(index, heights)
            if len(leaves) == TILE_WIDTH:
                self._tree.append(heights[-1][0])
            else:
                rest = edge_of(heights, len(leaves))
            advance(len(leaves), self._size - self._seen.start)
        self._complain_of_missing()
        self._require_old_at_the_edge()
        if not self._seen.complaints and self._tree.root(rest) != self._seen.head.root:
            self._complain("The entries are not those of the tree that the log has signed.")
        await self._check_tiles_above()

    async def _resume(self, first: int) -> bool:
        """Take the old tree's right edge from the tiles; that it is the old one shows when the old root comes of it."""
        prefixes = []
        level, count = 1, first
        while count:
            index, width = divmod(count, TILE_WIDTH)
            prefixes.append(await self._log.read_tile(TileId(level, index), self._size) or [] if width else [])
            if len(prefixes[-1]) < width:
                self._complain(f"Tile {index} of level {level} is not served.")
                return False
            prefixes[-1] = prefixes[-1][:width]
            level, count = level + 1, index
        self._tree.resume(first, prefixes)
        return True

    async def _leaves(self, first: int) -> AsyncIterator[tuple[int, Sequence[bytes], bool]]:
        """The leaves of each tile, in order, and whether their entries are there; many tiles are on their way.

        Ends where one is not served as it should be.
        """
        waiting: deque[asyncio.Task[tuple[Sequence[bytes], bool] | None]] = deque()
        end = -(-self._size // TILE_WIDTH)
        indexes = iter(range(first, end))
        try:
            for done in range(first, end):
                while len(waiting) < _AT_ONCE and (index := next(indexes, None)) is not None:
                    waiting.append(asyncio.create_task(self._read_leaves(index)))
                read = await waiting.popleft()
                if read is None:
                    return
                yield done, *read
        finally:
            await cancel(waiting)

    async def _read_leaves(self, index: int) -> tuple[Sequence[bytes], bool] | None:
        """The leaves of a tile's entries, or of missing ones as the tile has them; None where they do not agree."""
        entries, tile = await asyncio.gather(
            self._log.read_entries(index, self._size), self._log.read_tile(TileId(0, index), self._size)
        )
        if tile is None:
            self._complain(f"Tile {index} of level 0 is not served.")
            return None
        if entries is None:
            return tile, False
        leaves = [hash_leaf(entry) for entry in entries]
        if leaves == tile:
            return leaves, True
        places = [place for place, (ours, theirs) in enumerate(zip(leaves, tile, strict=False)) if ours != theirs]
        leaf_index = index * TILE_WIDTH + min([*places, len(leaves), len(tile)])
        self._complain(f"The entry of leaf {leaf_index} is not that of its tile.")
        return None

    def _note_missing(self, leaves: range) -> None:
        """Retention drops the oldest entries only, and the bundle with the last of them is not served either."""
        if not self._has_entries and leaves.start < self._pruned:
            self._seen.pruned = leaves.stop
        elif self._missing and self._missing[-1].stop == leaves.start:
            self._missing[-1] = range(self._missing[-1].start, leaves.stop)
        else:
            self._missing.append(leaves)

    def _complain_of_missing(self) -> None:
        for leaves in self._missing:
            is_oldest = leaves.start == max(self._seen.start, self._seen.pruned)
            hint = " If you know that retention dropped them, say up to which leaf: --pruned." if is_oldest else ""
            self._complain(f"The entries of leaves {leaves.start} to {leaves.stop - 1} are missing.{hint}")

    def _require_old(self, index: int, heights: Sequence[Sequence[bytes]]) -> None:
        old = self._old
        if old is None or old.size // TILE_WIDTH != index:
            return
        if self._tree.root(edge_of(heights, old.size % TILE_WIDTH)) != old.root:
            self._complain(f"The log does not begin with the {old.size} events of your checkpoint: it was rewritten.")

    def _require_old_at_the_edge(self) -> None:
        """Where the old tree ends with the last full tile there is no tile behind it in which to look."""
        old = self._old
        if old is not None and old.size == self._size and old.size % TILE_WIDTH == 0 and self._tree.root() != old.root:
            self._complain(f"The log does not begin with the {old.size} events of your checkpoint: it was rewritten.")

    async def _check_tiles_above(self) -> None:
        """Hold the higher tiles that the server has against those that come of its entries."""
        if self._seen.complaints:
            return
        for tile, hashes in [*self._above, *self._tree.open_tiles()]:
            if await self._log.read_tile(tile, self._size) != hashes:
                self._complain(f"Tile {tile.index} of level {tile.level} is not made of those below it.")

    def _complain(self, what: str) -> None:
        self._seen.complaints.append(what)


def _path(number: int, width: int) -> str:
    """c2sp.org/tlog-tiles, Merkle Tree: 1234067 is x001/x234/067; `.p/17` names a partial tile."""
    digits = f"{number:0{-(-len(str(number)) // 3) * 3}d}"
    groups = [digits[start : start + 3] for start in range(0, len(digits), 3)]
    path = "/".join([*(f"x{group}" for group in groups[:-1]), groups[-1]])
    return path if width == TILE_WIDTH else f"{path}.p/{width}"


def _split_entries(bundle: bytes) -> list[bytes]:
    """A bundle's entries, each behind its length in two bytes; the last is what there is where it is cut."""
    entries, start = [], 0
    while start < len(bundle):
        end = start + 2 + int.from_bytes(bundle[start : start + 2])
        entries.append(bundle[start + 2 : end])
        start = end
    return entries
