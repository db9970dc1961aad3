"""`python cli.py verify --url`: an auditor outside, who has the public key and an old checkpoint, and no database."""

from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from threading import Thread

import httpx
import pytest
from conftest import API_KEY, SIGNER, execute, run_cli, running_app, settings_for
from months import append_events, fill_months, partitions_of
from sqlalchemy.engine import URL
from test_attacks import attack, rewrite
from test_verify import leaves_of, plain
from verify import tree_hash

from db import Database
from housekeeping.partitions import seal_finished_months
from housekeeping.retention import apply_retention
from ledger.notes import generate_signer, parse_note, parse_tree_head, sign_checkpoint
from verifier.command import add_arguments
from verifier.command import verify as verify_by


@dataclass
class Auditor:
    """Somebody with a file."""

    url: str
    kept: Path

    def verify(self, *options: str, key: str = str(SIGNER.verifier)) -> tuple[int, list[str], str]:
        nowhere = URL.create("postgresql", host="127.0.0.1", port=1)
        arguments = ["--url", self.url, "--key", key, "--checkpoint", str(self.kept), *options]
        return run_cli(nowhere, "verify", *arguments, API_KEY=API_KEY)

    def await_checkpoint(self, size: int) -> None:
        """Until all events are in a checkpoint: one of a second ago does not have them."""
        with httpx.Client(base_url=self.url, headers={"X-API-Key": API_KEY}, timeout=30) as client:
            assert client.get(f"/events/{size}/proof").status_code == 200

    @property
    def size(self) -> int:
        return parse_tree_head(parse_note(self.kept.read_text()).text).size


@pytest.fixture
def database(database_url: URL) -> Iterator[Database]:
    database = Database(database_url)
    yield database
    database.close()


@pytest.fixture
def auditor(database: Database, tmp_path: Path) -> Iterator[Auditor]:
    with running_app(settings_for(database.url)) as client:
        client.get("/health")
        yield Auditor(str(client.base_url), tmp_path / "checkpoint")


def sign_anew(url: URL) -> None:
    """What a service signs that has lost its memory, or wants to."""
    leaves = leaves_of(url)
    note = sign_checkpoint(SIGNER, len(leaves), tree_hash(leaves))
    execute(url, "DELETE FROM ledger_checkpoints")
    columns = f"'{SIGNER.name}', {len(leaves)}, '\\x{tree_hash(leaves).hex()}', '{note}', now()"
    execute(url, f"INSERT INTO ledger_checkpoints SELECT {columns}")


@pytest.mark.parametrize("sizes", [(0, 1, 300), (256, 256, 257), (255, 512, 1100), (700, 70_000)])
def test_a_growing_log_is_checked_from_where_it_was_checked_last(
    auditor: Auditor, database: Database, sizes: tuple[int, ...]
) -> None:
    known = 0
    for number, size in enumerate(sizes):
        for start in range(known, size, 5_000):
            append_events(database, *plain(min(5_000, size - start)))
        if size:
            auditor.await_checkpoint(size)
        status, said, complaints = auditor.verify(*(["--all"] if number == 2 else []))
        assert status == 0, complaints
        start = 0 if number == 2 else known // 256 * 256
        assert said[0].startswith(f"{SIGNER.name}: {size} events, root ")
        assert said[0].endswith(f", checked from leaf {start} on")
        which = f"entry from leaf {start} on" if start else "entry"
        assert said[1] == f"OK: every {which} is as it was recorded, in the order in which it was."
        assert (f"Entries below leaf {start} were not read: --all" in said[2]) == (start > 0)
        assert (f"begins with the tree of {known} events that you had a checkpoint of" in said[2]) == (number > 0)
        assert ("is trusted from now on" in said[-1]) == (number == 0)
        assert auditor.size == size
        known = size


