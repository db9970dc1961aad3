"""200,000 requests that nobody should send, over raw connections, to the service as it ships.

None is answered 5xx, none hangs, none that was refused is stored, none makes the worker or its log grow odd.
"""

import asyncio
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import psycopg2
import pytest
import uvloop
from conftest import API_KEY, eventually, served
from corpus import INJECTED
from mutations import CUT_EVENT, SMUGGLED_EVENT, UNCLEAR_EVENT, Attempt, Framing, attempt
from sqlalchemy.engine import URL
from verify import assert_ledger_consistent
from wire import Answer, Connection, NotHttp, connect

pytestmark = pytest.mark.security

SEED = "audit"  # the same in every run, so that what fails fails again
CONNECTIONS = 32
WORKERS = 2  # as the Compose file has it
# A hang: slower than this, while so many others were answered as are in a second when nothing else runs here. Where
# fewer were, it is the machine that is slow.
HANG_S, OVERTAKEN = 1.0, 1_000
MAX_GROWTH_BYTES = 32 * 1024 * 1024
# What the service records of itself, once for each key or hold.
RECORDS = {
    ("POST", "keys"): "audit.key.create",
    ("DELETE", "keys"): "audit.key.revoke",
    ("POST", "legal-holds"): "audit.hold.place",
    ("DELETE", "legal-holds"): "audit.hold.release",
}
UNAVAILABLE = {"urn:audit:problem:too-many-readers"}  # README.md: at most four exports at a time


@dataclass
class Books:
    """What was sent, what came back, and what must therefore stand in the table."""

    acknowledged: set[int] = field(default_factory=set)
    unanswered: set[int] = field(default_factory=set)  # numbers of requests that two servers could read differently
    recorded: dict[str, set[str]] = field(default_factory=dict)  # event type: the keys and holds that it must tell of
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    complaints: list[str] = field(default_factory=list)
    answered: int = 0
    slowest_s: float = 0
    rss: list[list[int]] = field(default_factory=list)  # of each worker: when it was warm, and at the end

    def complain(self, attempt: Attempt, what: str) -> None:
        self.complaints.append(f"request {attempt.number} ({attempt.kind}): {what}\n    {attempt.wire[:600]!r}")

    def settle(self, attempt: Attempt, answer: Answer | None) -> None:
        """Note what became of a request, and whether that may be."""
        self.outcomes[attempt.kind, str(answer.status) if answer else "closed"] += 1
        if answer is None:
            if attempt.framing is Framing.WHOLE:
                self.complain(attempt, "no answer")
            elif attempt.framing is Framing.UNCLEAR:
                self.unanswered.add(attempt.number)
            return
        if answer.status < 300:
            self._acknowledge(attempt, answer)
        if answer.status >= 400 and attempt.method != "HEAD":
            self._check_problem(attempt, answer)
        if INJECTED in answer.fields:
            self.complain(attempt, "it put a header into the answer")

    def _acknowledge(self, attempt: Attempt, answer: Answer) -> None:
        if attempt.framing is Framing.CUT:
            self.complain(attempt, f"{answer.status} to half a request")
        if attempt.method not in ("POST", "DELETE"):
            return
        body = json.loads(answer.body)
        resource = attempt.path.split("/")[1]
        if event_type := RECORDS.get((attempt.method, resource)):
            self.recorded.setdefault(event_type, set()).add(str(body["id"]))
        elif resource == "events" and answer.status == 201:
            ids = body.get("ids") or [body["id"]]
            if not body.get("replayed") and not self.acknowledged.isdisjoint(ids):
                self.complain(attempt, f"an id was given twice: {ids}")
            self.acknowledged.update(ids)

    def _check_problem(self, attempt: Attempt, answer: Answer) -> None:
        if answer.fields.get(b"content-type") != b"application/problem+json":
            self.complain(attempt, f"{answer.status} without a problem document: {answer.body[:200]!r}")
            return
        problem = json.loads(answer.body)
        if problem["status"] != answer.status or (answer.status >= 500 and problem["type"] not in UNAVAILABLE):
            self.complain(attempt, f"{answer.status} {problem}")


