"""Going on after a restored backup: under a new origin, with the old log's last checkpoint in the log itself."""

from dataclasses import dataclass

from sqlalchemy import text

from db import Database
from ingest.records import own_event, record
from ledger.notes import NoteError, TreeHead, Verifier, open_checkpoint

_SIZE = text("SELECT size FROM ledger_head")


@dataclass(frozen=True, slots=True)
class Continuation:
    """What the old log vouched for, and how many of those events are still here."""

    old: TreeHead
    kept: int

    @property
    def lost(self) -> int:
        return self.old.size - self.kept


def record_continuation(database: Database, note: str, verifier: Verifier, origin: str, by: str) -> Continuation:
    """Append `audit.ledger.continue` with the old log's last checkpoint, before the new origin's first.

    Raises NoteError where it is not the old log's, or the origin is the same; and what transaction() raises.
    """
    old, _ = open_checkpoint(note, verifier)
    if old.origin == origin:
        raise NoteError(f"the log is still {origin}: set the new LEDGER_SIGNING_KEY first")
    with database.transaction() as connection:
        kept = min(old.size, int(connection.scalar(_SIZE) or 0))
        metadata = {"checkpoint": note, "origin": origin, "size": old.size, "kept": kept}
        record(connection, own_event("audit.ledger.continue", by, resource=f"ledger/{old.origin}", metadata=metadata))
    return Continuation(old, kept)
