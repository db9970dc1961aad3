"""Reads keep to themselves: they time out, survive a restart, and take nothing from the writes."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import httpx
import pytest
from conftest import running_app, settings_for
from sqlalchemy import create_engine, func, select, text
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool

import migrations
from cluster import Cluster
from config import ROOT
from db import Database
from queries import reader as reader_module
from queries.reader import Reader

LOGIN = {"event_type": "LOGIN", "actor": "alice"}
QUERIES = [
    "/events",
    "/events?actor=alice",
    "/events?event_type=LO*",
    "/events/1",
    "/events/count",
    "/events/top?field=actor",
]


@pytest.fixture
def reader(database_url: URL) -> Iterator[Reader]:
    database = Database(database_url)
    reader = Reader(database, database_url, timedelta(seconds=10))
    yield reader
    reader.close()
    database.close()


@pytest.fixture
def impatient_client(database_url: URL) -> Iterator[httpx.Client]:
    with running_app(settings_for(database_url, query_timeout=timedelta(seconds=1))) as client:
        yield client


def test_a_query_that_takes_too_long_is_a_503_and_writes_go_on(
    impatient_client: httpx.Client, database_url: URL
) -> None:
    client = impatient_client
    assert client.post("/events", json=LOGIN).status_code == 201
    with create_engine(database_url, poolclass=NullPool).begin() as other:
        other.execute(text("LOCK TABLE audit_events_adopted IN ACCESS EXCLUSIVE MODE"))
        for query in QUERIES:
            response = client.get(query)
            assert response.status_code == 503
            assert response.json()["type"] == "urn:audit:problem:query-timeout"
            assert "start and end" in response.json()["detail"]
            assert response.headers["Retry-After"]
        assert client.post("/events", json=LOGIN).status_code == 201
    assert [client.get(query).status_code for query in QUERIES] == [200] * len(QUERIES)


def test_a_restart_of_the_database_is_not_felt_by_the_next_read(own_cluster: Cluster) -> None:
    own_cluster.create_database("audit")
    migrations.upgrade(own_cluster.url("audit"))
    with running_app(settings_for(own_cluster.url("audit"))) as client:
        assert client.post("/events", json=LOGIN).status_code == 201
        answers = [client.get(query).json() for query in QUERIES]
        own_cluster.stop("immediate")
        assert client.get("/events").json()["type"] == "urn:audit:problem:database-unavailable"
        own_cluster.start()
        assert [client.get(query).json() for query in QUERIES] == answers


def test_reads_can_change_nothing(reader: Reader) -> None:
    for answer in (
        reader.search(text("SHOW transaction_read_only")),
        reader.walk("SELECT current_setting('transaction_read_only')", {}),
    ):
        assert [tuple(row) for row in answer] == [("on",)]


def test_a_statement_is_prepared_once_and_the_least_used_are_forgotten(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "MAX_PREPARED", 3)
    for number in (1, 2, 3, 1, 4, 1):
        sql = f"SELECT %(value)s::int + {number}, 100 %% 7, %(value)s::int"
        assert [tuple(row) for row in reader.walk(sql, {"value": 1})] == [(number + 1, 2, 1)]
    # This question is a prepared statement too: the third.
    (known,) = reader.walk("SELECT array_agg(statement ORDER BY prepare_time) FROM pg_prepared_statements", {})
    assert [statement.partition("+ ")[2][:1] for statement in known[0]] == ["1", "4", ""]


def test_two_workers_leave_connections_of_postgresqls_hundred_to_others(reader: Reader) -> None:
    owned = 2  # those of the writer and of housekeeping
    databases = [reader._database, reader._database]  # and the owner's
    pools: list[Any] = [database.engine.pool for database in databases]
    pools += [engine.pool for kinds in (reader._pools, reader._bound_pools) for engine in vars(kinds).values()]
    most = owned + sum(pool.size() + pool._max_overflow for pool in pools)
    assert 2 * most <= 100 - 3 - 5
    assert f"A worker has at most {most}:" in (ROOT / "docs/queries.md").read_text()
    assert f"at most {most} connections" in (ROOT / "README.md").read_text()


def test_walks_and_searches_have_connections_of_their_own(reader: Reader) -> None:
    (walking,) = reader.walk("SELECT pg_backend_pid()", {})
    (searching,) = reader.search(select(func.pg_backend_pid()))
    assert walking != searching
