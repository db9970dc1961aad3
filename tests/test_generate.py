"""The benchmarks' log: like one that the service left there, and the same for the same seed."""

from datetime import UTC, datetime
from typing import Any

import pytest
from conftest import execute, running_app, settings_for
from sqlalchemy.engine import URL
from verify import assert_ledger_consistent

from bench.generate import fill, plan_months, row_texts
from db import Database
from housekeeping.partitions import create_coming_months, seal_finished_months

NOW = datetime.now(UTC)
DEFINITION = (
    "SELECT array_agg(replace(line, '{0}', '') ORDER BY line) FROM ("
    "SELECT pg_get_constraintdef(oid) AS line FROM pg_constraint WHERE conrelid = '{0}'::regclass UNION ALL"
    " SELECT pg_get_indexdef(indexrelid) FROM pg_index WHERE indrelid = '{0}'::regclass) AS lines"
)


def scalars(url: URL, *expressions: str) -> Any:
    return execute(url, f"SELECT json_build_array({', '.join(expressions)}) FROM audit_events")


def test_rows_are_dense_and_rise_with_time_over_all_months(database_url: URL) -> None:
    fill(database_url, 1000, months=24)
    assert scalars(database_url, "count(*)", "min(id)", "max(id)") == [1000, 1, 1000]
    assert scalars(database_url, "count(DISTINCT date_trunc('month', recorded_at))") == [24]
    backwards = "SELECT count(*) FROM audit_events a JOIN audit_events b ON b.id = a.id + 1"
    assert execute(database_url, f"{backwards} WHERE b.recorded_at < a.recorded_at") == 0
    assert scalars(database_url, "bool_and(timestamp <= recorded_at)", "count(nonce)") == [True, 1000]
    members = "(SELECT count(*) FROM jsonb_object_keys(metadata))"
    assert scalars(database_url, f"min({members})", f"max({members})") == [3, 8]


def test_the_service_appends_after_the_last_row(database_url: URL) -> None:
    fill(database_url, 1000, months=2)
    with running_app(settings_for(database_url)) as client:
        event = {"event_type": "LOGIN", "actor": "alice"}
        assert [client.post("/events", json=event).json()["id"] for _ in range(3)] == [1001, 1002, 1003]
        assert client.get("/events/1000").status_code == 200
    assert_ledger_consistent(database_url)


def test_a_filled_month_is_like_one_that_the_service_creates(database_url: URL) -> None:
    fill(database_url, 100, months=3)
    filled = f"audit_events_{NOW:%Y_%m}"
    created = execute(database_url, "SELECT max(relname) FROM pg_class WHERE relname LIKE 'audit_events_2___\\___'")
    execute(database_url, f"DROP TABLE {created}")
    database = Database(database_url)
    assert create_coming_months(database) == [created]
    assert list(seal_finished_months(database)) == []  # what is over is sealed already
    database.close()
    assert execute(database_url, DEFINITION.format(filled)) == execute(database_url, DEFINITION.format(created))


def test_the_same_seed_makes_the_same_log() -> None:
    def log(seed: int) -> list[list[str]]:
        return [lines for month in plan_months(200, 3, NOW) for lines in row_texts(month, seed)]

    assert log(1) == log(1)
    assert log(1) != log(2)


def test_a_log_that_holds_events_is_left_alone(database_url: URL) -> None:
    fill(database_url, 10, months=1)
    with pytest.raises(SystemExit, match="holds events already"):
        fill(database_url, 10, months=1)
