"""Signs the tree's head, and never two that contradict each other: over workers, replicas, restarts and restores.

Before it signs, it proves to itself that the tree still begins with the one that was signed last. Where it does not,
nothing is signed any more and the service is not ready, until an operator has looked (runbook.md).

A database that went back, a restored backup or a standby that lagged, has forgotten what was signed. So with a sink a
checkpoint is put there before it is committed and handed out, under the lock, and only where the tree goes on from what
the sink has. One that is there and was never committed does no harm: it is of a tree that was committed.
"""

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta

from anyio import CapacityLimiter, to_thread
from sqlalchemy import Connection, text

from db import Database
from ledger.notes import NoteError, Signer, TreeHead, Verifier, open_checkpoint, sign_checkpoint
from ledger.tree import proves_consistency, root_of
from problems import CheckpointNotFound, CheckpointNotKept, LedgerInconsistent, TileNotFound
from proofs.paths import prove_consistency
from proofs.sink import Sink
from proofs.tiles import TransactionSource

logger = logging.getLogger("audit.ledger")

SIGNING_LOCK = 0x636865636B70  # "checkp": one replica at a time signs
MIN_AGE = timedelta(seconds=1)
_THREADS = 2  # of a process: one at a time signs, and may wait for the sink
_UNREAD = "CHECKPOINT_SINK was not read since the start, so what was signed before is not known."
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


@dataclass(frozen=True, slots=True)
class _Known:
    """The newest checkpoint that this process has seen signed, and when, by time.monotonic()."""

    checkpoint: Checkpoint
    looked_at: float


