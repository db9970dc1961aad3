"""Checkpoints: trees that somebody vouches for, and with which the log must begin."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from psycopg2.extensions import cursor as Cursor

from ledger.notes import NoteError, TreeHead, Verifier, parse_note, parse_tree_head

_STORED = "SELECT origin, size, root, note FROM ledger_checkpoints ORDER BY size"  # the whole table, once


@dataclass(frozen=True)
class Promise:
    """A checkpoint, and where it was found."""

    head: TreeHead
    where: str


def read_stored(cursor: Cursor, key: Verifier | None) -> tuple[list[Promise], list[str]]:
    """The checkpoints that the service signed and kept, and what is wrong with them in themselves.

    Signatures are checked of those that bear the key's name.
    """
    promises, complaints = [], []
    cursor.execute(_STORED)
    for origin, size, root, text in cursor:
        where = f"the checkpoint of {origin} of size {size} in ledger_checkpoints"
        try:
            note = parse_note(text)
            head = parse_tree_head(note.text)
            if head != TreeHead(origin, size, bytes(root)):
                raise NoteError("the note says something else than its row")
            if key is not None and key.name == origin and key.signature_in(note.signatures, note.text) is None:
                raise NoteError(f"the key {key.name}+{key.key_id.hex()} has not signed it")
        except NoteError as error:
            complaints.append(f"{where[0].upper()}{where[1:]}: {error}.")
            continue
        promises.append(Promise(head, where))
    return promises, complaints


def broken_promises(promises: Sequence[Promise], size: int, roots: Mapping[int, bytes]) -> Iterator[str]:
    """A sentence for the first checkpoint that a log of this size, with these roots, does not keep."""
    kept = 0
    broken = []
    for promise in sorted(promises, key=lambda each: each.head.size):
        if promise.head.size <= size and roots.get(promise.head.size) == promise.head.root:
            kept = max(kept, promise.head.size)
        else:
            broken.append(promise)
    if not broken:
        return
    where, count = broken[0].where, broken[0].head.size
    if count > size:
        yield f"The log has {size} events, and {where} vouches for {count}: it was set back."
    else:
        yield f"The log does not begin with the {count} events that {where} vouches for: it was rewritten."
    if kept:
        yield f"It does begin with the {kept} events of another checkpoint."
    if len(broken) > 1:
        yield f"{len(broken) - 1} more checkpoints are not kept."
