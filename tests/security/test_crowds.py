"""2,000 slow connections and 5,000 idle ones: who behaves well beside them hardly notices."""

import http.client
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO

import pytest
from conftest import API_KEY, eventually, served
from sqlalchemy.engine import URL

pytestmark = pytest.mark.security

SLOW, IDLE = 2_000, 5_000
FILES = 10_000  # descriptors that the service needs, and the crowd
ROUNDS, REQUESTS = 3, 1_000
MOST = 3.0  # times the p99 that it has alone
EVENT = json.dumps({"event_type": "LOGIN", "actor": "alice"})


@pytest.fixture
def many_files() -> Iterator[None]:
    """Let the processes that the test starts hold so many connections."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limits[1] != resource.RLIM_INFINITY and limits[1] < FILES:
        pytest.skip(f"needs {FILES} file descriptors, and the machine gives {limits[1]}: ulimit -Hn")
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@contextmanager
def crowd(port: int, slow: int, idle: int) -> Iterator[None]:
    """So many connections, nine in ten of which hold at any moment: whom the service cuts off comes back."""
    command = [sys.executable, str(Path(__file__).parent / "crowd.py"), *map(str, (port, slow, idle))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdin is not None and process.stdout is not None

        def count(stdin: IO[str] = process.stdin, stdout: IO[str] = process.stdout) -> int:
            print(file=stdin, flush=True)
            return int(stdout.readline())

        try:
            eventually(lambda: count() > (slow + idle) * 0.9, seconds=180)
            yield
            assert count() > (slow + idle) * 0.9
        finally:
            process.stdin.close()
            process.terminate()


def p99_ms(port: int) -> float:
    """Of POST and GET in turn over one connection."""
    times = []
    with closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
        for number in range(REQUESTS):
            started = time.perf_counter()
            method, path, body = ("POST", "/events", EVENT) if number % 2 else ("GET", "/events?limit=1", None)
            connection.request(method, path, body, {"X-API-Key": API_KEY, "Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            times.append((time.perf_counter() - started) * 1e3)
            assert answer.status in (200, 201)
    return sorted(times)[REQUESTS * 99 // 100]


def test_slow_and_idle_connections_leave_others_alone(one_database_url: URL, tmp_path: Path, many_files: None) -> None:
    with served(one_database_url, tmp_path / "service.log", WORKERS="2") as client:
        port = int(client.base_url.port or 0)
        p99_ms(port)
        alone, beside = [], []
        for _ in range(ROUNDS):
            alone.append(p99_ms(port))
            with crowd(port, SLOW, IDLE):
                beside.append(p99_ms(port))
    ratio = statistics.median(beside) / statistics.median(alone)
    print(f"\np99 alone {alone} ms, beside {SLOW} slow and {IDLE} idle connections {beside} ms: {ratio:.2f} times")
    assert ratio <= MOST