class Checkpoints:
    """The checkpoints of one log, which has the name of the signer's key."""

    def __init__(self, database: Database, signer: Signer, sink: Sink | None = None) -> None:
        self._database = database
        self._signer = signer
        self._sink = sink
        self._threads = CapacityLimiter(_THREADS)
        self._known: _Known | None = None
        self._contradiction: str | None = None  # why nothing was signed when it was tried last
        self._objection = None if sink is None else _UNREAD  # what the sink says against signing
        self._is_sink_failing = False

    @property
    def origin(self) -> str:
        return self._signer.name

    @property
    def is_kept_outside(self) -> bool:
        """Whether there is a sink, which has the newest checkpoint and says nothing against it."""
        return self._sink is not None and self._objection is None and not self._is_sink_failing

    def require_consistent(self) -> None:
        """Raise LedgerInconsistent while nothing is signed."""
        if reason := self._contradiction or self._objection:
            raise LedgerInconsistent(reason)

    async def current(self) -> Checkpoint:
        """newest(), in a thread of its own: whoever waits for the sink keeps no other request waiting."""
        return await to_thread.run_sync(self.newest, limiter=self._threads)

    async def covering(self, leaf_index: int) -> Checkpoint:
        """A checkpoint that has this leaf: the newest, or of the last second. Raises what newest() raises.

        Of a new event it takes a second at the most.
        """
        if (seen := self._seen_lately()) is not None and leaf_index < seen.head.size:
            return seen
        for _ in range(_MOST_WAITS):
            checkpoint = await self.current()
            if leaf_index < checkpoint.head.size:
                return checkpoint
            if self._is_sink_failing:
                raise CheckpointNotKept()
            await asyncio.sleep(MIN_AGE.total_seconds())
        raise LedgerInconsistent(f"The event of leaf {leaf_index} is in the table, and not in the tree.")

    def _seen_lately(self) -> Checkpoint | None:
        """What was newest within the last second, while nothing speaks against it."""
        known = self._known
        if known is None or self._contradiction or self._objection:
            return None
        return known.checkpoint if time.monotonic() - known.looked_at < MIN_AGE.total_seconds() else None

    def newest(self) -> Checkpoint:
        """The newest checkpoint: a new one where the tree grew, and the one before is a second old.

        The one before, too, once the sink has failed and until a look finds that it works again. Raises
        CheckpointNotKept where there is none, LedgerInconsistent, and what Database.transaction() raises.
        """
        self._require_no_objection()
        return self._find_last() if self._is_sink_failing else self._renew(is_look=False)

    def look(self) -> Checkpoint:
        """newest(), of a log that goes on from what the sink has; and the sink, where it works, has no older one."""
        return self._renew(is_look=True)

    def _renew(self, *, is_look: bool) -> Checkpoint:
        try:
            with self._transaction() as connection:
                connection.execute(_LOCK, {"key": SIGNING_LOCK})
                # Until the commit nobody else signs, nor writes to the sink.
                checkpoint = self._continue(connection, is_look)
        except CheckpointNotKept:
            self._require_no_objection()
            return self._find_last()
        self._known = _Known(checkpoint, time.monotonic())
        return checkpoint

    def _require_no_objection(self) -> None:
        if self._objection is not None:
            raise LedgerInconsistent(self._objection)

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        """What contradicts the log in it is told by require_consistent(), until a transaction finds nothing."""
        try:
            with self._database.transaction() as connection:
                yield connection
        except LedgerInconsistent as problem:
            logger.critical("nothing is signed: %s", problem.detail)
            self._contradiction = problem.detail
            raise
        self._contradiction = None

    def _continue(self, connection: Connection, is_look: bool) -> Checkpoint:
        last, signed_at = self._read_last(connection)
        head, now = read_head(connection, self.origin)
        is_young = signed_at is not None and timedelta(0) <= now - signed_at < MIN_AGE
        if last is not None:
            if head.size > last.head.size and is_young and not is_look:
                return last
            require_growth(connection, last.head, head)
        checkpoint = last
        if checkpoint is None or (head.size > checkpoint.head.size and not is_young):
            checkpoint = self._sign(connection, head, now)
        if checkpoint is not last or is_look:
            self._keep_outside(connection, checkpoint, head)
        return checkpoint

    def _find_last(self) -> Checkpoint:
        """The one that was signed last. Waits for no lock, which a look may hold while the sink hangs."""
        with self._transaction() as connection:
            last, _ = self._read_last(connection)
            if last is None:
                raise CheckpointNotKept()
            require_growth(connection, last.head, read_head(connection, self.origin)[0])
        return last

    def _read_last(self, connection: Connection) -> tuple[Checkpoint, datetime] | tuple[None, None]:
        known = self._known  # before the row, for without the lock another may sign meanwhile
        stored = connection.execute(_NEWEST, {"origin": self.origin}).one_or_none()
        last = None if stored is None else _open(stored.note, self._signer.verifier)
        _require_known(known, last)
        return (None, None) if stored is None or last is None else (last, stored.signed_at)

    def _keep_outside(self, connection: Connection, checkpoint: Checkpoint, head: TreeHead) -> None:
        """Put it into the sink, never instead of a newer one, nor of one from which the tree does not go on."""
        if self._sink is None:
            return
        try:
            there = self._read_outside(connection, self._sink, head)
            if there is None or there.size < checkpoint.head.size:
                self._sink.write(checkpoint.note)
        except (OSError, ValueError) as error:
            self._is_sink_failing = True
            logger.error("CHECKPOINT_SINK failed: %s", type(error).__name__)  # its text may quote the URL
            raise CheckpointNotKept() from None
        self._is_sink_failing = False

    def _read_outside(self, connection: Connection, sink: Sink, head: TreeHead) -> TreeHead | None:
        """What the sink has; an objection stands until the tree goes on from there."""
        note = sink.read()
        try:
            there = None if note is None else _open(note, self._signer.verifier).head
            if there is not None:
                require_growth(connection, there, head)
        except LedgerInconsistent as problem:
            self._objection = f"CHECKPOINT_SINK says otherwise. {problem.detail}"
            raise LedgerInconsistent(self._objection) from None
        self._objection = None
        return there

    def _sign(self, connection: Connection, head: TreeHead, now: datetime) -> Checkpoint:
        note = str(sign_checkpoint(self._signer, head.size, head.root))
        values = {"origin": head.origin, "size": head.size, "root": head.root, "note": note, "now": now}
        connection.execute(_KEEP, values)
        return Checkpoint(head, note)


def read_head(connection: Connection, origin: str) -> tuple[TreeHead, datetime]:
    """The tree as it is, under this name, and the database's time."""
    size, frontier, now = connection.execute(_HEAD).one()
    return TreeHead(origin, size, root_of([bytes(node) for node in frontier])), now


def find_newest(database: Database, verifier: Verifier) -> Checkpoint:
    """The newest checkpoint that was kept; signs none. Raises CheckpointNotFound and LedgerInconsistent."""
    with database.transaction() as connection:
        stored = connection.execute(_NEWEST, {"origin": verifier.name}).one_or_none()
    if stored is None:
        raise CheckpointNotFound(f"No checkpoint of {verifier.name} was signed yet: start the service first.")
    return _open(stored.note, verifier)


def require_growth(connection: Connection, signed: TreeHead, head: TreeHead) -> None:
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


def _open(note: str, verifier: Verifier) -> Checkpoint:
    try:
        return Checkpoint(open_checkpoint(note, verifier)[0], note)
    except NoteError as error:
        raise LedgerInconsistent(f"A checkpoint that was kept is not one of this key's: {error}.") from None


def _require_known(known: _Known | None, last: Checkpoint | None) -> None:
    """Whoever signed after this process has proved that its tree begins with the one known here."""
    if known is None:
        return
    head = known.checkpoint.head
    if last is None or (last.head.size <= head.size and last.head != head):
        raise LedgerInconsistent(f"The checkpoint of size {head.size}, which was signed, is gone from the database.")
