"""Retention: what expires, what a hold keeps, what is recorded, and what a crash in the middle leaves."""

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any

import pytest
from conftest import eventually, execute, running_app, settings_for
from months import Interruption, append_events, fill_months, interrupted_before, partitions_of
from sqlalchemy import Connection, Engine, create_engine, event, select, text
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool
from verify import assert_ledger_consistent

from db import Database
from housekeeping import holds, redaction, rounds
from housekeeping.partitions import UPKEEP_LOCK, seal_finished_months
from housekeeping.retention import apply_retention
from housekeeping.rounds import do_round
from models import audit_events
from problems import DatabaseUnavailable, InvalidFields
from schemas import LegalHoldIn, RedactionIn
from telemetry import Metrics

LOGIN = {"event_type": "LOGIN", "actor": "alice"}
YEAR = timedelta(days=365)
ADOPTED = "audit_events_adopted"


@pytest.fixture
def database(database_url: URL) -> Iterator[Database]:
    database = Database(database_url)
    yield database
    database.close()
    first_kept = execute(database_url, "SELECT min(id) FROM audit_events")
    assert_ledger_consistent(database_url, pruned=first_kept - 1)


def fill_log(database: Database) -> list[str]:
    """Two months of 40 events, mostly alice's and one other's, and a third that holds the newest 256; sealed."""
    first = [{**LOGIN, "timestamp": f"2024-01-{1 + n % 28:02}T00:00:00Z"} for n in range(39)]
    second = [{**LOGIN, "actor": "carol", "tenant": "acme", "resource": "order/1"}, *[LOGIN] * 39]
    names = fill_months(database, [*first, {**LOGIN, "actor": "bob", "tenant": "acme"}], second, [LOGIN] * 256)
    list(seal_finished_months(database))
    return names


def long_after(database: Database) -> datetime:
    """A moment at which everything has expired that is in the log."""
    return partitions_of(database.url)[-1].upper_bound + 2 * YEAR


def drop_expired(database: Database) -> list[str]:
    return list(apply_retention(database, YEAR, long_after(database)))


def place(database: Database, **subject: str) -> int:
    return int(holds.place_hold(database, LegalHoldIn(reason="Case 1", **subject), "root").id)


def records(database: Database, event_type: str) -> list[dict[str, Any]]:
    """Resource and metadata of the events of this type, oldest first."""
    statement = select(audit_events).where(audit_events.c.event_type == event_type).order_by(audit_events.c.id)
    with database.transaction() as connection:
        return [{"resource": row.resource, **(row.metadata or {})} for row in connection.execute(statement)]


def dropped(database: Database) -> list[str]:
    return [each["resource"].removeprefix("partitions/") for each in records(database, "audit.retention.drop")]


def names(database: Database) -> list[str]:
    return [partition.name for partition in partitions_of(database.url)]


def test_expired_partitions_are_dropped_oldest_first_and_recorded(database: Database) -> None:
    first, second, third = fill_log(database)
    assert drop_expired(database) == [ADOPTED, first, second]
    assert names(database)[0] == third
    assert dropped(database) == [ADOPTED, first, second]
    empty, full, _ = records(database, "audit.retention.drop")
    assert empty["count"] == 0
    assert {name: full[name] for name in ("count", "first_id", "last_id", "earliest", "latest")} == {
        "count": 40,
        "first_id": 1,
        "last_id": 40,
        "earliest": "2024-01-01T00:00:00.000000Z",
        "latest": "2026-01-01T00:00:00.000000Z",
    }
    assert drop_expired(database) == []


def test_a_partition_expires_when_all_of_it_has(database: Database) -> None:
    first, *_ = fill_log(database)
    bound = partitions_of(database.url)[1].upper_bound
    assert list(apply_retention(database, YEAR, bound + YEAR - timedelta(microseconds=1))) == [ADOPTED]
    assert list(apply_retention(database, YEAR, bound + YEAR)) == [first]


def test_without_retention_days_everything_stays(database: Database) -> None:
    fill_log(database)
    assert list(apply_retention(database, None, long_after(database))) == []
    assert len(names(database)) == 5


def test_what_is_not_sealed_stays(database: Database, database_url: URL) -> None:
    first, *_ = fill_log(database)
    execute(database_url, f"ALTER TABLE {first} DROP CONSTRAINT audit_events_month_is_over")
    assert drop_expired(database) == [ADOPTED]


def test_the_newest_256_events_stay_however_old(database: Database) -> None:
    first, second, _ = fill_months(database, [LOGIN] * 100, [LOGIN] * 255, [])
    append_events(database, recorded_at=partitions_of(database.url)[-1].upper_bound - timedelta(days=1))
    list(seal_finished_months(database))
    # The record of the empty partition's drop is the 256th event after the first month's.
    assert drop_expired(database) == [ADOPTED, first]
    assert names(database)[0] == second
    append_events(database, *[LOGIN] * 600)


