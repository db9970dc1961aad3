"""Witnesses: what they are asked, what they answer, and how their signatures are served."""

import os
import socket
import subprocess
import sys
import threading
from base64 import b64decode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from conftest import SIGNER, execute, run_cli
from sqlalchemy.engine import URL

from config import ROOT
from ledger.notes import COSIGNATURE, Signer, TreeHead, generate_signer, open_checkpoint, parse_note, sign_checkpoint
from ledger.tree import EMPTY_ROOT, proves_consistency

LOGIN = {"event_type": "LOGIN", "actor": "alice"}


class Witness:
    """A witness by the book (c2sp.org/tlog-witness): it signs what goes on from what it signed last."""

    def __init__(self) -> None:
        self.signer = generate_signer("witness.test/w1", COSIGNATURE)
        self.last = TreeHead(SIGNER.name, 0, EMPTY_ROOT)
        self.clock = 1_700_000_000

    def answer(self, body: str) -> tuple[int, str]:
        lines, _, note = body.partition("\n\n")
        old, *path = lines.split("\n")
        head, opened = open_checkpoint(note, SIGNER.verifier)
        if old != f"old {self.last.size}":
            return 409, f"{self.last.size}\n"
        proof = [b64decode(line, validate=True) for line in path]
        if not proves_consistency(self.last.size, self.last.root, head.size, head.root, proof):
            return 422, ""
        self.last, self.clock = head, self.clock + 1
        return 200, str(self.signer.cosign(opened.text, self.clock))


@contextmanager
def served_witness(witness: Witness) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/prefix/add-checkpoint"
            status, body = witness.answer(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode("utf-8", "surrogateescape"))

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/prefix/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def url(client: httpx.Client, _shared_app: tuple[httpx.Client, URL]) -> URL:
    return _shared_app[1]


def grow(client: httpx.Client, count: int) -> None:
    last = client.post("/events/batch", json=[LOGIN] * count).json()["last_id"]
    assert client.get(f"/events/{last}/proof").status_code == 200  # there is a checkpoint that has it


def cosignatures_in(note: str, signer: Signer) -> int:
    """The size that the note's checkpoint names, which the log and this witness have both signed."""
    head, opened = open_checkpoint(note, SIGNER.verifier)
    signature = signer.verifier.signature_in(opened.signatures, opened.text)
    assert signature is not None and signature.timestamp > 1_700_000_000
    return head.size


def test_a_witness_is_asked_and_its_signature_is_served(client: httpx.Client, url: URL) -> None:
    witness = Witness()
    vkey = str(witness.signer.verifier)
    assert client.get("/ledger/checkpoint", params={"cosigned": True}).status_code == 404
    with served_witness(witness) as prefix:
        for count in (10, 300, 1):
            grow(client, count)
            status, lines, errors = run_cli(url, "ledger", "cosign", "--witness", vkey, "--url", prefix)
            assert (status, errors) == (0, "")
            note = client.get("/ledger/checkpoint", params={"cosigned": True}).text
            assert cosignatures_in(note, witness.signer) == witness.last.size
            assert f"size {witness.last.size} " in lines[0]
    assert witness.last.size == 311
    assert len(parse_note(client.get("/ledger/checkpoint").text).signatures) == 1


def test_two_witnesses_sign_one_checkpoint(client: httpx.Client, url: URL) -> None:
    grow(client, 3)
    witnesses = [Witness(), Witness()]
    for witness in witnesses:
        with served_witness(witness) as prefix:
            run_cli(url, "ledger", "cosign", "--witness", str(witness.signer.verifier), "--url", prefix)
    note = client.get("/ledger/checkpoint", params={"cosigned": True}).text
    assert [cosignatures_in(note, witness.signer) for witness in witnesses] == [3, 3]


