"""/ledger and /events/{id}/proof: what others hold the log against. Tiles as in c2sp.org/tlog-tiles, prefix /ledger."""

import gzip
import re
from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from auth import Reading
from ingest.reads import ReadLog
from ledger.tree import TILE_WIDTH, TileId
from problems import (
    CheckpointNotFound,
    EventNotFound,
    Forbidden,
    InvalidFields,
    TileNotFound,
    Unauthorized,
    Unavailable,
    responses,
)
from proofs import tiles
from proofs.checkpoints import Checkpoints
from proofs.paths import prove_consistency, prove_inclusion
from proofs.witnesses import newest_cosigned
from queries import lookup
from queries.exports import accepts_gzip
from queries.reader import Reader
from routes import examples
from routes.examples import answer
from schemas import MAX_ID

router = APIRouter(tags=["ledger"], responses=responses(Unauthorized, Forbidden, InvalidFields, Unavailable))

# c2sp.org/tlog-tiles, Merkle Tree: <L>, and <N>[.p/<W>] with N in groups of three digits: 15 count more than ids do.
_LEVEL = re.compile(r"[0-9]|[1-5][0-9]|6[0-3]")
_INDEX = re.compile(r"((?:x[0-9]{3}/){0,4}[0-9]{3})(?:\.p/([1-9][0-9]{0,2}))?")
_OPAQUE_TAG = re.compile(r'"[^"]*"')  # of an entity-tag, without the W/ of a weak one
_HASH = "A SHA-256 in base64"


class _Parameters(BaseModel):
    model_config = ConfigDict(extra="forbid")


class CheckpointQuery(_Parameters):
    """Which checkpoint."""

    cosigned: bool = Field(default=False, description="The newest that a witness signed, with all who did")


class ConsistencyQuery(_Parameters):
    """Two sizes of the tree."""

    model_config = ConfigDict(extra="forbid", serialize_by_alias=True)

    old_size: int = Field(alias="from", ge=0, le=MAX_ID)
    size: int = Field(alias="to", ge=0, le=MAX_ID)


class InclusionProof(BaseModel):
    """That an event is in the tree that a checkpoint names (RFC 6962 section 2.1.1)."""

    event_id: int
    leaf_index: int
    tree_size: int
    entry: str = Field(description="The canonical JSON (RFC 8785) whose hash is the leaf")
    inclusion_path: list[str] = Field(description=f"{_HASH} each, from the leaf upwards")
    checkpoint: str = Field(description="The signed note (c2sp.org/tlog-checkpoint)")


class ConsistencyProof(BaseModel):
    """That the tree of one size begins with that of another (RFC 6962 section 2.1.2)."""

    model_config = ConfigDict(serialize_by_alias=True, validate_by_name=True)

    old_size: int = Field(alias="from")
    size: int = Field(alias="to")
    consistency_path: list[str] = Field(description=f"{_HASH} each")


_CHECKPOINT_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A signed note: origin, size and root hash",
        "content": {"text/plain": {"schema": {"type": "string"}, "example": examples.CHECKPOINT}},
    }
}


def _bytes(description: str) -> dict[int | str, dict[str, Any]]:
    content = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    return {200: {"description": description, "content": content}, 304: {"description": "What you have is it"}}


@router.get(
    "/ledger/checkpoint",
    response_class=Response,
    responses=_CHECKPOINT_ANSWER | responses(CheckpointNotFound),
)
async def get_checkpoint(request: Request, caller: Reading, wanted: Annotated[CheckpointQuery, Query()]) -> Response:
    """The newest checkpoint. It includes what was committed a second ago, and is signed when it is asked for."""
    state = request.app.state
    if wanted.cosigned:
        note = await run_in_threadpool(newest_cosigned, state.reader, state.checkpoints.origin)
        if note is None:
            raise CheckpointNotFound("No witness has signed a checkpoint yet.")
    else:
        note = (await state.checkpoints.current()).note
    return Response(note, media_type="text/plain; charset=utf-8")


@router.get(
    "/ledger/tile/entries/{index:path}",
    response_class=Response,
    responses={**_bytes("Entries, each behind its length in two bytes"), **responses(TileNotFound)},
)
def get_bundle(request: Request, caller: Reading, index: str) -> Response:
    """The log entries of up to 256 leaves, without personal data. For keys that are bound to no tenant."""
    if caller.tenant is not None:
        raise Forbidden("Bundles hold every tenant's entries: this call needs a key that is bound to no tenant.")
    number, width = _parse_index(index)
    body = tiles.read_bundle(request.app.state.reader, number, width)
    return _immutable(request, body, compressed=accepts_gzip(request.headers.get("Accept-Encoding", "")))


