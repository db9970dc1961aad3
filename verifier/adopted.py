"""The rows from before the ledger, held against the event that vouches for them (housekeeping/adoption.py)."""

from collections.abc import Callable
from dataclasses import dataclass, field

from psycopg2.extensions import connection as Connection
from psycopg2.extensions import cursor as Cursor

from verifier import records
from verifier.differences import ADOPTED, Difference, at
from verifier.rows import COPY_ROWS, Lines, Run, add_runs, hash_rows
from verifier.tree import GrowingTree

_PAGE_ROWS = 16_384

_COUNT = "SELECT count(*) FROM audit_events WHERE id < %s"  # index: audit_events_pkey


@dataclass
class Adopted:
    """What they came to."""

    count: int
    root: bytes = b""
    recorded: records.Adoption | None = None
    redacted: dict[str, Run] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


def count_older(cursor: Cursor, first_id: int) -> int:
    """How many rows there are from before the ledger, which begins with this id."""
    cursor.execute(_COUNT, (first_id,))
    ((count,),) = cursor.fetchall()
    return int(count)


def check_adopted(connection: Connection, first_id: int, advance: Callable[[int], object]) -> Adopted:
    """Hash them anew where an event vouches for them; `advance` is told how many are done."""
    with connection.cursor() as cursor:
        recorded, dropped = records.find_adoption(cursor), records.last_dropped(cursor)
        adopted = Adopted(count_older(cursor, first_id), recorded=recorded)
    if recorded is None:
        return adopted
    _recompute(connection, first_id, adopted, advance)
    if adopted.count == 0 and dropped is not None:
        return adopted
    if adopted.count != recorded.count:
        adopted.complaints.append(f"{recorded.count} rows were adopted, and there are {adopted.count}.")
    elif adopted.root != recorded.root and not adopted.differences:
        adopted.complaints.append(f"Adopted rows were changed: their root is {adopted.root.hex()}.")
    return adopted


def _recompute(connection: Connection, first_id: int, adopted: Adopted, advance: Callable[[int], object]) -> None:
    tree = GrowingTree(lambda _tile, _hashes: None)  # of leaves here, for gaps in the ids leave no whole tiles
    start = -(2**63)
    while True:
        lines = Lines()
        with connection.cursor() as cursor:
            cursor.copy_expert(COPY_ROWS.format(first_id=start, last_id=first_id - 1, limit=_PAGE_ROWS), lines)
        if not lines.rows:
            break
        hashed = hash_rows(lines.rows)
        for leaf in hashed.leaves:
            tree.append(leaf)
        adopted.differences += [at(event_id, ADOPTED) for event_id in hashed.changed]
        add_runs(adopted.redacted, hashed.redacted)
        advance(len(hashed.ids))
        start = hashed.ids[-1] + 1
    adopted.root = tree.root()
