"""/events/export and /events/stream: answers without an end that is known when they begin."""

from collections.abc import Callable, Coroutine
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request, Response

from auth import Authenticator, Reading, presented_key
from ingest.reads import ReadLog
from problems import Forbidden, InvalidFields, Unauthorized, Unavailable, responses
from queries.exports import Exports, accepts_gzip
from queries.stream import Feed
from routes import examples
from routes.events import refuse_repetition
from routes.streamed import Streamed
from schemas import MAX_ID, EventFilter, ExportQuery

router = APIRouter(
    prefix="/events",
    tags=["events"],
    responses=responses(Unauthorized, Forbidden, InvalidFields, Unavailable),
    dependencies=[Depends(refuse_repetition)],
)

_EXPORT_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The events, and a last line that says that they are all",
        "content": {
            "application/x-ndjson": {"schema": {"type": "string"}, "example": examples.EXPORT_NDJSON},
            "text/csv": {"schema": {"type": "string"}, "example": examples.EXPORT_CSV},
        },
        "headers": {"Audit-Snapshot": {"schema": {"type": "integer"}, "description": "The newest event's id"}},
    }
}
_STREAM_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Each event as `id:`, its id, and `data:`, its JSON",
        "content": {"text/event-stream": {"schema": {"type": "string"}, "example": examples.STREAM}},
    }
}
MEDIA_TYPES = {"ndjson": "application/x-ndjson", "csv": "text/csv; charset=utf-8"}


@router.get("/export", response_class=Response, responses=_EXPORT_ANSWER)
async def export_events(request: Request, caller: Reading, query: Annotated[ExportQuery, Query()]) -> Response:
    """Every event that meets the filters, in the order of ids, from one snapshot; the last line says `complete`."""
    query = caller.narrow(query)
    exports: Exports = request.app.state.exports
    compressed = accepts_gzip(request.headers.get("Accept-Encoding", ""))
    export = await exports.start(query, caller.id, caller.tenant, compressed=compressed)
    headers = {
        "Audit-Snapshot": str(export.snapshot),
        "Content-Disposition": f'attachment; filename="events.{query.format}"',
        "Vary": "Accept-Encoding",
        **({"Content-Encoding": "gzip"} if compressed else {}),
    }
    reads: ReadLog = request.app.state.reads

    def end() -> None:
        export.close()
        reads.record(caller, "export", query, export.count, complete=export.is_complete)

    return Streamed(export.pieces(), end, MEDIA_TYPES[query.format], headers, _key_watch(request))


@router.get("/stream", response_class=Response, responses=_STREAM_ANSWER)
async def stream_events(
    request: Request,
    caller: Reading,
    wanted: Annotated[EventFilter, Query()],
    last_event_id: Annotated[int | None, Header(ge=0, le=MAX_ID)] = None,
) -> Response:
    """Server-sent events, in the order of ids: what meets the filters from now on, or behind `Last-Event-ID`."""
    wanted = caller.narrow(wanted)
    feed: Feed = request.app.state.feed
    listener = await feed.listen(wanted, last_event_id, caller.id, caller.tenant)
    headers = {"X-Accel-Buffering": "no"}
    reads: ReadLog = request.app.state.reads
    reads.record(caller, "stream.open", wanted, 0)

    def end() -> None:
        listener.close()
        reads.record(caller, "stream", wanted, listener.count)

    answer = Streamed(listener.frames(), end, "text/event-stream", headers, _key_watch(request))
    listener.cut = answer.cut
    return answer


def _key_watch(request: Request) -> Callable[[Callable[[], None]], Coroutine[Any, Any, None]]:
    """What cuts an answer once the key that asked for it is refused."""
    authenticator: Authenticator = request.app.state.authenticator
    return partial(authenticator.cut_when_refused, presented_key(dict(request.scope["headers"])))
