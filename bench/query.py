"""make bench-query: how fast questions are answered over HTTP, beside the same SQL prepared in PostgreSQL.

Times are medians of single requests over one connection, cache warm. Where a bar allows 1 ms for HTTP, that
millisecond is taken off the service's time before the ratio is made.
"""

import argparse
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from sqlalchemy import create_engine
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool

from bench import events
from bench.figures import Figure, print_table, write_results
from bench.generate import fill
from bench.servers import (
    SERVE_COMMAND,
    Server,
    Service,
    binaries,
    require,
    running_server,
    running_service,
    template_name,
)
from db import Database
from housekeeping.partitions import seal_finished_months
from queries import aggregates, listing
from queries.cursors import encode_cursor
from queries.reader import WALK_OPTIONS
from queries.seals import SEALS, Seal, sealed_months
from schemas import EventListing, HistogramQuery

MONTHS = 24
LIMIT = 50
ALLOWANCE_MS = 1.0
RARE_ACTOR = "rare@example.org"

# Five events, months apart, become a rare actor's.
_MAKE_RARE = f"""
    UPDATE audit_events SET actor = '{RARE_ACTOR}' WHERE id IN (
        SELECT max(id) * n / 6 FROM audit_events, generate_series(1, 5) AS n GROUP BY n
    ) AND NOT EXISTS (SELECT FROM audit_events WHERE actor = '{RARE_ACTOR}')
"""  # noqa: S608
# The last event of the page before the 10,000th.
_BEFORE_PAGE_10000 = (
    f"SELECT timestamp, id FROM audit_events ORDER BY timestamp DESC, id DESC OFFSET {9_999 * LIMIT - 1} LIMIT 1"  # noqa: S608
)


@dataclass(frozen=True)
class Question:
    """A page that is asked for over HTTP, and as SQL."""

    name: str
    what: str
    filters: Mapping[str, str]


def questions(now: datetime) -> list[Question]:
    """Of the most frequent values, and of a week a year ago."""
    actor, event_type = events.ACTORS[0], events.EVENT_TYPES[0]
    start = (now - timedelta(days=365)).replace(hour=0, minute=0, second=0, microsecond=0)
    week = {"start": start.isoformat(), "end": (start + timedelta(days=7)).isoformat()}
    return [
        Question("actor", "a page of 50 by actor", {"actor": actor}),
        Question("type", "a page of 50 by type", {"event_type": event_type}),
        Question("range", "a page of 50 by time range", week),
        Question("all", "a page of 50 by actor, type and range", {"actor": actor, "event_type": event_type, **week}),
    ]


@dataclass(frozen=True)
class Subject:
    """A service on a log of so many rows."""

    rows: int
    server: Server
    url: URL
    service: Service
    seconds: int

    def seals(self) -> Sequence[Seal]:
        with create_engine(self.url, poolclass=NullPool).connect() as connection:
            return sealed_months(connection.execute(SEALS))

    def ask(self, path: str, **query: object) -> float:
        """The median time of a GET, in ms."""
        printed = _run(
            require("wrk", "wrk"), "--threads=1", "--connections=1", f"--duration={self.seconds}s", "--latency",
            f"--header=X-API-Key: {self.service.api_key}", f"{self.service.url}{path}?{urlencode(query)}",
        )  # fmt: skip
        found = re.search(r"50%\s+([\d.]+)(us|ms|s)\n", printed)
        if found is None or "Non-2xx" in printed:
            raise SystemExit(f"{path}: not every answer was a 200\n{printed}")
        return float(found[1]) * {"us": 1e-3, "ms": 1.0, "s": 1e3}[found[2]]

    def page(self, **query: object) -> float:
        return self.ask("/events", limit=LIMIT, **query)

    def run(self, sql: str, values: Mapping[str, Any], options: str) -> float:
        """The median time of the same statement, prepared, in ms."""
        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder) / "script.sql"
            script.write_text(_pgbench_script(sql))
            _run(
                binaries() / "pgbench", "--no-vacuum", "--protocol=prepared", "--client=1", f"--time={self.seconds}",
                f"--file={script}", "--log", f"--log-prefix={folder}/log",
                *(f"--define={name}={_literal(value)}" for name, value in values.items()),
                f"--host={self.url.query['host']}", f"--username={self.url.username}", self.url.database,
                options=f"-c timezone=UTC -c jit=off {options}",
            )  # fmt: skip
            times_us = [int(line.split()[2]) for log in Path(folder).glob("log*") for line in log.open()]
        return statistics.median(times_us) / 1e3


