"""An export, checked offline: each event is the one whose leaf a proof leads to a checkpoint that the log signed.

The proofs are the answers of GET /events/{id}/proof, a line each, in the order of the export.
"""

import asyncio
import gzip
from base64 import b64decode
from binascii import Error as Base64Error
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import orjson

from ledger.notes import TreeHead, Verifier, open_checkpoint
from ledger.tree import hash_leaf, root_from_inclusion
from verifier.differences import PERSONAL, ROW, Difference, at
from verifier.entries import check_personal_part, entry_of
from verifier.remote import RemoteError

NO_PROOF = "there is no proof of it"
NOT_PROVED = "its proof does not lead to the checkpoint that it names"

_AT_ONCE = 32
_TIMEOUT_S = 30


class NoExport(Exception):
    """The file is not what GET /events/export?format=ndjson answers, or what `ledger prove` prints."""


@dataclass
class Proved:
    """What an export came to."""

    count: int = 0
    redacted: int = 0
    largest: int = 0  # tree that the proofs lead to
    is_complete: bool = False  # it has the line that says so, with this count
    differences: list[Difference] = field(default_factory=list)


def verify_export(export: Path, proofs: Path, key: Verifier, advance: Callable[[int], object]) -> Proved:
    """Check every event of an export; raises NoExport, OSError, and NoteError where a checkpoint is not this key's."""
    check = _Check(key)
    answers = _lines(proofs)
    proof = next(answers, None)
    try:
        for event in _lines(export):
            if "id" not in event:
                check.proved.is_complete = event.get("complete") is True and event.get("count") == check.proved.count
                break
            while proof is not None and proof["event_id"] < event["id"]:
                proof = next(answers, None)
            check.take(event, proof if proof is not None and proof["event_id"] == event["id"] else None)
            advance(1)
    except (KeyError, TypeError, AttributeError):
        raise NoExport(f"{export} or {proofs}: event {check.proved.count + 1} or its proof lacks a member") from None
    return check.proved


class _Check:
    """The events so far."""

    def __init__(self, key: Verifier) -> None:
        self.proved = Proved()
        self._open = cache(lambda note: open_checkpoint(note, key)[0])
        self._first_id: int | None = None  # of the ledger: what the first proof says of it holds for all

    def take(self, event: Mapping[str, Any], proof: Mapping[str, Any] | None) -> None:
        self.proved.count += 1
        personal = check_personal_part(event)
        self.proved.redacted += personal == "redacted"
        if personal == "changed":
            self._differ(event, PERSONAL)
        elif proof is None:
            self._differ(event, NO_PROOF)
        elif entry_of(event) != proof["entry"].encode():
            self._differ(event, ROW)
        else:
            self._check_path(event, proof)

    def _check_path(self, event: Mapping[str, Any], proof: Mapping[str, Any]) -> None:
        head: TreeHead = self._open(proof["checkpoint"])
        leaf_index = proof["leaf_index"]
        first_id = event["id"] - leaf_index
        self._first_id = first_id if self._first_id is None else self._first_id
        try:
            path = [b64decode(node, validate=True) for node in proof["inclusion_path"]]
        except Base64Error:
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
    limits = httpx.Limits(max_connections=_AT_ONCE)
    headers = {"X-API-Key": api_key}
    async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=_TIMEOUT_S) as client:
        waiting: deque[asyncio.Task[bytes | None]] = deque()
        events = _lines(export)
        try:
            while True:
                while len(waiting) < _AT_ONCE and (event := next(events, None)) is not None and "id" in event:
                    waiting.append(asyncio.create_task(_read_proof(client, event["id"])))
                if not waiting:
                    return
                if (proof := await waiting.popleft()) is not None:
                    yield proof + b"\n"
        finally:
            for task in waiting:
                task.cancel()


async def _read_proof(client: httpx.AsyncClient, event_id: int) -> bytes | None:
    """The answer; None where the log has no leaf of this event."""
    try:
        answer = await client.get(f"/events/{event_id}/proof")
    except httpx.HTTPError as error:
        raise RemoteError(f"{client.base_url}: {error or type(error).__name__}") from None
    if answer.status_code not in (200, 404):
        raise RemoteError(f"{answer.url}: {answer.status_code} {answer.text[:200]}")
    return answer.content if answer.status_code == 200 else None


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects in a file, gzip or not, a line each. Lines end at LF only."""
    with path.open("rb") as raw:
        is_compressed = raw.read(2) == b"\x1f\x8b"
    with gzip.open(path) if is_compressed else path.open("rb") as file:
        try:
            for line in file:
                yield orjson.loads(line)
        except (ValueError, EOFError, gzip.BadGzipFile):
            raise NoExport(f"{path}: a line is cut, or no JSON") from None
