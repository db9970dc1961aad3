"""Going on after a restored backup: under a new origin, with the old log's last checkpoint in the log itself."""

from dataclasses import dataclass

from sqlalchemy import Connection, text

from db import Database
from ingest.records import own_event, record
from ledger.notes import NoteError, TreeHead, Verifier, open_checkpoint
from problems import LedgerInconsistent
from proofs.checkpoints import read_head, require_growth

# Index: ledger_checkpoints_pkey.
_NEWEST_BELOW = text(
    "SELECT size, note FROM ledger_checkpoints WHERE origin = :origin AND size < :size ORDER BY size DESC LIMIT 1"
)


@dataclass(frozen=True, slots=True)
class Continuation:
    """What the old log vouched for, and how many of those events are still here, as far as it can be proved."""

    old: TreeHead
    kept_at_least: int

    @property
    def lost_at_most(self) -> int:
        return self.old.size - self.kept_at_least


def record_continuation(database: Database, note: str, verifier: Verifier, origin: str, by: str) -> Continuation:
    """Append `audit.ledger.continue` with the old log's last checkpoint, before the new origin's first.

    Raises NoteError where it is not the old log's, or the origin is the same; and what transaction() raises.
    """
    old, _ = open_checkpoint(note, verifier)
    if old.origin == origin:
        raise NoteError(f"the log is still {origin}: set the new LEDGER_SIGNING_KEY first")
    with database.transaction() as connection:
        kept = _count_kept(connection, old, verifier)
        metadata = {"checkpoint": note, "origin": origin, "size": old.size, "kept_at_least": kept}
        record(connection, own_event("audit.ledger.continue", by, resource=f"ledger/{old.origin}", metadata=metadata))
    return Continuation(old, kept)


def _count_kept(connection: Connection, old: TreeHead, verifier: Verifier) -> int:
    """The size of the newest tree that the old key signed and that this one begins with.

    Not this tree's own size: since the restore it has grown by events that the old log never had.
    """
    if _is_beginning(connection, old):
        return old.size
    size = old.size
    while stored := connection.execute(_NEWEST_BELOW, {"origin": old.origin, "size": size}).one_or_none():
        size = int(stored.size)
        try:
            signed, _ = open_checkpoint(stored.note, verifier)
        except NoteError:
            continue
        if signed.size <= old.size and _is_beginning(connection, signed):
            return signed.size
    return 0


def _is_beginning(connection: Connection, signed: TreeHead) -> bool:
    try:
        require_growth(connection, signed, read_head(connection, signed.origin)[0])
    except LedgerInconsistent:
        return False
    return True
