"""AUDIT_READS: who read what stands in the log, and no answer waits for it."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from conftest import eventually, execute, running_app, settings_for
from sqlalchemy.engine import URL
from verify import assert_ledger_consistent

from ingest import reads

LOGIN = {"event_type": "LOGIN", "actor": "alice"}


@pytest.fixture
def audited(database_url: URL) -> Iterator[httpx.Client]:
    with running_app(settings_for(database_url, audit_reads=True)) as client:
        assert client.post("/events/batch", json=[LOGIN] * 3).status_code == 201
        yield client
    assert_ledger_consistent(database_url)


def recorded(url: URL) -> list[dict[str, Any]]:
    """The metadata of the audit.read events, in order; read from the table, for asking would make another."""
    statement = "SELECT json_agg(metadata ORDER BY id) FROM audit_events WHERE event_type = 'audit.read'"
    return execute(url, f"{statement} AND actor = 'root' AND outcome = 'success'") or []


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("/events?actor=al*&limit=2", {"call": "list", "filters": {"actor": ["al*"], "limit": 2}, "count": 2}),
        ("/events/count?outcome=denied", {"call": "count", "filters": {"outcome": "denied"}, "count": 0}),
        ("/events/top?field=actor", {"call": "top", "filters": {"field": "actor"}, "count": 3}),
        ("/events/histogram?interval=day", {"call": "histogram", "filters": {"interval": "day"}, "count": 3}),
        ("/events/2", {"call": "get", "filters": {}, "count": 1, "id": 2}),
        ("/events/2/proof", {"call": "proof", "filters": {}, "count": 1, "id": 2}),
        ("/events/export?after=1", {"call": "export", "filters": {"after": 1}, "count": 2, "complete": True}),
    ],
)
def test_a_read_is_recorded(audited: httpx.Client, database_url: URL, query: str, expected: dict[str, Any]) -> None:
    assert audited.get(query).status_code == 200
    eventually(lambda: recorded(database_url) == [expected])


def test_a_stream_is_recorded_when_it_opens_and_when_it_ends(audited: httpx.Client, database_url: URL) -> None:
    with audited.stream("GET", "/events/stream?actor=alice", headers={"Last-Event-ID": "1"}) as response:
        pieces = response.iter_raw()
        assert b"id: 3" in next(piece for piece in pieces if not piece.startswith(b": "))
        eventually(lambda: [each["call"] for each in recorded(database_url)] == ["stream.open"])
    eventually(lambda: len(recorded(database_url)) == 2)
    assert recorded(database_url)[1] == {"call": "stream", "filters": {"actor": ["alice"]}, "count": 2}


def test_a_refused_query_and_a_service_without_the_setting_record_nothing(
    audited: httpx.Client, database_url: URL
) -> None:
    assert audited.get("/events?limit=0").status_code == 422
    assert audited.get("/events/999").status_code == 404
    with running_app(settings_for(database_url)) as silent:
        assert silent.get("/events").status_code == 200
    assert audited.get("/events").status_code == 200
    eventually(lambda: len(recorded(database_url)) == 1)


def test_filters_of_any_size_and_depth_are_recorded(audited: httpx.Client, database_url: URL) -> None:
    deep = json.dumps(eval("{'a':" * 31 + "1" + "}" * 31))  # noqa: S307 - a constant
    assert audited.get("/events", params={"metadata": deep}).status_code == 200
    eventually(lambda: len(recorded(database_url)) == 1)
    assert json.loads(recorded(database_url)[0]["filters"]["metadata"]) == json.loads(deep)


def test_an_outage_delays_the_record_and_a_full_queue_drops_and_counts_it(
    audited: httpx.Client, database_url: URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reads, "MAX_WAITING", 2)
    execute(database_url, "ALTER FUNCTION append_events RENAME TO away")
    for _ in range(5):
        assert audited.get("/events").status_code == 200
    assert "audit_reads_dropped_total 3.0" in audited.get("/metrics").text
    execute(database_url, "ALTER FUNCTION away RENAME TO append_events")
    eventually(lambda: len(recorded(database_url)) == 2)


def test_a_stop_writes_what_waits(database_url: URL) -> None:
    with running_app(settings_for(database_url, audit_reads=True)) as client:
        for _ in range(20):
            client.get("/events")
    assert len(recorded(database_url)) == 20
