"""What the benchmarks run: a PostgreSQL of their own, databases filled once and cloned, and the two services."""

import fcntl
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import httpx
import psycopg2
from psycopg2.extensions import connection as Connection
from sqlalchemy.engine import URL

import migrations
from cluster import Cluster
from config import ROOT, kept_secret
from db import embedded_binaries
from ledger.notes import generate_signer

DATA_DIR = ROOT / ".data" / "bench"
DEBIAN_15 = Path("/usr/lib/postgresql/15/bin")

# The same for every side of a comparison. Autovacuum is off, for it would work on one side's database in the
# other side's round: each round starts with a VACUUM instead.
SERVER_SETTINGS = {
    "shared_buffers": "2GB",
    "max_wal_size": "8GB",
    "max_connections": "400",
    "autovacuum": "off",
    "synchronous_commit": "on",
    "fsync": "on",
}
# While a template is filled nothing needs to survive a crash: a half-filled one is dropped.
_FILLING_SETTINGS = {**SERVER_SETTINGS, "fsync": "off", "wal_level": "minimal", "max_wal_senders": "0"}

WORKERS = 2
SERVE_COMMAND = ["cli.py", "serve"]
PLAIN_COMMAND = ["-m", "uvicorn", "bench.plain_fastapi:app", "--workers", str(WORKERS), "--no-access-log"]


def binaries() -> Path:
    return DEBIAN_15 if DEBIAN_15.is_dir() else embedded_binaries()


@dataclass(frozen=True)
class Server:
    """The running PostgreSQL."""

    cluster: Cluster

    def clone(self, template: str, name: str) -> URL:
        """A fresh copy of the template, under this name."""
        self.execute("postgres", f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        self.execute("postgres", f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY FILE_COPY")
        return self.cluster.url(name)

    def execute(self, database: str, statement: str, *values: object) -> list[tuple[object, ...]]:
        with closing(connect(self.cluster.url(database))) as connection, connection.cursor() as cursor:
            connection.autocommit = True
            cursor.execute(statement, values)
            return cursor.fetchall() if cursor.description else []

    def settle(self, database: str) -> None:
        """The state in which every round starts: no dead rows, no pending GIN entries, nothing to write back."""
        self.execute(database, "VACUUM audit_events, ledger_head")
        self.execute(database, "CHECKPOINT")


def template_name(rows: int, months: int) -> str:
    """Named for its last month too: in the next one, another partition is written to."""
    return f"events_{rows}_in_{months}_months_to_{datetime.now(UTC):%Y_%m}"


def connect(url: URL) -> Connection:
    return psycopg2.connect(url.set(drivername="postgresql").render_as_string(hide_password=False))


@contextmanager
def running_server(templates: Mapping[str, Callable[[URL], object]]) -> Iterator[Server]:
    """A server that has the templates: name → what fills it. They stay in DATA_DIR, so the next run has them."""
    DATA_DIR.mkdir(parents=True, exist_ok=True)
    data_dir = DATA_DIR / "postgres"
    with _alone():
        with _started(data_dir, _FILLING_SETTINGS) as server:
            _drop_templates_of_other_months(server)
            for name, fill in templates.items():
                _make_template(server, name, fill)
        with _started(data_dir, SERVER_SETTINGS) as server:
            yield server


@contextmanager
def _alone() -> Iterator[None]:
    """Two benchmarks on one machine measure each other, and would stop each other's server."""
    with (DATA_DIR / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"another benchmark is running on {DATA_DIR}") from None
        yield


@contextmanager
def _started(data_dir: Path, settings: Mapping[str, str]) -> Iterator[Server]:
    cluster = Cluster(binaries(), data_dir, settings)
    cluster.start()
    try:
        yield Server(cluster)
    finally:
        cluster.stop()


def _drop_templates_of_other_months(server: Server) -> None:
    pattern = template_name(0, 0).replace("0_in_0", "%_in_%")
    names = "SELECT datname FROM pg_database WHERE datname LIKE 'events_%%' AND datname NOT LIKE %s"
    for (name,) in server.execute("postgres", names, pattern):
        server.execute("postgres", f"DROP DATABASE {name}")


def _make_template(server: Server, name: str, fill: Callable[[URL], object]) -> None:
    """Fill it under another name first: a template with the right name is a whole one."""
    if server.execute("postgres", "SELECT 1 FROM pg_database WHERE datname = %s", name):
        migrations.upgrade(server.cluster.url(name))
        return
    server.execute("postgres", "DROP DATABASE IF EXISTS filling")
    server.execute("postgres", "CREATE DATABASE filling")
    migrations.upgrade(server.cluster.url("filling"))
    fill(server.cluster.url("filling"))
    server.execute("postgres", f"ALTER DATABASE filling RENAME TO {name}")


@dataclass(frozen=True)
class Service:
    """A running HTTP service, and the key that it takes."""

    url: str
    api_key: str
    pid: int


@contextmanager
def running_service(command: list[str], database: URL, variables: Mapping[str, str] | None = None) -> Iterator[Service]:
    """Run it until the block ends, with what it logs in DATA_DIR."""
    port = _free_port()
    api_key = secrets.token_hex(16)
    environment = {
        **os.environ,
        "DATABASE_URL": database.render_as_string(hide_password=False),
        "API_KEY": api_key,
        "WORKERS": str(WORKERS),
        "HOST": "127.0.0.1",
        "PORT": str(port),
        "UVICORN_PORT": str(port),
        # The same for all runs: a log that stays knows its checkpoints by their key.
        "LEDGER_SIGNING_KEY": kept_secret(
            DATA_DIR / "ledger_signing_key", lambda: generate_signer("audit.example/benchmark").secret_text()
        ),
        **(variables or {}),
    }
    with (DATA_DIR / f"{database.database}.log").open("w") as log:
        process = subprocess.Popen(  # noqa: S603 - commands are ours
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=log,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_it_answers(url, process)
            yield Service(url, api_key, process.pid)
        finally:
            process.terminate()
            process.wait(timeout=60)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def _wait_until_it_answers(url: str, process: "subprocess.Popen[bytes]") -> None:
    for _ in range(300):
        if process.poll() is not None:
            raise SystemExit(f"the service ended with status {process.returncode}: see the logs in {DATA_DIR}")
        try:
            httpx.get(f"{url}/health", timeout=1)
            return
        except httpx.TransportError:
            time.sleep(0.1)
    raise SystemExit(f"the service does not answer: see the logs in {DATA_DIR}")


def require(program: str, package: str) -> str:
    """The program's path; where it is missing, how to get it."""
    if (path := shutil.which(program)) is None:
        raise SystemExit(f"{program} is missing: apt-get install {package}")
    return path
