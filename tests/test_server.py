"""Several workers behind one port: they share the work, die and are replaced, and end with their supervisor."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import httpx
import psutil
import pytest
from conftest import API_KEY, eventually, free_port
from sqlalchemy.engine import URL
from verify import assert_ledger_consistent

from config import ROOT

LOGIN = {"event_type": "LOGIN", "actor": "alice"}


class Service:
    """A supervisor and its two workers."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"

    def workers(self) -> list[psutil.Process]:
        """Processes that listen on the port."""
        children = psutil.Process(self.process.pid).children()
        return [child for child in children if child.is_running() and child.net_connections("tcp4")]

    def post(self, count: int) -> set[int]:
        """Post so many events, each over a connection of its own; their ids."""
        with ThreadPoolExecutor(16) as threads:
            return set(threads.map(lambda _: self._post_one(), range(count)))

    def _post_one(self) -> int:
        answer = httpx.post(f"{self.url}/events", json=LOGIN, headers={"X-API-Key": API_KEY}, timeout=30)
        assert answer.status_code == 201, answer.text
        event_id: int = answer.json()["id"]
        return event_id

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ready").status_code == 200
        except httpx.TransportError:
            return False


@contextmanager
def service(url: URL, port: int) -> Iterator[Service]:
    environment = {
        **os.environ,
        "DATABASE_URL": url.render_as_string(hide_password=False),
        "API_KEY": API_KEY,
        "PORT": str(port),
        "WORKERS": "2",
    }
    process = subprocess.Popen([sys.executable, "cli.py", "serve"], cwd=ROOT, env=environment)
    try:
        running = Service(process, port)
        eventually(lambda: len(running.workers()) == 2 and running.is_ready())
        yield running
    finally:
        process.kill()
        process.wait()


def test_two_workers_write_one_log_and_count_together(database_url: URL) -> None:
    with service(database_url, free_port()) as running:
        assert running.post(200) == set(range(1, 201))
        metrics = httpx.get(f"{running.url}/metrics").text
        assert "audit_events_recorded_total 200.0" in metrics
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(30) == 0
    assert assert_ledger_consistent(database_url) == 200


def test_connections_are_dealt_out_to_the_workers(database_url: URL) -> None:
    port = free_port()
    with service(database_url, port) as running, ExitStack() as stack:
        for _ in range(64):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))

        def shares() -> list[int]:
            return [
                sum(each.status == psutil.CONN_ESTABLISHED for each in worker.net_connections("tcp4"))
                for worker in running.workers()
            ]

        eventually(lambda: sum(shares()) >= 64)
        assert min(shares()) >= 10


@pytest.mark.skipif(sys.platform != "linux", reason="another kind of scheduler")
def test_workers_interrupt_nobody_when_they_wake(database_url: URL) -> None:
    with service(database_url, free_port()) as running:
        eventually(running.is_ready)
        assert {os.sched_getscheduler(worker.pid) for worker in running.workers()} == {os.SCHED_BATCH}


def test_a_worker_that_dies_or_hangs_is_replaced(database_url: URL) -> None:
    with service(database_url, free_port()) as running:
        for number in (signal.SIGKILL, signal.SIGSTOP):
            victim = running.workers()[0]
            victim.send_signal(number)
            eventually(lambda victim=victim: not victim.is_running() and len(running.workers()) == 2)  # type: ignore[misc]
        assert running.post(50) == set(range(1, 51))


def test_workers_end_with_their_supervisor(database_url: URL) -> None:
    port = free_port()
    with service(database_url, port) as running:
        workers = running.workers()
        running.process.kill()
        running.process.wait()
        _, alive = psutil.wait_procs(workers, timeout=30)
        assert alive == []
    with service(database_url, port) as running:
        assert running.post(10) == set(range(1, 11))


def test_a_port_that_is_taken_stops_the_start_in_one_line(database_url: URL) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        environment = {**os.environ, "API_KEY": API_KEY, "PORT": str(port), "WORKERS": "2"}
        command = [sys.executable, "cli.py", "serve"]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == f"audit-service: PORT: cannot listen on 127.0.0.1:{port}: Address already in use\n"


def test_an_answer_is_one_write(database_url: URL) -> None:
    port = free_port()
    with service(database_url, port), socket.create_connection(("127.0.0.1", port)) as client:
        for _ in range(50):
            client.sendall(b"GET /health HTTP/1.1\r\nHost: test\r\n\r\n")
            head, separator, body = client.recv(65536).partition(b"\r\n\r\n")
            assert separator, head
            assert body == b'{"status":"ok"}', "the body came apart from its head"


@pytest.mark.parametrize("workers", ["0", "-1", "many", "1000"])
def test_a_wrong_number_of_workers_is_named(workers: str) -> None:
    environment = {**os.environ, "API_KEY": API_KEY, "WORKERS": workers}
    command = [sys.executable, "cli.py", "serve"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (2, "audit-service: WORKERS: must be a number from 1 to 999\n")