class Fuzzer:
    """Connections that take the next request each, as soon as the last one was answered."""

    def __init__(self, port: int, seed: str, count: int) -> None:
        self.books = Books()
        self._port, self._seed, self._workers = port, seed, workers_of(port)
        self._numbers = iter(range(count))
        self._warm_up = count // 4

    async def run(self) -> Books:
        async with asyncio.TaskGroup() as group:
            for _ in range(CONNECTIONS):
                group.create_task(self._work())
        self.books.rss.append(self._rss())
        return self.books

    def _rss(self) -> list[int]:
        return [worker.memory_info().rss for worker in self._workers]

    async def _work(self) -> None:
        connection = await connect(self._port)
        for number in self._numbers:
            if number >= self._warm_up and not self.books.rss:
                self.books.rss.append(self._rss())
            if not connection.is_open:
                connection = await connect(self._port)
            await self._send(connection, attempt(self._seed, number))
        connection.close()

    async def _send(self, connection: Connection, attempt: Attempt) -> None:
        started, answered_before = time.monotonic(), self.books.answered
        patience = {Framing.WHOLE: 60.0, Framing.CUT: 0.05, Framing.UNCLEAR: 0.2}[attempt.framing]
        try:
            answer = await connection.exchange(
                attempt.wire, has_body=attempt.method != "HEAD", give_up_after_s=patience
            )
        except NotHttp as error:
            self.books.complain(attempt, f"not HTTP: {error}")
            answer = None
        self.books.answered += 1
        self._time(attempt, time.monotonic() - started, self.books.answered - answered_before)
        self.books.settle(attempt, answer)
        if attempt.framing is not Framing.WHOLE or answer is None or answer.ends_the_connection:
            connection.close()

    def _time(self, attempt: Attempt, seconds: float, overtaken: int) -> None:
        self.books.slowest_s = max(self.books.slowest_s, seconds)
        if seconds > HANG_S and overtaken > OVERTAKEN:
            self.books.complain(attempt, f"{seconds:.1f} s, while {overtaken} others were answered")


def workers_of(port: int) -> list[psutil.Process]:
    """The processes that listen there."""
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if any(each.laddr.port == port and each.status == "LISTEN" for each in child.net_connections("tcp4"))
    ]


def stored_events(url: URL) -> list[tuple[Any, ...]]:
    connection = psycopg2.connect(url.set(drivername="postgresql").render_as_string(hide_password=False))
    cursor = connection.cursor()
    cursor.execute("SELECT id, event_type, actor, source FROM audit_events")
    rows: list[tuple[Any, ...]] = cursor.fetchall()
    connection.close()
    return rows


def misplaced(books: Books, rows: list[tuple[Any, ...]]) -> list[str]:
    """What stands in the table and was not acknowledged, or the other way round."""
    ids = {row[0] for row in rows}
    complaints = [f"acknowledged and not stored: {lost}" for lost in sorted(books.acknowledged - ids)]
    records = Counter(row[1] for row in rows if row[3] == "audit-service")
    asked_for = {event_type: len(subjects) for event_type, subjects in books.recorded.items()}
    if records != asked_for:
        complaints.append(f"records of the service: {records}, and {asked_for} were acknowledged")
    for event_id, event_type, actor, source in rows:
        if event_id in books.acknowledged:
            continue
        is_unclear = event_type == UNCLEAR_EVENT and int(actor) in books.unanswered
        if source != "audit-service" and event_type != "first" and not is_unclear:
            complaints.append(f"stored and not acknowledged: {event_id} {event_type} {actor[:80]}")
    forbidden = {CUT_EVENT, SMUGGLED_EVENT} & {row[1] for row in rows}
    return complaints + [f"{event_type} was stored" for event_type in forbidden]


def odd_lines(log: Path) -> list[str]:
    """Lines of the log that are not one of ours, and errors."""
    odd = []
    for line in log.read_text().splitlines():
        try:
            members = json.loads(line)
        except ValueError:
            odd.append(line)
            continue
        if members["level"] == "ERROR" or members["message"] == "forged" or API_KEY in line:
            odd.append(line)
    return odd


def test_no_mutated_request_breaks_the_service_or_is_stored(
    request: pytest.FixtureRequest, one_database_url: URL, tmp_path: Path
) -> None:
    seed, count = request.config.getoption("--seed") or SEED, request.config.getoption("--requests")
    log = tmp_path / "service.log"
    started = time.monotonic()
    with served(one_database_url, log, WORKERS=str(WORKERS), TRUSTED_PROXIES="127.0.0.0/8") as client:
        client.post("/events/batch", json=[{"event_type": "first", "actor": "alice"}] * 100)
        port = int(client.base_url.port or 0)
        eventually(lambda: len(workers_of(port)) == WORKERS)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            books = runner.run(Fuzzer(port, seed, count).run())
    seconds = time.monotonic() - started
    print(f"\n--seed {seed}: {count} requests in {seconds:.0f} s, the slowest {books.slowest_s:.2f} s")
    for (kind, outcome), count in sorted(books.outcomes.items()):
        print(f"  {kind:20} {outcome:8} {count}")
    warm, end = ([f"{each >> 20} MiB" for each in rss] for rss in books.rss)
    print(f"{len(books.acknowledged)} events stored; workers when warm: {warm}, at the end: {end}")
    complaints = [*books.complaints, *misplaced(books, stored_events(one_database_url)), *odd_lines(log)]
    assert not complaints, "\n".join([f"{len(complaints)} complaints, --seed {seed}", *complaints[:30]])
    assert all(after - before < MAX_GROWTH_BYTES for before, after in zip(*books.rss, strict=True))
    assert_ledger_consistent(one_database_url)