def test_a_pruned_log_is_checked_by_its_hashes_where_the_auditor_knows_of_retention(
    auditor: Auditor, database: Database
) -> None:
    dropped, *_ = fill_months(database, plain(600), plain(700))
    auditor.await_checkpoint(1300)
    list(seal_finished_months(database))
    long_after = partitions_of(database.url)[-1].upper_bound + timedelta(days=400)
    assert dropped in list(apply_retention(database, timedelta(days=1), long_after))
    for options, missing in [([], "0 to 767"), (["--pruned", "500"], "512 to 767")]:
        status, _, complaints = auditor.verify(*options)
        assert (status, auditor.kept.exists()) == (1, False)
        assert f"The entries of leaves {missing} are missing. If you know that retention dropped them" in complaints
    status, said, complaints = auditor.verify("--pruned", "600")
    assert status == 0, complaints
    assert said[1].startswith("Entries below leaf 768 are not served: you say that retention dropped those below 600.")
    assert said[2].startswith("OK: every entry from leaf 768 on is as it was recorded")


@pytest.mark.parametrize("is_known", [False, True])
def test_the_oldest_entries_are_missing_unless_the_auditor_knows_of_retention(
    auditor: Auditor, database: Database, is_known: bool
) -> None:
    append_events(database, *plain(600))
    auditor.await_checkpoint(600)
    if is_known:
        assert auditor.verify()[0] == 0
    attack(database.url, "DELETE FROM audit_events WHERE id = 10")
    status, said, complaints = auditor.verify("--all")
    assert (status, said[-1]) == (1, "CHANGED: the log is not what was recorded.")
    assert "The entries of leaves 0 to 255 are missing." in complaints


def test_entries_missing_behind_others_are_no_retention(auditor: Auditor, database: Database) -> None:
    append_events(database, *plain(1100))
    auditor.await_checkpoint(1100)
    attack(database.url, "DELETE FROM audit_events WHERE id IN (300, 600)")
    status, _, complaints = auditor.verify("--pruned", "1000")
    assert (status, "The entries of leaves 256 to 767 are missing.\n" in complaints) == (1, True), complaints


def test_only_the_right_key_is_believed(auditor: Auditor, database: Database) -> None:
    append_events(database, *plain(10))
    auditor.await_checkpoint(10)
    stranger = str(generate_signer(SIGNER.name).verifier)
    status, _, complaints = auditor.verify(key=stranger)
    assert (status, "has not signed it" in complaints, auditor.kept.exists()) == (2, True, False)
    assert run_cli(database.url, "verify", "--url", auditor.url)[0] == 2


REWRITE = "UPDATE audit_events SET event_type = 'LOGOUT' WHERE id = 300"


@pytest.mark.parametrize("whole", [[], ["--all"]])
@pytest.mark.parametrize("grows", [False, True])
def test_a_history_rewritten_and_signed_anew_is_found(
    auditor: Auditor, database: Database, grows: bool, whole: list[str]
) -> None:
    append_events(database, *plain(600))
    auditor.await_checkpoint(600)
    assert auditor.verify()[0] == 0
    before = auditor.kept.read_text()
    rewrite(database.url, REWRITE)
    if grows:
        append_events(database, *plain(600))
    sign_anew(database.url)
    with running_app(settings_for(database.url)) as client:  # a new process remembers nothing
        auditor.url = str(client.base_url)
        status, said, complaints = auditor.verify(*whole)
    assert (status, said[-1]) == (1, "CHANGED: the log is not what was recorded.")
    assert "The log does not begin with the 600 events of your checkpoint: it was rewritten." in complaints
    assert auditor.kept.read_text() == before


def test_a_log_that_was_set_back_is_found(auditor: Auditor, database: Database) -> None:
    append_events(database, *plain(600))
    auditor.await_checkpoint(600)
    assert auditor.verify()[0] == 0
    rewrite(database.url, "DELETE FROM audit_events WHERE id > 500")
    sign_anew(database.url)
    with running_app(settings_for(database.url)) as client:
        auditor.url = str(client.base_url)
        status, _, complaints = auditor.verify()
    assert (status, "You have a checkpoint of 600 events, and the log has 500." in complaints) == (1, True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            "UPDATE audit_events SET event_type = 'LOGOUT' WHERE id = 300",
            "The entry of leaf 299 is not that of its tile",
        ),
        ("DELETE FROM audit_events WHERE id = 300", "The entries of leaves 256 to 511 are missing"),
        ("UPDATE ledger_tiles SET hashes = decode(repeat('00', 8192), 'hex') WHERE tile_index = 1", "of leaf 256"),
        ("DELETE FROM ledger_tiles WHERE tile_index = 1", "Tile 0 of level 1 is not made of those"),
        ("UPDATE ledger_tiles SET root = sha256('x') WHERE tile_index = 1", "Tile 0 of level 1 is not made of those"),
    ],
)
def test_rows_and_tiles_that_were_changed_are_found(
    auditor: Auditor, database: Database, change: str, said: str
) -> None:
    append_events(database, *plain(600))
    auditor.await_checkpoint(600)
    assert auditor.verify()[0] == 0
    attack(database.url, change)
    status, _, complaints = auditor.verify("--all")
    assert (status, said in complaints) == (1, True), complaints


