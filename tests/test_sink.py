"""The checkpoint that is kept outside the database, and what it is for: a restored backup is noticed."""

import asyncio
import base64
import shutil
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import SIGNER, eventually, execute, run_cli, running_app, settings_for
from months import append_events
from sqlalchemy import text
from sqlalchemy.engine import URL
from test_checkpoints import age_checkpoints, count_kept

import migrations
from config import Settings
from db import Database
from ledger.notes import generate_signer, open_checkpoint, sign_checkpoint
from ledger.tree import proves_consistency
from problems import CheckpointNotKept, LedgerInconsistent
from proofs.checkpoints import Checkpoint, Checkpoints, read_head
from proofs.continuation import record_continuation
from proofs.sink import FileSink
from proofs.watch import LedgerWatch
from telemetry import Metrics

LOGIN = {"event_type": "LOGIN", "actor": "alice"}


class _Shelf(BaseHTTPRequestHandler):
    """Keeps one body."""

    kept: bytes | None = None
    nonsense: bytes = b""  # what it answers instead

    def do_GET(self) -> None:
        if type(self).nonsense:
            self.wfile.write(type(self).nonsense)
            return
        body = type(self).kept
        self.send_response(404 if body is None else 200)
        self.end_headers()
        self.wfile.write(body or b"")

    def do_PUT(self) -> None:
        type(self).kept = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def shelf() -> Iterator[tuple[str, type[_Shelf]]]:
    """A URL that takes PUT and GET."""

    class Handler(_Shelf):
        pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/checkpoint", Handler
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def kept_size(note: str) -> int:
    return open_checkpoint(note, SIGNER.verifier)[0].size


def settings_with(url: URL, sink: Any, **changes: Any) -> Settings:
    return settings_for(url, checkpoint_sink=str(sink), checkpoint_interval=timedelta(milliseconds=100), **changes)


def test_the_newest_checkpoint_is_kept_in_a_file(database_url: URL, tmp_path: Path) -> None:
    sink = tmp_path / "checkpoint"
    with running_app(settings_with(database_url, sink)) as client:
        client.post("/events/batch", json=[LOGIN] * 300)
        eventually(lambda: sink.exists() and kept_size(sink.read_text()) == 300)
        client.post("/events", json=LOGIN)
        eventually(lambda: kept_size(sink.read_text()) == 301)
        assert "audit_checkpoint_kept 1.0" in client.get("/metrics").text
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_or_at_a_url(database_url: URL) -> None:
    with shelf() as (url, shelved), running_app(settings_with(database_url, url)) as client:
        client.post("/events", json=LOGIN)
        eventually(lambda: shelved.kept is not None and kept_size(shelved.kept.decode()) == 1)


def test_a_log_that_forgot_what_was_vouched_for_is_not_ready(database_url: URL, tmp_path: Path) -> None:
    sink = tmp_path / "checkpoint"
    vouched = str(sign_checkpoint(SIGNER, 5, bytes(32)))
    sink.write_text(vouched)
    with running_app(settings_with(database_url, sink)) as client:
        ready = client.get("/ready")
        assert (ready.status_code, ready.json()["type"]) == (503, "urn:audit:problem:ledger-inconsistent")
        assert "a checkpoint of 5 was signed" in ready.json()["detail"]
        client.post("/events/batch", json=[LOGIN] * 9)  # grown past it, and still another tree
        eventually(lambda: "does not begin with the 5" in client.get("/ready").json()["detail"])
        assert client.get("/ledger/checkpoint").status_code == 503
    assert sink.read_text() == vouched


def test_a_checkpoint_of_another_log_is_not_overwritten(database_url: URL, tmp_path: Path) -> None:
    sink = tmp_path / "checkpoint"
    other = str(sign_checkpoint(generate_signer("other.test/log"), 0, bytes(32)))
    sink.write_text(other)
    with running_app(settings_with(database_url, sink)) as client:
        assert "not one of this key's" in client.get("/ready").json()["detail"]
    assert sink.read_text() == other


def test_nothing_is_signed_until_the_sink_was_read_once(database_url: URL) -> None:
    with shelf() as (url, _):
        port = url
    with running_app(settings_with(database_url, port)) as client:
        assert "was not read since the start" in client.get("/ready").json()["detail"]
        assert client.get("/ledger/checkpoint").status_code == 503
        assert client.post("/events", json=LOGIN).status_code == 201
        assert "audit_checkpoint_kept 0.0" in client.get("/metrics").text


