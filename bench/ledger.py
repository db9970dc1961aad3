"""make bench-ledger: what the ledger costs those who write, and how long a proof takes in a long log."""

import argparse
import http.client
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import orjson
from sqlalchemy.engine import URL
from tqdm import tqdm

from bench import load
from bench.events import sample_events
from bench.figures import Figure, print_table, write_results
from bench.generate import fill
from bench.ingest import BATCHES, ROWS, Bench, Side
from bench.servers import (
    SERVE_COMMAND,
    SERVER_SETTINGS,
    Server,
    Service,
    connect,
    require,
    running_server,
    running_service,
    template_name,
)
from config import ROOT
from ingest.append import append_submissions, prepare_event, submission_of
from schemas import EventIn

LEAVES = 10_000_000
FLUSH = 10_000  # events, while the long log is filled
PROOFS = 500  # a round

# The other side's database: no leaf is hashed, and no tree grows. The rows, the ids and the head's lock are the same.
_STORE_ONLY = """
CREATE OR REPLACE FUNCTION grow_ledger(head ledger_head, leaves bytea[], moment timestamptz)
RETURNS void LANGUAGE sql AS $$ UPDATE ledger_head SET size = head.size + cardinality(leaves), recorded_at = moment $$
"""
_HASHED = "SELECT pg_get_functiondef('append_events'::regproc)"


def take_the_ledger_out(server: Server, database: str) -> None:
    """A bench-only switch: the functions of this one database are replaced."""
    server.execute(database, _STORE_ONLY)
    (definition,) = server.execute(database, _HASHED)[0]
    start = str(definition).index("sha256(\n")
    end = str(definition).index("ORDER BY id", start)
    server.execute(database, f"{str(definition)[:start]}'\\x'::bytea {str(definition)[end:]}".replace("%", "%%"))


def fill_ledger(url: URL, leaves: int) -> None:
    """A log of so many events, through the flush: the tree over them is whole."""
    prepared = [prepare_event(EventIn.model_validate_json(text), datetime.now(UTC)) for text in _bodies()]
    submission = submission_of(prepared)
    with closing(connect(url)) as connection, tqdm(total=leaves, unit=" leaves", unit_scale=True) as progress:
        connection.autocommit = True
        for _ in range(leaves // FLUSH):
            append_submissions(connection, [submission])
            progress.update(FLUSH)


def _bodies() -> Iterator[bytes]:
    return map(orjson.dumps, sample_events(FLUSH, seed=1))


@contextmanager
def both_services(server: Server, template: str, rounds: int, seconds: int) -> Iterator[tuple[Bench, Service]]:
    """The service as it ships, and one on a clone of its database that keeps no ledger."""
    ours, theirs = server.clone(template, "service"), server.clone(template, "direct")
    take_the_ledger_out(server, "direct")
    without = {"PYTHONPATH": f"{Path(__file__).parent / 'without_ledger'}:{ROOT}"}
    with (
        running_service(SERVE_COMMAND, ours) as service,
        running_service(SERVE_COMMAND, theirs, without) as unproved,
        tempfile.TemporaryDirectory() as folder,
    ):
        yield Bench(server, service, theirs, Path(folder), seconds, rounds), unproved


def single(bench: Bench, unproved: Service) -> Figure:
    figure = Figure("single", "single POST, 64 connections", "the same without a ledger", "events/s", 0.85)
    return bench.compare(figure, bench.post(64), Side("direct", lambda seconds: bench.wrk(unproved, 64, seconds).rate))


def batch(bench: Bench, unproved: Service) -> Figure:
    bodies = bench.folder / "batches"
    load.write_batches(bodies, BATCHES)

    def rate(service: Service, seconds: int) -> float:
        measured = load.wrk(service, "/events/batch", bodies, connections=4, seconds=seconds)
        return measured.rate * load.BATCH_EVENTS

    figure = Figure("batch", "batches of 1,000, 4 connections", "the same without a ledger", "events/s", 0.85)
    return bench.compare(figure, Side("service", partial(rate, bench.service)), Side("direct", partial(rate, unproved)))


def proofs(server: Server, template: str, leaves: int, rounds: int) -> Figure:
    """One after the other over one connection, of events all over the log."""
    figure = Figure("proof", f"p99 of GET /events/{{id}}/proof, {leaves:,} leaves", "", "ms", 10, at_most=True)
    with running_service(SERVE_COMMAND, server.cluster.url(template)) as service:
        time_proofs(service, leaves)
        for _ in range(rounds):
            times_ms = sorted(time_proofs(service, leaves))
            median, p99 = statistics.median(times_ms), times_ms[len(times_ms) * 99 // 100]
            print(f"proof: median {median:.1f} ms, p99 {p99:.1f} ms", file=sys.stderr)
            figure.ours.append(p99)
    return figure


def time_proofs(service: Service, leaves: int) -> list[float]:
    address = urlsplit(service.url).netloc
    times_ms = []
    with closing(http.client.HTTPConnection(address)) as connection:
        for _ in range(PROOFS):
            event_id = random.randint(1, leaves)  # noqa: S311 - a load, not a secret
            started = time.perf_counter()
            connection.request("GET", f"/events/{event_id}/proof", headers={"X-API-Key": service.api_key})
            answer = connection.getresponse()
            answer.read()
            times_ms.append((time.perf_counter() - started) * 1e3)
            if answer.status != 200:
                raise SystemExit(f"/events/{event_id}/proof: {answer.status}")
    return times_ms


def run(arguments: argparse.Namespace) -> list[Figure]:
    short, long = template_name(ROWS, 1), f"ledger_{arguments.leaves}"
    templates = {short: partial(fill, rows=ROWS, months=1), long: partial(fill_ledger, leaves=arguments.leaves)}
    with running_server(templates) as server:
        figures = [proofs(server, long, arguments.leaves, arguments.rounds)]
        with both_services(server, short, arguments.rounds, arguments.seconds) as (bench, unproved):
            return [single(bench, unproved), batch(bench, unproved), *figures]


def main() -> int:
    """Print the table, write the JSON; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(prog="bench.ledger", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=10, help="of a round, for each side (default 10)")
    parser.add_argument("--leaves", type=int, default=LEAVES, help=f"of the log of the proofs (default {LEAVES:,})")
    arguments = parser.parse_args()
    require("wrk", "wrk")
    figures = run(arguments)
    print_table(figures)
    conditions = {"seconds": arguments.seconds, "rounds": arguments.rounds, "server": SERVER_SETTINGS}
    print(f"\nEvery round: {write_results('ledger', figures, conditions)}")
    return 0 if all(figure.is_reached for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
