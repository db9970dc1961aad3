"""Looks at the ledger now and then: signs what it grew to, and holds it against the checkpoint kept outside."""

import asyncio
import logging

from problems import LedgerInconsistent, Problem
from proofs.checkpoints import Checkpoints
from telemetry import Metrics

logger = logging.getLogger("audit.ledger")


class LedgerWatch:
    """Has the log held against what CHECKPOINT_SINK keeps, and signed."""

    def __init__(self, checkpoints: Checkpoints, metrics: Metrics) -> None:
        self._checkpoints = checkpoints
        self._is_consistent = metrics.gauge("audit_ledger_consistent", "0 while the ledger contradicts a checkpoint")
        self._size = metrics.gauge("audit_checkpoint_size", "Leaves that the newest checkpoint vouches for")
        self._is_kept = metrics.gauge("audit_checkpoint_kept", "1 while CHECKPOINT_SINK has the newest checkpoint")

    async def run(self, interval_s: float) -> None:
        """For ever, in the background."""
        while True:
            await asyncio.sleep(interval_s)
            await asyncio.to_thread(self.look)

    def look(self) -> None:
        """Compare, sign and keep, once; what fails is logged, and told on /metrics and by /ready."""
        try:
            checkpoint = self._checkpoints.look()
        except LedgerInconsistent:
            self._is_consistent.set(0)  # logged where it was found
        except Problem as problem:
            logger.warning("the ledger was not looked at: %s", problem.detail)
        except Exception:
            logger.exception("the ledger was not looked at, in an unforeseen way")
        else:
            self._is_consistent.set(1)
            self._size.set(checkpoint.head.size)
        self._is_kept.set(self._checkpoints.is_kept_outside)