def test_a_sink_that_fails_later_stops_nothing(database_url: URL, tmp_path: Path) -> None:
    folder = tmp_path / "outside"
    folder.mkdir()
    with running_app(settings_with(database_url, folder / "checkpoint")) as client:
        eventually(lambda: (folder / "checkpoint").exists())
        shutil.rmtree(folder)
        client.post("/events", json=LOGIN)
        eventually(lambda: "audit_checkpoint_kept 0.0" in client.get("/metrics").text)
        assert client.get("/ready").status_code == 200
        folder.mkdir()
        eventually(lambda: (folder / "checkpoint").exists() and kept_size((folder / "checkpoint").read_text()) == 1)


@pytest.mark.parametrize(
    "nonsense",
    [
        b"220 mail.test ESMTP\r\n",  # BadStatusLine
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n40\r\nhalf",  # IncompleteRead
        b"HTTP/1.1 200 OK\r\nContent-Length: 200\r\n\r\naudit.test/log\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n\xff\xfe",
    ],
)
def test_a_url_that_answers_nonsense_for_a_while_ends_nothing(database_url: URL, nonsense: bytes) -> None:
    with shelf() as (url, shelved), running_app(settings_with(database_url, url)) as client:
        eventually(lambda: shelved.kept is not None)
        shelved.nonsense = nonsense
        eventually(lambda: "audit_checkpoint_kept 0.0" in client.get("/metrics").text)
        assert client.get("/ready").status_code == 200
        client.post("/events", json=LOGIN)
        shelved.nonsense = b""
        eventually(lambda: shelved.kept is not None and kept_size(shelved.kept.decode()) == 1)


def test_two_that_write_one_file_at_once_leave_a_whole_checkpoint(tmp_path: Path) -> None:
    """As two containers on one volume, whose pids are the same."""
    sinks, notes = [FileSink(tmp_path / "checkpoint") for _ in range(4)], [f"{size}\n" * 5_000 for size in range(4)]
    sinks[0].write(notes[0])
    with ThreadPoolExecutor(4) as pool:
        for _ in range(25):
            writing = [pool.submit(sink.write, note) for sink, note in zip(sinks, notes, strict=True)]
            while not all(writer.done() for writer in writing):
                assert sinks[0].read() in notes
            for writer in writing:
                writer.result()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").write_text("what was there")
    with pytest.raises(UnicodeEncodeError):
        FileSink(tmp_path / "checkpoint").write("half of a surrogate pair: \ud800")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    assert (tmp_path / "checkpoint").read_text() == "what was there"


def signed_by(checkpoints: Checkpoints, database: Database, size: int) -> Checkpoint:
    append_events(database, *[LOGIN] * size)
    age_checkpoints(database)
    return checkpoints.newest()


class _Broken:
    """A place that fails, in a way that may be nobody's expectation."""

    error: Exception | None = None

    def __init__(self, path: Path) -> None:
        self._file = FileSink(path)

    def read(self) -> str | None:
        if self.error is not None:
            raise self.error
        return self._file.read()

    def write(self, note: str) -> None:
        self._file.write(note)


def test_what_was_handed_out_is_outside_so_a_standby_that_lagged_is_noticed(database: Database, tmp_path: Path) -> None:
    """As after an asynchronous failover: the database goes back to a moment before the last checkpoint."""
    sink = FileSink(tmp_path / "checkpoint")
    checkpoints, replica = Checkpoints(database, SIGNER, sink), Checkpoints(database, SIGNER, sink)
    for each in (checkpoints, replica):
        assert each.look().head.size == 0
    append_events(database, *[LOGIN] * 990)
    with database.transaction() as connection:
        for table in ("ledger_head", "audit_events", "ledger_tiles", "ledger_checkpoints"):
            connection.execute(text(f"CREATE TABLE standby_{table} AS TABLE {table}"))
    handed_out = signed_by(checkpoints, database, 10)
    assert (handed_out.head.size, handed_out.note) == (1000, sink.read())

    with database.transaction() as connection:
        connection.execute(text("TRUNCATE ledger_head, audit_events, ledger_tiles, ledger_checkpoints"))
        for table in ("ledger_head", "audit_events", "ledger_tiles", "ledger_checkpoints"):
            connection.execute(text(f"INSERT INTO {table} OVERRIDING SYSTEM VALUE SELECT * FROM standby_{table}"))
            connection.execute(text(f"DROP TABLE standby_{table}"))
    restarted = Checkpoints(database, SIGNER, sink)
    age_checkpoints(database)
    for sign in (restarted.look, replica.newest, restarted.newest):
        with pytest.raises(LedgerInconsistent, match="990 leaves, and a checkpoint of 1000 was"):
            sign()
    append_events(database, *[LOGIN] * 20)  # grown past it, and still another tree
    for sign in (restarted.look, replica.look, restarted.newest):
        with pytest.raises(
            LedgerInconsistent, match=r"CHECKPOINT_SINK says otherwise\..* does not begin with the 1000"
        ):
            sign()
    assert sink.read() == handed_out.note