def test_the_request_can_be_carried_by_hand(client: httpx.Client, url: URL, tmp_path: Path) -> None:
    witness = Witness()
    vkey = str(witness.signer.verifier)
    grow(client, 5)
    _, lines, _ = run_cli(url, "ledger", "cosign-request", "--witness", vkey)
    request = "\n".join(lines) + "\n"
    status, answer = witness.answer(request)
    assert status == 200
    grow(client, 5)  # meanwhile
    (file := tmp_path / "request").write_text(request)
    assert _cosign(url, vkey, str(file), answer)[0] == 0
    note = client.get("/ledger/checkpoint", params={"cosigned": True}).text
    assert cosignatures_in(note, witness.signer) == 5


def test_a_signature_that_does_not_verify_is_not_kept(client: httpx.Client, url: URL, tmp_path: Path) -> None:
    witness, other = Witness(), Witness()
    grow(client, 5)
    vkey = str(witness.signer.verifier)
    _, lines, _ = run_cli(url, "ledger", "cosign-request", "--witness", vkey)
    (file := tmp_path / "request").write_text("\n".join(lines) + "\n")
    forged = str(witness.signer.cosign("other\n1\nAAAA\n", 1_700_000_001))
    assert "does not verify" in _cosign(url, vkey, str(file), forged)[1]
    strange = str(other.signer.cosign("other\n1\nAAAA\n", 1_700_000_001))
    assert "no signature of witness.test/w1" in _cosign(url, vkey, str(file), strange)[1]
    assert client.get("/ledger/checkpoint", params={"cosigned": True}).status_code == 404


@pytest.mark.parametrize("is_signed", [False, True])
def test_what_is_signed_under_another_checkpoint_is_not_kept(
    client: httpx.Client, url: URL, tmp_path: Path, is_signed: bool
) -> None:
    witness = Witness()
    vkey = str(witness.signer.verifier)
    grow(client, 5)
    signer = SIGNER if is_signed else generate_signer(SIGNER.name)
    doctored = sign_checkpoint(signer, 5, bytes(32))
    (file := tmp_path / "request").write_text(f"old 0\n\n{doctored}")
    status, complaint = _cosign(url, vkey, str(file), str(witness.signer.cosign(doctored.text, 1_700_000_001)))
    said = "not the one of size 5 that is kept here" if is_signed else "has not signed it"
    assert status == 1 and said in complaint and "Traceback" not in complaint, complaint
    assert client.get("/ledger/checkpoint", params={"cosigned": True}).status_code == 404


