"""Checkpoints: trees that somebody vouches for, and with which the log must begin."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ledger.notes import TreeHead


@dataclass(frozen=True)
class Promise:
    """A checkpoint, and where it was found."""

    head: TreeHead
    where: str


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
