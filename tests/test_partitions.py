"""The coming months: made ahead of time, by one replica, in nobody's way."""

import threading

from conftest import execute
from sqlalchemy import create_engine, text
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool

from db import Database
from partitions import create_coming_months

MONTHS = """
    SELECT array_agg(relname::text ORDER BY relname) FROM pg_class
    WHERE oid IN (SELECT inhrelid FROM pg_inherits WHERE inhparent = 'audit_events'::regclass)
      AND relname <> 'audit_events_adopted'
"""


def drop_last_months(url: URL, count: int) -> list[str]:
    months: list[str] = execute(url, MONTHS)
    for name in months[-count:]:
        execute(url, f"DROP TABLE {name}")
    return months


def test_missing_months_are_created_up_to_three_ahead(database_url: URL) -> None:
    database = Database(database_url)
    months = drop_last_months(database_url, 2)
    assert create_coming_months(database) == months[-2:]
    assert create_coming_months(database) == []
    assert execute(database_url, MONTHS) == months
    database.close()


def test_a_created_month_is_like_the_others(database_url: URL) -> None:
    definition = (
        "SELECT array_agg(replace(line, '{0}', '') ORDER BY line) FROM ("
        "SELECT pg_get_constraintdef(oid) AS line FROM pg_constraint WHERE conrelid = '{0}'::regclass UNION ALL"
        " SELECT regexp_replace(pg_get_indexdef(indexrelid), 'INDEX \\S+', '') FROM pg_index"
        " WHERE indrelid = '{0}'::regclass) AS lines"
    )
    (*_, last) = execute(database_url, MONTHS)
    before = execute(database_url, definition.format(last))
    drop_last_months(database_url, 1)
    database = Database(database_url)
    create_coming_months(database)
    database.close()
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


def test_creating_a_month_waits_for_no_reader_and_no_writer(database_url: URL) -> None:
    drop_last_months(database_url, 1)
    database = Database(database_url)
    with create_engine(database_url, poolclass=NullPool).begin() as other:
        other.execute(
            text(
                "INSERT INTO audit_events (id, event_type, actor, timestamp, recorded_at)"
                " VALUES (1, 'LOGIN', 'alice', now(), now())"
            )
        )
        assert len(create_coming_months(database)) == 1
    database.close()
