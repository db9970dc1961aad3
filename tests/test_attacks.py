"""A superuser changes the log by SQL, in every way one would try; each is found and named (docs/threat-model.md)."""

from collections.abc import Iterator
from typing import Any

import psycopg2
import pytest
from conftest import SIGNER, execute, run_cli, running_app, settings_for
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from months import append_events
from sqlalchemy.engine import URL
from test_verify import leaves_of, plain, promise, verified
from verify import assert_ledger_consistent, tree_hash

from db import Database
from housekeeping.redaction import redact
from ledger.notes import generate_signer, sign_checkpoint
from schemas import RedactionIn
from verifier.differences import ADDED, MISSING, PERSONAL, ROW
from verifier.records import UNRECORDED

COUNT = 900  # three full tiles, and 132 events behind them


@pytest.fixture
def url(database_url: URL) -> Iterator[URL]:
    """A log of COUNT events, appended in three flushes."""
    database = Database(database_url)
    for _ in range(3):
        append_events(database, *plain(COUNT // 3))
    database.close()
    assert_ledger_consistent(database_url)
    yield database_url


def attack(url: URL, *statements: str) -> None:
    """As one transaction of a superuser, who switches triggers and checks off where they are in the way."""
    connection = psycopg2.connect(url.set(drivername="postgresql").render_as_string(hide_password=False))
    with connection, connection.cursor() as cursor:
        cursor.execute("SET session_replication_role = replica")
        for statement in statements:
            cursor.execute(statement)
    connection.close()


def found_one_by_one(url: URL) -> list[str]:
    """With a line for each event that is part of a run."""
    differences = verified(url).differences
    return [f"Event {n}: {each.what}" for each in differences for n in range(each.first_id, each.last_id + 1)]


def found(url: URL, *promises: Any) -> list[str]:
    verdict = verified(url, *promises)
    return [*map(str, verdict.differences), *verdict.complaints]


MOVE_UP = "UPDATE audit_events SET id = -id WHERE id >= {0}; UPDATE audit_events SET id = -id + 1 WHERE id < 0"
COPY_EVENT = """
    INSERT INTO audit_events SELECT {0}, event_type, actor, timestamp, recorded_at, tenant, resource, outcome, source,
        source_ip, trace_id, metadata, nonce, personal_hash, redacted_at FROM audit_events WHERE id = {1}
"""


OWN_EVENT = """
    INSERT INTO audit_events (id, event_type, actor, timestamp, recorded_at, source, metadata)
    VALUES ({0}, '{1}', 'audit-service', {2}, now(), 'audit-service', '{3}')
"""
ERASE = """
    UPDATE audit_events SET actor = '[redacted]', resource = NULL, source_ip = NULL, metadata = NULL, nonce = NULL,
        redacted_at = {0} WHERE id {1}
"""


# What is done to a row, and what is said of it.
CHANGES = [
    ("actor = 'eve'", PERSONAL),
    ("metadata = '{\"n\": 10000}'", PERSONAL),
    ("metadata = NULL", PERSONAL),
    ("resource = ''", PERSONAL),
    ("source_ip = '10.0.0.1'", PERSONAL),
    ("nonce = substr(sha256('x'), 1, 16)", PERSONAL),
    ("nonce = NULL", PERSONAL),
    ("redacted_at = now()", PERSONAL),
    ("nonce = NULL, redacted_at = now(), metadata = NULL", PERSONAL),  # and the actor stays
    ("event_type = 'LOGOUT'", ROW),
    ("timestamp = timestamp + interval '1 microsecond'", ROW),
    ("recorded_at = recorded_at + interval '1 microsecond'", ROW),
    ("tenant = ''", ROW),
    ("outcome = 'denied'", ROW),
    ("source = 'x'", ROW),
    ("trace_id = repeat('0', 32)", ROW),
    ('tenant = \'x","timestamp":"2026\'', ROW),
]


def test_changed_rows_are_named(url: URL) -> None:
    ids = [1, 255, 256, 257, 511, 512, 513, 767, 768, *range(300, 300 + len(CHANGES) - 9)]
    changed = list(zip(ids, CHANGES, strict=True))
    attack(url, *(f"UPDATE audit_events SET {change} WHERE id = {event_id}" for event_id, (change, _) in changed))
    assert set(found_one_by_one(url)) == {f"Event {event_id}: {said}" for event_id, (_, said) in changed}


def test_a_personal_part_with_a_hash_made_to_fit_is_a_changed_row(url: URL) -> None:
    forged = "sha256(nonce || convert_to('{\"actor\":\"eve\"}', 'UTF8'))"
    attack(url, f"UPDATE audit_events SET actor = 'eve', metadata = NULL, personal_hash = {forged} WHERE id = 300")
    assert found(url) == [f"Event 300: {ROW}"]


def test_among_the_newest_events_a_changed_row_is_found_by_the_run_it_lies_in(url: URL) -> None:
    attack(url, "UPDATE audit_events SET event_type = 'LOGOUT' WHERE id = 800")
    (said,) = found(url)
    assert said.startswith("Events 769 to 896: one of them changed")
    attack(url, "UPDATE audit_events SET actor = 'eve' WHERE id = 898")
    assert found(url)[1] == f"Event 898: {PERSONAL}"


@pytest.mark.parametrize("event_id", [1, 256, 300, 800, COUNT])
def test_a_deleted_row_is_missing(url: URL, event_id: int) -> None:
    attack(url, f"DELETE FROM audit_events WHERE id = {event_id}")
    assert found(url) == [f"Event {event_id}: {MISSING}"]


def test_many_deleted_rows_are_one_line(url: URL) -> None:
    attack(url, "DELETE FROM audit_events WHERE id BETWEEN 200 AND 850")
    assert found(url) == [f"Events 200 to 850: {MISSING}"]


def test_the_oldest_rows_are_missing_unless_retention_says_that_it_dropped_them(url: URL) -> None:
    attack(url, "DELETE FROM audit_events WHERE id <= 300")
    assert found(url) == [f"Events 1 to 300: {MISSING}"]


def test_an_emptied_table_is_missing_its_rows(url: URL) -> None:
    attack(url, "TRUNCATE audit_events")
    assert found(url) == [f"Events 1 to {COUNT}: {MISSING}"]


def test_a_row_deleted_and_the_gap_closed_is_told(url: URL) -> None:
    attack(url, "DELETE FROM audit_events WHERE id = 300", MOVE_UP.format(301).replace("+ 1", "- 1"))
    first, *_ = found(url)
    assert first == f"Event 300: {MISSING}: in its place stands what was recorded as event 301"


def test_a_row_inserted_in_the_middle_is_told(url: URL) -> None:
    attack(url, MOVE_UP.format(300), COPY_EVENT.format(300, 17))
    first, *_ = found(url)
    assert first == "Event 300: added: what was recorded as event 300 is now event 301"
    assert f"Event {COUNT + 1}: {ADDED}" in found(url)


def test_a_row_added_behind_the_newest_or_under_a_known_id_is_told(url: URL) -> None:
    attack(url, COPY_EVENT.format(COUNT + 1, 17))
    assert found(url) == [f"Event {COUNT + 1}: {ADDED}"]
    again = COPY_EVENT.format(300, 17).replace("recorded_at,", "now(),")
    attack(url, f"DELETE FROM audit_events WHERE id > {COUNT}", again)
    assert found(url)[0].startswith("Event 300: added: ")


@pytest.mark.parametrize("event_id", [COUNT + 1, 2**63 - 2, 2**63 - 1])
def test_a_row_added_under_the_highest_id_is_told(url: URL, event_id: int) -> None:
    attack(url, COPY_EVENT.format(event_id, 17))
    assert found(url) == [f"Event {event_id}: {ADDED}"]


@pytest.mark.parametrize(("one", "other"), [(100, 101), (17, 700), (256, 257)])
def test_swapped_rows_are_named(url: URL, one: int, other: int) -> None:
    swap = f"UPDATE audit_events SET id = CASE id WHEN -{one} THEN {other} ELSE {one} END WHERE id < 0"
    attack(url, f"UPDATE audit_events SET id = -id WHERE id IN ({one}, {other})", swap)
    assert found(url) == [
        f"Event {one}: order swapped with event {other}",
        f"Event {other}: order swapped with event {one}",
    ]


MOVE = """
    UPDATE audit_events AS event SET id = -moved.new FROM unnest(%(old)s, %(new)s) AS moved (old, new)
    WHERE id = moved.old;
    UPDATE audit_events SET id = -id WHERE id < 0
"""
MOVE_CONTENTS = """
    UPDATE audit_events AS event SET (event_type, actor, timestamp, metadata, nonce, personal_hash)
        = (other.event_type, other.actor, other.timestamp, other.metadata, other.nonce, other.personal_hash)
    FROM audit_events AS other, unnest(%(old)s, %(new)s) AS moved (old, new)
    WHERE event.id = moved.new AND other.id = moved.old
"""


def move(url: URL, statement: str, moves: dict[int, int]) -> None:
    """What is at each key goes to its value."""
    connection = psycopg2.connect(url.set(drivername="postgresql").render_as_string(hide_password=False))
    with connection, connection.cursor() as cursor:
        cursor.execute(statement, {"old": list(moves), "new": list(moves.values())})
    connection.close()


def moved(ids: list[int], order: list[int]) -> dict[int, int]:
    return {old: new for old, new in zip(ids, order, strict=True) if old != new}


@pytest.mark.parametrize("statement", [MOVE, MOVE_CONTENTS])
def test_rows_moved_in_a_circle_are_each_named(url: URL, statement: str) -> None:
    move(url, statement, {100: 101, 101: 400, 400: 100, 500: 501, 501: 500})
    assert found(url) == [
        "Event 100: order changed: in its place stands what was recorded as event 400",
        "Event 101: order changed: in its place stands what was recorded as event 100",
        "Event 400: order changed: in its place stands what was recorded as event 101",
        "Event 500: order swapped with event 501",
        "Event 501: order swapped with event 500",
    ]


def test_no_order_but_the_one_that_was_recorded_passes(url: URL) -> None:
    ids = st.lists(st.integers(1, COUNT), min_size=2, max_size=8, unique=True)
    runs = st.builds(lambda first, count: list(range(first, first + count)), st.integers(1, 700), st.integers(2, 200))
    orders = (ids | runs).flatmap(lambda ids: st.tuples(st.just(ids), st.permutations(ids)))
    turns = st.builds(lambda ids, by: (ids, [*ids[by:], *ids[:by]]), ids | runs, st.integers(1, 3))

    @settings(max_examples=40)
    @given(orders | turns, st.sampled_from([MOVE, MOVE_CONTENTS]))
    def is_found(order: tuple[list[int], list[int]], statement: str) -> None:
        moves = moved(*order)
        assume(moves)
        move(url, statement, moves)
        differences = verified(url).differences
        move(url, statement, {new: old for old, new in moves.items()})
        assert differences != []

    is_found()
    assert found(url) == []


def test_in_each_tile_that_differs_an_event_is_named(url: URL) -> None:
    chain = [f"UPDATE audit_events SET id = {to} WHERE id = {old}" for old, to in ((300, 10), (600, 300), (700, 600))]
    attack(url, "DELETE FROM audit_events WHERE id = 10", *chain)
    assert found(url) == [
        f"Event 10: {MISSING}: in its place stands what was recorded as event 300",
        f"Event 300: {ROW}",
        "Event 600: added: what was recorded as event 600 is now event 300",
        f"Event 700: {MISSING}",
    ]


def test_a_redaction_that_nobody_recorded_is_told(url: URL) -> None:
    erased = "actor = '[redacted]', metadata = NULL, nonce = NULL, redacted_at = now()"
    attack(url, f"UPDATE audit_events SET {erased} WHERE id BETWEEN 5 AND 9")
    assert found(url) == ["Events 5 to 9: 5 of them redacted, and no audit.redaction event says so"]


def test_whatever_is_not_in_the_tree_excuses_nothing(url: URL) -> None:
    attack(url, OWN_EVENT.format(0, "audit.retention.drop", "now()", '{"last_id": 300}'))
    attack(url, OWN_EVENT.format(-1, "audit.redaction", "'2026-01-01'", '{"count": 5}'))
    attack(
        url, "DELETE FROM audit_events WHERE id BETWEEN 1 AND 300", ERASE.format("'2026-01-01'", "BETWEEN 305 AND 309")
    )
    assert found(url) == [
        f"Events -1 to 0: {ADDED}",
        f"Events 1 to 300: {MISSING}",
        f"Events 305 to 309: 5 of them {UNRECORDED}",
    ]


def test_a_record_that_was_changed_excuses_nothing(url: URL) -> None:
    attack(url, "DELETE FROM audit_events WHERE id <= 300")
    attack(
        url,
        """UPDATE audit_events SET event_type = 'audit.retention.drop', source = 'audit-service',
        metadata = '{"last_id": 300}' WHERE id = 400""",
    )
    assert found(url) == [f"Events 1 to 300: {MISSING}", f"Event 400: {PERSONAL}"]


@pytest.fixture
def redactions(url: URL) -> list[str]:
    """Three of four events each, 5 to 8, 15 to 18, 25 to 28, recorded as events 901 to 903; the moment of each."""
    database = Database(url)
    for start in (5, 15, 25):
        list(
            redact(database, RedactionIn(ids=list(range(start, start + 4)), reason="Request 1"), "root", "redactions/1")
        )
    database.close()
    assert found(url) == []
    return [str(execute(url, f"SELECT timestamp FROM audit_events WHERE id = {n}")) for n in (901, 902, 903)]


def test_a_record_that_was_redacted_itself_still_counts(url: URL, redactions: list[str]) -> None:
    database = Database(url)
    for event_id in (901, 904):  # the record, and the record of its redaction
        list(redact(database, RedactionIn(ids=[event_id], reason="Request 2"), "root", "redactions/2"))
    database.close()
    assert found(url) == []
    attack(url, ERASE.format("now()", "= 905"))
    # With the last of the records none of those before it counts any more.
    assert found(url) == [
        f"Events 5 to 8: 4 of them {UNRECORDED}",
        f"Event 901: {UNRECORDED}",
        f"Events 904 to 905: {UNRECORDED}",
    ]


@pytest.mark.parametrize("by", [(0, 0, 2), (1, 0, 2), (1, 2, 0), (1, 1, 1)])
def test_redaction_records_do_not_excuse_themselves_or_each_other(
    url: URL, redactions: list[str], by: tuple[int, int, int]
) -> None:
    """Each redacted at the moment of another's, or its own: which of them, `by` says."""
    for number, other in enumerate(by):
        attack(url, ERASE.format(f"'{redactions[other]}'", f"= {901 + number}"))
    attack(url, ERASE.format(f"'{redactions[by[0]]}'", "BETWEEN 300 AND 310"))
    assert any(UNRECORDED in each for each in found(url)), found(url)


def test_a_record_excuses_no_other_events_than_its_own(url: URL, redactions: list[str]) -> None:
    attack(url, "DELETE FROM audit_events WHERE id = 15", ERASE.format(f"'{redactions[1]}'", "= 14"))
    assert found(url) == [f"Events 14 to 18: 1 of them {UNRECORDED}", f"Event 15: {MISSING}"]
    attack(url, "DELETE FROM audit_events WHERE id = 14", ERASE.format(f"'{redactions[1]}'", "= 600"))
    assert found(url) == [f"Events 14 to 15: {MISSING}", f"Events 16 to 600: 1 of them {UNRECORDED}"]


def test_a_changed_tile_is_told_from_a_changed_row(url: URL) -> None:
    zeros = "overlay(hashes PLACING decode(repeat('00', 32), 'hex') FROM 32 * 43 + 1)"
    attack(url, f"UPDATE ledger_tiles SET hashes = {zeros} WHERE tile_index = 1")
    said = found(url)
    assert f"Event 300: {ROW}" in said
    assert any("the root that ledger_tiles has of their tile" in each for each in said)


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("DELETE FROM ledger_tiles WHERE tile_index = 1", "Events 257 to 512: their tile is missing"),
        ("UPDATE ledger_tiles SET root = sha256('x') WHERE tile_index = 1", "Events 257 to 512: the root that"),
        ("INSERT INTO ledger_tiles SELECT 0, 3, hashes, root FROM ledger_tiles LIMIT 1", "4 tiles of level 0"),
        ("UPDATE ledger_head SET frontier[1] = sha256('x')", "Events 1 to 512: one of them changed, or ledger_head"),
        ("UPDATE ledger_head SET frontier = '{}'", "Events 1 to 900: one of them changed, or ledger_head"),
        (
            "UPDATE ledger_head SET frontier = frontier || sha256('x')",
            "ledger_head.frontier has 5 hashes, and a log of",
        ),
        (
            "UPDATE ledger_head SET frontier = frontier || NULL::bytea",
            "ledger_head.frontier has 5 hashes, and a log of",
        ),
        ("UPDATE ledger_head SET frontier = frontier[:2]", "ledger_head.frontier has 2 hashes, and a log of"),
        ("UPDATE ledger_head SET frontier[2] = NULL", "Events 513 to 768: one of them changed, or ledger_head"),
        ("UPDATE ledger_head SET size = 800", f"Events 801 to {COUNT}: {ADDED}"),
        ("UPDATE ledger_head SET first_id = 2", "Events 2 to 65: row changed"),
        ("DELETE FROM ledger_head", "ledger_head has 0 rows"),
    ],
)
def test_tiles_and_head_that_do_not_fit_are_told(url: URL, statement: str, said: str) -> None:
    attack(url, statement)
    assert any(said in each for each in found(url)), found(url)