@router.get(
    "/ledger/tile/{level}/{index:path}",
    response_class=Response,
    responses={**_bytes("Up to 256 hashes of 32 bytes"), **responses(TileNotFound)},
)
def get_tile(request: Request, caller: Reading, level: str, index: str) -> Response:
    """A tile of the tree: full as `x001/x234/067`, partial, where the tree has no more yet, as `x001/x234/067.p/17`."""
    if not _LEVEL.fullmatch(level):
        raise TileNotFound()
    number, width = _parse_index(index)
    return _immutable(request, tiles.read_tile(request.app.state.reader, TileId(int(level), number), width))


@router.get("/ledger/consistency", response_model=ConsistencyProof, responses=answer(examples.CONSISTENCY))
def get_consistency(request: Request, caller: Reading, wanted: Annotated[ConsistencyQuery, Query()]) -> Any:
    """The proof that the tree of the size `to` begins with the one of the size `from`."""
    if wanted.old_size > wanted.size:
        raise InvalidFields(errors=[{"location": "query.from", "message": "must not be larger than to"}])
    reader: Reader = request.app.state.reader
    try:
        tiles.require_size(reader, wanted.size)
        path = prove_consistency(reader, wanted.old_size, wanted.size)
    except TileNotFound:
        raise InvalidFields(errors=[{"location": "query.to", "message": "the tree has not grown so far"}]) from None
    return ConsistencyProof(old_size=wanted.old_size, size=wanted.size, consistency_path=_encoded(path))


@router.get(
    "/events/{event_id}/proof",
    response_model=InclusionProof,
    responses=responses(EventNotFound) | answer(examples.PROOF),
)
async def get_proof(request: Request, caller: Reading, event_id: Annotated[int, Path(le=MAX_ID, ge=-MAX_ID)]) -> Any:
    """That the event is in the tree of a checkpoint of the last second; of a new event it takes up to a second."""
    reader: Reader = request.app.state.reader
    leaf_index = await run_in_threadpool(_find_leaf, reader, event_id, caller.tenant)
    checkpoints: Checkpoints = request.app.state.checkpoints
    checkpoint = await checkpoints.covering(leaf_index)
    size = checkpoint.head.size
    entry, path = await run_in_threadpool(_prove, reader, event_id, leaf_index, size)
    reads: ReadLog = request.app.state.reads
    reads.record(caller, "proof", None, 1, id=event_id)
    return InclusionProof(
        event_id=event_id,
        leaf_index=leaf_index,
        tree_size=size,
        entry=entry.decode(),
        inclusion_path=_encoded(path),
        checkpoint=checkpoint.note,
    )


def _find_leaf(reader: Reader, event_id: int, tenant: str | None) -> int:
    """The leaf's index; raises EventNotFound, also where the event is none of the caller's."""
    lookup.read_event(reader, event_id, tenant)
    leaf_index = event_id - tiles.read_first_id(reader)
    if leaf_index < 0:
        raise EventNotFound(f"The event {event_id} is older than the ledger, which has no leaf of it.")
    return leaf_index


def _prove(reader: Reader, event_id: int, leaf_index: int, size: int) -> tuple[bytes, Sequence[bytes]]:
    try:
        return tiles.read_entry(reader, event_id), prove_inclusion(reader, leaf_index, size)
    except TileNotFound:
        raise Unavailable("The replica for reads does not have the newest checkpoint's tree yet.") from None


def _parse_index(text: str) -> tuple[int, int]:
    """The number of a tile, and how many of its hashes are asked for; raises TileNotFound."""
    parts = _INDEX.fullmatch(text)
    width = TILE_WIDTH if parts is None or parts[2] is None else int(parts[2])
    if parts is None or (parts[2] is not None and width >= TILE_WIDTH) or text.startswith("x000/"):
        raise TileNotFound()
    return int(parts[1].replace("x", "").replace("/", "")), width


def _immutable(request: Request, body: bytes, *, compressed: bool = False) -> Response:
    """Bytes that will never be others, which a client need not fetch twice (RFC 9110 section 13.1.2)."""
    headers = {"ETag": f'"{sha256(body).hexdigest()[:32]}{"-gzip" if compressed else ""}"', "Vary": "Accept-Encoding"}
    if _has_it(request, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    if compressed:
        body, headers["Content-Encoding"] = gzip.compress(body, 6, mtime=0), "gzip"
    return Response(body, headers=headers, media_type="application/octet-stream")


def _has_it(request: Request, entity_tag: str) -> bool:
    """Whether If-None-Match names the entity-tag, by weak comparison (RFC 9110 section 8.8.3.2), or any by `*`."""
    known = ",".join(request.headers.getlist("If-None-Match"))
    return known.strip() == "*" or entity_tag in _OPAQUE_TAG.findall(known)


def _encoded(path: Sequence[bytes]) -> list[str]:
    return [b64encode(node).decode() for node in path]
