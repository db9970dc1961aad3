"""The months: made ahead of time, sealed when over, by one replica, in nobody's way."""

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta

import pytest
from conftest import eventually, execute, running_app, settings_for
from months import Interruption, append_events, fill_months, interrupted_before, partitions_of, partitions_read
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool
from verify import assert_ledger_consistent

from db import Database
from housekeeping.partitions import CREATION_LOCK, UPKEEP_LOCK, create_coming_months, seal_finished_months
from problems import DatabaseUnavailable

MONTHS = """
    SELECT array_agg(relname::text ORDER BY relname) FROM pg_class
    WHERE oid IN (SELECT inhrelid FROM pg_inherits WHERE inhparent = 'audit_events'::regclass)
      AND relname <> 'audit_events_adopted'
"""
REDACTION = "actor = '[redacted]', nonce = NULL, redacted_at = now()"
LOGIN = {"event_type": "LOGIN", "actor": "alice"}


@contextmanager
def reader(url: URL) -> Iterator[Connection]:
    """Somebody who has read every partition, and whose transaction stays open."""
    engine = create_engine(url, poolclass=NullPool)
    with engine.begin() as connection:
        connection.execute(text("SELECT count(*) FROM audit_events"))
        yield connection


def drop_last_months(url: URL, count: int) -> list[str]:
    months: list[str] = execute(url, MONTHS)
    for name in months[-count:]:
        execute(url, f"DROP TABLE {name}")
    return months


def test_missing_months_are_created_up_to_three_ahead(database_url: URL, database: Database) -> None:
    months = drop_last_months(database_url, 2)
    assert create_coming_months(database) == months[-2:]
    assert create_coming_months(database) == []
    assert execute(database_url, MONTHS) == months


def test_a_created_month_is_like_the_others(database_url: URL, database: Database) -> None:
    definition = (
        "SELECT array_agg(replace(line, '{0}', '') ORDER BY line) FROM ("
        "SELECT pg_get_constraintdef(oid) AS line FROM pg_constraint WHERE conrelid = '{0}'::regclass UNION ALL"
        " SELECT regexp_replace(pg_get_indexdef(indexrelid), 'INDEX \\S+', '') FROM pg_index"
        " WHERE indrelid = '{0}'::regclass) AS lines"
    )
    (*_, last) = execute(database_url, MONTHS)
    before = execute(database_url, definition.format(last))
    drop_last_months(database_url, 1)
    create_coming_months(database)
    assert execute(database_url, definition.format(last)) == before


