"""Rounds of one fault each, under load. After each the log is checked whole against what the clients were told.

`make test-faults` runs a hundred; `--seed` and `--first-round` repeat one that failed.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from random import Random

import pytest
from checks import Books, Verdict
from conftest import execute
from database import CAN_MOUNT, DEFAULT_SERVER, Postgres, running_postgres
from kinds import KINDS, Kind, Scene, cut_connection, kill_postgres, kill_worker, possible_kinds
from load import Load
from service import Service

import migrations

_ROUNDS_OF_A_LOG = 20  # then a new one: the log's size is what a check costs


@dataclass(frozen=True)
class Round:
    number: int
    kind: Kind
    verdict: Verdict
    longest_stall_s: float

    @property
    def complaints(self) -> list[str]:
        if self.longest_stall_s <= self.kind.longest_stall_s:
            return self.verdict.faults
        late = (
            f"nobody was acknowledged for {self.longest_stall_s:.1f} s, and {self.kind.longest_stall_s} s is the most"
        )
        return [*self.verdict.faults, late]


def test_a_few_rounds(tmp_path: Path) -> None:
    """That the harness itself works, in the time of `make test`: this seed deals each kind once."""
    kinds = [kind for kind in KINDS if kind.inflict in (kill_worker, cut_connection, kill_postgres)]
    run_rounds(DEFAULT_SERVER, "b", range(3), kinds, tmp_path)


@pytest.mark.faults
def test_many_rounds(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    seed = request.config.getoption("--seed") or str(time.time_ns())
    first = request.config.getoption("--first-round")
    numbers = range(first, first + request.config.getoption("--rounds"))
    if not CAN_MOUNT:
        print("skipped: fill the disk (only root may mount a disk to fill)")
    server = request.config.getoption("--server") or DEFAULT_SERVER
    run_rounds(server, seed, numbers, possible_kinds(), tmp_path)


def run_rounds(server: str, seed: str, numbers: Sequence[int], kinds: Sequence[Kind], folder: Path) -> None:
    """Run the rounds, print what they came to, and fail at the first that lost, doubled or stalled anything."""
    print(f"\nfaults on {server}, --seed {seed}, logs in {folder}")
    done: list[Round] = []
    try:
        with running_postgres(server) as postgres:
            for log_number, group in groupby(numbers, lambda number: number // _ROUNDS_OF_A_LOG):
                with log_of_its_own(postgres, log_number, folder) as (services, books):
                    for number in group:
                        kind = _shuffled(kinds, seed, log_number)[number % _ROUNDS_OF_A_LOG]
                        done.append(run_round(postgres, services, books, seed, number, kind))
                        assert not done[-1].complaints, _tell(server, seed, done[-1])
    finally:
        print(_table(done))


@contextmanager
def log_of_its_own(postgres: Postgres, number: int, folder: Path) -> Iterator[tuple[list[Service], Books]]:
    """A new database with one replica or two on it; when the block ends they stop, and the log is checked whole."""
    name = f"faults_{number}"
    execute(postgres.url(), f"CREATE DATABASE {name}")
    migrations.upgrade(postgres.url(name))
    books = Books(postgres.url(name))
    with ExitStack() as stack:
        services = []
        for replica in range(1 + number % 2):
            services.append(Service(postgres.url(name), folder / f"service-{number}-{replica}.log"))
            stack.callback(services[-1].close)
            services[-1].start()
        yield services, books
        assert [service.stop() for service in services] == [0] * len(services)
    books.close()
    execute(postgres.url(), f"DROP DATABASE {name} WITH (FORCE)")


def run_round(
    postgres: Postgres, services: Sequence[Service], books: Books, seed: str, number: int, kind: Kind
) -> Round:
    """Load, a fault and its cure in the midst of it, and the books closed when all is quiet."""
    print(f"{number:4} {kind.name:26} {len(services)} replica(s)", end="", flush=True)
    started_at = time.monotonic()
    load = Load(services, f"{seed}/{number}")
    scene = Scene(postgres, services, load, Random(f"{seed}/{number}"))  # noqa: S311 - repeatable on purpose
    try:
        load.wait_for_acknowledgements(100)
        scene.pause(0, 0.5)
        kind.inflict(scene)
        load.wait_for_acknowledgements(100)
        stall_s = load.drain()
        for service in services:
            service.wait_until_whole()
    except AssertionError as error:
        load.record.complain(f"it did not come back: {error}")
        stall_s = load.drain()
    load.record.complaints += [line for service in services for line in service.new_tracebacks()]
    verdict = books.close_round(load.record)
    took_s = time.monotonic() - started_at
    print(f" {verdict.acknowledged:7} acknowledged, {stall_s:5.1f} s stall, {took_s:5.1f} s", flush=True)
    return Round(number, kind, verdict, stall_s)


def _shuffled(kinds: Sequence[Kind], seed: str, log_number: int) -> list[Kind]:
    deck = [kind for kind in kinds for _ in range(kind.share)]
    deck = (deck * _ROUNDS_OF_A_LOG)[:_ROUNDS_OF_A_LOG]
    Random(f"{seed}/{log_number}").shuffle(deck)  # noqa: S311 - repeatable on purpose
    return deck


def _tell(server: str, seed: str, failed: Round) -> str:
    complaints = "\n  ".join(failed.complaints[:20])
    again = f"--server {server} --seed {seed} --first-round {failed.number} --rounds 1"
    return f"round {failed.number}, {failed.kind.name}:\n  {complaints}\nagain: make test-faults ARGS='{again}'"


def _table(rounds: Sequence[Round]) -> str:
    head = ("fault", "rounds", "acknowledged", "unknown", "lost", "doubled", "wrong", "longest stall", "allowed")
    lines: list[tuple[str, ...]] = [head]
    for name, group in [(kind.name, [r for r in rounds if r.kind is kind]) for kind in KINDS] + [("all", list(rounds))]:
        if not group:
            continue
        counts = [sum(values) for values in zip(*map(_counts, group), strict=True)]
        stall = f"{max(r.longest_stall_s for r in group):.1f} s"
        allowed = "" if name == "all" else f"{group[0].kind.longest_stall_s:.1f} s"
        lines.append((name, str(len(group)), *map(str, counts), stall, allowed))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n" + "\n".join(
        " ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines
    )


def _counts(done: Round) -> tuple[int, int, int, int, int]:
    verdict = done.verdict
    return verdict.acknowledged, verdict.unknown, len(verdict.lost), len(verdict.doubled), len(verdict.wrong)
