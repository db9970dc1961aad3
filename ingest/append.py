"""One flush: events become rows, leaves and keys in one statement, on a connection that is handed in.

The statement calls append_events(), which locks the head, gives the next ids, stores, grows the tree and commits:
nobody holds the lock while this process thinks, and recorded_at, ids and keys are decided under it.
"""

import os
from collections import deque
from collections.abc import Sequence, Set
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from itertools import accumulate
from typing import Any, NamedTuple

import orjson
from psycopg2.extensions import connection as Connection

from ledger import entries
from problems import IdempotencyConflict
from schemas import EventIn

# The function: alembic/versions/0010_lighter_flush.py; what goes in and what comes out: 0005_append_events.py.
_APPEND_EVENTS = (
    "SELECT recorded_at, next_id, ids, replayed, conflicting FROM append_events(%s, %s::integer[], %s::bigint)"
)

_NONCES_DRAWN = 256  # at once


class Prepared(NamedTuple):
    """An event ready to append but for its id and the moment: all that can be made before the lock is held."""

    row: bytes  # JSON for append_events()
    timestamp: str  # RFC 3339; the moment of its arrival where the client sent none
    key: tuple[str, str] | None  # tenant and idempotency key
    request_hash: bytes | None  # of a keyed event: tells a repetition from another event under the same key
    weight: int  # how long PostgreSQL holds the lock for it, next to others: see _weigh()


class Submission(NamedTuple):
    """Events that are appended all or none. An event whose key comes twice in it is sent once."""

    events: Sequence[Prepared]
    places: Sequence[int]  # of each event asked for, its index in `events`
    keys: Set[tuple[str, str]]
    weight: int


class Appended(NamedTuple):
    """Where a submission's events stand in the log. Ids of repeated keys are those of the first time."""

    ids: Sequence[int]
    recorded_at: str  # RFC 3339
    replayed: frozenset[int] = frozenset()  # indexes of events that were known already


@dataclass(frozen=True, slots=True)
class KeyConflict:
    """Nothing of the submission was stored: the key of this event came before, with another event."""

    index: int


Outcome = Appended | KeyConflict


def prepare_event(event: EventIn, now: datetime, trace_id: str | None = None) -> Prepared:
    """Hash the personal part and write the row. `now` and `trace_id` stand in for what the event does not say.

    Neither is in the request's hash: a client that sends it again does so later, and in another trace.
    """
    row: dict[str, Any] = {name: value for name, value in event.__dict__.items() if value is not None}
    key = row.pop("idempotency_key", None)
    timestamp = entries.format_timestamp(event.timestamp or now)
    if event.timestamp is not None:
        row["timestamp"] = timestamp
    request_hash = None if key is None else sha256(entries.canonical_json(row)).digest()
    row["timestamp"] = timestamp
    if trace_id is not None:
        row.setdefault("trace_id", trace_id)
    nonce = _draw_nonce()
    row["personal_hash"] = entries.hash_personal_part(nonce, entries.personal_part(row)).hex()
    row["nonce"] = nonce.hex()
    if request_hash is not None:
        row["idempotency_key"] = key
        row["request_hash"] = request_hash.hex()
    text = orjson.dumps(row)
    return Prepared(
        text, timestamp, None if key is None else (event.tenant or "", str(key)), request_hash, _weigh(text)
    )


_nonces: deque[bytes] = deque()
os.register_at_fork(after_in_child=_nonces.clear)


def _draw_nonce() -> bytes:
    """Random bytes of the kernel, never the same twice; any thread may call it.

    Drawn for many events at once: the system call lets go of the interpreter's lock, which the writer's thread then
    takes, so that one for each event cost 6 of 100 µs.
    """
    while True:
        try:
            return _nonces.popleft()
        except IndexError:
            drawn = os.urandom(entries.NONCE_BYTES * _NONCES_DRAWN)
            _nonces.extend(drawn[at : at + entries.NONCE_BYTES] for at in range(0, len(drawn), entries.NONCE_BYTES))


def _weigh(row: bytes) -> int:
    """Its bytes, and 50 more for each comma, for each value in metadata is an entry of an index.

    1 MiB of it takes PostgreSQL 30 to 70 ms, from 60,000 letters in one event to 6,000 numbers in each.
    """
    return len(row) + 50 * row.count(b",")


def submission_of(events: Sequence[Prepared]) -> Submission:
    """The events as one submission; raises IdempotencyConflict where two different ones share a key."""
    first_places: dict[tuple[str, str], int] = {}
    unique: list[Prepared] = []
    places: list[int] = []
    for index, event in enumerate(events):
        place = len(unique)
        if event.key is not None:
            place = first_places.setdefault(event.key, place)
        if place == len(unique):
            unique.append(event)
        elif unique[place].request_hash != event.request_hash:
            raise conflict_at(index)
        places.append(place)
    return Submission(unique, places, first_places.keys(), sum([event.weight for event in unique]))


def conflict_at(index: int) -> IdempotencyConflict:
    """The key of the event at this index of a batch was used before."""
    location = f"body.{index}.idempotency_key"
    return IdempotencyConflict(errors=[{"location": location, "message": "was used before, with another event"}])


def append_submissions(
    connection: Connection, submissions: Sequence[Submission], retried_from: int | None = None
) -> tuple[list[Outcome], int]:
    """Append the submissions in their order, each whole or not at all, and commit; also the id that comes next.

    No key may be in two of them. `retried_from`: where this was sent before and nobody knows what became of it,
    the next id as it was then. Raises the driver's error; the connection is in autocommit.
    """
    sizes = [len(submission.events) for submission in submissions]
    keyed = any(submission.keys for submission in submissions)
    starts = list(accumulate(sizes, initial=1))[:-1] if keyed else None
    rows = b",".join([event.row for submission in submissions for event in submission.events]).decode()
    with connection.cursor() as cursor:
        cursor.execute(_APPEND_EVENTS, (f"[{rows}]", starts, retried_from))
        row = cursor.fetchone()
    assert row is not None  # noqa: S101 - for mypy; the function returns one row
    recorded_at, next_id, ids, replayed, conflicting = row
    moment = entries.format_timestamp(recorded_at)
    outcomes = [
        _outcome(submission, moment, ids[start : start + size], _from(start, replayed), _from(start, conflicting))
        for submission, size, start in zip(submissions, sizes, accumulate(sizes, initial=0), strict=False)
    ]
    return outcomes, next_id


def _from(start: int, positions: Sequence[int]) -> Set[int]:
    """Positions in the flush, which count from 1, as places in the submission that starts there."""
    return {position - 1 - start for position in positions}


def _outcome(
    submission: Submission, moment: str, ids: Sequence[int], replayed: Set[int], conflicting: Set[int]
) -> Outcome:
    if not submission.keys:
        return Appended(ids, moment)
    seen: set[int] = set()
    repeated: set[int] = set()
    for index, place in enumerate(submission.places):
        if place in conflicting:
            return KeyConflict(index)
        if place in replayed or place in seen:
            repeated.add(index)
        seen.add(place)
    return Appended([ids[place] for place in submission.places], moment, frozenset(repeated))
