"""The clients: they post without pause, keep every acknowledgement, and retry as the answers tell them."""

import http.client
import json
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from email.message import Message
from itertools import cycle, pairwise
from random import Random

from conftest import API_KEY, eventually
from service import ANSWER_TIMEOUT_S, Service
from traffic import Event, Submission, make_submission

CLIENTS = 14
_FRESH_CLIENTS = 4  # of them, those that make a new connection for each request, and soon try another worker
_THINK_S = 0.03  # at most, between two requests: the log must stay small enough to be checked in each round
_FRESH_ANSWER_TIMEOUT_S = 1.5
_DRAIN_TIMEOUT_S = 40
_NOTHING_STORED = ("database-unavailable", "queue-full", "shutting-down", "schema-not-ready")


@dataclass
class Record:
    """What the clients of one round saw."""

    acknowledged: dict[str, tuple[int, Event]] = field(default_factory=dict)  # token → id, members as answered
    unknown: set[str] = field(default_factory=set)  # may be stored, once: nobody was told
    acknowledged_at: list[float] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)  # answers that no fault excuses
    lock: threading.Lock = field(default_factory=threading.Lock)

    def acknowledge(self, tokens: Sequence[str], ids: Sequence[int], members: Sequence[Event]) -> None:
        with self.lock:
            self.acknowledged_at.append(time.monotonic())
            for token, event_id, event in zip(tokens, ids, members, strict=True):
                self.acknowledged[token] = event_id, event

    def complain(self, text: str) -> None:
        with self.lock:
            self.complaints.append(text)


class _OutcomeUnknown(Exception):
    """The request may have been acted on, and no answer says."""


class _NothingSent(Exception):
    """The service could not be reached at all."""


class Load:
    """All clients of one round."""

    def __init__(self, services: Sequence[Service], seed: str) -> None:
        self.record = Record()
        self.started_at = time.monotonic()
        self.gives_up = False  # drained, or not to be drained: no client tries again
        self._stopping = threading.Event()
        clients = [_Client(self, services, f"{seed}.{number}") for number in range(CLIENTS)]
        # A worker that answers no more still accepts: one who stays with another worker must not feel it.
        workers = cycle([(service, worker) for service in services for worker in service.workers()])
        for client, (service, worker) in zip(clients[_FRESH_CLIENTS:], workers, strict=False):
            client.stay_with(service.connect_to(worker))
        self._threads = [threading.Thread(target=client.run, daemon=True) for client in clients]
        for thread in self._threads:
            thread.start()

    @property
    def is_stopping(self) -> bool:
        return self._stopping.is_set()

    def wait_for_acknowledgements(self, count: int) -> None:
        """Wait until the service has acknowledged so many more requests."""
        goal = len(self.record.acknowledged_at) + count
        eventually(lambda: len(self.record.acknowledged_at) >= goal, _DRAIN_TIMEOUT_S)

    def drain(self) -> float:
        """Begin nothing new, wait until every client has its last answer; return the longest stall, in seconds."""
        stopped_at = time.monotonic()
        self._stopping.set()
        for thread in self._threads:
            thread.join(max(stopped_at + _DRAIN_TIMEOUT_S - time.monotonic(), 0))
        if stuck := sum(thread.is_alive() for thread in self._threads):
            self.record.complain(f"{stuck} clients had no answer {_DRAIN_TIMEOUT_S} s after the fault was over")
        self.gives_up = True
        for thread in self._threads:
            thread.join()
        moments = sorted(moment for moment in self.record.acknowledged_at if moment < stopped_at)
        return max(later - earlier for earlier, later in pairwise([self.started_at, *moments, stopped_at]))


