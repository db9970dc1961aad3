"""Checkpoints: trees that somebody vouches for, and with which the log must begin.

There are three million of them after a year: of each only its size and the root that the log has there are held.
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from psycopg2.extensions import connection as Connection

from ledger.notes import NoteError, TreeHead, Verifier, parse_note, parse_tree_head
from ledger.tree import HASH_BYTES

# Each the whole table, once; the second by ledger_checkpoints_pkey.
_SIZES = "SELECT DISTINCT size FROM ledger_checkpoints WHERE size <= %s ORDER BY size"
_STORED = "SELECT origin, size, root, note FROM ledger_checkpoints ORDER BY origin, size"


@dataclass(frozen=True)
class Promise:
    """A checkpoint, and where it was found."""

    head: TreeHead
    where: str


class Roots:
    """The tree's roots at sizes of which somebody knows them."""

    def __init__(self, sizes: Iterable[int], more: Iterable[int]) -> None:
        """The sizes in order, each once; and a few more in any."""
        self.sizes = array("q", sizes)
        for size in more:
            place = bisect_left(self.sizes, size)
            if size not in self.sizes[place : place + 1]:
                self.sizes.insert(place, size)
        self._hashes = bytearray(HASH_BYTES * len(self.sizes))
        self._is_known = bytearray(len(self.sizes))

    def keep(self, size: int, root: bytes) -> None:
        place = bisect_left(self.sizes, size)
        self._hashes[place * HASH_BYTES : (place + 1) * HASH_BYTES] = root
        self._is_known[place] = True

    def get(self, size: int) -> bytes | None:
        """None of a size that the tree has not come to."""
        place = bisect_left(self.sizes, size)
        if not self._is_known[place]:
            return None
        return bytes(self._hashes[place * HASH_BYTES : (place + 1) * HASH_BYTES])


class Keeping:
    """What becomes of the promises, of which there are many: the smallest that is broken, and how many are."""

    def __init__(self, size: int, roots: Roots) -> None:
        self._size = size  # of the log
        self._roots = roots
        self._kept = 0  # the size of the largest
        self._first_broken: Promise | None = None
        self._broken = 0

    def hold_against(self, promise: Promise) -> None:
        """Compare the log with a promise whose size its roots were noted for."""
        head = promise.head
        if head.size <= self._size and self._roots.get(head.size) == head.root:
            self._kept = max(self._kept, head.size)
            return
        self._broken += 1
        if self._first_broken is None or head.size < self._first_broken.head.size:
            self._first_broken = promise

    def complaints(self) -> Iterator[str]:
        """A sentence for the first checkpoint that the log does not keep, and what is to be said of the others."""
        if self._first_broken is None:
            return
        where, count = self._first_broken.where, self._first_broken.head.size
        if count > self._size:
            yield f"The log has {self._size} events, and {where} vouches for {count}: it was set back."
        else:
            yield f"The log does not begin with the {count} events that {where} vouches for: it was rewritten."
        if self._kept:
            yield f"It does begin with the {self._kept} events of another checkpoint."
        if self._broken > 1:
            yield f"{self._broken - 1} more checkpoints are not kept."


def stored_sizes(connection: Connection, size: int) -> Iterator[int]:
    """Of the checkpoints that the service signed and kept, up to this one, in order."""
    return (each for (each,) in _stream(connection, _SIZES, size))


def read_stored(connection: Connection, key: Verifier | None) -> Iterator[Promise | str]:
    """Those checkpoints; in place of one that is wrong in itself, what is wrong with it.

    Signatures are checked of those that bear the key's name.
    """
    for origin, size, root, text in _stream(connection, _STORED):
        where = f"the checkpoint of {origin} of size {size} in ledger_checkpoints"
        try:
            note = parse_note(text)
            head = parse_tree_head(note.text)
            if head != TreeHead(origin, size, bytes(root)):
                raise NoteError("the note says something else than its row")
            if key is not None and key.name == origin and key.signature_in(note.signatures, note.text) is None:
                raise NoteError(f"the key {key.name}+{key.key_id.hex()} has not signed it")
        except NoteError as error:
            yield f"{where[0].upper()}{where[1:]}: {error}."
            continue
        yield Promise(head, where)


def _stream(connection: Connection, statement: str, *values: int) -> Iterator[Any]:
    """The rows, two thousand at a time. The transaction is one of which the driver does not know: hence the hold."""
    with connection.cursor("checkpoints", withhold=True) as cursor:
        cursor.execute(statement, values)
        yield from cursor