IMPOSSIBLE = [
    "metadata = '[1]'",
    "metadata = '{\"n\": 1e400}'",
    "personal_hash = 'x'",
    "personal_hash = NULL",
    "timestamp = 'infinity'",
    "timestamp = '0044-03-15 12:00 BC'",
    "outcome = 'x\"y'",
    "trace_id = '\"'",
    "source_ip = '10.0.0.0/8'",
]


def test_what_the_service_could_never_have_stored_is_named_too(url: URL) -> None:
    checks = ("metadata_is_an_object", "personal_hash_has_32_bytes", "outcome_is_known", "trace_id_is_32_hex_digits")
    attack(url, *(f"ALTER TABLE audit_events DROP CONSTRAINT audit_events_{check}" for check in checks))
    for event_id, impossible in enumerate(IMPOSSIBLE, 300):
        attack(url, f"UPDATE audit_events SET {impossible} WHERE id = {event_id}")
    named = {difference.partition(":")[0] for difference in found_one_by_one(url)}
    assert named == {f"Event {event_id}" for event_id, _ in enumerate(IMPOSSIBLE, 300)}


def rewrite(url: URL, *statements: str) -> None:
    """Change the rows, and make every tile and the head anew with the service's own functions."""
    attack(
        url,
        *statements,
        "CREATE TEMP TABLE rewritten AS"
        " SELECT array_agg(audit_leaf(audit_events) ORDER BY id) AS leaves FROM audit_events",
        "DELETE FROM ledger_tiles",
        "UPDATE ledger_head SET size = 0, frontier = '{}'",
        "SELECT grow_ledger(ledger_head, leaves, ledger_head.recorded_at) FROM ledger_head, rewritten",
    )


