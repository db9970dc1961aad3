"""Signs the tree's head, and never two that contradict each other: over workers, replicas, restarts and restores.

Before it signs, it proves to itself that the tree still begins with the one that was signed last. Where it does not,
nothing is signed any more and the service is not ready, until an operator has looked (runbook.md).
"""

import asyncio
import logging
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Connection, text

from db import Database
from ledger.notes import NoteError, Signer, TreeHead, Verifier, open_checkpoint, sign_checkpoint
from ledger.tree import proves_consistency, root_of
from problems import CheckpointNotFound, LedgerInconsistent, TileNotFound
from proofs.paths import prove_consistency
from proofs.tiles import TransactionSource

logger = logging.getLogger("audit.ledger")

SIGNING_LOCK = 0x636865636B70  # "checkp": one replica at a time signs
MIN_AGE = timedelta(seconds=1)
_MOST_WAITS = 3  # for a checkpoint to grow old enough; the second includes what was committed before the first

_LOCK = text("SELECT pg_advisory_xact_lock(:key)")
_HEAD = text("SELECT size, frontier, clock_timestamp() AS now FROM ledger_head")
# Index: ledger_checkpoints_pkey.
_NEWEST = text("SELECT size, note, signed_at FROM ledger_checkpoints WHERE origin = :origin ORDER BY size DESC LIMIT 1")
_KEEP = text(
    "INSERT INTO ledger_checkpoints (origin, size, root, note, signed_at) VALUES (:origin, :size, :root, :note, :now)"
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A tree head, and the note that says it, signed."""

    head: TreeHead
    note: str


class Checkpoints:
    """The checkpoints of one log, which has the name of the signer's key."""

    def __init__(self, database: Database, signer: Signer) -> None:
        self._database = database
        self._signer = signer
        self._known: TreeHead | None = None  # the newest that this process has seen signed
        self._contradiction: str | None = None  # why nothing was signed when it was tried last
        self._objection: str | None = None  # what a checkpoint kept outside says against signing

    @property
    def origin(self) -> str:
        return self._signer.name

    def require_consistent(self) -> None:
        """Raise LedgerInconsistent while nothing is signed."""
        if reason := self._objection or self._contradiction:
            raise LedgerInconsistent(reason)

    def object(self, reason: str | None) -> None:
        """Sign nothing, for this reason, until None is given."""
        if reason is not None and reason != self._objection:
            logger.critical("nothing is signed: %s", reason)
        self._objection = reason

    def require_continuation(self, outside: str) -> None:
        """Raise LedgerInconsistent where the log does not go on from a checkpoint that was kept outside."""
        with self._database.transaction() as connection:
            head, _ = self._read_head(connection)
            signed = _open(outside, self._signer.verifier)
            _require_growth(connection, signed.head, head)

    async def covering(self, leaf_index: int) -> Checkpoint:
        """The newest checkpoint, once it has this leaf: a second later at the most. Raises what newest() raises."""
        for _ in range(_MOST_WAITS):
            checkpoint = await self._database.in_thread(self.newest)
            if leaf_index < checkpoint.head.size:
                return checkpoint
            await asyncio.sleep(MIN_AGE.total_seconds())
        raise LedgerInconsistent(f"The event of leaf {leaf_index} is in the table, and not in the tree.")

    def newest(self) -> Checkpoint:
        """The newest checkpoint: a new one where the tree grew, and the one before is a second old.

        Raises LedgerInconsistent, and what Database.transaction() raises.
        """
        if self._objection is not None:
            raise LedgerInconsistent(self._objection)
        try:
            with self._database.transaction() as connection:
                connection.execute(_LOCK, {"key": SIGNING_LOCK})
                # Until the commit nobody else signs.
                checkpoint = self._continue(connection)
        except LedgerInconsistent as problem:
            logger.critical("nothing is signed: %s", problem.detail)
            self._contradiction = problem.detail
            raise
        self._known, self._contradiction = checkpoint.head, None
        return checkpoint

    def _continue(self, connection: Connection) -> Checkpoint:
        stored = connection.execute(_NEWEST, {"origin": self._signer.name}).one_or_none()
        last = None if stored is None else _open(stored.note, self._signer.verifier)
        self._require_known(last)
        head, now = self._read_head(connection)
        if stored is None or last is None:
            return self._sign(connection, head, now)
        if head.size > last.head.size and timedelta(0) <= now - stored.signed_at < MIN_AGE:
            return last
        _require_growth(connection, last.head, head)
        return last if head.size == last.head.size else self._sign(connection, head, now)

    def _read_head(self, connection: Connection) -> tuple[TreeHead, datetime]:
        size, frontier, now = connection.execute(_HEAD).one()
        return TreeHead(self._signer.name, size, root_of([bytes(node) for node in frontier])), now

    def _require_known(self, last: Checkpoint | None) -> None:
        """Whoever signed after this process has proved that its tree begins with the one known here."""
        known = self._known
        if known is None or (last is not None and (last.head.size > known.size or last.head == known)):
            return
        raise LedgerInconsistent(f"The checkpoint of size {known.size}, which was signed, is gone from the database.")

    def _sign(self, connection: Connection, head: TreeHead, now: datetime) -> Checkpoint:
        note = str(sign_checkpoint(self._signer, head.size, head.root))
        values = {"origin": head.origin, "size": head.size, "root": head.root, "note": note, "now": now}
        connection.execute(_KEEP, values)
        return Checkpoint(head, note)


def find_newest(database: Database, verifier: Verifier) -> Checkpoint:
    """The newest checkpoint that was kept; signs none. Raises CheckpointNotFound and LedgerInconsistent."""
    with database.transaction() as connection:
        stored = connection.execute(_NEWEST, {"origin": verifier.name}).one_or_none()
    if stored is None:
        raise CheckpointNotFound(f"No checkpoint of {verifier.name} was signed yet: start the service first.")
    return _open(stored.note, verifier)


def _open(note: str, verifier: Verifier) -> Checkpoint:
    try:
        return Checkpoint(open_checkpoint(note, verifier)[0], note)
    except NoteError as error:
        raise LedgerInconsistent(f"A checkpoint that was kept is not one of this key's: {error}.") from None


def _require_growth(connection: Connection, signed: TreeHead, head: TreeHead) -> None:
    """Prove that the tree goes on from what was signed; raises LedgerInconsistent."""
    if head.size < signed.size:
        raise LedgerInconsistent(
            f"The tree has {head.size} leaves, and a checkpoint of {signed.size} was signed: the database was restored"
            " from an older backup, or its newest events were taken away."
        )
    try:
        path = prove_consistency(TransactionSource(connection), signed.size, head.size)
    except TileNotFound:
        path = []
    if not proves_consistency(signed.size, signed.root, head.size, head.root, path):
        raise LedgerInconsistent(
            f"The tree of {head.size} leaves does not begin with the {signed.size} that were signed."
        )
