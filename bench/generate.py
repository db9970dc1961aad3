"""Fills audit_events of a freshly migrated database with a log of many months, at COPY speed.

The rows are as the service would have left them, but for two things: nonce and personal_hash are random bytes,
and the ledger does not cover them. ledger_head is put behind them, as for rows from before the ledger: the
service appends after the last one, and its tree holds what it appended. The same seed and `until` make the same log.

    python -m bench.generate --rows 1000000 --database-url postgresql://…
"""

import argparse
import random
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from io import StringIO

import psycopg2
from psycopg2.extensions import connection as Connection
from sqlalchemy.engine import URL, make_url

from bench import events
from db import Database
from housekeeping.partitions import seal_finished_months

COPY_ROWS = 20_000  # rows made at a time: 8 MB of text
LOADERS = 2  # while one has the indexes of its month built, the other makes and copies rows
_RANDOM_BYTES = 16 + 32 + 16  # of a row: nonce, personal hash, trace id

# A month's table first stands alone: COPY FREEZE into a table of the same transaction writes no WAL where
# wal_level is minimal. Attached to audit_events it gets the indexes, each built in one go.
_CREATE_MONTH = "CREATE TABLE {name} (LIKE audit_events INCLUDING DEFAULTS INCLUDING CONSTRAINTS)"
_COPY_MONTH = (
    "COPY {name} (id, recorded_at, event_type, actor, timestamp, tenant, resource, outcome, source,"
    " source_ip, trace_id, metadata, nonce, personal_hash) FROM STDIN (FREEZE)"
)
_ATTACH_MONTH = "ALTER TABLE audit_events ATTACH PARTITION {name} FOR VALUES FROM ('{start}') TO ('{end}')"
# The range before the log's first month stays the adopted partition's, and the current month becomes a whole one.
_MAKE_ROOM = """
    ALTER TABLE audit_events DETACH PARTITION audit_events_adopted;
    ALTER TABLE audit_events ATTACH PARTITION audit_events_adopted FOR VALUES FROM (MINVALUE) TO ('{start}');
    DROP TABLE {current};
"""
_MOVE_HEAD = "UPDATE ledger_head SET first_id = %s, size = 0, frontier = '{}', recorded_at = %s"

# One to six members more, beside the two that every metadata object has.
_MORE_METADATA = [
    "".join(
        f', "{name}": {value}'
        for name, value in (
            ("region", f'"eu-{number % 5}"'),
            ("method", ('"GET"', '"POST"', '"PUT"', '"DELETE"')[number % 4]),
            ("status", (200, 201, 204, 403, 404)[number % 5]),
            ("client", f'"{("web", "ios", "android", "api")[number % 4]}/{number % 37}"'),
            ("version", f'"1.{number % 90}.{number % 7}"'),
            ("session", number),
        )[: 1 + number % 6]
    )
    for number in range(0x1000)
]


@dataclass(frozen=True)
class Month:
    """A partition to fill: its rows' ids, and the time over which they were recorded."""

    start: datetime
    end: datetime  # of the partition
    recorded_until: datetime  # of its rows: `end`, or for the current month now
    first_id: int
    rows: int

    @property
    def table(self) -> str:
        return f"audit_events_{self.start:%Y_%m}"


def fill(url: URL, rows: int, months: int = 24, seed: int = 1, until: datetime | None = None) -> None:
    """Fill the database's empty log with `rows` events, evenly over `months` of which the last is the current one."""
    until = until or datetime.now(UTC)
    plan = plan_months(rows, months, until)
    with closing(_connect(url)) as connection:
        _make_room(connection, plan)
        progress = _Progress(rows)
        with ThreadPoolExecutor(LOADERS) as loaders:
            list(loaders.map(lambda month: _load(url, month, seed, progress), plan))
        _finish(connection, rows, until)
    with closing(Database(url)) as database:
        list(seal_finished_months(database))
    progress.finish()


