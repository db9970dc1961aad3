"""The loads: wrk over HTTP, pgbench and COPY straight into PostgreSQL. Each returns what it measured."""

import json
import random
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.engine import URL

from bench import events
from bench.servers import Service, binaries, require

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Measured:
    """One run of a load."""

    rate: float  # a second: requests or transactions
    p99_ms: float | None = None


def wrk(service: Service, path: str, bodies: Path, *, connections: int, seconds: int, pause_ms: float = 0) -> Measured:
    """POST the file's bodies, in a closed loop of so many connections."""
    seed = random.randrange(1_000_000)  # noqa: S311 - a load, not a secret
    printed = _run(
        require("wrk", "wrk"), "--threads=1", f"--connections={connections}", f"--duration={seconds}s",
        "--timeout=30s", f"--script={HERE / 'post.lua'}", service.url,
        "--", bodies, path, service.api_key, seed, pause_ms,
    )  # fmt: skip
    summary = json.loads(printed.splitlines()[-1])
    if summary["errors"] or not summary["requests"]:
        raise SystemExit(f"{service.url}{path}: {summary['errors']} errors of {summary['requests']} requests")
    return Measured(summary["requests"] / summary["seconds"], summary["p99_ms"])


def pgbench(database: URL, script: Path, *, clients: int, seconds: int) -> Measured:
    """Run the script, a transaction each time, over so many connections."""
    printed = _run(
        binaries() / "pgbench", "--no-vacuum", "--protocol=prepared", f"--client={clients}", "--jobs=1",
        f"--time={seconds}", f"--file={script}", f"--host={database.query['host']}",
        f"--username={database.username}", str(database.database),
    )  # fmt: skip
    found = re.search(r"^tps = ([\d.]+)", printed, re.MULTILINE)
    if found is None:
        raise SystemExit(f"pgbench printed no rate:\n{printed}")
    return Measured(float(found[1]))


def write_bodies(path: Path, count: int) -> Path:
    """Bodies for POST /events, one a line."""
    path.write_text("".join(f"{events.body_of(event)}\n" for event in events.sample_events(count, seed=2)))
    return path


def write_insert(path: Path) -> Path:
    """The pgbench script that inserts what a body of write_bodies holds, drawn from the same distributions."""
    path.write_text(
        (HERE / "insert.sql").read_text().format(
            actors=events.ACTOR_COUNT,
            exponent=events.ZIPF_EXPONENT,
            types=len(events.EVENT_TYPES),
            kinds=len(events.KINDS),
            tenants=events.TENANT_COUNT,
            sources=events.SOURCE_COUNT,
            outcomes=len(events.OUTCOMES),
            type_names=_array(events.EVENT_TYPES),
            tenant_names=_array(events.TENANTS),
            kind_names=_array(events.KINDS),
            outcome_names=_array(events.OUTCOMES),
            source_names=_array(events.SOURCES),
        )
    )  # fmt: skip
    return path


def _array(texts: Sequence[str]) -> str:
    return "{" + ",".join(texts) + "}"


def _run(program: str | Path, *arguments: object) -> str:
    result = subprocess.run(  # noqa: S603 - programs and arguments are ours
        [program, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise SystemExit(f"{program} failed with status {result.returncode}:\n{result.stdout}{result.stderr}")
    return result.stdout
