"""The schema's history: from the table before Alembic to head and back, without losing a row."""

import hashlib
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import execute
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool
from verify import tree_hash

import migrations
from alembic import command

BARE_TABLE = """
    CREATE TABLE audit_events (
        id serial PRIMARY KEY, event_type varchar(255), actor varchar(255), timestamp timestamp
    )
"""
ROWS = 200_000
# Gaps in the ids, odd Unicode, empty and long strings, three years of timestamps, microseconds.
BARE_ROWS = f"""
    INSERT INTO audit_events (id, event_type, actor, timestamp)
    SELECT n * 3 + n % 2,
           (ARRAY['LOGIN', '', 'ünïcødé 🦊', E'tab\\tnew\\nline\\\\', 'e\u0301', repeat('x', 255)])[n % 6 + 1],
           'actor-' || n % 977,
           timestamp '2023-01-01 00:00:00.000001' + n * interval '7 minutes 53.123457 seconds'
    FROM generate_series(1, {ROWS}) AS n
"""
NAIVE = "SELECT id, event_type, actor, timestamp FROM audit_events ORDER BY id"
IN_UTC = "SELECT id, event_type, actor, timestamp AT TIME ZONE 'UTC' AS timestamp FROM audit_events ORDER BY id"


@pytest.fixture
def bare_url(empty_database_url: URL) -> URL:
    """A database with the table as it was before Alembic, and one row."""
    execute(empty_database_url, BARE_TABLE)
    execute(empty_database_url, "INSERT INTO audit_events VALUES (7, 'LOGIN', 'alice', '2024-02-29 12:00')")
    return empty_database_url


def empty(url: URL) -> None:
    """Take everything out of the database."""
    execute(url, "DROP SCHEMA public CASCADE")
    execute(url, "CREATE SCHEMA public")


def rows(url: URL, statement: str) -> list[tuple[Any, ...]]:
    with create_engine(url, poolclass=NullPool).connect() as connection:
        return [tuple(row) for row in connection.execute(text(statement))]


def downgrade(url: URL, revision: str) -> None:
    command.downgrade(migrations.alembic_config(url), revision)


def schema(url: URL) -> list[tuple[Any, ...]]:
    """Columns, constraints and indexes of the table and of its first partition, names included."""
    return rows(
        url,
        "SELECT attrelid::regclass::text, attname::text, format_type(atttypid, atttypmod), attnotnull"
        " FROM pg_attribute WHERE attrelid IN ('audit_events'::regclass, 'audit_events_adopted'::regclass)"
        " AND attnum > 0 AND NOT attisdropped"
        " UNION ALL SELECT conrelid::regclass::text, conname::text, pg_get_constraintdef(oid), convalidated"
        " FROM pg_constraint WHERE conrelid IN ('audit_events'::regclass, 'audit_events_adopted'::regclass)"
        " AND contype <> 'n'"
        " UNION ALL SELECT indrelid::regclass::text, indexrelid::regclass::text, pg_get_indexdef(indexrelid),"
        " indisvalid FROM pg_index"
        " WHERE indrelid IN ('audit_events'::regclass, 'audit_events_adopted'::regclass) ORDER BY 1, 2, 3",
    )


def test_200_000_rows_reach_head_unchanged_and_come_back(empty_database_url: URL) -> None:
    url = empty_database_url
    execute(url, BARE_TABLE)
    execute(url, BARE_ROWS)
    before = rows(url, NAIVE)
    assert len(before) == ROWS

    migrations.upgrade(url)
    assert rows(url, IN_UTC) == before
    assert rows(url, "SELECT count(DISTINCT recorded_at), bool_and(recorded_at <= now()) FROM audit_events") == [
        (1, True)
    ]
    assert rows(url, "SELECT count(*) FROM audit_events_adopted") == [(ROWS,)]

    downgrade(url, "0001")
    assert rows(url, NAIVE) == before
    migrations.upgrade(url)
    assert rows(url, IN_UTC) == before


def test_an_empty_database_and_an_adopted_table_end_at_the_same_schema(empty_database_url: URL, bare_url: URL) -> None:
    adopted = bare_url
    migrations.upgrade(adopted)
    adopted_schema = schema(adopted)
    empty(adopted)
    migrations.upgrade(adopted)
    assert schema(adopted) == adopted_schema


def test_models_mirror_the_newest_migration(database_url: URL) -> None:
    command.check(migrations.alembic_config(database_url))


def test_a_drift_between_models_and_head_is_found(database_url: URL) -> None:
    execute(database_url, "ALTER TABLE audit_events ADD COLUMN extra text")
    with pytest.raises(Exception, match="New upgrade operations detected"):
        command.check(migrations.alembic_config(database_url))


