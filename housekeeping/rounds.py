"""What has to be done now and then, beside the requests and in nobody's way: partitions, retention, old keys."""

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from sqlalchemy import text
from starlette.concurrency import run_in_threadpool

from config import Settings
from db import Database
from housekeeping.partitions import create_coming_months, list_partitions, seal_finished_months
from housekeeping.retention import apply_retention
from housekeeping.rewrite import rewrite_erased
from problems import Problem
from telemetry import Metrics

logger = logging.getLogger("audit.housekeeping")

_INTERVAL_S = 3600
_RETRY_INTERVAL_S = 60
_PURGE_BATCH = 10_000  # keys a transaction

# Index: idempotency_keys_recorded_at. SKIP LOCKED: replicas share the work and never wait for one another.
_PURGE_KEYS = text(
    "DELETE FROM idempotency_keys WHERE (tenant, key) IN (SELECT tenant, key FROM idempotency_keys"
    " WHERE recorded_at < now() - :window ORDER BY recorded_at LIMIT :batch FOR UPDATE SKIP LOCKED)"
)
_FIRST_EVENT = text("SELECT id, recorded_at FROM audit_events ORDER BY id LIMIT 1")  # index: audit_events_pkey
_DATABASE_NOW = text("SELECT clock_timestamp()")
_HOLDS_IN_FORCE = text("SELECT count(*) FROM legal_holds WHERE released_at IS NULL")  # few: no index


async def keep_house(database: Database, settings: Settings, metrics: Metrics) -> None:
    """Run for ever in the background. Failing changes nothing today: there are three months to succeed."""
    while True:
        is_done = await run_in_threadpool(do_round, database, settings, metrics)
        await asyncio.sleep(_INTERVAL_S if is_done else _RETRY_INTERVAL_S)


def earlier_now(database: Database) -> datetime:
    """By this host's clock or the database's: what was dropped because one of them is ahead does not come back."""
    with database.transaction() as connection:
        database_now: datetime = connection.scalars(_DATABASE_NOW).one()
    return min(datetime.now(UTC), database_now)


def do_round(
    database: Database,
    settings: Settings,
    metrics: Metrics,
    clock: Callable[[Database], datetime] = earlier_now,
) -> bool:
    """Do each job once; return whether all succeeded. One that fails keeps no other from being done."""
    jobs: list[Callable[[], None]] = [
        lambda: _create_months(database),
        lambda: _seal_months(database),
        lambda: _apply_retention(database, settings, metrics, clock),
        lambda: _rewrite_erased(database),
        lambda: _purge_keys(database, settings),
        lambda: _measure(database, metrics),
    ]
    return all([_succeeds(job) for job in jobs])


def _succeeds(job: Callable[[], None]) -> bool:
    try:
        job()
    except Problem as problem:
        logger.warning("housekeeping was put off: %s", problem.detail)
        return False
    except Exception:
        logger.exception("housekeeping failed in an unforeseen way")
        return False
    return True


def _create_months(database: Database) -> None:
    if created := create_coming_months(database):
        logger.info("created partitions %s", ", ".join(created))


def _seal_months(database: Database) -> None:
    for partition in seal_finished_months(database):
        logger.info("sealed partition %s", partition)


def _apply_retention(
    database: Database, settings: Settings, metrics: Metrics, clock: Callable[[Database], datetime]
) -> None:
    for partition in apply_retention(database, settings.retention, clock(database)):
        metrics.partitions_dropped.inc()
        logger.info("dropped partition %s, which had expired", partition)


def _rewrite_erased(database: Database) -> None:
    for relation in rewrite_erased(database):
        logger.info("rewrote %s, in which personal data was erased", relation)


def _purge_keys(database: Database, settings: Settings) -> None:
    if purged := purge_keys(database, settings.idempotency_window):
        logger.info("purged %d idempotency keys", purged)


def _measure(database: Database, metrics: Metrics) -> None:
    with database.transaction() as connection:
        metrics.partitions.set(len(list_partitions(connection)))
        metrics.legal_holds.set(connection.scalar(_HOLDS_IN_FORCE) or 0)
        if first := connection.execute(_FIRST_EVENT).one_or_none():
            metrics.first_event.set(first.id)
            metrics.first_event_recorded.set(first.recorded_at.timestamp())


def purge_keys(database: Database, window: timedelta) -> int:
    """Forget the idempotency keys older than the window; return how many."""
    purged = 0
    while True:
        with database.transaction() as connection:
            count = connection.execute(_PURGE_KEYS, {"window": window, "batch": _PURGE_BATCH}).rowcount
        purged += count
        if count < _PURGE_BATCH:
            return purged
