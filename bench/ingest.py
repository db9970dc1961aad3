"""make bench-ingest: how fast events are taken, each figure as a ratio to something run beside it."""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from sqlalchemy.engine import URL

from bench import load
from bench.figures import Figure, print_table, write_results
from bench.generate import fill
from bench.memory import MemoryWatch, watching_memory
from bench.servers import (
    PLAIN_COMMAND,
    SERVE_COMMAND,
    SERVER_SETTINGS,
    WORKERS,
    Server,
    Service,
    require,
    running_server,
    running_service,
    template_name,
)

ROWS = 1_000_000  # all in the month that is written to: the harder case
HISTORY_MONTHS = 24
BODIES = 8192
BATCHES = 300
WARM_UP_SECONDS = 2
PROBE_SECONDS = 5
PGBENCH_CLIENTS = (16, 32, 64, 128, 256)
PACED_CONNECTIONS = 128

Run = Callable[[int], float]  # measures for so many seconds


@dataclass(frozen=True)
class Side:
    """One side of a comparison: what is run, and the database it writes to."""

    database: str
    run: Run


@dataclass
class Bench:
    """The server, the service under test on its database, and a clone of that database for everything else."""

    server: Server
    service: Service
    direct: URL
    folder: Path
    seconds: int
    rounds: int

    def compare(self, figure: Figure, ours: Side, theirs: Side) -> Figure:
        """Measure the sides in turn, as often as asked for."""
        for number in range(1, self.rounds + 1):
            figure.ours.append(self.measure(ours))
            figure.theirs.append(self.measure(theirs))
            print(
                f"{figure.name} {number}/{self.rounds}: {figure.ours[-1]:,.1f} to {figure.theirs[-1]:,.1f}",
                file=sys.stderr,
            )
        return figure

    def measure(self, side: Side, seconds: int | None = None) -> float:
        self.server.settle(side.database)
        side.run(WARM_UP_SECONDS)
        return side.run(seconds or self.seconds)

    def post(self, connections: int) -> Side:
        return Side("service", lambda seconds: self.wrk(self.service, connections, seconds).rate)

    def wrk(self, service: Service, connections: int, seconds: int, pause_ms: float = 0) -> load.Measured:
        return load.wrk(service, "/events", self.bodies, connections=connections, seconds=seconds, pause_ms=pause_ms)

    def insert(self, clients: int) -> Side:
        return Side(
            "direct",
            lambda seconds: load.pgbench_rate(self.direct, self.insert_script, clients=clients, seconds=seconds),
        )

    @cached_property
    def bodies(self) -> Path:
        return load.write_bodies(self.folder / "bodies", BODIES)

    @cached_property
    def insert_script(self) -> Path:
        return load.write_insert(self.folder / "insert.sql")

    @cached_property
    def best_clients(self) -> int:
        """The number of clients with which pgbench inserts fastest here."""
        return max(PGBENCH_CLIENTS, key=lambda clients: self.measure(self.insert(clients), PROBE_SECONDS))


def single_64(bench: Bench) -> Figure:
    figure = Figure("single-64", "single POST, 64 connections", "pgbench INSERT, 64 clients", "events/s", 1.0)
    return bench.compare(figure, bench.post(64), bench.insert(64))


def single_256(bench: Bench) -> Figure:
    against = f"pgbench INSERT at its best, {bench.best_clients} clients"
    figure = Figure("single-256", "single POST, 256 connections", against, "events/s", 1.2)
    return bench.compare(figure, bench.post(256), bench.insert(bench.best_clients))


def plain(bench: Bench) -> Figure:
    figure = Figure("plain", "single POST, 64 connections", "plain FastAPI and ORM, 64 connections", "events/s", 20)
    with running_service(PLAIN_COMMAND, bench.direct) as service:
        return bench.compare(
            figure,
            bench.post(64),
            Side("direct", lambda seconds: bench.wrk(service, 64, seconds).rate),
        )


def batch(bench: Bench) -> Figure:
    bodies = bench.folder / "batches"
    texts = load.write_batches(bodies, BATCHES)
    figure = Figure("batch", "batches of 1,000, 4 connections", "COPY, 10,000 a transaction", "events/s", 0.8)
    return bench.compare(
        figure,
        Side("service", lambda seconds: _post_batches(bench, bodies, seconds)),
        Side("direct", lambda seconds: load.copy_rate(bench.direct, texts, seconds=seconds)),
    )


def _post_batches(bench: Bench, bodies: Path, seconds: int) -> float:
    measured = load.wrk(bench.service, "/events/batch", bodies, connections=4, seconds=seconds)
    return measured.rate * load.BATCH_EVENTS


