"""Rows as COPY prints them, and their hashes: six times as fast as through objects of the driver's.

Only what is sure to hash alike goes the fast way: no two different rows may come to the same bytes, or one could
stand for the other. Everything else goes by the book, which is verifier/entries.py.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from typing import Any

import orjson

from ledger.entries import canonical_json
from verifier.entries import check_personal_part, leaf_of

# bytea comes last, for its two backslashes each are the only ones in an ordinary row. Index: audit_events_pkey.
COPY_ROWS = r"""
    COPY (
        SELECT id, event_type, actor, timestamp, recorded_at, tenant, resource, outcome, source, source_ip, trace_id,
               metadata, redacted_at, nonce, personal_hash
        FROM audit_events WHERE {condition} ORDER BY id, recorded_at LIMIT {limit}
    ) TO STDOUT (NULL E'\b')
"""
BETWEEN = "id BETWEEN {first_id} AND {last_id}"
# What the session must be set to, whatever the role or the database would have.
SESSION = "SET timezone = 'UTC'; SET datestyle = 'ISO'; SET bytea_output = 'hex'"

_NULL = "\b"  # COPY prints a backspace as \b, so no value looks like this
_COLUMNS = (
    "id event_type actor timestamp recorded_at tenant resource outcome source source_ip trace_id metadata redacted_at"
    " nonce personal_hash"
).split()
_BACKSLASHES = 4  # of an ordinary row: \\x before the nonce and before the hash
_ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
_MOMENT_WIDTH = len("2026-01-31 12:00:00.123456+00")
_PLAIN = frozenset((str, int, bool, type(None)))
_PLAIN_JSON = orjson.OPT_SORT_KEYS | orjson.OPT_STRICT_INTEGER  # refuses integers beyond 2^53


@dataclass(frozen=True)
class Run:
    """So many events, and between which ids."""

    count: int
    first_id: int
    last_id: int

    def __add__(self, other: "Run") -> "Run":
        ids = (min(self.first_id, other.first_id), max(self.last_id, other.last_id))
        return Run(self.count + other.count, *ids)


@dataclass
class Hashed:
    """What a run of rows came to, in their order."""

    ids: list[int] = field(default_factory=list)
    leaves: list[bytes] = field(default_factory=list)
    changed: list[int] = field(default_factory=list)  # ids whose personal part is not what its hash says
    redacted: dict[str, Run] = field(default_factory=dict)  # by redacted_at


class Lines:
    """What COPY prints into: a line a row."""

    def __init__(self) -> None:
        self.rows: list[bytes] = []
        self.write = self.rows.append


def hash_rows(rows: Sequence[bytes]) -> Hashed:
    """Recompute each row's personal hash and leaf."""
    hashed = Hashed()
    recorded_at = moment = ""
    for row in rows:
        line = row.decode()
        values = line.split("\t")
        if line.count("\\") != _BACKSLASHES or values[12] != _NULL or values[13] == _NULL:
            _hash_by_the_book(row, hashed)
            continue
        if values[4] != recorded_at:  # that of a whole flush
            recorded_at = values[4]
            moment = _rfc3339(recorded_at)
        personal_hash = values[14][3:-1]
        text = bytes.fromhex(values[13][3:]) + _personal_json(values[2], values[11], values[6], values[9])
        if sha256(text).hexdigest() != personal_hash:
            hashed.changed.append(int(values[0]))
        start, middle, end = _frame(values[1], values[7], values[8], values[5])
        trace = "" if values[10] == _NULL else f',"trace_id":{_quoted(values[10])}'
        entry = (
            f'{start}{values[0]}{middle}{personal_hash}","recorded_at":"{moment}{end}{_rfc3339(values[3])}"{trace}}}'
        )
        hashed.ids.append(int(values[0]))
        hashed.leaves.append(sha256(entry.encode()).digest())
    return hashed


def parse_row(row: bytes) -> dict[str, Any]:
    """A row as the members of an event, as GET /events/export has them; metadata that is no JSON stays text."""
    texts = row.decode().removesuffix("\n").split("\t")
    values = [None if text == _NULL else _unescaped(text) for text in texts]
    event: dict[str, Any] = dict(zip(_COLUMNS, values, strict=True))
    event["id"] = int(event["id"])
    for name in ("timestamp", "recorded_at", "redacted_at"):
        event[name] = event[name] and _rfc3339(event[name])
    for name in ("nonce", "personal_hash"):
        event[name] = event[name] and event[name].removeprefix("\\x")
    try:
        event["metadata"] = event["metadata"] and orjson.loads(event["metadata"])
    except orjson.JSONDecodeError:  # a number that no double can be
        pass
    return event


def add_runs(runs: dict[str, Run], more: Mapping[str, Run]) -> None:
    for moment, run in more.items():
        runs[moment] = runs[moment] + run if moment in runs else run


def _hash_by_the_book(row: bytes, hashed: Hashed) -> None:
    event = parse_row(row)
    personal = check_personal_part(event)
    if personal == "changed":
        hashed.changed.append(event["id"])
    elif personal == "redacted":
        add_runs(hashed.redacted, {event["redacted_at"]: Run(1, event["id"], event["id"])})
    hashed.ids.append(event["id"])
    hashed.leaves.append(leaf_of(event))


def _personal_json(actor: str, metadata: str, resource: str, source_ip: str) -> bytes:
    """RFC 8785 canonical JSON of a personal part; b"" of what nobody can have recorded."""
    personal: dict[str, Any] = {"actor": actor}
    is_plain = True
    if metadata != _NULL:
        try:
            personal["metadata"] = members = orjson.loads(metadata)
        except orjson.JSONDecodeError:
            return b""
        # Flat, names in ASCII, no floats: there orjson sorts and prints as the RFC does (ledger/entries.py).
        is_plain = metadata.isascii() and type(members) is dict and _PLAIN.issuperset(map(type, members.values()))
    if resource != _NULL:
        personal["resource"] = resource
    if source_ip != _NULL:
        personal["source_ip"] = source_ip
    try:
        return orjson.dumps(personal, option=_PLAIN_JSON) if is_plain else canonical_json(personal)
    except TypeError:  # an integer beyond 2^53
        return canonical_json(personal)


@lru_cache(10_000)
def _frame(event_type: str, outcome: str, source: str, tenant: str) -> tuple[str, str, str]:
    """What stands around the id, the personal hash and the moments in a leaf's bytes: the same in many entries."""
    return (
        f'\0{{"event_type":{_quoted(event_type)},"id":',
        f'{_member("outcome", outcome)},"personal_hash":"',
        f'"{_member("source", source)}{_member("tenant", tenant)},"timestamp":"',
    )


def _member(name: str, value: str) -> str:
    return "" if value == _NULL else f',"{name}":{_quoted(value)}'


def _quoted(value: str) -> str:
    return orjson.dumps(value).decode()


def _rfc3339(moment: str) -> str:
    """PostgreSQL's moment in UTC, whose trailing zeros are missing; what is none of this era stays as it is."""
    if len(moment) == _MOMENT_WIDTH and moment.endswith("+00"):
        return f"{moment[:10]}T{moment[11:26]}Z"
    seconds, _, fraction = moment.removesuffix("+00").partition(".")
    if not moment.endswith("+00") or len(fraction) > 6:
        return moment
    return f"{seconds.replace(' ', 'T')}.{fraction:0<6}Z"


def _unescaped(value: str) -> str:
    """A value of COPY's text format (PostgreSQL, COPY, File Formats)."""
    return re.sub(r"\\(.)", lambda found: _ESCAPES.get(found[1], found[1]), value)
