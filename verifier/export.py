"""An export, checked offline: each event is the one whose leaf a proof leads to a checkpoint that the log signed.

The proofs are the answers of GET /events/{id}/proof, a line each, in the order of the export.
"""

import asyncio
import gzip
import json
import zlib
from base64 import b64decode
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import orjson

from ledger.notes import NoteError, TreeHead, Verifier, open_checkpoint
from ledger.tree import hash_leaf, root_from_inclusion
from verifier.differences import PERSONAL, ROW, Difference, at
from verifier.entries import MEMBERS, check_personal_part, entry_of
from verifier.remote import cancel, open_client, read_resource

NO_PROOF = "there is no proof of it"
NOT_PROVED = "its proof does not lead to the checkpoint that it names"
MORE_MEMBERS = "it has members that no event has"
NOT_IN_ORDER = "it stands behind itself or a newer event"

_TOTALS = frozenset(("complete", "count", "snapshot"))  # the members of the last line

_AT_ONCE = 32


class NoExport(Exception):
    """The file is not what GET /events/export?format=ndjson answers, or what `ledger prove` prints."""


@dataclass
class Proved:
    """What an export came to."""

    count: int = 0
    redacted: int = 0
    largest: int = 0  # tree that the proofs lead to
    is_complete: bool = False  # it has the line that says so, with this count
    has_more: bool = False  # behind that line
    differences: list[Difference] = field(default_factory=list)


def verify_export(export: Path, proofs: Path, key: Verifier, advance: Callable[[int], object]) -> Proved:
    """Check every event of an export; raises NoExport, OSError, and NoteError where a checkpoint is not this key's."""
    check = _Check(key)
    events, answers = _lines(export), _lines(proofs)
    proof = next(answers, None)
    try:
        for event in events:
            if "id" not in event:
                check.finish(event)
                break
            while proof is not None and proof["event_id"] < event["id"]:
                proof = next(answers, None)
            check.take(event, proof if proof is not None and proof["event_id"] == event["id"] else None)
            check.proved.count += 1
            advance(1)
        check.proved.has_more = next(events, None) is not None
    except NoteError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        raise NoExport(
            f"{export} or {proofs}: event {check.proved.count + 1} or its proof is not as it is made"
        ) from None
    return check.proved


class _Check:
    """The events so far."""

    def __init__(self, key: Verifier) -> None:
        self.proved = Proved()
        self._open = cache(lambda note: open_checkpoint(note, key)[0])
        self._first_id: int | None = None  # of the ledger: what the first proof says of it holds for all
        self._last_id: int | None = None  # the newest so far

    def take(self, event: Mapping[str, Any], proof: Mapping[str, Any] | None) -> None:
        personal = check_personal_part(event)
        self.proved.redacted += personal == "redacted"
        if self._last_id is not None and event["id"] <= self._last_id:
            self._differ(event, NOT_IN_ORDER)
            return
        self._last_id = event["id"]
        if not MEMBERS.issuperset(event):
            self._differ(event, MORE_MEMBERS)
        elif personal == "changed":
            self._differ(event, PERSONAL)
        elif proof is None:
            self._differ(event, NO_PROOF)
        elif entry_of(event) != proof["entry"].encode():
            self._differ(event, ROW)
        else:
            self._check_path(event, proof)

    def finish(self, totals: Mapping[str, Any]) -> None:
        """The line that no event is."""
        is_last = totals.keys() == _TOTALS and totals["complete"] is True
        self.proved.is_complete = is_last and totals["count"] == self.proved.count

    def _check_path(self, event: Mapping[str, Any], proof: Mapping[str, Any]) -> None:
        head: TreeHead = self._open(proof["checkpoint"])
        leaf_index = proof["leaf_index"]
        first_id = event["id"] - leaf_index
        self._first_id = first_id if self._first_id is None else self._first_id
        try:
            path = [b64decode(node, validate=True) for node in proof["inclusion_path"]]
        except ValueError:  # none, or not in ASCII
            path = []
        root = root_from_inclusion(hash_leaf(proof["entry"].encode()), leaf_index, head.size, path)
        if root != head.root or first_id != self._first_id:
            self._differ(event, NOT_PROVED)
        self.proved.largest = max(self.proved.largest, head.size)

    def _differ(self, event: Mapping[str, Any], what: str) -> None:
        self.proved.differences.append(at(event["id"], what))


async def proofs_of(url: str, api_key: str, export: Path) -> AsyncIterator[bytes]:
    """The proof of each event of the export, a line each, many requests at a time; of those that have one.

    Raises RemoteError, NoExport and OSError.
    """
    async with open_client(url, api_key, _AT_ONCE) as client:
        waiting: deque[asyncio.Task[bytes | None]] = deque()
        events = _lines(export)
        try:
            while True:
                while len(waiting) < _AT_ONCE and (event := next(events, None)) is not None and "id" in event:
                    waiting.append(asyncio.create_task(read_resource(client, f"/events/{event['id']}/proof")))
                if not waiting:
                    return
                if (proof := await waiting.popleft()) is not None:
                    yield proof + b"\n"
        finally:
            await cancel(waiting)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects in a file, gzip or not, a line each. Lines end at LF only. Raises NoExport and OSError."""
    with path.open("rb") as raw:
        is_compressed = raw.read(2) == b"\x1f\x8b"
    with gzip.open(path) if is_compressed else path.open("rb") as file:
        try:
            for line in file:
                yield _parse_object(line)
        except (ValueError, RecursionError, EOFError, zlib.error, gzip.BadGzipFile):
            raise NoExport(f"{path}: a line is cut, or no JSON object whose names differ") from None


def _parse_object(line: bytes) -> dict[str, Any]:
    """As orjson reads it, and any other reader: of two members with one name they do not agree which counts."""
    parsed = orjson.loads(line)
    if type(parsed) is not dict:
        raise ValueError("no object")
    json.loads(line, object_pairs_hook=_require_different_names)
    return parsed


def _require_different_names(members: list[tuple[str, Any]]) -> None:
    names = [name for name, _ in members]
    if len(set(names)) < len(names):
        raise ValueError("a name stands twice")
