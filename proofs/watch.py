"""Looks at the ledger now and then: signs what it grew to, and holds it against the checkpoint kept outside."""

import asyncio
import logging

from problems import LedgerInconsistent, Problem
from proofs.checkpoints import Checkpoints
from proofs.sink import Sink
from telemetry import Metrics

logger = logging.getLogger("audit.ledger")

_UNREAD = "CHECKPOINT_SINK was not read since the start, so what was signed before is not known."


class LedgerWatch:
    """Keeps the newest checkpoint outside. Until what is kept there was read once, nothing is signed."""

    def __init__(self, checkpoints: Checkpoints, sink: Sink | None, metrics: Metrics) -> None:
        self._checkpoints = checkpoints
        self._sink = sink
        self._is_consistent = metrics.gauge("audit_ledger_consistent", "0 while the ledger contradicts a checkpoint")
        self._size = metrics.gauge("audit_checkpoint_size", "Leaves that the newest checkpoint vouches for")
        self._is_kept = metrics.gauge("audit_checkpoint_kept", "1 while CHECKPOINT_SINK has the newest checkpoint")
        if sink is not None:
            checkpoints.object(_UNREAD)

    async def run(self, interval_s: float) -> None:
        """For ever, in the background."""
        while True:
            await asyncio.sleep(interval_s)
            await asyncio.to_thread(self.look)

    def look(self) -> None:
        """Compare, sign and keep, once; what fails is logged, and told on /metrics and by /ready."""
        try:
            was_read, kept = self._read()
            checkpoint = self._checkpoints.newest()
        except LedgerInconsistent:
            self._is_consistent.set(0)  # logged where it was found
            return
        except Problem as problem:
            logger.warning("the ledger was not looked at: %s", problem.detail)
            return
        except Exception:
            logger.exception("the ledger was not looked at, in an unforeseen way")
            return
        self._is_consistent.set(1)
        self._size.set(checkpoint.head.size)
        if self._sink is not None and was_read:
            self._keep(self._sink, checkpoint.note, kept)

    def _read(self) -> tuple[bool, str | None]:
        """Whether the sink could be read, and what it holds; an objection stands until the log goes on from there."""
        if self._sink is None:
            return False, None
        try:
            kept = self._sink.read()
        except (OSError, ValueError) as error:
            self._complain(error)
            return False, None
        try:
            if kept is not None:
                self._checkpoints.require_continuation(kept)
        except LedgerInconsistent as problem:
            self._checkpoints.object(f"CHECKPOINT_SINK says otherwise. {problem.detail}")
            raise
        self._checkpoints.object(None)
        return True, kept

    def _keep(self, sink: Sink, note: str, kept: str | None) -> None:
        try:
            if note != kept:
                sink.write(note)
            self._is_kept.set(1)
        except (OSError, ValueError) as error:
            self._complain(error)

    def _complain(self, error: Exception) -> None:
        self._is_kept.set(0)
        logger.error("CHECKPOINT_SINK failed: %s", type(error).__name__)  # its text may quote the URL
