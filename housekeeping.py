"""What has to be done now and then, beside the requests and in nobody's way: partitions, old keys."""

import asyncio
import logging
from datetime import timedelta

from sqlalchemy import text
from starlette.concurrency import run_in_threadpool

from config import Settings
from db import Database
from partitions import create_coming_months
from problems import Problem

logger = logging.getLogger("audit.housekeeping")

_INTERVAL_S = 3600
_RETRY_INTERVAL_S = 60
_PURGE_BATCH = 10_000  # keys a transaction

# Index: idempotency_keys_recorded_at. SKIP LOCKED: replicas share the work and never wait for one another.
_PURGE_KEYS = text(
    "DELETE FROM idempotency_keys WHERE (tenant, key) IN (SELECT tenant, key FROM idempotency_keys"
    " WHERE recorded_at < now() - :window ORDER BY recorded_at LIMIT :batch FOR UPDATE SKIP LOCKED)"
)


def purge_keys(database: Database, window: timedelta) -> int:
    """Forget the idempotency keys older than the window; return how many."""
    purged = 0
    while True:
        with database.transaction() as connection:
            count = connection.execute(_PURGE_KEYS, {"window": window, "batch": _PURGE_BATCH}).rowcount
        purged += count
        if count < _PURGE_BATCH:
            return purged


async def keep_house(database: Database, settings: Settings) -> None:
    """Run for ever in the background. Failing changes nothing today: there are three months to succeed."""
    while True:
        interval_s = _INTERVAL_S
        try:
            if created := await run_in_threadpool(create_coming_months, database):
                logger.info("created partitions %s", ", ".join(created))
            if purged := await run_in_threadpool(purge_keys, database, settings.idempotency_window):
                logger.info("purged %d idempotency keys", purged)
        except Problem as problem:
            logger.warning("housekeeping was put off: %s", problem.detail)
            interval_s = _RETRY_INTERVAL_S
        await asyncio.sleep(interval_s)