@pytest.mark.parametrize("moment", [253_402_300_800, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_signature_of_no_year_is_not_kept(client: httpx.Client, url: URL, tmp_path: Path, moment: int) -> None:
    witness = Witness()
    vkey = str(witness.signer.verifier)
    grow(client, 5)
    _, lines, _ = run_cli(url, "ledger", "cosign-request", "--witness", vkey)
    (file := tmp_path / "request").write_text("\n".join(lines) + "\n")
    _, opened = open_checkpoint("\n".join(lines).partition("\n\n")[2] + "\n", SIGNER.verifier)
    status, complaint = _cosign(url, vkey, str(file), str(witness.signer.cosign(opened.text, moment)))
    assert status == 1 and f"has signed at {moment} in Unix time" in complaint and "Traceback" not in complaint
    assert client.get("/ledger/checkpoint", params={"cosigned": True}).status_code == 404


def test_only_a_witness_key_cosigns(client: httpx.Client, url: URL, tmp_path: Path) -> None:
    grow(client, 5)
    note = client.get("/ledger/checkpoint").text
    (file := tmp_path / "request").write_text(f"old 0\n\n{note}")
    status, complaint = _cosign(url, str(SIGNER.verifier), str(file), note.rpartition("\n\n")[2])
    assert status == 1 and "is none of a witness" in complaint


def test_a_log_shorter_than_what_the_witness_has_seen_is_told(client: httpx.Client, url: URL) -> None:
    witness = Witness()
    vkey = str(witness.signer.verifier)
    grow(client, 4)
    said = "The witness has signed a checkpoint of size 5, and the log's newest has 4: the log is shorter"
    for command in (["cosign-request"], ["cosign", "--url", "http://127.0.0.1:1"]):
        status, lines, complaint = run_cli(url, "ledger", *command, "--witness", vkey, "--old-size", "5")
        assert (status, lines) == (1, []) and complaint.startswith(f"audit-service: {said}"), complaint
    assert "invalid" in run_cli(url, "ledger", "cosign-request", "--witness", vkey, "--old-size", "-1")[2]
    with served_witness(witness) as prefix:
        assert run_cli(url, "ledger", "cosign", "--witness", vkey, "--url", prefix)[0] == 0
    execute(url, "DELETE FROM ledger_checkpoints")
    execute(url, f"INSERT INTO ledger_checkpoints SELECT '{SIGNER.name}', 3, sha256(''), '{shorter()}', now()")
    status, _, complaint = run_cli(url, "ledger", "cosign-request", "--witness", vkey)
    assert status == 1 and "a checkpoint of size 4, and the log's newest has 3" in complaint


@pytest.mark.parametrize("body", ["\udcff", "", "— witness.test/w1 AAAA\n", "\x00"])
def test_a_witness_that_answers_anything_is_told_plainly(client: httpx.Client, url: URL, body: str) -> None:
    witness = Witness()
    grow(client, 4)
    witness.answer = lambda _: (200, body)  # type: ignore[method-assign,assignment]
    with served_witness(witness) as prefix:
        for address in (prefix, "no-url", "http://[::1"):
            vkey = str(witness.signer.verifier)
            status, _, complaint = run_cli(url, "ledger", "cosign", "--witness", vkey, "--url", address)
            assert status == 1 and complaint.startswith("audit-service: ") and complaint.count("\n") == 1, complaint


def shorter() -> str:
    """A checkpoint of a log of three events."""
    return str(sign_checkpoint(SIGNER, 3, EMPTY_ROOT))


def test_a_witness_that_knows_more_says_how_to_go_on(client: httpx.Client, url: URL) -> None:
    witness = Witness()
    vkey = str(witness.signer.verifier)
    grow(client, 4)
    _, lines, _ = run_cli(url, "ledger", "cosign-request", "--witness", vkey)
    assert witness.answer("\n".join(lines) + "\n")[0] == 200  # and nobody kept what it signed
    grow(client, 4)
    with served_witness(witness) as prefix:
        status, _, complaint = run_cli(url, "ledger", "cosign", "--witness", vkey, "--url", prefix)
        assert status == 1 and "signed a checkpoint of size 4 last: name that with --old-size" in complaint
        assert run_cli(url, "ledger", "cosign", "--witness", vkey, "--url", prefix, "--old-size", "4")[0] == 0
    assert witness.last.size == 8


@pytest.mark.parametrize("answer", [b"220 mail.test ESMTP\r\n", b"HTTP/1.1 200 OK\r\n\r\n\xff\xfe"])
def test_a_witness_that_answers_nonsense_is_told_in_a_line(client: httpx.Client, url: URL, answer: bytes) -> None:
    grow(client, 1)
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(_answer_once, listener, answer)
        prefix = "http://{}:{}".format(*listener.getsockname())
        vkey = str(Witness().signer.verifier)
        status, _, complaint = run_cli(url, "ledger", "cosign", "--witness", vkey, "--url", prefix)
        asked.result()
    assert (status, complaint.count("\n")) == (1, 1)
    assert f"{prefix} does not answer as a witness does: " in complaint


def _answer_once(listener: socket.socket, answer: bytes) -> None:
    listener.settimeout(60)
    connection, _ = listener.accept()
    with connection:
        connection.sendall(answer)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(100_000):
            pass


def _cosign(url: URL, vkey: str, file: str, answer: str) -> tuple[int, str]:
    environment = {**os.environ, "DATABASE_URL": url.render_as_string(hide_password=False)}
    command = [sys.executable, "cli.py", "ledger", "cosign", "--witness", vkey, "--request", file]
    done = subprocess.run(command, cwd=ROOT, env=environment, input=answer, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr
