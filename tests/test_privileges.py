"""The two database roles: the service appends and reads under one that can change nothing, and everything works."""

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg2
import pytest
from conftest import Server, execute, running_app, settings_for
from months import partitions_of
from sqlalchemy import create_engine
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool
from verify import assert_ledger_consistent

import migrations
from cluster import Cluster
from config import ROOT, ConfigurationError, load_settings
from db import Database
from housekeeping.privileges import OWNERS_OWN, SERVICE_PRIVILEGES, RoleMissing, grant_privileges
from housekeeping.rounds import do_round
from ingest.writer import _END_BACKEND
from models import metadata
from telemetry import Metrics

LOGIN = {"event_type": "LOGIN", "actor": "alice"}
ROLE = f"audit_test_service_{os.getpid()}"


@pytest.fixture(scope="module")
def service_role(server: Server) -> Iterator[tuple[str, str]]:
    """Name and password of a login role that owns nothing."""
    password = secrets.token_hex(16)
    execute(server.admin_url, f"CREATE ROLE {ROLE} LOGIN PASSWORD '{password}'")
    yield ROLE, password
    execute(server.admin_url, f"DROP ROLE {ROLE}")


@pytest.fixture
def service_url(service_role: tuple[str, str], database_url: URL) -> URL:
    """The migrated database, under the service's role."""
    role, password = service_role
    migrations.upgrade(database_url, role)
    return database_url.set(username=role, password=password)


def serving(service_url: URL, owner_url: URL | None, **changes: Any) -> Any:
    return running_app(settings_for(service_url, database_owner_url=owner_url, **changes))


@contextmanager
def connected(url: URL) -> Iterator[Any]:
    connection = psycopg2.connect(url.set(drivername="postgresql").render_as_string(hide_password=False))
    connection.autocommit = True
    try:
        yield connection.cursor()
    finally:
        connection.close()


def refused(url: URL, statement: str) -> bool:
    with connected(url) as cursor:
        try:
            cursor.execute(statement)
        except psycopg2.errors.InsufficientPrivilege:
            return True
    return False


def test_events_cannot_be_changed_or_taken_away(service_url: URL, database_url: URL) -> None:
    with serving(service_url, database_url) as client:
        client.post("/events", json=LOGIN)
    tables = ["audit_events", *(partition.name for partition in partitions_of(database_url))]
    assert len(tables) == 6
    for table in tables:
        for statement in (
            f"UPDATE {table} SET actor = 'eve'",
            f"UPDATE {table} SET redacted_at = now() WHERE id = 1",
            f"DELETE FROM {table}",
            f"TRUNCATE {table}",
            f"DROP TABLE {table}",
            f"ALTER TABLE {table} DISABLE TRIGGER ALL",
            f"SELECT FROM {table} FOR UPDATE",
        ):
            assert refused(service_url, statement), statement
    for partition in tables[1:]:
        assert refused(service_url, f"SELECT FROM {partition}")
        assert refused(service_url, f"INSERT INTO {partition} SELECT FROM audit_events")
    assert assert_ledger_consistent(database_url) == 1


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE ledger_head SET first_id = 5",
        "DELETE FROM ledger_head",
        "INSERT INTO ledger_head SELECT * FROM ledger_head",
        "UPDATE ledger_tiles SET hashes = ''",
        "DELETE FROM ledger_tiles",
        "TRUNCATE ledger_tiles",
        "UPDATE idempotency_keys SET event_id = 1",
        "DELETE FROM idempotency_keys",
        "DELETE FROM legal_holds",
        "UPDATE legal_holds SET actor = 'eve'",
        "SELECT FROM rewrites_due",
        "UPDATE alembic_version SET version_num = '0001'",
        "CREATE TABLE mine (id integer)",
        "ALTER TABLE audit_events OWNER TO CURRENT_USER",
        "CREATE OR REPLACE FUNCTION audit_moment(moment timestamptz) RETURNS text LANGUAGE sql AS $$ SELECT '' $$",
    ],
)
def test_nor_can_the_rest_but_for_what_a_flush_needs(service_url: URL, statement: str) -> None:
    assert refused(service_url, statement)


