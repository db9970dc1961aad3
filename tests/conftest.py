"""Real PostgreSQL servers for the tests: each test that asks for one runs on every server there is.

A session has a template database, made by `alembic upgrade head`; a test that writes gets a clone of it.
"""

import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import pytest
import uvicorn
from fastapi import FastAPI
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool
from verify import assert_ledger_consistent

import migrations
from cluster import Cluster
from config import ROOT, Settings
from db import Database, embedded_binaries
from ledger.notes import generate_signer
from main import create_app
from server import OneWriteProtocol

SIGNER = generate_signer("audit.test/log")
API_KEY = "test-key-of-the-suite"
TEMPLATE = "audit_test_template"

# Set and empty counts as not set, and a developer's .env cannot fill it.
SCRUBBED = (
    "API_KEY",
    "AUDIT_READS",
    "CHECKPOINT_INTERVAL",
    "CHECKPOINT_SINK",
    "COUNT_LIMIT",
    "DATABASE_OWNER_URL",
    "DATABASE_READ_URL",
    "DATABASE_URL",
    "DATA_DIR",
    "DB_HOST",
    "DB_NAME",
    "DB_OWNER_PASSWORD",
    "DB_OWNER_USER",
    "DB_PASSWORD",
    "DB_PORT",
    "DB_USER",
    "ENVIRONMENT",
    "HOST",
    "IDEMPOTENCY_WINDOW",
    "LEDGER_ORIGIN",
    "LEDGER_SIGNING_KEY",
    "LEDGER_SIGNING_KEY_FILE",
    "LOG_LEVEL",
    "LOG_WRITES",
    "MAX_CLOCK_SKEW",
    "MAX_STREAMS_PER_KEY",
    "PORT",
    "QUERY_TIMEOUT",
    "RATE_LIMIT",
    "RETENTION_DAYS",
    "RUN_MIGRATIONS",
    "TLS_CERT_FILE",
    "TLS_KEY_FILE",
    "TRUSTED_PROXIES",
    "WORKERS",
)

# How long an example takes is the machine's affair, which is shared: a property fails for what it finds only.
hypothesis.settings.register_profile("audit", deadline=None)
hypothesis.settings.load_profile("audit")

BINARIES = {"embedded": embedded_binaries()}
if (debian_15 := Path("/usr/lib/postgresql/15/bin")).is_dir():
    BINARIES["debian15"] = debian_15
TEST_DATABASE_URL = os.environ.get("TEST_DATABASE_URL")
SERVERS = [*BINARIES, *(["TEST_DATABASE_URL"] if TEST_DATABASE_URL else [])]

_versions: dict[str, str] = {}
_names = (f"audit_test_{os.getpid()}_{number}" for number in itertools.count())


def pytest_addoption(parser: pytest.Parser) -> None:
    faults = parser.getgroup("faults", "tests/faults: what one run of the rounds does")
    faults.addoption("--rounds", type=int, default=100)
    faults.addoption("--first-round", type=int, default=0, help="with a seed: the round to begin with")
    faults.addoption(
        "--seed", help="what decides every choice, of the requests in tests/security too; each run prints it"
    )
    faults.addoption("--server", choices=list(BINARIES), help="Debian's 15 where it is, unless told otherwise")
    faults.addoption("--requests", type=int, default=200_000, help="how many tests/security mutates")


def execute(url: URL, statement: str) -> Any:
    """Run one statement, outside a transaction; return the first column of its first row, if any."""
    engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        result = connection.execute(text(statement))
        return result.scalar() if result.returns_rows else None