def test_a_checkpoint_that_cannot_be_put_outside_is_not_handed_out(database: Database, tmp_path: Path) -> None:
    sink = _Broken(tmp_path / "checkpoint")
    checkpoints = Checkpoints(database, SIGNER, sink)
    checkpoints.look()
    first = signed_by(checkpoints, database, 3)
    sink.error = OSError()
    for _ in range(2):
        assert signed_by(checkpoints, database, 1) == first
    with pytest.raises(CheckpointNotKept):
        asyncio.run(checkpoints.covering(4))
    assert asyncio.run(checkpoints.covering(2)) == first  # the proofs of what it has go on
    assert count_kept(database) == 2
    checkpoints.require_consistent()
    assert checkpoints.look() == first and not checkpoints.is_kept_outside
    sink.error = None
    assert checkpoints.newest() == first  # requests do not try again and again, and wait
    assert checkpoints.look().head.size == 5 and checkpoints.is_kept_outside
    assert signed_by(checkpoints, database, 1).note == sink.read()


def test_a_log_is_noticed_as_changed_although_the_sink_fails(database_url: URL, tmp_path: Path) -> None:
    database, sink = Database(database_url), _Broken(tmp_path / "checkpoint")
    checkpoints = Checkpoints(database, SIGNER, sink)
    checkpoints.look()
    signed_by(checkpoints, database, 3)
    sink.error = OSError()
    signed_by(checkpoints, database, 1)
    execute(database_url, "UPDATE ledger_head SET frontier[1] = sha256('x')")
    with pytest.raises(LedgerInconsistent, match="does not begin with the 3"):
        checkpoints.newest()
    database.close()


def test_what_is_outside_never_goes_back(database: Database, tmp_path: Path) -> None:
    """One that signed and died before its commit leaves a newer one there than the database has."""
    sink = FileSink(tmp_path / "checkpoint")
    checkpoints = Checkpoints(database, SIGNER, sink)
    checkpoints.look()
    assert signed_by(checkpoints, database, 5).note == sink.read()
    append_events(database, LOGIN)
    with database.transaction() as connection:
        head = read_head(connection, SIGNER.name)[0]
    uncommitted = str(sign_checkpoint(SIGNER, head.size, head.root))
    sink.write(uncommitted)
    with database.transaction() as connection:
        connection.execute(text("UPDATE ledger_checkpoints SET signed_at = now() + interval '0.9 s' - interval '1 s'"))
    restarted = Checkpoints(database, SIGNER, sink)
    assert restarted.look().head.size == 5  # too young for another
    assert sink.read() == uncommitted
    age_checkpoints(database)
    assert restarted.look().note == uncommitted == sink.read()


def test_a_sink_that_is_behind_is_given_the_newest_at_the_start(database: Database, tmp_path: Path) -> None:
    sink = FileSink(tmp_path / "checkpoint")
    newest = signed_by(Checkpoints(database, SIGNER), database, 5)
    assert Checkpoints(database, SIGNER, sink).look() == newest
    assert sink.read() == newest.note


def test_an_error_that_nobody_foresaw_does_not_end_the_watch(database: Database, tmp_path: Path) -> None:
    sink = _Broken(tmp_path / "checkpoint")
    sink.error = KeyError("nobody foresaw this")
    metrics = Metrics()
    watch = LedgerWatch(Checkpoints(database, SIGNER, sink), metrics)
    watch.look()
    assert b"audit_checkpoint_kept 0.0" in metrics.exposition()
    sink.error = None
    watch.look()
    assert b"audit_checkpoint_kept 1.0" in metrics.exposition()