def test_replicas_do_not_get_in_each_others_way(database_url: URL) -> None:
    months = drop_last_months(database_url, 3)
    databases = [Database(database_url) for _ in range(4)]
    created: list[str] = []
    threads = [threading.Thread(target=lambda d=d: created.extend(create_coming_months(d))) for d in databases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for database in databases:
        database.close()
    assert created == months[-3:]


def test_a_month_that_is_needed_now_does_not_wait_for_a_seal(database_url: URL, database: Database) -> None:
    months = drop_last_months(database_url, 1)
    with database.exclusive_session(UPKEEP_LOCK):
        assert create_coming_months(database) == months[-1:]


def test_a_month_that_another_replica_is_making_is_there_afterwards(database_url: URL, database: Database) -> None:
    """A flush comes back from here and tries again, so to say that somebody is at it would not do."""
    months = drop_last_months(database_url, 1)
    waiting = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'advisory'"
    with ThreadPoolExecutor(1) as pool, database.transaction() as other:
        other.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": CREATION_LOCK})
        creating = pool.submit(create_coming_months, database)
        eventually(lambda: creating.done() or execute(database_url, waiting) is not None)
        other.rollback()
        assert creating.result() == months[-1:]


def test_creating_a_month_waits_for_no_reader_and_no_writer(database_url: URL) -> None:
    drop_last_months(database_url, 1)
    database = Database(database_url)
    with reader(database_url) as other:
        other.execute(
            text(
                "INSERT INTO audit_events (id, event_type, actor, timestamp, recorded_at)"
                " VALUES (1, 'LOGIN', 'alice', now(), now())"
            )
        )
        assert len(create_coming_months(database)) == 1
    database.close()


def fill_two_months(database: Database) -> list[str]:
    """Ids 1 to 50 of January; 51 to 100 of February, with one late event; 101 in the month after."""
    january = [{**LOGIN, "timestamp": f"2024-01-{1 + n % 28:02}T00:00:00Z"} for n in range(50)]
    february = [{**LOGIN, "timestamp": f"2024-02-{1 + n % 28:02}T00:00:00Z"} for n in range(49)]
    late = {**LOGIN, "timestamp": "2024-01-20T12:00:00Z"}
    return fill_months(database, january, [*february, late], [LOGIN])


def test_a_sealed_month_is_left_out_of_queries_for_others(database_url: URL, database: Database) -> None:
    first, second, *_ = fill_two_months(database)
    assert list(seal_finished_months(database)) == ["audit_events_adopted", first, second]
    assert list(seal_finished_months(database)) == []
    sealed = {"audit_events_adopted", first, second}
    for condition, expected in (
        ("id = 50", {first}),
        ("id = 51", {second}),
        ("id >= 51", {second}),
        ("id > 20 AND id < 40", {first}),
        ("id > 100", set()),
        ("timestamp >= '2024-01-05'::timestamptz AND timestamp < '2024-01-10'::timestamptz", {first}),
        ("timestamp >= '2024-01-20 12:00Z'::timestamptz AND timestamp < '2024-01-21Z'::timestamptz", {first, second}),
        ("timestamp >= '2024-02-10'::timestamptz", {second}),
        ("timestamp < '2024-01-01 00:00:01Z'::timestamptz", {first}),
        ("timestamp < '2023-12-31'::timestamptz", set()),
        ("timestamp <= '2024-01-09Z'::timestamptz AND (timestamp, id) < ('2024-01-09Z'::timestamptz, 7)", {first}),
        ("timestamp >= '2024-02-09Z'::timestamptz AND (timestamp, id) > ('2024-02-09Z'::timestamptz, 7)", {second}),
        ("actor = 'alice' AND timestamp >= '2024-02-10'::timestamptz", {second}),
    ):
        read = partitions_read(database_url, f"SELECT * FROM audit_events WHERE {condition}")
        assert read & sealed == expected, condition


def test_a_page_reads_the_sealed_months_it_needs(database_url: URL, database: Database) -> None:
    first, second, *_ = fill_two_months(database)
    list(seal_finished_months(database))
    page = (
        "SELECT * FROM audit_events WHERE actor = 'alice' AND timestamp <= '2024-01-09Z'::timestamptz"
        " AND (timestamp, id) < ('2024-01-09Z'::timestamptz, 7) ORDER BY timestamp DESC, id DESC LIMIT 50"
    )
    read = partitions_read(database_url, page)
    assert first in read
    assert second not in read


def test_a_month_is_sealed_only_when_no_flush_can_write_into_it(database_url: URL, database: Database) -> None:
    (_, this_month, *_) = partitions_of(database_url)
    append_events(database, LOGIN, recorded_at=this_month.upper_bound - timedelta(microseconds=1))
    assert list(seal_finished_months(database)) == ["audit_events_adopted"]
    append_events(database, LOGIN, recorded_at=this_month.upper_bound)
    assert list(seal_finished_months(database)) == [this_month.name]


def test_a_month_without_events_is_sealed_too(database_url: URL, database: Database) -> None:
    first, second, _ = fill_months(database, [LOGIN], [], [LOGIN])
    assert list(seal_finished_months(database)) == ["audit_events_adopted", first, second]
    for condition in ("id > 0", "id < 9000000000000000000", "timestamp < '9999-01-01'", "timestamp > '0001-01-01'"):
        assert second not in partitions_read(database_url, f"SELECT * FROM audit_events WHERE {condition}")


def test_a_sealed_month_takes_no_late_row_and_keeps_redaction_possible(database_url: URL, database: Database) -> None:
    first, *_ = fill_two_months(database)
    list(seal_finished_months(database))
    row = "INSERT INTO {0} SELECT 777, event_type, actor, timestamp, recorded_at FROM {0} LIMIT 1"
    with pytest.raises(Exception, match="audit_events_month_is_over"):
        execute(database_url, row.format(first))
    execute(database_url, f"UPDATE {first} SET {REDACTION} WHERE id = 1")


def test_sealing_resumes_wherever_it_was_interrupted(database_url: URL, database: Database) -> None:
    first, second, *_ = fill_two_months(database)
    for stop in itertools.count():
        for name in ("audit_events_adopted", first, second):
            execute(database_url, f"ALTER TABLE {name} DROP CONSTRAINT IF EXISTS audit_events_month_is_over")
        try:
            with interrupted_before(stop):
                list(seal_finished_months(database))
            break
        except Interruption:
            list(seal_finished_months(database))
        assert [each.name for each in partitions_of(database_url) if each.is_sealed] == [
            "audit_events_adopted",
            first,
            second,
        ]
    assert stop > 5


def test_sealing_gives_way_to_a_reader_and_is_done_later(database_url: URL, database: Database) -> None:
    fill_two_months(database)
    with reader(database_url), pytest.raises(DatabaseUnavailable):
        started = time.monotonic()
        list(seal_finished_months(database))
    assert time.monotonic() - started < 3  # others queue behind it while it waits: 0.1 s, not the session's 5 s
    assert len(list(seal_finished_months(database))) == 3


def test_one_replica_seals_at_a_time(database_url: URL, database: Database) -> None:
    fill_two_months(database)
    with database.exclusive_session(UPKEEP_LOCK):
        assert list(seal_finished_months(Database(database_url))) == []
    assert len(list(seal_finished_months(database))) == 3


def test_writes_go_on_while_months_are_made_and_sealed(database_url: URL) -> None:
    """Also while somebody reads for long, which keeps the seals waiting."""
    database = Database(database_url)
    fill_two_months(database)
    done = threading.Event()

    def write() -> set[int]:
        codes = set()
        while not done.is_set():
            codes.add(client.post("/events/batch", json=[LOGIN] * 100).status_code)
        return codes

    unseal = "ALTER TABLE audit_events_adopted DROP CONSTRAINT audit_events_month_is_over"
    with running_app(settings_for(database_url)) as client, ThreadPoolExecutor(4) as pool:
        eventually(lambda: "audit_partitions 5.0" in client.get("/metrics").text)  # housekeeping is through
        writers = [pool.submit(write) for _ in range(4)]
        try:
            for _ in range(5):
                execute(database_url, unseal)
                drop_last_months(database_url, 1)
                with reader(database_url):
                    assert len(create_coming_months(database)) == 1
                    with pytest.raises(DatabaseUnavailable):
                        list(seal_finished_months(database))
                assert list(seal_finished_months(database)) == ["audit_events_adopted"]
        finally:
            done.set()
        assert [writer.result() for writer in writers] == [{201}] * 4
    database.close()
    assert_ledger_consistent(database_url)
