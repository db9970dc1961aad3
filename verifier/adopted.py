"""The rows from before the ledger, held against the event that vouches for them (housekeeping/adoption.py)."""

from collections.abc import Callable
from dataclasses import dataclass, field

from psycopg2.extensions import connection as Connection
from psycopg2.extensions import cursor as Cursor

from verifier import records
from verifier.differences import ADDED, ADOPTED, Difference, at
from verifier.rows import BETWEEN, COPY_ROWS, Lines, Run, add_runs, hash_rows
from verifier.tree import GrowingTree

_PAGE_ROWS = 16_384

_OLDER = "SELECT count(*), min(id), max(id) FROM audit_events WHERE id < %s"  # index: audit_events_pkey


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
    older = _older(cursor, first_id)
    return 0 if older is None else older.count


def check_adopted(
    connection: Connection, first_id: int, told: records.Records, advance: Callable[[int], object]
) -> Adopted:
    """Hash them anew where an event vouches for them; `advance` is told how many are done."""
    with connection.cursor() as cursor:
        older = _older(cursor, first_id)
    if first_id == 1:  # there were none when the ledger began
        return Adopted(0, differences=[] if older is None else [_added(older)])
    adopted = Adopted(0 if older is None else older.count)
    if not told.adoptions:
        return adopted
    first = told.adoptions[0]  # it counts: whoever changed rows could append another
    adopted.recorded = recorded = records.adoption_of(first)
    if recorded is None:
        what = "is to vouch for the rows from before the ledger, and has no count and root of them"
        adopted.complaints.append(f"Event {first.event_id} {what}.")
        return adopted
    _recompute(connection, first_id, adopted, advance)
    if adopted.count == 0 and any(drop.number("last_id") is not None for drop in told.drops):
        return adopted
    if adopted.count != recorded.count:
        adopted.complaints.append(f"{recorded.count} rows were adopted, and there are {adopted.count}.")
    elif adopted.root != recorded.root and not adopted.differences:
        adopted.complaints.append(f"Adopted rows were changed: their root is {adopted.root.hex()}.")
    return adopted


def _older(cursor: Cursor, first_id: int) -> Run | None:
    cursor.execute(_OLDER, (first_id,))
    ((count, *ids),) = cursor.fetchall()
    return Run(count, *ids) if count else None


def _added(run: Run) -> Difference:
    is_whole = run.last_id - run.first_id + 1 == run.count
    return Difference(run.first_id, run.last_id, ADDED if is_whole else f"{run.count} of them {ADDED}")


def _recompute(connection: Connection, first_id: int, adopted: Adopted, advance: Callable[[int], object]) -> None:
    tree = GrowingTree(lambda _tile, _hashes: None)  # of leaves here, for gaps in the ids leave no whole tiles
    start = -(2**63)
    while True:
        lines = Lines()
        with connection.cursor() as cursor:
            condition = BETWEEN.format(first_id=start, last_id=first_id - 1)
            cursor.copy_expert(COPY_ROWS.format(condition=condition, limit=_PAGE_ROWS), lines)
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