def against_sql(subject: Subject, rounds: int) -> list[Figure]:
    figures = []
    for question in questions(datetime.now(UTC)):
        wanted = EventListing.model_validate(
            {**question.filters, "limit": LIMIT}
            | {name: [question.filters[name]] for name in ("actor", "event_type") if name in question.filters}
        )
        sql, values = listing.walk_statement(wanted, None, listing.can_search(wanted), subject.seals())
        figure = Figure(question.name, f"{question.what}, less 1 ms", "the same SQL, prepared", "ms", 1.5, at_most=True)
        for _ in range(rounds):
            figure.ours.append(subject.page(**question.filters) - ALLOWANCE_MS)
            figure.theirs.append(subject.run(sql, values, WALK_OPTIONS))
        figures.append(figure)
    return figures


def deep_and_rare(subject: Subject, rounds: int) -> list[Figure]:
    ((timestamp, event_id),) = subject.server.execute(str(subject.url.database), _BEFORE_PAGE_10000)
    cursor = encode_cursor(EventListing(limit=LIMIT), (timestamp, event_id))  # type: ignore[arg-type]  # what the columns are
    deep = Figure("deep", "page 10,000", "page 1", "ms", 1.2, at_most=True)
    rare = Figure("rare", "an actor with 5 events", "the most frequent actor", "ms", 3, at_most=True)
    for _ in range(rounds):
        deep.ours.append(subject.page(cursor=cursor))
        deep.theirs.append(subject.page())
        rare.ours.append(subject.page(actor=RARE_ACTOR))
        rare.theirs.append(subject.page(actor=events.ACTORS[0]))
    return [deep, rare]