def test_the_service_works_under_it(service_url: URL, database_url: URL) -> None:
    with serving(service_url, database_url, audit_reads=True) as client:
        assert client.get("/ready").status_code == 200
        assert client.post("/events/batch", json=[LOGIN] * 600).status_code == 201
        keyed = {**LOGIN, "idempotency_key": "k"}
        assert [client.post("/events", json=keyed).status_code for _ in range(2)] == [201, 200]
        assert len(client.get("/events", params={"actor": "alice", "metadata": "{}"}).json()["events"]) == 0
        assert client.get("/events/1").status_code == 200
        assert client.get("/events/count").json()["count"] >= 601
        assert client.get("/events/top", params={"field": "actor"}).status_code == 200
        assert '"complete":true' in client.get("/events/export").text
        hold = client.post("/legal-holds", json={"tenant": "acme", "reason": "Case 1"})
        assert hold.status_code == 201
        assert client.delete(hold.headers["Location"]).json()["released_by"] == "root"
        wanted = {"actor": "alice", "reason": "Request 1", "dry_run": False}
        assert client.post("/redactions", json=wanted).json()["count"] > 600
    assert_ledger_consistent(database_url)


def test_the_owner_keeps_house(service_url: URL, database_url: URL) -> None:
    for url, succeeds in ((database_url, True), (service_url, False)):
        database = Database(url)
        last = partitions_of(database_url)[-1]
        execute(database_url, f"DROP TABLE {last.name}")
        assert do_round(database, settings_for(url), Metrics()) == succeeds
        database.close()


def test_a_month_that_a_flush_lacks_is_made_by_the_owner(service_url: URL, database_url: URL) -> None:
    with serving(service_url, database_url) as client:
        assert client.get("/ready").status_code == 200
        months = [partition.name for partition in partitions_of(database_url)[1:]]
        execute(database_url, f"DROP TABLE {', '.join(months)}")
        assert client.post("/events", json=LOGIN).status_code == 201
    (made,) = [partition for partition in partitions_of(database_url) if partition.name == months[0]]
    assert refused(service_url, f"DELETE FROM {made.name}")
    assert_ledger_consistent(database_url)


def test_without_the_owner_what_needs_it_is_refused_and_says_so(service_url: URL, database_url: URL) -> None:
    with serving(service_url, None) as client:
        assert client.post("/events", json=LOGIN).status_code == 201
        answer = client.post("/redactions", json={"actor": "alice", "reason": "Request 1", "dry_run": False})
        assert answer.status_code == 503
        assert "DATABASE_OWNER_URL" in answer.json()["detail"]
    assert_ledger_consistent(database_url)


def test_its_own_lost_sessions_can_be_ended(service_url: URL) -> None:
    with connected(service_url) as lost, connected(service_url) as cursor:
        lost.execute("SELECT pid, backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid()")
        cursor.execute(_END_BACKEND, (5_000, *lost.fetchone()))
        assert cursor.fetchone() == (True,)


def test_privileges_are_set_anew_and_extra_ones_taken_away(service_url: URL, database_url: URL) -> None:
    partition = partitions_of(database_url)[1].name
    execute(database_url, f"GRANT ALL ON audit_events, rewrites_due, {partition} TO {ROLE}")
    assert not refused(service_url, "DELETE FROM audit_events")
    migrations.upgrade(database_url, ROLE)
    for table in ("audit_events", "rewrites_due", partition):
        assert refused(service_url, f"DELETE FROM {table}")
    with serving(service_url, database_url) as client:
        assert client.post("/events", json=LOGIN).status_code == 201


def test_migrations_run_by_the_service_itself_are_the_owners(
    service_role: tuple[str, str], empty_database_url: URL
) -> None:
    role, password = service_role
    service_url = empty_database_url.set(username=role, password=password)
    with serving(service_url, empty_database_url, run_migrations=True) as client:
        assert client.post("/events", json=LOGIN).status_code == 201
    assert refused(service_url, "DELETE FROM audit_events")


def test_every_table_is_either_granted_or_the_owners_own() -> None:
    assert {*SERVICE_PRIVILEGES, *OWNERS_OWN} == {*metadata.tables, "alembic_version"}


def test_a_role_that_is_missing_stops_the_command_with_the_statement_that_makes_it(database_url: URL) -> None:
    environment = {
        **os.environ,
        "DATABASE_OWNER_URL": database_url.render_as_string(hide_password=False),
        "DATABASE_URL": database_url.set(username="no such role").render_as_string(hide_password=False),
    }
    command = [sys.executable, "-m", "alembic", "upgrade", "head"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert 'CREATE ROLE "no such role" LOGIN' in result.stderr
    assert "Traceback" not in result.stderr


def test_an_owner_who_may_make_no_role_is_told_what_to_have_a_superuser_run(
    service_role: tuple[str, str], server: Server, empty_database_url: URL
) -> None:
    owner, password = f"audit_test_owner_{os.getpid()}", secrets.token_hex(16)
    execute(server.admin_url, f"CREATE ROLE {owner} LOGIN PASSWORD '{password}'")
    execute(server.admin_url, f"ALTER DATABASE {empty_database_url.database} OWNER TO {owner}")
    execute(server.admin_url, f"REVOKE audit_tenant_reader FROM {service_role[0]}")  # of another test
    owner_url = empty_database_url.set(username=owner, password=password)
    try:
        with pytest.raises(RuntimeError, match=f"GRANT audit_tenant_reader TO {owner};"):
            migrations.upgrade(owner_url, service_role[0])
        execute(server.admin_url, f"GRANT audit_tenant_reader TO {owner}")
        with pytest.raises(SystemExit, match=f'superuser run: GRANT audit_tenant_reader TO "{service_role[0]}";'):
            migrations.upgrade(owner_url, service_role[0])
        execute(server.admin_url, f"GRANT audit_tenant_reader TO {service_role[0]}")
        migrations.upgrade(owner_url, service_role[0])
    finally:
        execute(server.admin_url, f"REVOKE audit_tenant_reader FROM {service_role[0]}")
        execute(empty_database_url, f"REASSIGN OWNED BY {owner} TO CURRENT_USER")
        execute(empty_database_url, f"DROP OWNED BY {owner}, {service_role[0]}")
        execute(server.admin_url, f"DROP ROLE {owner}")


def test_a_superuser_is_warned_of(database_url: URL, server: Server) -> None:
    name = f"{ROLE}_super"
    execute(server.admin_url, f"CREATE ROLE {name} SUPERUSER")
    try:
        with create_engine(database_url, poolclass=NullPool).connect() as connection:
            assert grant_privileges(connection, name) == f'The role "{name}" is a superuser, whom no privilege holds.'
            with pytest.raises(RoleMissing):
                grant_privileges(connection, "nobody")
    finally:
        execute(server.admin_url, f"DROP ROLE {name}")


def test_the_script_of_compose_makes_the_role_and_may_be_run_again(own_cluster: Cluster) -> None:
    psql = shutil.which("psql") or str(own_cluster.binaries / "psql")
    own_cluster.create_database("audit")
    url = own_cluster.url("audit")

    def run(**variables: str) -> str:
        environment = {**os.environ, "PGHOST": str(url.query["host"]), "PGUSER": str(url.username)}
        result = subprocess.run(
            [psql, "--quiet", "--no-psqlrc", "--dbname=audit", "--file=deploy/roles.sql"],
            cwd=ROOT,
            env={**environment, **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return str(result.stderr)

    role = 'audit "service"'
    for password in ("it's one", "another"):
        assert run(DB_USER=role, DB_PASSWORD=password) == ""
        migrations.upgrade(url, role)
    attributes = "SELECT (rolsuper, rolcreaterole, rolcreatedb, rolcanlogin)::text FROM pg_roles WHERE rolname = '{}'"
    assert execute(url, attributes.format(role)) == "(f,f,f,t)"
    service_url = url.set(username=role, password="another")
    assert refused(service_url, "TRUNCATE audit_events")
    with serving(service_url, url) as client:
        assert client.post("/events", json=LOGIN).status_code == 201
    assert "one" in run(DB_USER=str(url.username), DB_PASSWORD="x")
    assert execute(url, attributes.format(url.username)) == "(t,t,t,t)"


def test_compose_gives_each_service_its_role() -> None:
    compose = (ROOT / "docker-compose.yml").read_text()
    assert "POSTGRES_USER: ${DB_OWNER_USER" in compose
    assert "./deploy/roles.sql:/roles.sql:ro" in compose
    example = load_settings({"DB_HOST": "audit-postgres"}, ROOT / ".env.example")
    assert example.database_url is not None and example.database_owner_url is not None
    assert (example.database_url.username, example.database_owner_url.username) == ("audit_service", "audit")
    assert example.database_url.database == example.database_owner_url.database == "audit"


def test_the_owners_url_comes_whole_or_in_parts() -> None:
    parts = {"DB_HOST": "h", "DB_USER": "s", "DB_OWNER_USER": "o", "DB_OWNER_PASSWORD": "p"}
    owner = load_settings(parts, None).database_owner_url
    assert owner is not None
    assert owner.render_as_string(hide_password=False) == "postgresql+psycopg2://o:p@h:5432/audit"
    whole = load_settings({**parts, "DATABASE_OWNER_URL": "postgresql://x@y/z"}, None).database_owner_url
    assert whole is not None and whole.username == "x"
    assert load_settings({"DB_HOST": "h"}, None).database_owner_url is None
    with pytest.raises(ConfigurationError, match=r"^DATABASE_OWNER_URL: "):
        load_settings({"DATABASE_OWNER_URL": "postgresql://x@y/z"}, None)
    with pytest.raises(ConfigurationError, match=r"^DB_OWNER_PASSWORD: "):
        load_settings({**parts, "DB_OWNER_PASSWORD": "change-me-as-well"}, None)
