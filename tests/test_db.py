"""What the service says and does when its database is away, behind, read-only or wrong."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import httpx
import psycopg2
import pytest
from conftest import eventually, execute, free_port, running_app, settings_for
from fastapi import FastAPI
from sqlalchemy import text
from sqlalchemy.engine import URL
from verify import assert_ledger_consistent

import migrations
from alembic import command
from cluster import SUPERUSER, Cluster
from db import CONNECT_ARGS, Database
from ingest import writer
from main import create_app

LOGIN = {"event_type": "LOGIN", "actor": "alice"}


@pytest.fixture
def own_client(database_url: URL) -> Iterator[httpx.Client]:
    """A service on a database of the test's own, for tests that change more than rows."""
    with running_app(settings_for(database_url)) as client:
        yield client


def assert_unavailable(response: httpx.Response, code: str) -> None:
    assert response.status_code == 503, response.text
    assert response.headers["Content-Type"] == "application/problem+json"
    assert response.json()["type"] == f"urn:audit:problem:{code}"
    assert int(response.headers["Retry-After"]) > 0


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_an_outage_is_a_503_and_ends_without_a_restart(own_cluster: Cluster, mode: str) -> None:
    own_cluster.create_database("audit")
    migrations.upgrade(own_cluster.url("audit"))
    with running_app(settings_for(own_cluster.url("audit"))) as client:
        assert client.post("/events", json=LOGIN).status_code == 201
        own_cluster.stop(mode)
        for _ in range(3):
            assert_unavailable(client.post("/events", json=LOGIN), "database-unavailable")
        assert_unavailable(client.get("/events"), "database-unavailable")
        assert_unavailable(client.get("/ready"), "database-unavailable")
        assert client.get("/health").status_code == 200
        own_cluster.start()
        assert client.post("/events", json=LOGIN).json()["id"] == 2
        assert client.get("/ready").status_code == 200


def test_each_end_of_a_connection_notices_within_the_same_time_that_the_other_vanished(own_cluster: Cluster) -> None:
    port = free_port()
    own_cluster.stop()
    own_cluster.options |= {"listen_addresses": "127.0.0.1", "port": str(port)}
    own_cluster.start()
    settings = {
        "tcp_keepalives_idle": CONNECT_ARGS["keepalives_idle"],
        "tcp_keepalives_interval": CONNECT_ARGS["keepalives_interval"],
        "tcp_keepalives_count": CONNECT_ARGS["keepalives_count"],
        "tcp_user_timeout": CONNECT_ARGS["tcp_user_timeout"],
    }
    ask = text("SELECT name, setting::integer FROM pg_settings WHERE name = ANY (:names)")
    over_tcp = URL.create("postgresql+psycopg2", SUPERUSER, host="127.0.0.1", port=port, database=SUPERUSER)
    for url, expected in ((over_tcp, settings), (own_cluster.url().set(port=port), dict.fromkeys(settings, 0))):
        with closing(Database(url)) as database, database.engine.connect() as connection:
            assert {row.name: row.setting for row in connection.execute(ask, {"names": list(settings)})} == expected
    assert "keepalive" not in (own_cluster.data_dir / "server.log").read_text()


def test_a_service_started_during_an_outage_serves_after_it(own_cluster: Cluster) -> None:
    own_cluster.create_database("audit")
    url = own_cluster.url("audit")
    migrations.upgrade(url)
    own_cluster.stop()
    with running_app(settings_for(url)) as client:
        assert_unavailable(client.post("/events", json=LOGIN), "database-unavailable")
        own_cluster.start()
        assert client.post("/events", json=LOGIN).status_code == 201


def test_before_the_migration_every_answer_names_it_and_after_it_no_restart_is_needed(empty_database_url: URL) -> None:
    with running_app(settings_for(empty_database_url)) as client:
        for revision in ("0001", "0002", "0003"):
            for response in (
                client.get("/ready"),
                client.post("/events", json=LOGIN),
                client.get("/events"),
                client.get("/events/1"),
            ):
                assert_unavailable(response, "schema-not-ready")
                assert f"lacks migration {revision}" in response.json()["detail"]
                assert "alembic upgrade head" in response.json()["detail"]
            assert client.get("/health").status_code == 200
            command.upgrade(migrations.alembic_config(empty_database_url), revision)
        migrations.upgrade(empty_database_url)
        assert client.get("/ready").json() == {"status": "ready", "revision": migrations.head()}
        assert client.post("/events", json=LOGIN).status_code == 201


