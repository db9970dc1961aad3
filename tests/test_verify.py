"""`python cli.py verify`: a log that nobody changed passes, whatever happened to it that may happen."""

import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import psycopg2
import psycopg2.extras
import pytest
import rfc8785
from conftest import SIGNER, execute, run_cli
from hypothesis import given, settings
from hypothesis import strategies as st
from months import Interruption, append_events, fill_months, interrupted_before, partitions_of
from sqlalchemy.engine import URL
from verify import assert_ledger_consistent, doubles, leaf_of, read, tree_hash

from db import Database
from housekeeping import redaction
from housekeeping.partitions import seal_finished_months
from housekeeping.retention import apply_retention
from ledger.entries import personal_part
from ledger.notes import TreeHead, generate_signer, sign_checkpoint
from problems import DatabaseUnavailable
from schemas import RedactionIn
from verifier import database as verifier
from verifier.database import Verdict, verify_database
from verifier.promises import Promise
from verifier.ranges import check_range
from verifier.rows import COPY_ROWS, SESSION, Lines, hash_rows

# Texts that JSON or COPY escapes, numbers that no double holds, names that sort differently by UTF-16 unit.
ODD: list[dict[str, Any]] = [
    {"event_type": "a\\b\"c\t\n\x01\b\x7f", "actor": "\\N", "resource": "\\x00", "tenant": "\u2028é"},
    {"event_type": "x", "actor": "alice", "metadata": {"\ue000": 1, "\U00010000": 2, "deep": {"b": [1.5], "a": 0}}},
    {"event_type": "x", "actor": "bob", "metadata": {"big": 2**53 - 1, "tiny": 1e-7, "e": 1e22, "one": 1.0, "t": True}},
    {"event_type": "x", "actor": "y", "timestamp": "0001-01-01T00:00:00Z", "trace_id": "0af76519" * 4},
    {"event_type": "x", "actor": "y", "timestamp": "2026-01-31T12:00:00.1Z", "source_ip": "2001:db8::1", "source": "s"},
    {"event_type": "x", "actor": "y", "outcome": "denied", "source_ip": "10.0.0.1", "metadata": {}, "resource": "r"},
]  # fmt: skip


def plain(count: int) -> list[dict[str, Any]]:
    return [{"event_type": "LOGIN", "actor": f"user-{n}", "metadata": {"n": n}} for n in range(count)]


def verified(url: URL, *promises: Promise, jobs: int = 2) -> Verdict:
    counted: list[int] = []
    totals: set[int] = set()

    def advance(count: int, total: int) -> None:
        counted.append(count)
        totals.add(total)

    verdict = verify_database(url, promises, advance, SIGNER.verifier, jobs)
    if not verdict.differences and not verdict.complaints:
        assert {sum(counted)} == totals
    return verdict


def assert_unchanged(url: URL, *promises: Promise) -> Verdict:
    verdict = verified(url, *promises)
    assert (verdict.differences, verdict.complaints) == ([], [])
    return verdict


def leaves_of(url: URL) -> list[bytes]:
    with psycopg2.connect(url.set(drivername="postgresql").render_as_string(hide_password=False)) as connection:
        cursor = connection.cursor(cursor_factory=psycopg2.extras.RealDictCursor)
        return [leaf_of(row) for row in read(cursor, "SELECT * FROM audit_events ORDER BY id")]


def promise(size: int, root: bytes) -> Promise:
    return Promise(TreeHead("log", size, root), "a checkpoint")