@pytest.mark.parametrize(
    ("subject", "stops_at"),
    [
        ({"actor": "bob"}, 0),
        ({"actor": "carol"}, 1),
        ({"tenant": "acme"}, 0),
        ({"resource": "order/1"}, 1),
        ({"tenant": "acme", "actor": "carol"}, 1),
        ({"tenant": "acme", "resource": "order/1"}, 1),
        ({"tenant": "acme", "actor": "carol", "resource": "order/1"}, 1),
        ({"actor": "nobody"}, 2),
        ({"tenant": "other"}, 2),
        ({"resource": "order/2"}, 2),
        ({"tenant": "acme", "actor": "alice"}, 2),
        ({"actor": "bob", "resource": "order/1"}, 2),
        ({"tenant": "other", "resource": "order/1"}, 2),
    ],
)
def test_a_hold_keeps_what_matches_all_that_it_names(
    database: Database, subject: dict[str, str], stops_at: int
) -> None:
    months = fill_log(database)
    hold = place(database, **subject)
    assert drop_expired(database) == [ADOPTED, *months[:stops_at]]
    kept = [{"resource": f"partitions/{months[stops_at]}", "legal_hold": hold}] if stops_at < 2 else []
    assert records(database, "audit.retention.keep") == kept
    assert holds.find_hold(database, hold).keeps == (months[stops_at] if kept else None)