def test_a_downgrade_under_a_running_service_is_noticed(own_client: httpx.Client, database_url: URL) -> None:
    assert own_client.post("/events", json=LOGIN).status_code == 201
    command.downgrade(migrations.alembic_config(database_url), "0002")
    assert_unavailable(own_client.post("/events", json=LOGIN), "schema-not-ready")
    assert_unavailable(own_client.get("/events"), "schema-not-ready")
    migrations.upgrade(database_url)
    assert own_client.post("/events", json=LOGIN).json()["id"] == 2


def test_run_migrations_migrates_at_the_start(empty_database_url: URL) -> None:
    with running_app(settings_for(empty_database_url, run_migrations=True)) as client:
        assert client.post("/events", json=LOGIN).status_code == 201


def test_a_read_only_database_takes_reads_and_refuses_writes(own_client: httpx.Client, database_url: URL) -> None:
    assert own_client.post("/events", json=LOGIN).status_code == 201
    execute(database_url, f"ALTER DATABASE {database_url.database} SET default_transaction_read_only = on")
    execute(
        database_url,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()",
    )
    assert len(own_client.get("/events").json()["events"]) == 1
    assert_unavailable(own_client.post("/events", json=LOGIN), "database-unavailable")
    assert "read-only" in own_client.get("/ready").json()["detail"]


def test_a_connection_lost_during_the_commit_leaves_the_outcome_unknown(
    own_client: httpx.Client, database_url: URL
) -> None:
    execute(
        database_url,
        "CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END $$",
    )
    execute(
        database_url,
        "CREATE CONSTRAINT TRIGGER die AFTER INSERT ON audit_events DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION die()",
    )
    assert_unavailable(own_client.post("/events", json=LOGIN), "outcome-unknown")
    execute(database_url, "DROP TRIGGER die ON audit_events")
    assert own_client.post("/events", json=LOGIN).json()["id"] == 1


def test_a_refused_event_hurts_no_neighbour_where_the_connection_is_lost_too(
    own_cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """carol's insert waits until the server process is killed; sent again, the flush is refused for mallory."""
    monkeypatch.setattr(writer, "_RESOLVE_S", 60)
    own_cluster.create_database("audit")
    url = own_cluster.url("audit")
    migrations.upgrade(url)
    execute(url, "ALTER TABLE audit_events ADD CONSTRAINT no_mallory CHECK (actor <> 'mallory')")
    execute(
        url,
        "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_advisory_xact_lock(7); RETURN NEW; END $$",
    )
    execute(
        url,
        "CREATE TRIGGER wait BEFORE INSERT ON audit_events FOR EACH ROW WHEN (NEW.actor = 'carol')"
        " EXECUTE FUNCTION wait()",
    )
    waiting = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'advisory'"
    actors = ["alice", "bob", "carol", "mallory", "dave", "erin"]
    app = create_app(settings_for(url))
    with running_app(settings_for(url), app) as client, ThreadPoolExecutor(len(actors)) as pool:
        holder, gate = (psycopg2.connect(_dsn(url)) for _ in range(2))
        holder.cursor().execute("SELECT * FROM ledger_head FOR UPDATE")
        gate.cursor().execute("SELECT pg_advisory_lock(7)")
        answers = []
        for number, actor in enumerate(actors):
            answers.append(pool.submit(client.post, "/events", json={**LOGIN, "actor": actor}))
            eventually(lambda number=number: _in_flight(app) == (1, number))  # type: ignore[misc]
        holder.close()
        eventually(lambda: execute(url, waiting) is not None)
        os.kill(execute(url, waiting), signal.SIGKILL)  # and PostgreSQL starts anew
        codes = [answer.result().status_code for answer in answers]
        gate.close()
    assert dict(zip(actors, codes, strict=True)) == {**dict.fromkeys(actors, 201), "mallory": 500}
    assert assert_ledger_consistent(url) == 5


def _dsn(url: URL) -> str:
    return url.set(drivername="postgresql").render_as_string(hide_password=False)


def _in_flight(app: FastAPI) -> tuple[int, int]:
    """How many events are in the flush under way, and how many wait for the next one."""
    waiting = len(app.state.writer._queue)
    return app.state.writer._queued_events - waiting, waiting


def test_an_error_nobody_foresaw_tells_the_caller_nothing(own_client: httpx.Client, database_url: URL) -> None:
    execute(database_url, "ALTER TABLE audit_events ADD CONSTRAINT no_mallory CHECK (actor <> 'mallory')")
    response = own_client.post("/events", json={**LOGIN, "actor": "mallory"})
    assert response.status_code == 500
    assert response.json()["detail"].startswith("Internal error.")
    assert response.json()["request_id"] == response.headers["X-Request-ID"]
    assert "mallory" not in response.text
    assert own_client.post("/events", json=LOGIN).json()["id"] == 1