class _Client:
    """Posts on a connection of its own; on a new one for each request, unless told to stay with one."""

    def __init__(self, load: Load, services: Sequence[Service], name: str) -> None:
        self._load = load
        self._record = load.record
        self._ports = [service.port for service in services]
        self._name = name
        self._random = Random(name)  # noqa: S311 - repeatable on purpose
        self._stays = False
        self._connection: http.client.HTTPConnection | None = None
        self._answered: deque[tuple[Submission, list[int]]] = deque(maxlen=50)

    def stay_with(self, connection: http.client.HTTPConnection) -> None:
        """Keep the connection for as long as it lives."""
        self._connection, self._stays = connection, True

    def run(self) -> None:
        count = 0
        while not self._load.is_stopping:
            count += 1
            if self._answered and self._random.random() < 0.05:
                self._repeat(*self._random.choice(self._answered))
            elif self._random.random() < 0.02:
                self._walk_out(make_submission(self._random, f"{self._name}.{count}"))
            else:
                self._submit(make_submission(self._random, f"{self._name}.{count}"))
            time.sleep(self._random.uniform(0, _THINK_S))
        self._disconnect()

    def _submit(self, submission: Submission) -> None:
        answer = self._send_until_settled(submission)
        if answer is None:
            self._note_unknown(submission)
            return
        self._record.acknowledge(submission.tokens, answer.ids, answer.members_of(submission))
        if submission.is_keyed:
            self._answered.append((submission, answer.ids))

    def _repeat(self, submission: Submission, ids: Sequence[int]) -> None:
        """Send what was acknowledged once more: it must be known."""
        again = self._send_until_settled(submission)
        if again is not None and (again.ids != ids or again.headers.get("Idempotent-Replay") != "true"):
            self._record.complain(f"{submission.tokens[0]} was stored as {ids}, and repeated gave {again}")

    def _walk_out(self, submission: Submission) -> None:
        """Go away in mid-request, or before the answer."""
        with suppress(OSError, _NothingSent):
            connection = self._connect()
            self._note_unknown(submission)
            connection.putrequest("POST", submission.path)
            for name, value in self._headers(submission).items():
                connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(submission.body)))
            share = self._random.choice([0.5, 1])
            connection.endheaders(submission.body[: int(len(submission.body) * share)])
        self._disconnect()

    def _send_until_settled(self, submission: Submission) -> "_Answer | None":
        """The acknowledgement; None where nobody will know, or nobody waits any longer."""
        while not self._load.gives_up:
            pause_s = 0.1
            try:
                answer = self._send(submission)
            except _NothingSent:
                pass
            except _OutcomeUnknown:
                if not submission.is_keyed:
                    return None
            else:
                if answer.status in (200, 201):
                    return answer
                if answer.status != 503 or "Retry-After" not in answer.headers:
                    self._record.complain(f"{submission.path} was answered {answer.status} {answer.body}")
                    return None
                if not (answer.says_nothing_stored or submission.is_keyed):
                    return None
                pause_s = int(answer.headers["Retry-After"]) * self._random.uniform(0.5, 1)
            time.sleep(pause_s)
        return None

    def _send(self, submission: Submission) -> "_Answer":
        connection = self._connect()
        try:
            connection.request("POST", submission.path, submission.body, self._headers(submission))
            response = connection.getresponse()
            answer = _Answer(response.status, response.headers, json.loads(response.read()))
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._disconnect()
            raise _OutcomeUnknown from error
        if not self._stays:
            self._disconnect()
        return answer

    def _connect(self) -> http.client.HTTPConnection:
        if self._connection is None or self._connection.sock is None:
            port = self._random.choice(self._ports)
            timeout_s = ANSWER_TIMEOUT_S if self._stays else _FRESH_ANSWER_TIMEOUT_S
            self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
            try:
                self._connection.connect()
            except OSError as error:
                self._disconnect()
                raise _NothingSent from error
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def _headers(self, submission: Submission) -> dict[str, str]:
        return submission.headers | {"X-API-Key": API_KEY}

    def _note_unknown(self, submission: Submission) -> None:
        with self._record.lock:
            self._record.unknown |= set(submission.tokens)


@dataclass(frozen=True)
class _Answer:
    status: int
    headers: Message
    body: Event

    @property
    def ids(self) -> list[int]:
        return self.body["ids"] if "ids" in self.body else [self.body["id"]]

    @property
    def says_nothing_stored(self) -> bool:
        return self.body["type"].rpartition(":")[2] in _NOTHING_STORED

    def members_of(self, submission: Submission) -> Sequence[Event]:
        """What each event's row must hold: what was sent, and where the answer is the event, what it says."""
        if "ids" in self.body:
            return submission.stored
        answered = {name: value for name, value in self.body.items() if name != "id" and value is not None}
        return [answered | submission.stored[0]]