@dataclass(frozen=True)
class Server:
    """A PostgreSQL server on which the tests may create databases."""

    admin_url: URL

    def url(self, database: str) -> URL:
        return self.admin_url.set(database=database)

    @contextmanager
    def database(self, template: str = "template1") -> Iterator[URL]:
        """A database of one test's own, gone when the block ends."""
        name = next(_names)
        execute(self.admin_url, f"CREATE DATABASE {name} TEMPLATE {template}")
        try:
            yield self.url(name)
        finally:
            execute(self.admin_url, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session", autouse=True)
def _scrubbed_environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in SCRUBBED:
            patch.setenv(name, "")
        patch.setenv("LEDGER_SIGNING_KEY", SIGNER.secret_text())  # without one no service starts
        yield


@contextmanager
def running_cluster(binaries: Path) -> Iterator[Cluster]:
    """A server of its own on an empty data directory. It need not survive a power cut, so no fsync."""
    with tempfile.TemporaryDirectory(prefix="audit-test-") as folder:
        Path(folder).chmod(0o711)  # the server may run as another user than we do
        cluster = Cluster(binaries, Path(folder) / "postgres", {"fsync": "off", "max_connections": "50"})
        cluster.start()
        try:
            yield cluster
        finally:
            if cluster.is_running():
                cluster.stop("immediate")


@pytest.fixture(scope="session", params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """Each server in turn, with the template database on it."""
    if request.param == "TEST_DATABASE_URL":
        url = make_url(str(TEST_DATABASE_URL)).set(drivername="postgresql+psycopg2")
        yield from _with_template(Server(url), request.param)
        return
    with running_cluster(BINARIES[request.param]) as cluster:
        yield from _with_template(Server(cluster.url()), request.param)


def _with_template(server: Server, name: str) -> Iterator[Server]:
    _versions[name] = execute(server.admin_url, "SHOW server_version")
    execute(server.admin_url, f"DROP DATABASE IF EXISTS {TEMPLATE}")
    execute(server.admin_url, f"CREATE DATABASE {TEMPLATE}")
    migrations.upgrade(server.url(TEMPLATE))
    yield server
    execute(server.admin_url, f"DROP DATABASE {TEMPLATE}")


@pytest.fixture(params=list(BINARIES))
def own_cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A server that one test may stop, freeze or kill."""
    with running_cluster(BINARIES[request.param]) as cluster:
        yield cluster


@pytest.fixture
def database_url(server: Server) -> Iterator[URL]:
    """A migrated database of the test's own."""
    with server.database(TEMPLATE) as url:
        yield url


@pytest.fixture
def database(database_url: URL) -> Iterator[Database]:
    """The same, opened; its log is checked at the end."""
    database = Database(database_url)
    yield database
    database.close()
    assert_ledger_consistent(database_url)


@pytest.fixture(scope="module")
def one_database_url(request: pytest.FixtureRequest) -> Iterator[URL]:
    """A migrated database on a server of its own, on one release: for what takes minutes."""
    name = request.config.getoption("--server") or ("debian15" if "debian15" in BINARIES else "embedded")
    with running_cluster(BINARIES[name]) as cluster:
        for server in _with_template(Server(cluster.url()), name):
            with server.database(TEMPLATE) as url:
                yield url


@pytest.fixture
def empty_database_url(server: Server) -> Iterator[URL]:
    """A database of the test's own with nothing in it."""
    with server.database() as url:
        yield url


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def eventually(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until the condition holds, and fail where it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.05)


def copy_of_the_project(folder: Path) -> None:
    """What a clone would hold, with the changes that are not committed yet."""
    tracked = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True)
    for name in tracked.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def settings_for(url: URL, **changes: Any) -> Settings:
    return Settings(**{"database_url": url, "api_key": API_KEY, "ledger_signing_key": SIGNER.secret_text(), **changes})


@contextmanager
def running_app(
    settings: Settings, app: FastAPI | None = None, protocol: Any = OneWriteProtocol
) -> Iterator[httpx.Client]:
    """The app behind a real HTTP server on a free port, with a client that presents the suite's key."""
    # asyncio turns Nagle's algorithm off only where the socket says that it is TCP.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        config = uvicorn.Config(app or create_app(settings), http=protocol, log_config=None, access_log=False)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        base_url = "http://{}:{}".format(*listener.getsockname())
        try:
            with httpx.Client(base_url=base_url, headers={"X-API-Key": API_KEY}, timeout=30) as client:
                yield client  # the listener queues what comes before the app has started
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def _shared_service(server: Server) -> Iterator[tuple[httpx.Client, URL, FastAPI]]:
    """One service for all tests that only need an empty log: starting one takes 0.3 s."""
    with server.database(TEMPLATE) as url:
        app = create_app(settings_for(url))
        with running_app(settings_for(url), app) as client:
            yield client, url, app


@pytest.fixture(scope="session")
def _shared_app(_shared_service: tuple[httpx.Client, URL, FastAPI]) -> tuple[httpx.Client, URL]:
    return _shared_service[:2]


@pytest.fixture
def client(_shared_service: tuple[httpx.Client, URL, FastAPI]) -> Iterator[httpx.Client]:
    """A client of a running service whose log is empty."""
    client, url, app = _shared_service
    assert client.get("/health").status_code == 200  # started: it has looked at the ledger that is emptied now
    # In the order in which housekeeping, whose first round may be under way, locks them.
    tables = "rewrites_due, api_keys, legal_holds, idempotency_keys, ledger_checkpoints, ledger_cosignatures"
    execute(url, f"TRUNCATE {tables}, ledger_tiles, audit_events")
    execute(url, "UPDATE ledger_head SET first_id = 1, size = 0, frontier = '{}'")
    app.state.checkpoints._known = None  # as a restart would: a ledger that was emptied is one that it refuses
    yield client
    assert_ledger_consistent(url)


def is_listening(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return False
    return True


@contextmanager
def served(url: URL, log: Path, **variables: str) -> Iterator[httpx.Client]:
    """`python cli.py serve` on a free port; its standard output goes to the log file."""
    port = free_port()
    environment = {
        **os.environ,
        "DATABASE_URL": url.render_as_string(hide_password=False),
        "API_KEY": API_KEY,
        "PORT": str(port),
        **variables,
    }
    with log.open("w") as output, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        client.headers["X-API-Key"] = API_KEY
        process = subprocess.Popen(
            [sys.executable, "cli.py", "serve"], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            eventually(lambda: is_listening(port) or process.poll() is not None)
            yield client
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0, log.read_text()


def run_cli(url: URL, *arguments: str, **variables: str) -> tuple[int, list[str], str]:
    """`python cli.py …` on this database: its exit status, the lines that it printed, and what it complained of."""
    environment = {**os.environ, "DATABASE_URL": url.render_as_string(hide_password=False), **variables}
    command = [sys.executable, "cli.py", *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    # Lines end at LF only: JSON may hold other line breaks.
    return result.returncode, result.stdout.removesuffix("\n").split("\n") if result.stdout else [], result.stderr


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, version in _versions.items():
        terminalreporter.write_line(f"ran on PostgreSQL {version} ({name})")