def latency(bench: Bench) -> Figure:
    """Both sides get as many arrivals a second: half of the most that the service takes."""
    rate = max(bench.measure(bench.post(connections), PROBE_SECONDS) for connections in (64, 256)) / 2
    clients = bench.best_clients
    what, against = f"p99 of single POST, {rate:,.0f} a second", f"p99 of pgbench INSERT, {clients} clients"
    # A connection pauses after its answer, so an answer's time comes off the pause.
    pause_ms = 1000 * PACED_CONNECTIONS / rate
    pause_ms -= bench.wrk(bench.service, PACED_CONNECTIONS, PROBE_SECONDS, pause_ms).p50_ms
    return bench.compare(
        Figure("latency", what, against, "ms", 3, at_most=True),
        Side("service", lambda seconds: _paced_p99_ms(bench, seconds, pause_ms, rate)),
        Side("direct", lambda seconds: load.pgbench_p99_ms(
            bench.direct, bench.insert_script, clients=clients, seconds=seconds, rate=rate)),
    )  # fmt: skip


def _paced_p99_ms(bench: Bench, seconds: int, pause_ms: float, rate: float) -> float:
    measured = bench.wrk(bench.service, PACED_CONNECTIONS, seconds, pause_ms)
    if not 0.95 < measured.rate / rate < 1.05:
        print(f"latency: {measured.rate:,.0f} a second came, where {rate:,.0f} were to", file=sys.stderr)
    return measured.p99_ms


def memory(watch: MemoryWatch) -> Figure:
    """Of the largest worker, over all that was measured before."""
    figure = Figure("memory", f"resident memory of {WORKERS} workers, highest", "", "MiB", 150, at_most=True)
    figure.ours.extend(watch.peaks_mib.values())
    return figure


def history(bench: Bench, rows: int, template: str) -> Figure:
    """A second service, on a long log. What it appends stays there: a copy would need as much disk again."""
    what, against = f"single POST, 64 connections, {rows:,} rows", f"the same, {ROWS:,} rows"
    figure = Figure("history", what, against, "events/s", 0.8)
    with running_service(SERVE_COMMAND, bench.server.cluster.url(template)) as service:
        long = Side(template, lambda seconds: bench.wrk(service, 64, seconds).rate)
        return bench.compare(figure, long, bench.post(64))


FIGURES: dict[str, Callable[[Bench], Figure]] = {
    "single-64": single_64,
    "single-256": single_256,
    "plain": plain,
    "latency": latency,
    "batch": batch,
}


@contextmanager
def running_bench(server: Server, template: str, rounds: int, seconds: int) -> Iterator[Bench]:
    """The service and, for all else, a database `direct`, each a fresh clone of the template."""
    service_database, direct = server.clone(template, "service"), server.clone(template, "direct")
    server.execute("direct", f"CREATE SEQUENCE bench_ids START {ROWS + 1} CACHE 32")
    server.execute("direct", "ALTER TABLE audit_events ALTER id SET DEFAULT nextval('bench_ids')")
    server.execute("direct", "ALTER TABLE audit_events ALTER recorded_at SET DEFAULT now()")
    with running_service(SERVE_COMMAND, service_database) as service, tempfile.TemporaryDirectory() as folder:
        yield Bench(server, service, direct, Path(folder), seconds, rounds)


def run(arguments: argparse.Namespace) -> list[Figure]:
    short, long = template_name(ROWS, 1), template_name(arguments.rows, HISTORY_MONTHS)
    templates = {short: partial(fill, rows=ROWS, months=1)}
    if arguments.rows:
        templates[long] = partial(fill, rows=arguments.rows, months=HISTORY_MONTHS)
    with (
        running_server(templates) as server,
        running_bench(server, short, arguments.rounds, arguments.seconds) as bench,
        watching_memory(bench.service.pid) as watch,
    ):
        if arguments.rows:
            return [history(bench, arguments.rows, long)]
        return [*(FIGURES[name](bench) for name in arguments.only or FIGURES), memory(watch)]


def main() -> int:
    """Print the table, write the JSON; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(prog="bench.ingest", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=10, help="of a round, for each side (default 10)")
    parser.add_argument("--only", action="append", choices=FIGURES, help="measure this line; may be repeated")
    parser.add_argument("--rows", type=int, help="instead: the rate with so many rows, against that with 1,000,000")
    arguments = parser.parse_args()
    require("wrk", "wrk")
    figures = run(arguments)
    print_table(figures)
    conditions = {"seconds": arguments.seconds, "rounds": arguments.rounds, "server": SERVER_SETTINGS}
    print(f"\nEvery round: {write_results('ingest', figures, conditions)}")
    return 0 if all(figure.is_reached for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
