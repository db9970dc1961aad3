"""`ledger adopt`: the rows from before the ledger get an event that vouches for them."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import execute, run_cli, running_app, settings_for
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import create_engine, text
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool
from verify import assert_ledger_consistent, leaf_of, tree_hash

import migrations
from db import Database
from housekeeping import adoption, redaction
from schemas import RedactionIn

COUNT = 700
OLD_TABLE = """
    CREATE TABLE audit_events (
        id serial PRIMARY KEY, event_type varchar NOT NULL, actor varchar NOT NULL, timestamp timestamp NOT NULL
    )
"""
# Every third id is missing; texts that JSON escapes, and a timestamp of the year 1.
OLD_ROWS = f"""
    INSERT INTO audit_events SELECT n + n / 2, E'old "\\n\\u00e9' || n, 'user-' || n % 7,
        timestamp '0001-01-02 03:04:05.5' + n * interval '1 year' FROM generate_series(1, {COUNT}) AS n
"""


@pytest.fixture
def database(empty_database_url: URL) -> Iterator[Database]:
    """A log with rows from before the ledger."""
    execute(empty_database_url, OLD_TABLE)
    execute(empty_database_url, OLD_ROWS)
    migrations.upgrade(empty_database_url)
    database = Database(empty_database_url)
    yield database
    database.close()
    assert_ledger_consistent(empty_database_url)


def adopt(database: Database) -> adoption.Adoption:
    pages: list[int] = []
    adopted = adoption.adopt(database, pages.append)
    assert adopted is not None
    assert sum(pages) == adopted.count
    return adopted


def difference(database: Database) -> str | None:
    with database.transaction() as connection:
        recorded = adoption.find_adoption(connection)
    assert recorded is not None
    return adoption.check(database, recorded, lambda _: None)


def old_rows(url: URL) -> list[dict[str, Any]]:
    statement = "SELECT * FROM audit_events WHERE id < (SELECT first_id FROM ledger_head) ORDER BY id"
    with create_engine(url, poolclass=NullPool).connect() as connection:
        return [dict(row) for row in connection.execute(text(statement)).mappings()]


def test_the_root_is_that_of_the_rows_entries(database: Database) -> None:
    before = old_rows(database.url)
    adopted = adopt(database)
    after = old_rows(database.url)
    assert (adopted.count, adopted.root) == (COUNT, tree_hash([leaf_of(row) for row in after]))
    made = ("nonce", "personal_hash")
    assert [{**row, **dict.fromkeys(made)} for row in after] == before
    stored = "SELECT string_agg(audit_leaf(audit_events), '' ORDER BY id) FROM audit_events WHERE id < {}"
    first_id = execute(database.url, "SELECT first_id FROM ledger_head")
    assert bytes(execute(database.url, stored.format(first_id))) == b"".join(map(adoption.hash_row, after))
    assert adopted.event_id == first_id


def test_adopted_again_it_is_checked_and_recorded_once(database: Database) -> None:
    first = adopt(database)
    assert difference(database) is None
    assert adoption.adopt(database, lambda _: None) == first
    assert execute(database.url, "SELECT size FROM ledger_head") == 1


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("UPDATE audit_events SET actor = 'eve' WHERE id = 4", "Row 4 was changed"),
        ("UPDATE audit_events SET resource = 'x' WHERE id = 4", "Row 4 was changed"),
        ("UPDATE audit_events SET event_type = 'x' WHERE id = 4", "their root is"),
        ("UPDATE audit_events SET timestamp = now() WHERE id = 4", "their root is"),
        ("UPDATE audit_events SET personal_hash = sha256('x'), redacted_at = now() WHERE id = 4", "their root is"),
        ("UPDATE audit_events SET personal_hash = NULL WHERE id = 4", "Row 4 was changed"),
        ("UPDATE audit_events SET id = 2 WHERE id = 4", "their root is"),
        ("DELETE FROM audit_events WHERE id = 4", f"{COUNT} rows were adopted, and there are {COUNT - 1}"),
        ("DELETE FROM audit_events_adopted", f"{COUNT} rows were adopted, and there are 0"),
        (
            "INSERT INTO audit_events (id, event_type, actor, timestamp, recorded_at)"
            " SELECT 2, event_type, actor, timestamp, recorded_at FROM audit_events WHERE id = 4",
            "Row 2 was changed",
        ),
    ],
)
def test_a_change_is_noticed(database: Database, statement: str, said: str) -> None:
    adopt(database)
    execute(database.url, statement)
    assert said in str(difference(database))


def forge(event_type: str, metadata: str, event_id: int) -> str:
    return f"""
        INSERT INTO audit_events (id, event_type, actor, timestamp, recorded_at, source, metadata)
        SELECT {event_id}, '{event_type}', 'audit-service', now(), now(), 'audit-service', '{metadata}'
    """


def test_records_that_are_not_in_the_tree_count_for_nothing(database: Database) -> None:
    adopted = adopt(database)
    execute(database.url, forge("audit.ledger.adopt", f'{{"count": 1, "root": "{"00" * 32}"}}', 0))
    assert difference(database) is not None
    status, _, complaints = run_cli(database.url, "verify")
    assert (status, f"{COUNT} rows were adopted, and there are {COUNT + 1}." in complaints) == (1, True)
    with database.transaction() as connection:
        assert adoption.find_adoption(connection) == adopted
    execute(database.url, "DELETE FROM audit_events_adopted; DELETE FROM audit_events WHERE id = 0")
    execute(database.url, forge("audit.retention.drop", '{"last_id": 2000}', 5000))
    assert difference(database) == f"{COUNT} rows were adopted, and there are 0."
    execute(database.url, "DELETE FROM audit_events WHERE id = 5000")


@pytest.mark.parametrize("metadata", ["NULL", "'{}'", '\'{"count": "x", "root": 1}\'', f"'{{\"count\": {COUNT}}}'"])
def test_a_record_without_a_root_is_a_plain_complaint(database: Database, metadata: str) -> None:
    adopted = adopt(database)
    change = f"UPDATE audit_events SET metadata = {{}} WHERE id = {adopted.event_id}"
    execute(database.url, change.format(metadata))
    said = (
        f"Event {adopted.event_id} is to vouch for the rows from before the ledger, and has no count and root of them."
    )
    for command in (["verify"], ["ledger", "adopt"]):
        status, _, complaints = run_cli(database.url, *command)
        assert (status, said in complaints, "Traceback" in complaints) == (1, True, False)
    recorded = f'{{"count": {adopted.count}, "root": "{adopted.root.hex()}"}}'
    execute(database.url, change.format(f"'{recorded}'"))


def test_verify_hashes_the_adopted_rows(database: Database) -> None:
    adopted = adopt(database)
    status, said, complaints = run_cli(database.url, "verify")
    assert (status, said[1]) == (0, f"Event {adopted.event_id} vouches for {COUNT} rows from before the ledger."), (
        complaints
    )
    execute(database.url, "UPDATE audit_events SET event_type = 'x' WHERE id = 4")
    status, _, complaints = run_cli(database.url, "verify")
    assert (status, "Adopted rows were changed: their root is" in complaints) == (1, True)


def test_a_later_record_counts_for_nothing(database: Database) -> None:
    recorded = adopt(database)
    with running_app(settings_for(database.url)) as client:
        forged = {"event_type": "audit.ledger.adopt", "actor": "audit-service", "source": "audit-service"}
        answer = client.post("/events", json={**forged, "metadata": {"count": 0, "root": "00"}})
        assert (answer.status_code, answer.json()["errors"][0]["location"]) == (422, "body.source")
        answer = client.post("/events/batch", json=[{"event_type": "a", "actor": "b"}, forged])
        assert (answer.status_code, answer.json()["errors"][0]["location"]) == (422, "body.1.source")
        refused = client.post("/redactions", json={"ids": [recorded.event_id], "reason": "x"})
        assert (refused.status_code, refused.json()["errors"][0]["location"]) == (422, "body.ids")


def test_adopted_rows_can_be_redacted_before_and_after(database: Database) -> None:
    def redact(actor: str) -> int:
        wanted = RedactionIn(actor=actor, reason="Request 1")
        return sum(redaction.redact(database, wanted, "root", "redactions/1"))

    assert redact("user-1") == COUNT // 7
    adopt(database)
    assert difference(database) is None
    assert redact("user-2") == COUNT // 7
    assert difference(database) is None
    assert (
        execute(database.url, "SELECT count(*) FROM audit_events WHERE redacted_at IS NOT NULL AND nonce IS NOT NULL")
        == 0
    )


def test_interrupted_it_goes_on(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("housekeeping.adoption._PAGE_ROWS", 100)

    def interrupt(after: int) -> Callable[[int], None]:
        def advance(_: int) -> None:
            nonlocal after
            after -= 1
            if after == 0:
                raise KeyboardInterrupt

        return advance

    for pages in (1, 4):
        with pytest.raises(KeyboardInterrupt):
            adoption.adopt(database, interrupt(pages))
    assert execute(database.url, "SELECT count(*) FROM audit_events WHERE personal_hash IS NOT NULL") == 400
    assert adopt(database).count == COUNT
    assert difference(database) is None


@given(st.lists(st.binary(max_size=3), max_size=70))
def test_any_number_of_leaves_has_the_root_of_rfc_6962(leaves: list[bytes]) -> None:
    tree = adoption._Tree()
    for leaf in leaves:
        tree.append(leaf)
    assert tree.root() == tree_hash(leaves)


def test_adoption_from_the_command_line(database: Database) -> None:
    status, (said,), progress = run_cli(database.url, "ledger", "adopt")
    assert (status, said.startswith(f"Event {COUNT * 3 // 2 + 1} vouches for {COUNT} rows, root ")) == (0, True)
    assert "hashing: 100%" in progress
    assert run_cli(database.url, "ledger", "adopt")[:2] == (0, [said])
    execute(database.url, "UPDATE audit_events SET actor = 'eve' WHERE id = 4")
    status, again, complaint = run_cli(database.url, "ledger", "adopt")
    assert (status, again) == (1, [said])
    assert "Row 4 was changed" in complaint


def test_a_log_that_began_with_the_ledger_has_nothing_to_adopt(database_url: URL) -> None:
    status, said, _ = run_cli(database_url, "ledger", "adopt")
    assert (status, said) == (0, ["There is nothing to adopt: no row is older than the ledger."])
    assert assert_ledger_consistent(database_url) == 0