@pytest.fixture
def short_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges of two tiles, in this process: the walk over them without events by the ten thousand."""
    monkeypatch.setattr(verifier, "RANGE_LEAVES", 512)

    def check_here(_: URL, connection: Any, ranges: Any, __: int | None) -> Any:
        return (check_range(connection, each) for each in ranges)

    monkeypatch.setattr(verifier, "_check_ranges", check_here)


@pytest.fixture
def database(database_url: URL) -> Iterator[Database]:
    database = Database(database_url)
    yield database
    database.close()
    first_kept = execute(database_url, "SELECT coalesce(min(id), 1) FROM audit_events")
    assert_ledger_consistent(database_url, pruned=first_kept - 1)


@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 1300])
def test_an_untouched_log_of_any_size_passes(database: Database, short_ranges: None, size: int) -> None:
    append_events(database, *(ODD * (size // 6 + 1))[:size])
    verdict = assert_unchanged(database.url)
    assert (verdict.size, verdict.root) == (size, tree_hash(leaves_of(database.url)))


def test_several_processes_share_one_snapshot(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifier, "RANGE_LEAVES", 512)
    append_events(database, *plain(2000))
    assert assert_unchanged(database.url).size == 2000


def test_checkpoints_of_any_size_are_kept(database: Database, short_ranges: None) -> None:
    append_events(database, *plain(1300))
    leaves = leaves_of(database.url)
    promises = [
        promise(size, tree_hash(leaves[:size])) for size in (0, 1, 255, 256, 257, 511, 512, 513, 1024, 1299, 1300)
    ]
    assert_unchanged(database.url, *promises)
    for each in promises[1:]:
        assert verified(database.url, promise(each.head.size, b"\0" * 32)).complaints != []


KEEP = """
    INSERT INTO ledger_checkpoints (origin, size, root, note, signed_at)
    SELECT origin, size, root, format(E'%%s\n%%s\n%%s\n\n— x AAAAAAAA\n', origin, size, encode(root, 'base64')), now()
    FROM unnest(%s, %s) AS head (size, root), (SELECT 'log-' || n AS origin FROM generate_series(1, %s) AS n) AS log
"""


def test_of_many_stored_checkpoints_few_are_held_at_once(database: Database) -> None:
    append_events(database, *plain(600))
    leaves = leaves_of(database.url)
    heads = [(size, tree_hash(leaves[:size])) for size in range(0, 601, 2)]
    with psycopg2.connect(
        database.url.set(drivername="postgresql").render_as_string(hide_password=False)
    ) as connection:
        connection.cursor().execute(KEEP, (*map(list, zip(*heads, strict=True)), 100))
    tracemalloc.start()
    verdict = assert_unchanged(database.url)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert verdict.checkpoints == 100 * len(heads)
    assert peak < 10e6  # bytes: all at once take 14 MB
    execute(database.url, "DELETE FROM ledger_checkpoints WHERE size > 598")
    sized = "UPDATE ledger_checkpoints SET size = size + 2 WHERE origin = 'log-7' AND size = 598"
    execute(database.url, sized)
    (said,) = verified(database.url).complaints
    assert said.startswith("The checkpoint of log-7 of size 600 in ledger_checkpoints: the note says something else")


def test_redacted_events_are_counted_and_their_leaves_agree(database: Database) -> None:
    append_events(database, *ODD * 60)
    for number, actor in enumerate(("bob", "alice")):
        wanted = RedactionIn(actor=actor, reason="Request 1")
        assert list(redaction.redact(database, wanted, "root", f"redactions/{number}")) == [60]
    assert assert_unchanged(database.url).redacted == 120


def test_what_retention_dropped_is_in_the_tree(database: Database, short_ranges: None) -> None:
    dropped, *_ = fill_months(database, plain(300), plain(700))
    list(seal_finished_months(database))
    long_after = partitions_of(database.url)[-1].upper_bound + timedelta(days=400)
    assert dropped in list(apply_retention(database, timedelta(days=1), long_after))
    verdict = assert_unchanged(database.url)
    assert verdict.dropped == 300
    assert verdict.size > 1000  # what was dropped is in the log


@pytest.mark.parametrize("statement", range(8))
def test_while_a_partition_is_on_its_way_out_nothing_is_told(
    database: Database, short_ranges: None, statement: int
) -> None:
    """Interrupted anywhere, retention leaves a log that passes, or of which nothing is told until it goes on."""
    fill_months(database, plain(300), plain(700))
    list(seal_finished_months(database))
    long_after = partitions_of(database.url)[-1].upper_bound + timedelta(days=400)
    with suppress(Interruption), interrupted_before(statement):
        list(apply_retention(database, timedelta(days=1), long_after))
    if all(partition.is_attached and not partition.is_detaching for partition in partitions_of(database.url)):
        assert_unchanged(database.url)
    else:
        with pytest.raises(DatabaseUnavailable, match="is on its way out"):
            verified(database.url)
        assert run_cli(database.url, "verify")[0] == 2
    list(apply_retention(database, timedelta(days=1), long_after))
    assert assert_unchanged(database.url).dropped == 300


# What PostgreSQL can hold, whoever wrote it.
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | TEXTS | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
INSERT = """
    INSERT INTO audit_events (
        id, event_type, actor, timestamp, recorded_at, tenant, resource, outcome, source, source_ip, trace_id, metadata,
        nonce, personal_hash
    ) VALUES (
        %(id)s, %(event_type)s, %(actor)s, %(timestamp)s, %(recorded_at)s, %(tenant)s, %(resource)s, %(outcome)s,
        %(source)s, %(source_ip)s, %(trace_id)s, %(metadata)s, %(nonce)s, %(personal_hash)s
    )