def test_what_a_hold_keeps_is_recorded_once_and_searched_for_once(database: Database, database_url: URL) -> None:
    first, *_ = fill_log(database)
    place(database, tenant="acme")
    drop_expired(database)
    statements: list[str] = []

    def note(_c: Connection, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        for _ in range(3):
            assert drop_expired(database) == []
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    assert not [statement for statement in statements if f"{first} AS event" in statement]
    assert [each["resource"] for each in records(database, "audit.retention.keep")] == [f"partitions/{first}"]


def test_a_released_hold_lets_go_and_the_next_one_takes_over(database: Database) -> None:
    first, second, _ = fill_log(database)
    early, late = place(database, tenant="acme"), place(database, actor="bob")
    assert drop_expired(database) == [ADOPTED]
    holds.release_hold(database, early, "root")
    assert drop_expired(database) == []
    assert [each["legal_hold"] for each in records(database, "audit.retention.keep")] == [early, late]
    holds.release_hold(database, late, "root")
    assert drop_expired(database) == [first, second]


def test_the_one_hold_of_thousands_that_matches_is_found_in_two_scans(database: Database, database_url: URL) -> None:
    _, second, _ = fill_log(database)
    execute(
        database_url,
        "INSERT INTO legal_holds (tenant, resource, reason, created_by, created_at)"
        " SELECT CASE WHEN n % 2 = 0 THEN 't' || n END, CASE WHEN n % 2 = 1 THEN 'r' || n END, 'x', 'root', now()"
        " FROM generate_series(1, 2000) AS n",
    )
    last = place(database, resource="order/1")
    execute(database_url, f"ANALYZE {second}")
    scans = f"SELECT seq_scan FROM pg_stat_user_tables WHERE relname = '{second}'"
    before = execute(database_url, scans)
    assert len(drop_expired(database)) == 2
    assert records(database, "audit.retention.keep")[0]["legal_hold"] == last
    eventually(lambda: execute(database_url, scans) > before)  # a session tells its counts when it ends
    assert execute(database_url, scans) - before <= 3
    # Without statistics PostgreSQL may plan for a handful, and scan once for each.
    assert execute(database_url, "SELECT reltuples FROM pg_class WHERE relname = 'legal_holds'") == 2001


def test_dropping_resumes_wherever_it_was_interrupted(server: Any, database_url: URL) -> None:
    """And is recorded once for each partition, whatever was repeated."""
    template = Database(database_url)
    months = fill_log(template)
    template.close()
    for stop in itertools.count():
        with server.database(database_url.database) as url:
            database = Database(url)
            now = long_after(database)
            try:
                with interrupted_before(stop):
                    list(apply_retention(database, YEAR, now))
                interrupted = False
            except Interruption:
                interrupted = True
            list(apply_retention(database, YEAR, now))
            assert dropped(database) == [ADOPTED, *months[:2]]
            assert names(database)[0] == months[2]
            database.close()
            assert_ledger_consistent(url, pruned=80)
        if not interrupted:
            break
    assert stop > 10


@pytest.mark.parametrize("wish", ["a hold", "no retention"])
def test_a_partition_on_its_way_out_comes_back_when_it_is_to_stay(server: Any, database_url: URL, wish: str) -> None:
    """Wherever the drop was interrupted, the next call undoes what it did, and the partition is as it was."""
    template = Database(database_url)
    fill_log(template)
    list(apply_retention(template, YEAR, partitions_of(database_url)[0].upper_bound + YEAR))
    before = partitions_of(database_url)
    now = long_after(template)
    template.close()
    for stop in range(4):
        with server.database(database_url.database) as url:
            database = Database(url)
            with pytest.raises(Interruption), interrupted_before(stop):
                list(apply_retention(database, YEAR, now))
            if wish == "a hold":
                place(database, actor="bob")
            assert list(apply_retention(database, YEAR if wish == "a hold" else None, now)) == []
            assert partitions_of(url) == before
            assert execute(url, "SELECT count(*) FROM audit_events WHERE id <= 40") == 40
            assert dropped(database) == [ADOPTED]
            database.close()
            assert_ledger_consistent(url)


def test_a_hold_placed_in_the_middle_of_a_drop_is_honoured(database: Database, database_url: URL) -> None:
    """Placed after the search for holds, and after the partition was detached."""
    first, *_ = fill_log(database)
    placed: list[int] = []

    def place_after_the_search(_c: Connection, _cursor: Any, statement: str, *_: Any) -> None:
        if "count(*), min(id)" in statement and first in statement and not placed:
            placed.append(0)
            placed[0] = place(database, actor="bob")

    event.listen(Engine, "before_cursor_execute", place_after_the_search)
    try:
        assert drop_expired(database) == [ADOPTED]
    finally:
        event.remove(Engine, "before_cursor_execute", place_after_the_search)
    assert names(database)[0] == first
    assert records(database, "audit.retention.keep") == [{"resource": f"partitions/{first}", "legal_hold": placed[0]}]


def test_a_hold_that_comes_when_the_drop_is_certain_waits_for_it(database: Database, database_url: URL) -> None:
    """So whoever gets a 201 for a hold finds in the log, before it, all that it was too late for."""
    first, *_ = fill_log(database)
    waiting = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'relation'"
    placing: list[Future[int]] = []

    def place_before_the_drop(_c: Connection, _cursor: Any, statement: str, *_: Any) -> None:
        if statement == f"DROP TABLE {first}":
            placing.append(pool.submit(place, database, actor="bob"))
            eventually(lambda: placing[0].done() or execute(database_url, waiting) is not None)
            assert not placing[0].done()

    event.listen(Engine, "before_cursor_execute", place_before_the_drop)
    try:
        with ThreadPoolExecutor(1) as pool:
            assert drop_expired(database)[:2] == [ADOPTED, first]
    finally:
        event.remove(Engine, "before_cursor_execute", place_before_the_drop)
    assert holds.find_hold(database, placing[0].result()).keeps is None
    kinds = "SELECT array_agg(event_type ORDER BY id) FROM audit_events WHERE event_type LIKE 'audit.%'"
    assert execute(database_url, kinds)[1:3] == ["audit.retention.drop", "audit.hold.place"]


def test_a_drop_waits_for_a_reader_without_making_others_wait(database: Database, database_url: URL) -> None:
    """Cut off while it waits, it is finished by the next call; meanwhile new queries and writes go on."""
    first, second, _ = fill_log(database)
    drop_adopted = partitions_of(database_url)[0].upper_bound + YEAR
    assert list(apply_retention(database, YEAR, drop_adopted)) == [ADOPTED]
    now = long_after(database)
    waiting = "SELECT pid FROM pg_stat_activity WHERE query LIKE '%CONCURRENTLY' AND wait_event_type = 'Lock'"
    engine = create_engine(database_url, poolclass=NullPool)
    with ThreadPoolExecutor(1) as pool, engine.begin() as reader:
        reader.execute(text("SELECT count(*) FROM audit_events"))
        dropping = pool.submit(lambda: list(apply_retention(database, YEAR, now)))
        eventually(lambda: execute(database_url, waiting) is not None)
        append_events(database, LOGIN)
        assert execute(database_url, "SELECT min(id) FROM audit_events") == 41
        assert reader.scalar(text("SELECT min(id) FROM audit_events")) == 41  # read committed: a new query
        execute(database_url, f"SELECT pg_terminate_backend(({waiting}))")
        assert isinstance(dropping.exception(), DatabaseUnavailable)
    assert [each.is_detaching for each in partitions_of(database_url)[:2]] == [True, False]
    assert list(apply_retention(database, YEAR, now)) == [first, second]


def test_what_an_operator_detached_is_left_alone(database: Database, database_url: URL) -> None:
    fill_log(database)
    execute(database_url, f"ALTER TABLE audit_events DETACH PARTITION {ADOPTED}")
    assert ADOPTED not in drop_expired(database)
    assert execute(database_url, f"SELECT count(*) FROM {ADOPTED}") == 0


def test_one_replica_drops_at_a_time(database: Database, database_url: URL) -> None:
    fill_log(database)
    with database.exclusive_session(UPKEEP_LOCK):
        assert drop_expired(database) == []
    assert len(drop_expired(database)) == 3


def test_writes_and_reads_go_on_while_partitions_are_dropped(database: Database, database_url: URL) -> None:
    fill_log(database)
    done = threading.Event()

    def use(call: Any) -> set[int]:
        codes = set()
        while not done.is_set():
            codes.add(call().status_code)
        return codes

    now = long_after(database)
    with running_app(settings_for(database_url)) as client, ThreadPoolExecutor(4) as pool:
        eventually(lambda: "audit_partitions 5.0" in client.get("/metrics").text)  # housekeeping is through
        users = [pool.submit(use, lambda: client.post("/events/batch", json=[LOGIN] * 100)) for _ in range(2)]
        users += [pool.submit(use, lambda: client.get("/events", params={"actor": "alice"})) for _ in range(2)]
        try:
            assert len(list(apply_retention(database, YEAR, now))) == 3
        finally:
            done.set()
        assert [each.result() for each in users] == [{201}, {201}, {200}, {200}]


def test_a_dropped_event_is_not_found_and_its_key_makes_no_second_one(database_url: URL, database: Database) -> None:
    keyed = {**LOGIN, "timestamp": "2024-01-01T00:00:00Z", "idempotency_key": "k"}
    fill_months(database, [keyed], [LOGIN] * 300, [LOGIN])
    list(seal_finished_months(database))
    assert len(drop_expired(database)) == 2
    with running_app(settings_for(database_url)) as client:
        assert client.get("/events/1").status_code == 404
        again = client.post("/events", json=keyed)
        assert (again.status_code, again.json()["type"]) == (404, "urn:audit:problem:event-not-found")
        assert (
            client.get("/events", params={"start": "2024-01-01T00:00:00Z", "end": "2024-01-02T00:00:00Z"}).json()[
                "events"
            ]
            == []
        )


def test_housekeeping_applies_the_setting_and_counts(database: Database, database_url: URL) -> None:
    fill_log(database)
    metrics = Metrics()
    place(database, actor="nobody")
    assert do_round(database, settings_for(database_url, retention=YEAR), metrics, long_after)

    def value(name: str) -> float | None:
        return metrics.registry.get_sample_value(name)

    assert value("audit_partitions_dropped_total") == 3
    assert value("audit_legal_holds") == 1
    assert value("audit_first_event_id") == 81
    assert value("audit_partitions") == len(names(database))
    recorded_at = execute(database_url, "SELECT extract(epoch FROM recorded_at) FROM audit_events WHERE id = 81")
    assert value("audit_first_event_recorded_seconds") == pytest.approx(float(recorded_at))


@pytest.mark.parametrize("ahead", [3 * YEAR, -3 * YEAR], ids=["ahead", "behind"])
def test_of_the_hosts_clock_and_the_databases_the_earlier_one_decides(
    database: Database, monkeypatch: pytest.MonkeyPatch, ahead: timedelta
) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "Clock":
            return cls.fromtimestamp((datetime.now(tz) + ahead).timestamp(), tz)

    fill_log(database)
    kept = names(database)
    monkeypatch.setattr(rounds, "datetime", Clock)
    assert do_round(database, settings_for(database.url, retention=YEAR), Metrics())
    assert names(database) == kept
    now = datetime.now(UTC) + min(ahead, timedelta(0))
    assert abs(rounds.earlier_now(database) - now) < timedelta(minutes=1)


def test_a_job_that_fails_keeps_no_other_from_being_done(database: Database, database_url: URL) -> None:
    fill_log(database)
    execute(database_url, "ALTER TABLE audit_events_adopted DROP CONSTRAINT audit_events_month_is_over")
    metrics = Metrics()
    with create_engine(database_url, poolclass=NullPool).begin() as reader:
        reader.execute(text("SELECT count(*) FROM audit_events"))
        assert not do_round(database, settings_for(database_url), metrics, long_after)
    assert metrics.registry.get_sample_value("audit_partitions") == 5
    assert do_round(database, settings_for(database_url), metrics, long_after)


def test_the_record_of_a_drop_is_not_redacted(database: Database) -> None:
    """It names nobody, and the verifier knows by it that the events were not taken away."""
    fill_log(database)
    drop_expired(database)
    find = "SELECT id FROM audit_events WHERE event_type = 'audit.retention.drop' LIMIT 1"
    wanted = RedactionIn(ids=[int(str(execute(database.url, find)))], reason="Request 1")
    with pytest.raises(InvalidFields) as refused:
        redaction.measure(database, wanted, "root")
    assert [error["location"] for error in refused.value.errors] == ["body.ids"]
