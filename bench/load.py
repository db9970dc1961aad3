"""The loads: wrk over HTTP, pgbench and COPY straight into PostgreSQL, and the events that all of them write."""

import json
import random
import re
import secrets
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from string import Template
from typing import Any

from sqlalchemy.engine import URL

from bench import events
from bench.servers import Service, binaries, connect, require

HERE = Path(__file__).parent
BATCH_EVENTS = 1_000
COPY_EVENTS = 10_000  # a transaction
CLIENTS_A_JOB = 16  # of pgbench, which is at its best with up to four threads

_COPY = (
    "COPY audit_events (event_type, actor, timestamp, tenant, resource, outcome, source, metadata,"
    " nonce, personal_hash) FROM STDIN"
)


@dataclass(frozen=True)
class Measured:
    """One run of wrk."""

    rate: float  # requests a second
    p50_ms: float
    p99_ms: float


def wrk(service: Service, path: str, bodies: Path, *, connections: int, seconds: int, pause_ms: float = 0) -> Measured:
    """POST the file's bodies over so many connections, each of which pauses so long on average before it sends."""
    seed = random.randrange(1_000_000)  # noqa: S311 - a load, not a secret
    printed = _run(
        require("wrk", "wrk"), "--threads=1", f"--connections={connections}", f"--duration={seconds}s",
        "--timeout=30s", f"--script={HERE / 'post.lua'}", service.url,
        "--", bodies, path, service.api_key, seed, pause_ms,
    )  # fmt: skip
    summary = json.loads(printed.splitlines()[-1])
    if summary["errors"] or not summary["requests"]:
        raise SystemExit(f"{service.url}{path}: {summary['errors']} errors, {summary['requests']} requests")
    return Measured(summary["requests"] / summary["seconds"], summary["p50_ms"], summary["p99_ms"])


def pgbench_rate(database: URL, script: Path, *, clients: int, seconds: int) -> float:
    """Transactions a second, of one run of the script each, as fast as it goes."""
    printed = _pgbench(database, script, clients, seconds)
    found = re.search(r"^tps = ([\d.]+)", printed, re.MULTILINE)
    if found is None:
        raise SystemExit(f"pgbench printed no rate:\n{printed}")
    return float(found[1])


def pgbench_p99_ms(database: URL, script: Path, *, clients: int, seconds: int, rate: float) -> float:
    """The time below which 99 in 100 transactions stay when so many a second arrive, whatever the others do."""
    with tempfile.TemporaryDirectory() as folder:
        _pgbench(database, script, clients, seconds, f"--rate={rate}", "--log", f"--log-prefix={folder}/log")
        # A line: client, transaction, µs since the moment for which it was scheduled, …
        times_us = sorted(int(line.split()[2]) for log in Path(folder).iterdir() for line in log.open())
    return times_us[len(times_us) * 99 // 100] / 1e3


def _pgbench(database: URL, script: Path, clients: int, seconds: int, *options: str) -> str:
    return _run(
        binaries() / "pgbench", "--no-vacuum", "--protocol=prepared", f"--client={clients}",
        f"--jobs={max(1, min(4, clients // CLIENTS_A_JOB))}", f"--time={seconds}", f"--file={script}", *options,
        f"--host={database.query['host']}", f"--username={database.username}", str(database.database),
    )  # fmt: skip


def copy_rate(database: URL, texts: Sequence[bytes], *, seconds: int) -> float:
    """Rows a second of COPY over one connection, a text of COPY_EVENTS rows a transaction."""
    with closing(connect(database)) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        started = time.perf_counter()
        copied = 0
        while time.perf_counter() - started < seconds:
            cursor.copy_expert(_COPY, BytesIO(texts[copied % len(texts)]))
            copied += 1
        return copied * COPY_EVENTS / (time.perf_counter() - started)


def write_bodies(path: Path, count: int) -> Path:
    """Bodies for POST /events, one a line, with marks in whose place post.lua puts a number."""
    path.write_text("".join(f"{_json(event)}\n" for event in events.sample_events(count, seed=2, marked=True)))
    return path


def write_batches(path: Path, count: int) -> list[bytes]:
    """Bodies for POST /events/batch, one a line; return the same events as texts for COPY."""
    sample = events.sample_events(count * BATCH_EVENTS, seed=3)
    with path.open("w") as file:
        file.writelines(f"{_json(list(batch))}\n" for batch in _pieces(sample, BATCH_EVENTS))
    return ["".join(map(_copy_line, piece)).encode() for piece in _pieces(sample, COPY_EVENTS)]


def _copy_line(event: Mapping[str, Any]) -> str:
    fields = [_json(value) if isinstance(value, dict) else value for value in event.values()]
    return "\t".join([*fields, f"\\\\x{secrets.token_hex(16)}", f"\\\\x{secrets.token_hex(32)}\n"])


def write_insert(path: Path) -> Path:
    """The pgbench script that inserts such events as write_bodies has, drawn from the same distributions."""
    names = {"event_type": events.EVENT_TYPES, "kind": events.KINDS, "tenant": events.TENANTS,
             "source": events.SOURCES, "outcome": events.OUTCOMES}  # fmt: skip
    values = {
        "exponent": events.ZIPF_EXPONENT,
        "actor_count": events.ACTOR_COUNT,
        **{f"{name}_count": len(texts) for name, texts in names.items()},
        **{f"{name}s": "{" + ",".join(texts) + "}" for name, texts in names.items()},
    }
    path.write_text(Template((HERE / "insert.sql").read_text()).substitute(values))
    return path


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _pieces(sequence: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (sequence[at : at + size] for at in range(0, len(sequence), size))


def _run(program: str | Path, *arguments: object) -> str:
    result = subprocess.run(  # noqa: S603 - programs and arguments are ours
        [program, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise SystemExit(f"{program} failed with status {result.returncode}:\n{result.stdout}{result.stderr}")
    return result.stdout