@pytest.fixture
def restored(own_cluster: Any, tmp_path: Path) -> Iterator[tuple[URL, Path]]:
    """A log of 400 events, restored by pg_restore from a backup of its first 300; and the file of its checkpoint."""
    own_cluster.create_database("audit")
    url = own_cluster.url("audit")
    migrations.upgrade(url)
    sink, backup = tmp_path / "checkpoint", tmp_path / "backup"
    with running_app(settings_with(url, sink)) as client:
        client.post("/events/batch", json=[LOGIN] * 300)
        eventually(lambda: kept_size(client.get("/ledger/checkpoint").text) == 300)
        _run(own_cluster, "pg_dump", "--format=custom", f"--file={backup}", url)
        client.post("/events/batch", json=[LOGIN] * 100)
        eventually(lambda: kept_size(sink.read_text()) == 400)
    execute(own_cluster.url(), "DROP DATABASE audit WITH (FORCE)")
    own_cluster.create_database("audit")
    _run(own_cluster, "pg_restore", "--dbname", url, str(backup))
    yield url, sink


def _run(cluster: Any, program: str, *arguments: Any) -> None:
    texts = [
        argument.set(drivername="postgresql").render_as_string(hide_password=False)
        if isinstance(argument, URL)
        else argument
        for argument in arguments
    ]
    subprocess.run([str(cluster.binaries / program), *texts], check=True)


def test_a_restored_backup_is_noticed_and_goes_on_under_a_new_origin(
    restored: tuple[URL, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The walk of runbook.md, A backup was restored."""
    url, sink = restored
    with running_app(settings_with(url, sink)) as client:
        detail = client.get("/ready").json()["detail"]
        assert "300 leaves, and a checkpoint of 400 was signed" in detail
        client.post("/events/batch", json=[LOGIN] * 50)  # events are still taken; the old log never had these

    successor = generate_signer("audit.test/log-2")
    monkeypatch.setenv("LEDGER_SIGNING_KEY", successor.secret_text())
    key = str(SIGNER.verifier)
    status, lines, errors = run_cli(url, "ledger", "continue", "--checkpoint", str(sink), "--key", key, "--by", "carol")
    assert (status, errors) == (0, "")
    assert lines[0] == "audit.test/log vouched for 400 events: at least 300 are here, at most 100 are lost."

    new_sink = sink.with_name("checkpoint-2")
    with running_app(settings_with(url, new_sink, ledger_signing_key=successor.secret_text())) as client:
        assert client.get("/ready").status_code == 200
        (event,) = client.get("/events", params={"event_type": "audit.ledger.continue"}).json()["events"]
        assert (event["id"], event["actor"]) == (351, "carol")
        assert event["metadata"]["checkpoint"] == sink.read_text()
        assert (event["metadata"]["size"], event["metadata"]["kept_at_least"]) == (400, 300)
        head, _ = open_checkpoint(client.get("/ledger/checkpoint").text, successor.verifier)
        assert head.size == 351
        # What the old log's first 300 were is proved by the checkpoint of that size, which the backup has.
        _prove_continuation(client, url, head.size)


def test_kept_is_what_the_old_key_signed_and_the_tree_begins_with(database_url: URL) -> None:
    database = Database(database_url)
    note = signed_by(Checkpoints(database, SIGNER), database, 5).note
    append_events(database, *[LOGIN] * 9)  # after the restore
    forged = note.replace("/log\n5\n", "/log\n7\n")
    never_here = str(sign_checkpoint(SIGNER, 6, bytes(32)))
    for size, stored in ((7, forged), (6, never_here)):
        values = f"'{SIGNER.name}', {size}, sha256('x'), '{stored}', now()"
        execute(database_url, f"INSERT INTO ledger_checkpoints (origin, size, root, note, signed_at) VALUES ({values})")
    lost = str(sign_checkpoint(SIGNER, 12, bytes(32)))
    for old, kept in ((note, 5), (lost, 5), (str(sign_checkpoint(SIGNER, 4, bytes(32))), 0)):
        found = record_continuation(database, old, SIGNER.verifier, "audit.test/log-2", "carol")
        assert (found.kept_at_least, found.lost_at_most) == (kept, found.old.size - kept)
    database.close()


def _prove_continuation(client: httpx.Client, url: URL, size: int) -> None:
    note = execute(
        url, "SELECT note FROM ledger_checkpoints WHERE origin = 'audit.test/log' ORDER BY size DESC LIMIT 1"
    )
    old, _ = open_checkpoint(note, SIGNER.verifier)
    new = client.get("/ledger/checkpoint").text.split("\n")
    answer = client.get("/ledger/consistency", params={"from": old.size, "to": size}).json()
    path = [base64.b64decode(node) for node in answer["consistency_path"]]
    assert old.size == 300
    assert proves_consistency(old.size, old.root, size, base64.b64decode(new[2]), path)