def test_a_server_that_is_no_log_gives_no_verdict(auditor: Auditor, tmp_path: Path) -> None:
    auditor.url = "http://127.0.0.1:1"
    status, said, complaints = auditor.verify()
    assert (status, said) == (2, [])
    assert "audit-service: http://127.0.0.1:1/ledger/" in complaints


CHECKPOINT = str(sign_checkpoint(SIGNER, 70_000, bytes(32))).encode()
HASHES = bytes(8192)
ANYTHING: list[tuple[int, dict[str, str], bytes]] = [
    (200, {}, b"\xff\xfe"),
    (200, {"Content-Type": "text/plain; charset=hex"}, b""),
    (200, {}, HASHES),
    (200, {}, HASHES[:31]),
    (200, {}, b"\xff\xff\0"),
    (200, {"Content-Encoding": "gzip"}, b"\x1f\x8b"),
    (301, {"Location": "http://xn--a\xff/"}, b""),
    (404, {}, b""),
    (500, {"Content-Type": "text/plain; charset=hex"}, b"\x1b[2JOK: every entry is as it was recorded"),
    (999, {"Content-Type": "text/plain; charset=utf-7"}, b"+2AA-"),
]
FAILURE = ANYTHING[-2]


@contextmanager
def served(checkpoint: bytes, random: Random, answers: list[tuple[int, dict[str, str], bytes]]) -> Iterator[str]:
    """A server that has this checkpoint, and otherwise any of the answers."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = random.choice(answers)
            if self.path.endswith("/checkpoint"):
                status, headers, body = 200, {}, checkpoint
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def verify_here(url: str, kept: Path, *options: str) -> int:
    """The status that the command ends with, in this process; whatever it raises comes out."""
    parser = ArgumentParser()
    add_arguments(parser)
    arguments = ["--url", url, "--key", str(SIGNER.verifier), "--checkpoint", str(kept), *options]
    nowhere = URL.create("postgresql", host="127.0.0.1", port=1)
    return verify_by(settings_for(nowhere), parser.parse_args(arguments))


@pytest.mark.parametrize("checkpoint", [CHECKPOINT, b"\xff", b"", CHECKPOINT[:-2], CHECKPOINT.replace(b"7", b"8")])
def test_whatever_a_server_answers_the_status_says(tmp_path: Path, checkpoint: bytes) -> None:
    for seed in range(20):
        random = Random(seed)  # noqa: S311 - no secret
        answers = random.sample(ANYTHING, 1 + seed % 3)
        with served(checkpoint, random, answers) as url:
            assert verify_here(url, tmp_path / "checkpoint", "--pruned", str(random.choice([0, 70_000]))) in (1, 2)
    assert not (tmp_path / "checkpoint").exists()


def test_a_server_that_fails_is_told_in_a_line_that_a_terminal_shows_as_it_is(tmp_path: Path) -> None:
    with served(CHECKPOINT, Random(), [FAILURE]) as url:  # noqa: S311 - no secret
        status, said, complaints = Auditor(url, tmp_path / "checkpoint").verify()
    assert (status, said) == (2, [])
    assert complaints.splitlines()[-1].endswith(": 500 [2JOK: every entry is as it was recorded")
    assert "Traceback" not in complaints and "\x1b[2J" not in complaints


@pytest.mark.parametrize("url", ["http://[::1", "nothing", "http://127.0.0.1:99999", "http://\u00ff\u0000/", ""])
def test_a_url_that_is_none_is_told(tmp_path: Path, url: str) -> None:
    assert verify_here(url, tmp_path / "checkpoint") == 2


def test_a_kept_checkpoint_that_is_no_text_is_told(tmp_path: Path) -> None:
    (kept := tmp_path / "checkpoint").write_bytes(b"\xff")
    assert verify_here("http://127.0.0.1:1", kept) == 2