def day_histogram(subject: Subject, rounds: int) -> list[Figure]:
    end = datetime.now(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    start = (end - timedelta(days=1)).replace(day=1)
    query = {"actor": events.ACTORS[0], "start": start.isoformat(), "end": end.isoformat(), "interval": "day"}
    wanted = HistogramQuery.model_validate({**query, "actor": [query["actor"]]})
    sql, values = aggregates.histogram_statement(wanted, start, end - timedelta(microseconds=1))
    what = "days of a month, one actor, less 1 ms"
    figure = Figure("histogram", what, "the same SQL, prepared", "ms", 1.3, at_most=True)
    for _ in range(rounds):
        figure.ours.append(subject.ask("/events/histogram", **query) - ALLOWANCE_MS)
        figure.theirs.append(subject.run(sql, values, WALK_OPTIONS))
    return [figure]


def against_size(small: Subject, large: Subject, rounds: int) -> list[Figure]:
    figures = []
    for question in questions(datetime.now(UTC)):
        what, against = f"{question.what}, {large.rows:,} events", f"{small.rows:,} events"
        figure = Figure(f"size-{question.name}", what, against, "ms", 1.3, at_most=True)
        for _ in range(rounds):
            figure.ours.append(large.page(**question.filters))
            figure.theirs.append(small.page(**question.filters))
        figures.append(figure)
    return figures


def export_against_copy(subject: Subject, rounds: int) -> list[Figure]:
    """A million events, or all, as NDJSON over HTTP, and their columns by COPY, which need not be in order."""
    figure = Figure("export", "NDJSON export of 1,000,000 events", "COPY of the same columns", "ms", 2.5, at_most=True)
    ((first_id,),) = subject.server.execute(str(subject.url.database), "SELECT min(id) FROM audit_events")
    last_id = int(str(first_id)) + min(subject.rows, 1_000_000) - 1
    export = [
        require("curl", "curl"), "--silent", "--fail", "--header", f"X-API-Key: {subject.service.api_key}",
        f"{subject.service.url}/events/export?snapshot={last_id}",
    ]  # fmt: skip
    copy = [
        binaries() / "psql", f"--host={subject.url.query['host']}", f"--username={subject.url.username}",
        f"--command=COPY (SELECT * FROM audit_events WHERE id <= {last_id}) TO STDOUT", subject.url.database,  # noqa: S608
    ]  # fmt: skip
    for _ in range(rounds):
        figure.ours.append(_time_ms(export))
        figure.theirs.append(_time_ms(copy))
    return [figure]


def _time_ms(command: Sequence[object]) -> float:
    """Of a program whose output nobody keeps."""
    started = time.perf_counter()
    subprocess.run([str(part) for part in command], stdout=subprocess.DEVNULL, check=True)  # noqa: S603 - ours
    return (time.perf_counter() - started) * 1e3


BENCHES: Mapping[str, Callable[[Subject, int], list[Figure]]] = {
    "sql": against_sql,
    "deep-and-rare": deep_and_rare,
    "histogram": day_histogram,
    "export": export_against_copy,
}


def _pgbench_script(sql: str) -> str:
    """Parameters as pgbench has them. It would see one in the colons of a time's format and of JSON's null, too."""
    sql = sql.replace("""'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'""", """E'YYYY-MM-DD"T"HH24\\\\x3aMI\\\\x3aSS.US"Z"'""")
    sql = re.sub(r"'([^']*):null([^']*)'", r"E'\1\\x3anull\2'", sql)
    return re.sub(r"%\((\w+)\)s", r":\1", sql).replace("%%", "%").replace("\n", " ") + ";\n"


def _literal(value: object) -> str:
    if isinstance(value, list):
        return "{" + ",".join(f'"{member}"' for member in value) + "}"
    return f"{value.total_seconds()} s" if isinstance(value, timedelta) else str(value)


def _run(program: str | Path, *arguments: object, options: str = "") -> str:
    result = subprocess.run(  # noqa: S603 - programs and arguments are ours
        [program, *map(str, arguments)], capture_output=True, text=True, check=False, env={"PGOPTIONS": options}
    )
    if result.returncode:
        raise SystemExit(f"{program} failed with status {result.returncode}:\n{result.stdout}{result.stderr}")
    return result.stdout


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.query", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 50_000_000], help="sizes of the log")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=2, help="how long each side is measured in a round")
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=list(BENCHES))
    arguments = parser.parse_args()
    templates = {template_name(rows, MONTHS): partial(fill, rows=rows, months=MONTHS) for rows in arguments.rows}
    figures: list[Figure] = []
    with running_server(templates) as server, ExitStack() as stack:
        subjects = []
        for name, rows in zip(templates, arguments.rows, strict=True):
            # Not on a clone: a large one would not fit beside its template, and reads change nothing.
            server.execute(name, _MAKE_RARE)
            url = server.cluster.url(name)
            with closing(Database(url)) as database:
                list(seal_finished_months(database))
            server.settle(name)
            service = stack.enter_context(running_service(SERVE_COMMAND, url))
            subjects.append(Subject(rows, server, url, service, arguments.seconds))
        for subject in subjects:
            print(f"{subject.rows:,} events")
            measured = [figure for name in arguments.only for figure in BENCHES[name](subject, arguments.rounds)]
            print_table(measured)
            figures += measured
        if len(subjects) > 1:
            measured = against_size(subjects[0], subjects[-1], arguments.rounds)
            print_table(measured)
            figures += measured
    print(write_results("query", figures, {"rows": arguments.rows, "rounds": arguments.rounds}))


if __name__ == "__main__":
    main()