def test_a_history_rewritten_with_all_its_hashes_is_found_by_an_older_checkpoint(url: URL) -> None:
    leaves = leaves_of(url)
    old = [promise(size, tree_hash(leaves[:size])) for size in (100, 256, 600, COUNT)]
    rewrite(url, "UPDATE audit_events SET event_type = 'LOGOUT' WHERE id = 300")
    assert_ledger_consistent(url)
    assert found(url) == []  # by itself it is whole
    assert found(url, old[0], old[1]) == []  # they vouch for what was before
    assert found(url, *old) == [
        "The log does not begin with the 600 events that a checkpoint vouches for: it was rewritten.",
        "It does begin with the 256 events of another checkpoint.",
        "1 more checkpoints are not kept.",
    ]


def test_a_log_set_back_to_an_earlier_state_is_found_by_a_checkpoint(url: URL) -> None:
    old = promise(COUNT, tree_hash(leaves_of(url)))
    rewrite(url, "DELETE FROM audit_events WHERE id > 700")
    assert_ledger_consistent(url)
    assert found(url) == []
    assert found(url, old) == [f"The log has 700 events, and a checkpoint vouches for {COUNT}: it was set back."]


def test_the_command_names_what_was_changed_and_ends_with_status_1(url: URL) -> None:
    attack(url, "UPDATE audit_events SET actor = 'eve' WHERE id = 300")
    status, said, complaints = run_cli(url, "verify")
    assert status == 1
    assert said[-1] == "CHANGED: the log is not what was recorded. The first wrong event is 300."
    assert f"audit-service: Event 300: {PERSONAL}" in complaints


def test_stored_checkpoints_tell_a_rewrite_and_must_be_signed(url: URL) -> None:
    with running_app(settings_for(url)) as client:
        assert client.get("/ledger/checkpoint").status_code == 200
    assert found(url) == []
    rewrite(url, "UPDATE audit_events SET event_type = 'LOGOUT' WHERE id = 300")
    said = f"The log does not begin with the {COUNT} events that the checkpoint of {SIGNER.name} of size {COUNT} in"
    assert [each.startswith(said) for each in found(url)] == [True]

    forged = str(sign_checkpoint(generate_signer(SIGNER.name), COUNT, tree_hash(leaves_of(url))))
    root = tree_hash(leaves_of(url)).hex()
    attack(url, f"UPDATE ledger_checkpoints SET note = '{forged}', root = '\\x{root}'")
    (said,) = found(url)
    assert "has not signed it" in said
    attack(url, "UPDATE ledger_checkpoints SET size = 7")
    assert "the note says something else than its row" in found(url)[0]
