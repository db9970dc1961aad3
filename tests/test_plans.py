"""The plans of the queries that run: which indexes they read, and how many rows they look at.

PostgreSQL itself tells (auto_explain), so these are the statements of the service and not copies of them.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from conftest import TEMPLATE, Server, execute
from sqlalchemy import Engine, event

from db import Database
from housekeeping import redaction
from housekeeping.partitions import seal_finished_months
from queries import aggregates, listing, lookup
from queries.cursors import encode_cursor
from queries.reader import Reader
from schemas import EventFilter, EventListing, HistogramQuery, RedactionIn, TopQuery

MONTHS, EVENTS_A_MONTH = 6, 6_000

# Months that are over. Of the actors one does every second thing, one only in the first half of the time;
# the rare one did five things of the rare type, with rare metadata, one a month.
LOG = [
    "ALTER TABLE audit_events DETACH PARTITION audit_events_adopted",
    f"""
    DO $$
    DECLARE
        present timestamptz := date_trunc('month', now());
        first timestamptz; name text; month int;
    BEGIN
        EXECUTE format('CREATE TABLE audit_events_now PARTITION OF audit_events FOR VALUES FROM (%L) TO (%L)', present,
            (SELECT min(substring(pg_get_expr(relpartbound, oid) FROM $r$FROM \\('([^']+)'\\)$r$)::timestamptz)
             FROM pg_class WHERE oid IN (SELECT inhrelid FROM pg_inherits WHERE inhparent = 'audit_events'::regclass)));
        FOR month IN 1..{MONTHS} LOOP
            first := present - make_interval(months => {MONTHS} + 1 - month);
            name := 'audit_events_past_' || month;
            EXECUTE format('CREATE TABLE %I PARTITION OF audit_events FOR VALUES FROM (%L) TO (%L)',
                name, first, first + interval '1 month');
            INSERT INTO audit_events (id, event_type, actor, timestamp, recorded_at, tenant, metadata)
            SELECT (month - 1) * {EVENTS_A_MONTH} + n,
                CASE WHEN n = 7 AND month < 6 THEN 'rare' WHEN month <= {MONTHS} / 2 THEN 'early'
                     ELSE 'late.' || n % 10 END,
                CASE WHEN n = 7 AND month < 6 THEN 'rare' WHEN n % 2 = 0 THEN 'busy'
                     WHEN month <= {MONTHS} / 2 AND n % 3 = 0 THEN 'retired' ELSE 'actor.' || n END,
                moment, moment, 'acme', jsonb_build_object('n', n, 'rare', n = 7 AND month < 6)
            FROM generate_series(1, {EVENTS_A_MONTH}) AS n,
                LATERAL (SELECT first + n * interval '5 minutes' AS moment) AS moments;
        END LOOP;
    END $$
    """,
    "VACUUM ANALYZE audit_events",
]


@dataclass(frozen=True)
class Ran:
    """What the statements since the last look read."""

    indexes: set[str]  # by the names they have in the partitioned table, and 'none' for a scan without one
    kinds: set[str]  # of the scans
    partitions: int
    rows: int  # looked at, those that did not match included


class Plans:
    """Collects the plan of every statement that SQLAlchemy runs."""

    def __init__(self) -> None:
        self._plans: list[Any] = []

    def collect(self, connection: Any, *_: object) -> None:
        notices: list[str] = connection.connection.driver_connection.notices
        self._plans += [json.loads(notice.partition("plan:\n")[2]) for notice in notices if "plan:\n" in notice]
        notices.clear()

    def since(self) -> Ran:
        scans = [node for plan in self._plans for node in _nodes(plan["Plan"]) if "_past_" in _name(node)]
        self._plans.clear()
        return Ran(
            {_index_of(node) for node in scans if node["Node Type"] != "Bitmap Heap Scan"},
            {node["Node Type"] for node in scans},
            len({node["Relation Name"] for node in scans if "Relation Name" in node}),
            sum(map(_rows, scans)),
        )


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for inner in plan.get("Plans", []):
        yield from _nodes(inner)


def _name(node: dict[str, Any]) -> str:
    """Of the index that a node reads, or else of the table, of those that hold events."""
    return str(node.get("Index Name", node.get("Relation Name", "")))


def _rows(node: dict[str, Any]) -> int:
    return int(node["Actual Loops"] * (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)))


def _index_of(node: dict[str, Any]) -> str:
    kinds = (
        *(f"{name}_timestamp_id" for name in ("actor", "event_type", "tenant")),
        "timestamp_id",
        "metadata",
        "pkey",
    )
    return next((kind for kind in kinds if kind in node.get("Index Name", "")), "none")


@pytest.fixture(scope="module")
def log(server: Server) -> Iterator[Database]:
    with server.database(TEMPLATE) as url:
        for statement in LOG:
            execute(url, statement)
        name = url.database
        settings = ["session_preload_libraries = auto_explain", "auto_explain.log_min_duration = 0"]
        settings += [
            "auto_explain.log_analyze = on",
            "auto_explain.log_format = json",
            "auto_explain.log_level = notice",
        ]
        for setting in settings:
            execute(url, f"ALTER DATABASE {name} SET {setting}")
        database = Database(url)
        # The present month was cut short by the migration.
        assert len(list(seal_finished_months(database))) == MONTHS + 1
        yield database
        database.close()


@pytest.fixture(scope="module")
def explained(log: Database) -> Iterator[tuple[Reader, Plans]]:
    plans = Plans()
    reader = Reader(log, log.url, timedelta(seconds=10))
    event.listen(Engine, "after_cursor_execute", plans.collect)
    yield reader, plans
    event.remove(Engine, "after_cursor_execute", plans.collect)
    reader.close()


def days_ago(days: int) -> datetime:
    return datetime.now(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0) - timedelta(days=days)


PREFETCH = MONTHS  # a merge looks at the first row of each partition
PAGE = 51


@pytest.mark.parametrize("order", ["desc", "asc"])
@pytest.mark.parametrize(
    ("filters", "index", "rows"),
    [
        ({}, "timestamp_id", PAGE),
        ({"actor": ["busy"]}, "actor_timestamp_id", PAGE),
        ({"actor": ["rare"]}, "actor_timestamp_id", 5),
        ({"actor": ["nobody"]}, "actor_timestamp_id", 0),
        ({"actor": ["busy", "rare", "nobody"]}, "actor_timestamp_id", PAGE + 5 + 2 * PREFETCH),
        ({"actor": ["busy"], "limit": 1000}, "actor_timestamp_id", 4 * (250 + 1 + PREFETCH)),
        ({"event_type": ["late.0", "late.3"]}, "event_type_timestamp_id", 2 * PAGE + PREFETCH),
        ({"event_type": ["rare"]}, "event_type_timestamp_id", 5),
        ({"actor": ["busy"], "tenant": "acme"}, "actor_timestamp_id", PAGE),
    ],
    ids=str,
)
def test_a_page_is_walked(
    explained: tuple[Reader, Plans], filters: dict[str, Any], order: Any, index: str, rows: int
) -> None:
    reader, plans = explained
    wanted = EventListing.model_validate({"limit": 50, "order": order, **filters})
    page = listing.list_events(reader, wanted)
    first = plans.since()
    assert first.indexes == {index}
    assert first.rows <= rows + PREFETCH
    if page.next_cursor:
        listing.list_events(reader, wanted.model_copy(update={"cursor": page.next_cursor}))
        second = plans.since()
        assert second.indexes == {index}
        assert second.rows <= rows + PREFETCH


@pytest.mark.parametrize(
    ("filters", "indexes", "rows"),
    [
        ({"metadata": '{"rare": true}'}, {"metadata"}, 5),
        ({"event_type": ["rar*"]}, {"event_type_timestamp_id"}, 5),
        ({"actor": ["rar*"]}, {"actor_timestamp_id"}, 5),
        ({"actor": ["busy"], "event_type": ["rare"]}, {"event_type_timestamp_id", "actor_timestamp_id"}, 5),
        ({"actor": ["retired"], "event_type": ["late.0"]}, {"actor_timestamp_id", "event_type_timestamp_id"}, 0),
    ],
    ids=str,
)
def test_what_a_walk_does_not_find_soon_is_searched_for(
    explained: tuple[Reader, Plans], filters: dict[str, Any], indexes: set[str], rows: int
) -> None:
    reader, plans = explained
    listing.list_events(reader, EventListing.model_validate({"limit": 50, **filters}))
    ran = plans.since()
    assert "none" not in ran.indexes
    assert indexes & ran.indexes
    searched = ran.rows - listing.WALKED_EVENTS - PREFETCH
    # Each stretch looks for its first event; a bitmap is counted in the index and in the table.
    assert searched <= 4 * rows + 6 * PREFETCH


@pytest.mark.parametrize("filters", [{}, {"actor": ["busy"]}, {"actor": ["busy"], "event_type": ["late.0"]}], ids=str)
def test_a_time_range_leaves_sealed_partitions_out(explained: tuple[Reader, Plans], filters: dict[str, Any]) -> None:
    reader, plans = explained
    found = {"start": days_ago(20).isoformat(), "end": days_ago(15).isoformat(), **filters}
    assert listing.list_events(reader, EventListing.model_validate({"limit": 5, **found})).events
    assert plans.since().partitions == 1
    aggregates.count_by_value(reader, TopQuery.model_validate({"field": "actor", **found}))
    assert plans.since().partitions == 1
    planned = {**found, "outcome": "success"}
    aggregates.count_events(reader, EventFilter.model_validate(planned), 1000)
    assert plans.since().partitions == 1
    aggregates.count_by_time(reader, HistogramQuery.model_validate({"interval": "day", **planned}))
    assert plans.since().partitions == 1


@pytest.mark.parametrize(("order", "months"), [("desc", 2), ("asc", MONTHS - 1)])
@pytest.mark.parametrize(("filters", "step"), [({}, 1), ({"actor": ["busy"]}, 2)], ids=["all", "an actor"])
def test_a_cursor_leaves_sealed_partitions_out_that_it_has_passed(
    explained: tuple[Reader, Plans], filters: dict[str, Any], step: int, order: Any, months: int
) -> None:
    reader, plans = explained
    wanted = EventListing.model_validate({"limit": 5, "order": order, **filters})
    event_id = EVENTS_A_MONTH * 3 // 2  # in the second month
    moment = datetime.fromisoformat(json.loads(lookup.read_event(reader, event_id))["timestamp"])
    plans.since()
    cursor = encode_cursor(wanted, (moment, event_id))
    found = listing.list_events(reader, wanted.model_copy(update={"cursor": cursor})).events
    assert plans.since().partitions == months
    direction = step if order == "asc" else -step
    assert [json.loads(each)["id"] for each in found] == [event_id + direction * number for number in range(1, 6)]


@pytest.mark.parametrize(
    ("filters", "index"),
    [
        ({}, "timestamp_id"),
        ({"actor": ["busy", "rare"]}, "actor_timestamp_id"),
        ({"event_type": ["late.0"]}, "event_type_timestamp_id"),
        ({"tenant": "acme"}, "tenant_timestamp_id"),
    ],
    ids=str,
)
def test_what_one_index_holds_is_counted_in_it_alone(
    explained: tuple[Reader, Plans], filters: dict[str, Any], index: str
) -> None:
    reader, plans = explained
    found = {"start": days_ago(20).isoformat(), "end": days_ago(15).isoformat(), **filters}
    count, _ = aggregates.count_events(reader, EventFilter.model_validate(found), 10_000)
    assert count > 0
    counted = plans.since()
    aggregates.count_by_time(reader, HistogramQuery.model_validate({"interval": "day", **found}))
    for ran in (counted, plans.since()):
        assert (ran.indexes, ran.kinds, ran.rows) == ({index}, {"Index Only Scan"}, count)


@pytest.mark.parametrize(
    ("filters", "indexes"),
    [
        ({"metadata": '{"rare": true}'}, {"metadata"}),
        ({"actor": ["rar*"]}, {"actor_timestamp_id"}),
        ({"actor": ["busy"], "event_type": ["rare"]}, {"event_type_timestamp_id", "actor_timestamp_id"}),
    ],
    ids=str,
)
def test_what_is_rare_is_counted_where_an_index_has_it(
    explained: tuple[Reader, Plans], filters: dict[str, Any], indexes: set[str]
) -> None:
    reader, plans = explained
    year = {"start": days_ago(365).isoformat(), "end": days_ago(-31).isoformat()}
    aggregates.count_events(reader, EventFilter.model_validate(filters), 1000)
    ran = [plans.since()]
    aggregates.count_by_value(reader, TopQuery.model_validate({"field": "actor", **filters}))
    ran.append(plans.since())
    aggregates.count_by_time(reader, HistogramQuery.model_validate({"interval": "month", **filters, **year}))
    for each in (*ran, plans.since()):
        assert each.indexes & indexes
        assert "none" not in each.indexes
        assert each.rows <= 2 * 5 + 2 * MONTHS


def test_an_id_leaves_sealed_partitions_out(explained: tuple[Reader, Plans]) -> None:
    reader, plans = explained
    assert json.loads(lookup.read_event(reader, EVENTS_A_MONTH + 1))["id"] == EVENTS_A_MONTH + 1
    ran = plans.since()
    assert ran.partitions == 1
    assert ran.rows == 1


def test_a_count_stops_at_its_limit(explained: tuple[Reader, Plans]) -> None:
    reader, plans = explained
    assert aggregates.count_events(reader, EventFilter(), 1000) == (1000, True)
    assert plans.since().rows <= 1001
    assert aggregates.count_events(reader, EventFilter(resource="nothing"), 1000) == (0, True)
    assert plans.since().rows <= 1001


@pytest.mark.parametrize("tenant", [None, "acme"])
def test_a_batch_to_redact_is_walked_however_many_events_the_actor_has(
    log: Database, explained: tuple[Reader, Plans], tenant: str | None
) -> None:
    plans = explained[1]
    batches = redaction.find_batches(log, RedactionIn(actor="busy", tenant=tenant, reason="Request 1"))
    assert len(next(batches)) == redaction.BATCH_EVENTS
    plans.since()  # and which event is the newest
    for _ in range(3):
        assert len(next(batches)) == redaction.BATCH_EVENTS
        ran = plans.since()
        assert ran.indexes == {"actor_timestamp_id"}
        assert ran.rows <= redaction.BATCH_EVENTS + PREFETCH


def test_all_of_an_actor_is_found_to_be_redacted_by_index(log: Database, explained: tuple[Reader, Plans]) -> None:
    plans = explained[1]
    wanted = RedactionIn(actor="rare", reason="Request 1")
    assert redaction.measure(log, wanted, "root") == redaction.Extent(5, 0)
    assert plans.since().indexes == {"actor_timestamp_id", "metadata"}
    found = [EVENTS_A_MONTH * month + 7 for month in range(5)]
    assert list(redaction.find_batches(log, wanted)) == [found]
    ran = plans.since()
    assert ran.indexes == {"pkey", "actor_timestamp_id", "metadata"}
    assert ran.rows <= 5 + 2 * PREFETCH
