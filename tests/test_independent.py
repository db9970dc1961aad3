"""Verifiers that this project did not write accept the log, and reject it once it was tampered with.

Go's golang.org/x/mod/sumdb, from Debian (golang-go, golang-golang-x-mod-dev): tests/independent/verifier.go.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from conftest import API_KEY, SIGNER, running_app, settings_for
from months import append_events
from sqlalchemy.engine import URL
from test_attacks import attack
from test_verify import plain

from config import ROOT
from db import Database
from ledger.notes import generate_signer

SOURCE = ROOT / "tests" / "independent" / "verifier.go"
GO_PATH = Path("/usr/share/gocode")  # where Debian puts the sources of its Go packages
OLD_SIZE = 300


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The verifier, compiled without the network. In CI it must be there."""
    has_go = shutil.which("go") is not None and (GO_PATH / "src/golang.org/x/mod/sumdb").is_dir()
    if not has_go and "CI" not in os.environ:
        pytest.skip("needs: apt-get install golang-go golang-golang-x-mod-dev")
    built = tmp_path_factory.mktemp("independent") / "verifier"
    environment = {
        **os.environ,
        "GO111MODULE": "off",
        "GOPATH": str(GO_PATH),
        "GOCACHE": str(built.parent / "cache"),
        "GOFLAGS": "",
    }
    subprocess.run(["go", "build", "-o", str(built), str(SOURCE)], env=environment, check=True)
    return built


@pytest.fixture
def log(database_url: URL) -> Iterator[tuple[URL, httpx.Client]]:
    """1,000 events, all of them under a checkpoint."""
    database = Database(database_url)
    for _ in range(4):
        append_events(database, *plain(250))
    database.close()
    with running_app(settings_for(database_url)) as client:
        assert client.get("/events/1000/proof").status_code == 200
        yield database_url, client


def judge(program: Path, client: httpx.Client, key: str = str(SIGNER.verifier)) -> tuple[int, str]:
    command = [str(program), str(client.base_url), key, API_KEY, str(OLD_SIZE)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.returncode, result.stdout.strip()


def test_go_accepts_the_log(program: Path, log: tuple[URL, httpx.Client]) -> None:
    assert judge(program, log[1]) == (0, "OK: 1000 entries")


def test_go_rejects_another_key(program: Path, log: tuple[URL, httpx.Client]) -> None:
    status, said = judge(program, log[1], str(generate_signer(SIGNER.name).verifier))
    assert (status, said) == (1, "note has no verifiable signatures")


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        (
            "UPDATE audit_events SET event_type = 'LOGOUT' WHERE id = 300",
            "the entry of leaf 299 is not that of its tile",
        ),
        ("UPDATE audit_events SET event_type = 'LOGOUT' WHERE id = 990", "downloaded inconsistent tile"),
        ("DELETE FROM audit_events WHERE id = 300", "404"),
        (
            "UPDATE ledger_tiles SET hashes = decode(repeat('00', 8192), 'hex') WHERE tile_index = 1",
            "of leaf 256",
        ),
        ("UPDATE ledger_tiles SET root = sha256('x') WHERE tile_index = 1", "inconsistent tile"),
    ],
)
def test_go_rejects_a_log_that_was_tampered_with(
    program: Path, log: tuple[URL, httpx.Client], statement: str, said: str
) -> None:
    attack(log[0], statement)
    status, complaint = judge(program, log[1])
    assert (status, said in complaint) == (1, True), complaint