def test_the_new_months_exist_and_follow_the_adopted_rows_without_a_gap(bare_url: URL) -> None:
    migrations.upgrade(bare_url)
    bounds = [
        re.findall(r"MINVALUE|'[^']+'", bound)
        for (bound,) in rows(
            bare_url,
            "SELECT pg_get_expr(relpartbound, oid) FROM pg_class WHERE oid IN (SELECT inhrelid FROM pg_inherits"
            " WHERE inhparent = 'audit_events'::regclass) ORDER BY 1 DESC",
        )
    ]
    bounds.sort(key=lambda bound: (bound[0] != "MINVALUE", bound[0]))
    assert [end for _, end in bounds[:-1]] == [start for start, _ in bounds[1:]]
    assert len(bounds) == 5


@pytest.mark.parametrize(
    ("damage", "complaint", "mend"),
    [
        ("UPDATE audit_events SET actor = NULL", "1 rows have no actor", True),
        ("UPDATE audit_events SET event_type = NULL", "1 rows have no event_type", True),
        ("UPDATE audit_events SET timestamp = NULL", "1 rows have no timestamp", True),
        ("UPDATE audit_events SET timestamp = 'infinity'", "1 rows have a timestamp outside", True),
        ("UPDATE audit_events SET timestamp = '0044-03-15 BC'", "1 rows have a timestamp outside", True),
        (
            "ALTER TABLE audit_events DROP CONSTRAINT audit_events_pkey;"
            "INSERT INTO audit_events SELECT * FROM audit_events",
            "2 rows share their id",
            False,
        ),
        (
            "ALTER TABLE audit_events DROP CONSTRAINT audit_events_pkey, ALTER COLUMN id DROP NOT NULL;"
            "INSERT INTO audit_events VALUES (NULL, 'LOGIN', 'bob', '2024-01-01')",
            "1 rows have no id",
            True,
        ),
    ],
)
def test_rows_that_cannot_be_carried_stop_the_migration_before_it_changes_anything(
    bare_url: URL, damage: str, complaint: str, mend: bool
) -> None:
    for statement in damage.split(";"):
        execute(bare_url, statement)
    before = rows(bare_url, NAIVE.replace("timestamp FROM", "timestamp::text FROM"))
    with pytest.raises(RuntimeError, match=complaint) as stopped:
        migrations.upgrade(bare_url)
    assert rows(bare_url, NAIVE.replace("timestamp FROM", "timestamp::text FROM")) == before
    columns = "SELECT count(*) FROM information_schema.columns WHERE table_name = 'audit_events'"
    assert rows(bare_url, columns) == [(4,)]
    if mend:  # the statement in the message is one that works
        execute(bare_url, str(stopped.value).partition("with: ")[2])
        migrations.upgrade(bare_url)


def test_a_table_of_another_shape_is_refused(empty_database_url: URL) -> None:
    execute(empty_database_url, "CREATE TABLE audit_events (id uuid, event_type text, actor text, note text)")
    with pytest.raises(RuntimeError, match=r"id is uuid.*timestamp is missing.*note is unknown"):
        migrations.upgrade(empty_database_url)


def test_timestamps_with_a_time_zone_are_adopted_as_they_are(empty_database_url: URL) -> None:
    execute(
        empty_database_url, "CREATE TABLE audit_events (id bigint, event_type text, actor text, timestamp timestamptz)"
    )
    execute(empty_database_url, "INSERT INTO audit_events VALUES (1, 'LOGIN', 'alice', '2024-01-01 12:00+02')")
    migrations.upgrade(empty_database_url)
    assert rows(empty_database_url, IN_UTC)[0][3].isoformat() == "2024-01-01T10:00:00"


class Interruption(Exception):
    """Stands for whatever ends a migration half-way."""


def statements_of_an_upgrade(url: URL, stop_before: int | None = None, to: str = "head") -> list[str]:
    """Run the upgrade, and note each statement that is not a mere look; stop before the given one."""
    seen: list[str] = []

    def note(_c: Connection, _cursor: Any, statement: str, *_: Any) -> None:
        if re.match(r"\s*(SELECT|SHOW)\b", statement):
            return
        if stop_before is not None and len(seen) == stop_before:
            raise Interruption()
        seen.append(statement.strip())

    event.listen(Engine, "before_cursor_execute", note)
    try:
        command.upgrade(migrations.alembic_config(url), to)
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    return seen


def test_an_upgrade_interrupted_before_any_statement_resumes(bare_url: URL) -> None:
    """Stops before each statement in turn, each time resuming what the stop before left behind."""
    stops = 0
    while True:
        try:
            statements_of_an_upgrade(bare_url, stop_before=stops)
            break
        except Interruption:
            stops += 1
    assert stops > 20
    assert [row[:3] for row in rows(bare_url, IN_UTC)] == [(7, "LOGIN", "alice")]
    command.check(migrations.alembic_config(bare_url))


