"""Far more than the service can take, clients that go away, and a stop with requests under way: on real processes."""

import http.client
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from email.message import Message
from pathlib import Path

import psutil
import psycopg2
import pytest
from conftest import API_KEY, eventually, execute
from database import DEFAULT_SERVER, running_postgres
from load import Load
from service import Service
from sqlalchemy.engine import URL
from verify import assert_ledger_consistent

import migrations

pytestmark = pytest.mark.faults

LOGIN = {"event_type": "LOGIN", "actor": "alice"}
HEADERS = {"X-API-Key": API_KEY, "Content-Type": "application/json"}
LARGE_EVENT = json.dumps({**LOGIN, "metadata": {"padding": "x" * 60_000}}).encode()
LARGE_BATCH = json.dumps([{**LOGIN, "metadata": {"padding": "x" * 1_580}}] * 10_000).encode()
CLIENTS_WITH_EVENTS, CLIENTS_WITH_BATCHES = 300, 20
OVERLOAD_S = 30
MAX_WORKER_BYTES = 640 * 1024 * 1024


@pytest.fixture
def database_url(request: pytest.FixtureRequest) -> Iterator[URL]:
    server = request.config.getoption("--server") or DEFAULT_SERVER
    with running_postgres(server, disk_mib=4096) as postgres:
        execute(postgres.url(), "CREATE DATABASE faults")
        migrations.upgrade(postgres.url("faults"))
        yield postgres.url("faults")


@pytest.fixture
def service(database_url: URL, tmp_path: Path) -> Iterator[Service]:
    service = Service(database_url, tmp_path / "service.log")
    try:
        service.start()
        yield service
    finally:
        service.close()


@contextmanager
def held_head(url: URL) -> Iterator[None]:
    """While the block runs nobody can append."""
    connection = psycopg2.connect(url.set(drivername="postgresql").render_as_string(hide_password=False))
    try:
        connection.cursor().execute("SELECT * FROM ledger_head FOR UPDATE")
        yield
    finally:
        connection.close()


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Message
    body: bytes

    @property
    def name(self) -> str:
        """Like `201` or `503 queue-full`."""
        code = "" if self.status < 400 else json.loads(self.body)["type"].rpartition(":")[2]
        return f"{self.status} {code}".strip()


def post(port: int, path: str, body: bytes) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request("POST", path, body, HEADERS)
        response = connection.getresponse()
        return Answer(response.status, response.headers, response.read())
    finally:
        connection.close()


def test_memory_stays_bounded_and_the_rest_is_refused(service: Service, database_url: URL) -> None:
    """The database stands still three seconds in four; 320 connections send whatever goes through them."""
    answers: Counter[str] = Counter()
    is_over = threading.Event()

    def send(path: str, body: bytes) -> None:
        while not is_over.is_set():
            try:
                answer = post(service.port, path, body)
            except OSError as error:
                answers[type(error).__name__] += 1
                continue
            answers[answer.name] += 1
            if answer.status == 503:
                is_over.wait(int(answer.headers["Retry-After"]))

    senders = [("/events", LARGE_EVENT)] * CLIENTS_WITH_EVENTS + [("/events/batch", LARGE_BATCH)] * CLIENTS_WITH_BATCHES
    workers = service.workers()
    peaks: list[int] = []
    with ThreadPoolExecutor(len(senders)) as pool:
        for sender in senders:
            pool.submit(send, *sender)
        for _ in range(OVERLOAD_S // 4):
            with held_head(database_url):
                peaks += watch_memory(workers, seconds=3)
            peaks += watch_memory(workers, seconds=1)
        is_over.set()
    print(f"\n{dict(answers)}\nlargest worker by the second, MiB: {[peak >> 20 for peak in peaks]}")
    assert service.workers() == workers
    assert {"201", "503 queue-full"} <= answers.keys() <= {"201", "503 queue-full", "503 database-unavailable"}
    assert max(peaks) < MAX_WORKER_BYTES


def watch_memory(workers: Sequence[psutil.Process], seconds: int) -> list[int]:
    """The resident bytes of the largest worker, the peak of each second."""
    peaks = [0] * seconds
    for second in range(seconds):
        for _ in range(10):
            peaks[second] = max(peaks[second], *(worker.memory_info().rss for worker in workers))
            time.sleep(0.1)
    return peaks


def test_clients_that_go_away_in_mid_request_hold_up_nobody(service: Service, database_url: URL) -> None:
    """Some leave half a body behind and stay connected, some never read their answer, some are gone at once."""
    body = json.dumps([{**LOGIN, "metadata": {"token": "gone"}}] * 20).encode()
    head = "".join(f"{name}: {value}\r\n" for name, value in HEADERS.items())
    request = f"POST /events/batch HTTP/1.1\r\nHost: x\r\n{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    load = Load([service], "gone")
    load.wait_for_acknowledgements(100)
    with ExitStack() as stay:
        for number in range(60):
            gone = socket.create_connection(("127.0.0.1", service.port))
            gone.sendall(request[: len(request) // 2] if number % 2 else request)
            if number % 3:
                stay.callback(gone.close)
            else:
                gone.close()
        load.wait_for_acknowledgements(1_000)
        assert load.drain() < 2
    assert load.record.complaints == []
    assert_ledger_consistent(database_url)


def test_a_stop_answers_what_was_accepted_and_refuses_what_comes_after(service: Service, database_url: URL) -> None:
    with ThreadPoolExecutor(21) as pool:
        with held_head(database_url):
            accepted = [pool.submit(post, service.port, "/events", json.dumps(LOGIN).encode()) for _ in range(20)]
            eventually(lambda: is_all_read(service.port, connections=20))
            stopped = pool.submit(service.stop)
            eventually(lambda: is_refused(service.port))
            assert not any(answer.done() for answer in accepted)
        assert [answer.result().name for answer in accepted] == ["201"] * 20
        assert stopped.result() == 0
    assert assert_ledger_consistent(database_url) == 20


def is_all_read(port: int, connections: int) -> bool:
    """Whether there are so many connections to the port, and whatever came in over them was read (proc(5))."""
    lines = map(str.split, Path("/proc/net/tcp").read_text().splitlines()[1:])
    sockets = [(state, queues) for _, local, _, state, queues, *_ in lines if local.endswith(f":{port:04X}")]
    established = [state for state, _ in sockets if state == "01"]
    return len(established) == connections and all(queues.endswith(":00000000") for _, queues in sockets)


def is_refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return True
    return False