def plan_months(rows: int, months: int, until: datetime) -> list[Month]:
    starts = [until.replace(day=1, hour=0, minute=0, second=0, microsecond=0)]
    while len(starts) < months:
        starts.insert(0, (starts[0] - timedelta(days=1)).replace(day=1))
    ends = [*starts[1:], (starts[-1] + timedelta(days=31)).replace(day=1)]
    bounds = [rows * number // months for number in range(months + 1)]
    return [
        Month(start, end, min(end, until), first + 1, after - first)
        for start, end, first, after in zip(starts, ends, bounds, bounds[1:], strict=False)
    ]


def _connect(url: URL) -> Connection:
    connection = psycopg2.connect(url.set(drivername="postgresql").render_as_string(hide_password=False))
    with connection.cursor() as cursor:
        cursor.execute("SET timezone = 'UTC'; SET maintenance_work_mem = '1GB'; SET synchronous_commit = off")
    connection.commit()
    return connection


def _make_room(connection: Connection, plan: list[Month]) -> None:
    with connection, connection.cursor() as cursor:
        cursor.execute("SELECT EXISTS (SELECT FROM audit_events)")
        if cursor.fetchone() != (False,):
            raise SystemExit("audit_events holds events already: name a database that has just been migrated")
        cursor.execute(_MAKE_ROOM.format(start=plan[0].start, current=plan[-1].table))


def _load(url: URL, month: Month, seed: int, progress: "_Progress") -> None:
    with closing(_connect(url)) as connection, connection, connection.cursor() as cursor:
        cursor.execute(_CREATE_MONTH.format(name=month.table))
        for lines in row_texts(month, seed):
            cursor.copy_expert(_COPY_MONTH.format(name=month.table), StringIO("".join(lines)))
            progress.advance(len(lines))
        cursor.execute(_ATTACH_MONTH.format(name=month.table, start=month.start, end=month.end))


def _finish(connection: Connection, rows: int, until: datetime) -> None:
    with connection, connection.cursor() as cursor:
        cursor.execute(_MOVE_HEAD, (rows + 1, until))
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute("VACUUM (ANALYZE) audit_events")


def row_texts(month: Month, seed: int) -> Iterator[list[str]]:
    """The month's rows in COPY's text format, COPY_ROWS at a time."""
    rng = random.Random(f"{seed} {month.table}")  # noqa: S311 - a load, not a secret
    actor_weights = events.zipf_weights(events.ACTOR_COUNT)
    type_weights = events.zipf_weights(len(events.EVENT_TYPES))
    step = (month.recorded_until - month.start) / max(month.rows, 1)
    for first in range(0, month.rows, COPY_ROWS):
        count = min(COPY_ROWS, month.rows - first)
        ranks = rng.choices(range(events.ACTOR_COUNT), cum_weights=actor_weights, k=count)
        types = rng.choices(range(len(events.EVENT_TYPES)), cum_weights=type_weights, k=count)
        random_hex = rng.randbytes(_RANDOM_BYTES * count).hex()
        yield [
            _row_text(
                month.first_id + number,
                month.start + number * step,
                rank,
                event_type,
                rng.getrandbits(64),
                random_hex[2 * _RANDOM_BYTES * (number - first) : 2 * _RANDOM_BYTES * (number - first + 1)],
            )
            for number, rank, event_type in zip(range(first, first + count), ranks, types, strict=True)
        ]


def _row_text(event_id: int, recorded_at: datetime, rank: int, event_type: int, bits: int, random_hex: str) -> str:
    """One row. `bits` decides what is not given; random_hex is its nonce, personal hash and trace id."""
    delay_ms = bits & 0x7FF if bits & 0x7F0000 else bits & 0x7FFFFFF  # one event in 128 comes up to 37 hours late
    number = 100_000_000 + (bits >> 32) % 900_000_000
    return (
        f"{event_id}\t{recorded_at}\t{events.EVENT_TYPES[event_type]}\t{events.ACTORS[rank]}"
        f"\t{recorded_at - timedelta(milliseconds=delay_ms)}\t{events.TENANTS[rank % events.TENANT_COUNT]}"
        f"\t{events.KINDS[event_type % len(events.KINDS)]}/{number % (10 << event_type % 20)}"
        f"\t{events.OUTCOMES[bits % len(events.OUTCOMES)]}\t{events.SOURCES[event_type % events.SOURCE_COUNT]}"
        f"\t10.{rank >> 12}.{rank >> 6 & 63}.{rank & 63}\t{random_hex[96:]}"
        f'\t{{"request": "r{number}", "took_ms": {bits >> 40 & 0x3FF}{_MORE_METADATA[bits >> 24 & 0xFFF]}}}'
        f"\t\\\\x{random_hex[:32]}\t\\\\x{random_hex[32:96]}\n"
    )


class _Progress:
    """A bar on standard error, shared by the loaders."""

    WIDTH = 40

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._started = time.monotonic()
        self._lock = threading.Lock()

    def advance(self, rows: int) -> None:
        with self._lock:
            self._done += rows
            self._show(end="")

    def finish(self) -> None:
        self._show(end="\n")

    def _show(self, end: str) -> None:
        filled = self.WIDTH * self._done // max(self._total, 1)
        rate = self._done / (time.monotonic() - self._started)
        bar = "#" * filled + "." * (self.WIDTH - filled)
        print(f"\r[{bar}] {self._done:,} of {self._total:,} rows, {rate:,.0f} a second", end=end, file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.generate", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--database-url", type=make_url, required=True, help="a database that has just been migrated")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--months", type=int, default=24)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    fill(arguments.database_url, arguments.rows, arguments.months, arguments.seed)


if __name__ == "__main__":
    main()