def test_every_statement_can_be_the_last_before_a_restart(bare_url: URL) -> None:
    """From a fresh table each time: stop before statement n, then run to the end."""
    for n in range(0, len(statements_of_an_upgrade(bare_url)), 3):
        empty(bare_url)
        execute(bare_url, BARE_TABLE)
        execute(bare_url, "INSERT INTO audit_events VALUES (7, 'LOGIN', 'alice', '2024-02-29 12:00')")
        with pytest.raises(Interruption):
            statements_of_an_upgrade(bare_url, stop_before=n)
        migrations.upgrade(bare_url)
        assert [row[:3] for row in rows(bare_url, IN_UTC)] == [(7, "LOGIN", "alice")]


def test_a_half_built_index_is_built_again(bare_url: URL) -> None:
    execute(bare_url, "CREATE INDEX ix_audit_events_actor ON audit_events (actor)")
    execute(bare_url, "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'ix_audit_events_actor'::regclass")
    command.upgrade(migrations.alembic_config(bare_url), "0002")
    assert rows(bare_url, "SELECT indisvalid FROM pg_index WHERE indexrelid = 'ix_audit_events_actor'::regclass") == [
        (True,)
    ]


def test_a_writer_goes_on_while_the_table_is_prepared(bare_url: URL) -> None:
    """An old application, in a time zone of its own, writes between any two steps; its rows are carried too."""
    old_application = create_engine(
        bare_url, isolation_level="AUTOCOMMIT", connect_args={"options": "-c timezone=Asia/Tokyo"}
    )
    written = 0

    def write(_c: Connection, _cursor: Any, statement: str, *_: Any) -> None:
        nonlocal written
        if "-- old application" in statement or swapping:
            return
        if statement.startswith("LOCK TABLE"):
            swapping.append(True)
            return
        written += 1
        with old_application.connect() as connection:
            connection.execute(
                text("INSERT INTO audit_events VALUES (:id, 'WRITE', 'old', '2024-05-05 05:05:05') -- old application"),
                {"id": 100 + written},
            )

    command.upgrade(migrations.alembic_config(bare_url), "0001")
    swapping: list[bool] = []
    event.listen(Engine, "before_cursor_execute", write)
    try:
        migrations.upgrade(bare_url)
    finally:
        event.remove(Engine, "before_cursor_execute", write)
        old_application.dispose()
    assert written > 20
    carried = rows(bare_url, IN_UTC)
    assert [row[0] for row in carried] == [7, *range(101, 101 + written)]
    assert {row[3].isoformat() for row in carried[1:]} == {"2024-05-05T05:05:05"}


def test_a_lock_held_by_somebody_else_fails_the_migration_instead_of_queueing_for_ever(bare_url: URL) -> None:
    command.upgrade(migrations.alembic_config(bare_url), "0002")
    with create_engine(bare_url, poolclass=NullPool).begin() as reader:
        reader.execute(text("SELECT count(*) FROM audit_events"))
        with pytest.raises(DBAPIError, match="lock timeout"):
            migrations.upgrade(bare_url)
    migrations.upgrade(bare_url)


def test_two_replicas_migrate_at_once(bare_url: URL) -> None:
    script = "import sys, migrations, sqlalchemy; migrations.upgrade(sqlalchemy.make_url(sys.argv[1]))"
    url = bare_url.render_as_string(hide_password=False)
    replicas = [
        subprocess.Popen([sys.executable, "-c", script, url], cwd=Path(migrations.__file__).parent) for _ in range(3)
    ]
    assert [replica.wait(60) for replica in replicas] == [0, 0, 0]
    command.check(migrations.alembic_config(bare_url))


def test_a_downgrade_keeps_what_the_older_table_cannot_hold(database_url: URL) -> None:
    execute(
        database_url,
        "INSERT INTO audit_events (id, event_type, actor, timestamp, recorded_at, tenant)"
        " VALUES (1, 'LOGIN', 'alice', now(), now(), 'acme'), (2, 'LOGIN', 'bob', now(), now(), NULL)",
    )
    downgrade(database_url, "0002")
    assert rows(database_url, "SELECT id, actor FROM audit_events ORDER BY id") == [(1, "alice"), (2, "bob")]
    assert rows(database_url, "SELECT id, tenant FROM audit_events_0003_columns") == [(1, "acme")]
    execute(database_url, "INSERT INTO audit_events (event_type, actor, timestamp) VALUES ('LOGIN', 'eve', now())")
    assert rows(database_url, "SELECT max(id) FROM audit_events") == [(3,)]
    migrations.upgrade(database_url)
    downgrade(database_url, "base")
    assert rows(database_url, "SELECT count(*) FROM audit_events") == [(3,)]


