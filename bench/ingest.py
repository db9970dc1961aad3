"""make bench-ingest: how fast events are taken, each figure as a ratio to something run beside it."""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy.engine import URL

from bench import load
from bench.load import Measured
from bench.servers import SERVE_COMMAND, SERVER_SETTINGS, Server, Service, running_server, running_service

ROWS = 1_000_000
TEMPLATE = "events_1m"
WARM_UP_SECONDS = 2
BODIES = 8192
PGBENCH_CLIENTS = (16, 32, 64, 128, 256)
RESULTS = Path(__file__).parent / "results"


@dataclass
class Figure:
    """One line of the table: the medians of both sides, and the ratio between them that is asked for."""

    name: str
    what: str
    against: str
    bar: float
    unit: str = "a second"
    at_most: bool = False
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return statistics.median(self.ours) / statistics.median(self.theirs)

    @property
    def is_reached(self) -> bool:
        return self.ratio <= self.bar if self.at_most else self.ratio >= self.bar


@dataclass(frozen=True)
class Bench:
    """The two sides, each with a database of its own, and how long and how often to measure."""

    server: Server
    service: Service
    insert_database: URL
    bodies: Path
    insert: Path
    seconds: int
    rounds: int

    def alternate(self, figure: Figure, ours: Callable[[int], float], theirs: Callable[[int], float]) -> Figure:
        """Measure both in turn; each gets the number of seconds to run for."""
        for number in range(self.rounds):
            figure.ours.append(self.measure("service", ours))
            figure.theirs.append(self.measure("direct", theirs))
            print(
                f"{figure.name} {number + 1}/{self.rounds}: {figure.ours[-1]:,.1f} to {figure.theirs[-1]:,.1f}",
                file=sys.stderr,
            )
        return figure

    def measure(self, database: str, run: Callable[[int], float]) -> float:
        self.server.settle(database)
        run(WARM_UP_SECONDS)
        return run(self.seconds)

    def post(self, connections: int) -> Callable[[int], float]:
        return lambda seconds: self._wrk(connections, seconds).rate

    def _wrk(self, connections: int, seconds: int) -> Measured:
        return load.wrk(self.service, "/events", self.bodies, connections=connections, seconds=seconds)

    def insert_rows(self, clients: int) -> Callable[[int], float]:
        return lambda seconds: load.pgbench(self.insert_database, self.insert, clients=clients, seconds=seconds).rate


def single_64(bench: Bench) -> Figure:
    figure = Figure("single-64", "single POST, 64 connections", "pgbench INSERT, 64 clients", 1.0)
    return bench.alternate(figure, bench.post(64), bench.insert_rows(64))


def single_256(bench: Bench) -> Figure:
    clients = max(PGBENCH_CLIENTS, key=lambda clients: bench.measure("direct", bench.insert_rows(clients)))
    figure = Figure("single-256", "single POST, 256 connections", f"pgbench at its best, {clients} clients", 1.2)
    return bench.alternate(figure, bench.post(256), bench.insert_rows(clients))


FIGURES: dict[str, Callable[[Bench], Figure]] = {"single-64": single_64, "single-256": single_256}


@contextmanager
def running_bench(rounds: int, seconds: int) -> Iterator[Bench]:
    with running_server({TEMPLATE: (ROWS, 1)}) as server, tempfile.TemporaryDirectory() as folder:
        service_database = server.clone(TEMPLATE, "service")
        insert_database = server.clone(TEMPLATE, "direct")
        server.execute("direct", f"CREATE SEQUENCE bench_ids START {ROWS + 1} CACHE 32")
        with running_service(SERVE_COMMAND, service_database) as service:
            yield Bench(
                server,
                service,
                insert_database,
                load.write_bodies(Path(folder) / "bodies", BODIES),
                load.write_insert(Path(folder) / "insert.sql"),
                seconds,
                rounds,
            )


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.ingest", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=10, help="of a round, for each side")
    parser.add_argument("--only", action="append", choices=FIGURES, help="may be repeated")
    arguments = parser.parse_args()
    with running_bench(arguments.rounds, arguments.seconds) as bench:
        figures = [FIGURES[name](bench) for name in arguments.only or FIGURES]
    for figure in figures:
        print(
            f"{figure.what}: {statistics.median(figure.ours):,.0f} against {statistics.median(figure.theirs):,.0f}"
            f" ({figure.against}): {figure.ratio:.2f} x, bar {figure.bar} x"
        )
    RESULTS.mkdir(exist_ok=True)
    result = {"figures": [asdict(figure) for figure in figures], "settings": SERVER_SETTINGS}
    (RESULTS / f"ingest-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
