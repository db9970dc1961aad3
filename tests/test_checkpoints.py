"""Signing: no two checkpoints that contradict each other, over replicas and restarts, whatever is done in SQL."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from conftest import SIGNER, run_cli, running_app, settings_for
from months import append_events
from sqlalchemy import text
from sqlalchemy.engine import URL

from config import ConfigurationError, Settings
from db import Database
from ledger.notes import generate_signer, open_checkpoint, parse_signer
from problems import LedgerInconsistent
from proofs.checkpoints import Checkpoints
from proofs.signing import signer_in_force

LOGIN = {"event_type": "LOGIN", "actor": "alice"}


def grow(database: Database, count: int = 1) -> None:
    append_events(database, *[LOGIN] * count)


def age_checkpoints(database: Database) -> None:
    """As if the newest were a second old."""
    with database.transaction() as connection:
        connection.execute(text("UPDATE ledger_checkpoints SET signed_at = signed_at - interval '1 s'"))


def count_kept(database: Database) -> int:
    with database.transaction() as connection:
        return int(connection.scalar(text("SELECT count(*) FROM ledger_checkpoints")) or 0)


def test_a_checkpoint_is_signed_where_the_tree_grew_and_the_last_is_a_second_old(database: Database) -> None:
    checkpoints = Checkpoints(database, SIGNER)
    assert checkpoints.newest().head.size == 0
    age_checkpoints(database)
    assert checkpoints.newest().head.size == 0
    assert count_kept(database) == 1
    grow(database)
    assert checkpoints.newest().head.size == 1
    grow(database, 300)
    assert checkpoints.newest().head.size == 1
    age_checkpoints(database)
    newest = checkpoints.newest()
    assert (newest.head.size, count_kept(database)) == (301, 3)
    assert open_checkpoint(newest.note, SIGNER.verifier)[0] == newest.head
    assert Checkpoints(database, SIGNER).newest() == newest  # after a restart


def test_replicas_that_sign_at_once_sign_one(database_url: URL, database: Database) -> None:
    grow(database, 5)
    others = [Database(database_url) for _ in range(4)]
    start = threading.Barrier(4)

    def sign(other: Database) -> str:
        start.wait()
        return Checkpoints(other, SIGNER).newest().note

    with ThreadPoolExecutor(4) as pool:
        notes = set(pool.map(sign, others))
    for other in others:
        other.close()
    assert (len(notes), count_kept(database)) == (1, 1)


def take_newest_away(database: Database) -> None:
    """The tables as they were 200 events ago."""
    with database.transaction() as connection:
        connection.execute(text("UPDATE ledger_head SET (size, frontier) = (SELECT size, frontier FROM head_before)"))


def make_another_root(database: Database) -> None:
    with database.transaction() as connection:
        connection.execute(text("UPDATE ledger_head SET frontier[cardinality(frontier)] = sha256('x')"))


def rewrite_history(database: Database) -> None:
    """A tree over other events, whole in itself, that has outgrown the signed one."""
    with database.transaction() as connection:
        for table in ("audit_events", "ledger_tiles"):
            connection.execute(text(f"TRUNCATE {table}"))
        connection.execute(text("UPDATE ledger_head SET size = 0, frontier = '{}'"))
    append_events(database, *[{**LOGIN, "actor": "mallory"}] * 700)


def forge_a_checkpoint(database: Database) -> None:
    with database.transaction() as connection:
        connection.execute(text("UPDATE ledger_checkpoints SET note = replace(note, 'audit', 'Audit')"))


def forget_the_checkpoints(database: Database) -> None:
    with database.transaction() as connection:
        connection.execute(text("TRUNCATE ledger_checkpoints"))


@pytest.fixture
def tampered(database_url: URL) -> Database:
    """A log of 600 events under a checkpoint of as many; what it was at 400 is remembered."""
    database = Database(database_url)
    grow(database, 400)
    with database.transaction() as connection:
        connection.execute(text("CREATE TABLE head_before AS TABLE ledger_head"))
    grow(database, 200)
    return database


@pytest.mark.parametrize(
    ("tamper", "reason"),
    [
        (take_newest_away, "restored from an older backup"),
        (make_another_root, "does not begin with the 600"),
        (rewrite_history, "does not begin with the 600"),
        (forge_a_checkpoint, "not one of this key's"),
        (forget_the_checkpoints, "is gone from the database"),
    ],
)
def test_nothing_is_signed_that_contradicts_what_was(
    tampered: Database, tamper: Callable[[Database], None], reason: str
) -> None:
    checkpoints = Checkpoints(tampered, SIGNER)
    assert checkpoints.newest().head.size == 600
    age_checkpoints(tampered)
    tamper(tampered)
    for _ in range(2):
        with pytest.raises(LedgerInconsistent, match=reason):
            checkpoints.newest()
    with pytest.raises(LedgerInconsistent, match=reason):
        checkpoints.require_consistent()
    if tamper is not forget_the_checkpoints:  # of that, only what is kept outside tells after a restart
        with pytest.raises(LedgerInconsistent, match=reason):
            Checkpoints(tampered, SIGNER).newest()
    tampered.close()


def test_another_key_for_the_same_log_is_refused(database_url: URL) -> None:
    database = Database(database_url)
    Checkpoints(database, SIGNER).newest()
    with pytest.raises(LedgerInconsistent, match="not one of this key's"):
        Checkpoints(database, generate_signer(SIGNER.name)).newest()
    database.close()


def test_the_service_is_not_ready_and_says_so(database_url: URL) -> None:
    database = Database(database_url)
    grow(database, 3)
    with running_app(settings_for(database_url)) as client:
        assert client.get("/ready").status_code == 200
        make_another_root(database)
        answer = client.get("/ledger/checkpoint")
        assert (answer.status_code, answer.json()["type"]) == (503, "urn:audit:problem:ledger-inconsistent")
        ready = client.get("/ready")
        assert (ready.status_code, ready.json()["type"]) == (503, "urn:audit:problem:ledger-inconsistent")
        assert "3" in ready.json()["detail"]
    # A service that starts on such a log finds out before it is ready.
    with running_app(settings_for(database_url)) as client:
        assert client.get("/ready").status_code == 503
        assert "audit_ledger_consistent 0.0" in client.get("/metrics").text
    database.close()


def test_a_checkpoint_is_signed_although_nobody_asks(database_url: URL) -> None:
    database = Database(database_url)
    with running_app(settings_for(database_url, checkpoint_interval=timedelta(seconds=0.2))) as client:
        client.post("/events", json=LOGIN)
        deadline = time.monotonic() + 30
        while "audit_checkpoint_size 1.0" not in client.get("/metrics").text:
            assert time.monotonic() < deadline
    database.close()


def test_production_does_not_start_without_a_signing_key() -> None:
    with pytest.raises(ConfigurationError, match=r"^LEDGER_SIGNING_KEY: not set"):
        signer_in_force(Settings())


def test_a_key_of_another_log_than_the_one_named_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"^LEDGER_ORIGIN: the signing key is that of audit.test/log"):
        signer_in_force(Settings(ledger_origin="other.test/log", ledger_signing_key=SIGNER.secret_text()))
    with pytest.raises(ConfigurationError, match=r"^LEDGER_SIGNING_KEY: ") as refused:
        signer_in_force(Settings(ledger_signing_key=SIGNER.secret_text()[:-4] + "AAA="))
    assert SIGNER.secret_text()[-20:-4] not in str(refused.value)


def test_development_makes_a_key_once(tmp_path: Path) -> None:
    settings = Settings(environment="development", data_dir=tmp_path, ledger_origin="mine/log")
    signer = signer_in_force(settings)
    assert signer.name == "mine/log" and signer_in_force(settings) == signer
    assert (tmp_path / "ledger_signing_key").stat().st_mode & 0o777 == 0o600


def test_keygen_prints_a_pair_that_works(database_url: URL) -> None:
    status, (secret, public), _ = run_cli(database_url, "ledger", "keygen", "--origin", "audit.example.com/log")
    signer = parse_signer(secret.removeprefix("LEDGER_SIGNING_KEY="))
    assert (status, public) == (0, f"Public key: {signer.verifier}")
    assert signer.name == "audit.example.com/log"
