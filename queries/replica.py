"""How far the replica is behind, told by the log itself: the age of the oldest event that it does not have.

An idle primary makes no replica look late, and a replica that is cut off does look it: what PostgreSQL says of the
last transaction replayed, or of WAL received, gets one of the two wrong.
"""

import asyncio
import logging

from prometheus_client import Gauge
from sqlalchemy import Connection, text

from db import Database
from problems import Problem
from queries.pages import read_newest_id
from queries.reader import Reader
from telemetry import Metrics

logger = logging.getLogger("audit.replica")

INTERVAL_S = 5.0
_UNKNOWN = float("nan")

# Index: audit_events_pkey.
_AGE = text("SELECT extract(epoch FROM clock_timestamp() - recorded_at) FROM audit_events WHERE id = :id")


class ReplicaWatch:
    """Looks at the replica and at the primary now and then, and tells on /metrics."""

    def __init__(self, database: Database, reader: Reader, metrics: Metrics) -> None:
        self._database = database
        self._reader = reader
        self._up: Gauge = metrics.gauge("audit_replica_up", "1 while the replica answers")
        self._lag_events = metrics.gauge("audit_replica_lag_events", "Events that the replica does not have yet")
        self._lag_seconds = metrics.gauge("audit_replica_lag_seconds", "Age of the oldest event that it does not have")

    async def run(self) -> None:
        """For ever, in the background."""
        while True:
            await self.look()
            await asyncio.sleep(INTERVAL_S)

    async def look(self) -> None:
        """Measure once; what cannot be known is NaN."""
        self._lag_events.set(_UNKNOWN)
        self._lag_seconds.set(_UNKNOWN)
        try:
            replayed = await self._reader.scan(read_newest_id)
            self._up.set(1)
        except Problem as problem:
            self._up.set(0)
            logger.warning("the replica does not answer: %s", problem.detail)
            return
        try:
            events, seconds = await self._database.in_thread(self._measure_lag, replayed)
        except Problem:
            return  # logged where it arose; the lag is not known
        self._lag_events.set(events)
        self._lag_seconds.set(seconds)

    def _measure_lag(self, replayed: int) -> tuple[int, float]:
        with self._database.transaction() as connection:
            return _lag_behind(connection, replayed)


def _lag_behind(primary: Connection, replayed: int) -> tuple[int, float]:
    """In events and in seconds. The replica was looked at first, so neither is negative."""
    missing = read_newest_id(primary) - replayed
    if missing <= 0:
        return 0, 0.0
    return missing, float(primary.scalar(_AGE, {"id": replayed + 1}) or 0)