"""
ROWS = st.fixed_dictionaries(
    {
        "event_type": TEXTS,
        "actor": TEXTS,
        "timestamp": st.datetimes(timezones=st.just(UTC)),
        "tenant": st.none() | TEXTS,
        "resource": st.none() | TEXTS,
        "outcome": st.none() | st.sampled_from(["success", "denied"]),
        "source": st.none() | TEXTS,
        "source_ip": st.none() | st.ip_addresses().map(str),
        "trace_id": st.none() | st.binary(min_size=16, max_size=16).map(bytes.hex),
        "metadata": st.none() | st.dictionaries(TEXTS, JSON, max_size=4).map(psycopg2.extras.Json),
    }
)


def test_any_row_has_the_leaf_that_another_encoder_gives_it(database_url: URL) -> None:
    connection = psycopg2.connect(database_url.set(drivername="postgresql").render_as_string(hide_password=False))
    connection.cursor().execute(SESSION)
    connection.commit()

    @settings(max_examples=200)
    @given(st.lists(ROWS, min_size=1, max_size=5), st.booleans())
    def hashes_agree(rows: list[dict[str, Any]], are_committed_to: bool) -> None:
        with connection.cursor(cursor_factory=psycopg2.extras.RealDictCursor) as cursor:
            for number, row in enumerate(rows):
                event = {"id": number, "recorded_at": datetime(2026, 1, 1, tzinfo=UTC), **row}
                event |= {"nonce": bytes(16), "personal_hash": bytes(32)}
                cursor.execute(INSERT, event)
            if are_committed_to:
                for event in read(cursor, "SELECT * FROM audit_events"):
                    digest = sha256(bytes(16) + rfc8785.dumps(doubles(personal_part(event)))).digest()
                    cursor.execute("UPDATE audit_events SET personal_hash = %s WHERE id = %s", (digest, event["id"]))
            stored = read(cursor, "SELECT * FROM audit_events ORDER BY id")
            lines = Lines()
            cursor.copy_expert(COPY_ROWS.format(condition="id >= 0", limit="ALL"), lines)
            hashed = hash_rows(lines.rows)
            connection.rollback()
        assert hashed.ids == list(range(len(rows)))
        assert hashed.changed == ([] if are_committed_to else hashed.ids)
        if are_committed_to:
            assert hashed.leaves == [leaf_of(row) for row in stored]

    hashes_agree()
    connection.close()


def test_the_command_says_so_in_plain_words(database: Database, tmp_path: Path) -> None:
    append_events(database, *plain(300))
    leaves = leaves_of(database.url)
    status, said, complaints = run_cli(database.url, "verify")
    assert status == 0, complaints
    assert said[0] == f"300 events, ids 1 to 300, root {tree_hash(leaves).hex()}"
    assert said[1] == "OK: every event is as it was recorded, in the order in which it was."
    assert "verifying: 100%" in complaints

    signer = generate_signer("log.example.com")
    kept = tmp_path / "checkpoint"
    kept.write_text(str(sign_checkpoint(signer, 100, tree_hash(leaves[:100]))))
    options = ["--checkpoint", str(kept), "--key", str(signer.verifier)]
    status, said, _ = run_cli(database.url, "verify", *options)
    assert (status, said[-1]) == (0, f"It begins with the 100 events of the checkpoint in {kept}.")

    other = generate_signer("log.example.com")
    status, _, complaints = run_cli(database.url, "verify", "--checkpoint", str(kept), "--key", str(other.verifier))
    assert (status, "has not signed it" in complaints) == (2, True)