def test_missing_revisions_are_listed_oldest_first(bare_url: URL, database_url: URL) -> None:
    def missing(url: URL) -> list[str]:
        with create_engine(url, poolclass=NullPool).connect() as connection:
            return migrations.missing_revisions(connection)

    assert missing(bare_url)[:2] == ["0001", "0002"]
    command.upgrade(migrations.alembic_config(bare_url), "0002")
    assert missing(bare_url)[0] == "0003"
    assert missing(database_url) == []
    execute(database_url, "UPDATE alembic_version SET version_num = '9999'")
    assert missing(database_url) == [], "a newer release migrated this database; older replicas go on"


def test_tiles_from_before_0005_get_their_roots(empty_database_url: URL) -> None:
    url = empty_database_url
    command.upgrade(migrations.alembic_config(url), "0004")
    hashes = [hashlib.sha256(b"%d" % n).digest() for n in range(256)]
    execute(url, f"INSERT INTO ledger_tiles VALUES (0, 0, '\\x{b''.join(hashes).hex()}')")
    migrations.upgrade(url)
    assert bytes(execute(url, "SELECT root FROM ledger_tiles")) == tree_hash(hashes)
    downgrade(url, "0004")
    assert rows(url, "SELECT level, tile_index FROM ledger_tiles") == [(0, 0)]


# squawk's rules that a revision breaks knowingly; one that is not listed breaks none.
SQUAWK_EXCEPTIONS = {
    # The table as history has it; 0003 mends its types.
    "0001": "prefer-bigint-over-int,prefer-identity,prefer-text-field,prefer-timestamp-tz",
    # varchar to text changes the catalog only. The swap drops, renames and indexes within one transaction
    # what the steps before it prepared; the indexes it creates are on a table that is empty and unseen.
    "0003": "changing-column-type,ban-drop-column,ban-drop-constraint,ban-drop-default,ban-drop-function,"
    "renaming-column,renaming-table,require-concurrent-index-creation,require-concurrent-index-deletion",
    # A tile's level is 7 at most. The index is on a table made in the same transaction.
    "0004": "prefer-bigint-over-smallint,require-concurrent-index-creation",
    # The index is on the partitioned table alone, which has no rows; those of its partitions are built concurrently.
    "0008": "require-concurrent-index-creation",
    # One row for 256 events.
    "0005": "adding-not-nullable-field,constraint-missing-not-valid",
    # Only append_events() reads the column, and learns of it in the same transaction.
    "0007": "ban-drop-not-null",
}
# squawk cannot see Alembic's transactions; the tests above resume after each statement instead.
SQUAWK_OFF = "prefer-robust-stmts"


@pytest.mark.parametrize("adopting", [False, True])
def test_squawk_finds_nothing_in_the_sql_that_runs(empty_database_url: URL, tmp_path: Path, adopting: bool) -> None:
    """Whatever reaches PostgreSQL is linted, not what a dry run would print."""
    url = empty_database_url
    if adopting:
        execute(url, BARE_TABLE)
        execute(url, "INSERT INTO audit_events VALUES (7, 'LOGIN', 'alice', '2024-02-29 12:00')")
    execute(url, "CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY)")  # Alembic's, not ours
    with create_engine(url, poolclass=NullPool).connect() as connection:
        revisions = migrations.missing_revisions(connection)
    for revision in revisions:
        statements = [re.sub(r"%\(\w+\)s", "NULL", sql) for sql in statements_of_an_upgrade(url, to=revision)]
        file = tmp_path / f"{revision}.sql"
        file.write_text(";\n".join(["SET lock_timeout = '5s'", "SET statement_timeout = '1h'", *statements, ""]))
        excluded = ",".join(filter(None, [SQUAWK_OFF, SQUAWK_EXCEPTIONS.get(revision)]))
        squawk = Path(sys.executable).with_name("squawk")
        arguments = ["--pg-version=15.0", "--reporter=gcc", f"--exclude={excluded}", str(file)]
        result = subprocess.run([squawk, *arguments], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout


def test_a_long_wait_for_the_migration_lock_is_a_wait(bare_url: URL) -> None:
    with create_engine(bare_url, poolclass=NullPool).connect() as other:
        migrations.take_migration_lock(other)
        replica = threading.Thread(target=migrations.upgrade, args=(bare_url,))
        replica.start()
        replica.join(1)
        assert replica.is_alive()
        with create_engine(bare_url, poolclass=NullPool).connect() as connection:
            assert migrations.missing_revisions(connection)[0] == "0001"
    replica.join(30)
    assert not replica.is_alive()
