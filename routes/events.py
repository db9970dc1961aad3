"""/events: append one or many, list them, get one."""

import json
from collections import Counter
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request, Response

from auth import Key, Reading, Writing
from ingest import cloudevents
from ingest.reads import ReadLog
from problems import (
    BadRequest,
    BodyTooLarge,
    EventNotFound,
    Forbidden,
    IdempotencyConflict,
    InvalidFields,
    MalformedBody,
    Unauthorized,
    Unavailable,
    UnsupportedMediaType,
    responses,
)
from queries import aggregates, listing, lookup
from queries.reader import Reader
from routes import examples
from routes.examples import answer
from routes.writes import MAX_BATCH_EVENTS
from schemas import (
    MAX_ID,
    BatchReceipt,
    Count,
    Event,
    EventFilter,
    EventIn,
    EventListing,
    EventPage,
    Histogram,
    HistogramQuery,
    Top,
    TopQuery,
)

REPEATABLE = frozenset({"actor", "event_type"})


async def refuse_repetition(request: Request) -> None:
    """Of a parameter that takes one value, a second would be lost without a word."""
    given = Counter(name for name, _ in request.query_params.multi_items())
    repeated = sorted(name for name, count in given.items() if count > 1 and name not in REPEATABLE)
    if repeated:
        raise InvalidFields(
            errors=[{"location": f"query.{name}", "message": "given more than once"} for name in repeated]
        )


router = APIRouter(
    prefix="/events",
    tags=["events"],
    responses=responses(Unauthorized, Forbidden, InvalidFields, Unavailable),
    dependencies=[Depends(refuse_repetition)],
)

_EVENT_SCHEMA = EventIn.model_json_schema()
_SIZE = {"minItems": 1, "maxItems": MAX_BATCH_EVENTS}
_EVENT_BODY = {
    "required": True,
    "content": {
        "application/json": {"schema": _EVENT_SCHEMA},
        cloudevents.STRUCTURED: {"schema": cloudevents.SCHEMA},
        cloudevents.BATCH: {"schema": {"type": "array", **_SIZE, "items": cloudevents.SCHEMA}},
    },
}
_BATCH_BODY = {
    "required": True,
    "content": {
        "application/json": {"schema": {"type": "array", **_SIZE, "items": _EVENT_SCHEMA}},
        "application/x-ndjson": {"schema": {"type": "string", "description": "One event a line"}},
    },
}
_REPLAYED: dict[int | str, dict[str, Any]] = {
    200: {
        "model": Event,
        "description": "The idempotency key is known: the event that it stands for",
        "content": {"application/json": {"example": examples.EVENT}},
    }
}
_WRITE_PROBLEMS = responses(MalformedBody, IdempotencyConflict, BodyTooLarge, UnsupportedMediaType)


@router.post(
    "",
    status_code=201,
    response_model=Event | BatchReceipt,
    openapi_extra={"requestBody": _EVENT_BODY},
    responses=_REPLAYED | _WRITE_PROBLEMS | answer(examples.EVENT, 201),
)
def create_event(caller: Writing) -> None:
    """Append one event, or a CloudEvents batch. 201 means that it is committed.

    With an idempotency key, in `Idempotency-Key` or in the body, a repetition answers 200 with the first event. The key
    of a CloudEvent is its source and id; with one, and with a batch, `Idempotency-Key` is refused.
    """
    # For OpenAPI: routes/writes.py answers before the router is asked.


@router.post(
    "/batch",
    status_code=201,
    response_model=BatchReceipt,
    openapi_extra={"requestBody": _BATCH_BODY},
    responses=_WRITE_PROBLEMS | answer(examples.RECEIPT, 201),
)
def create_events(caller: Writing) -> None:
    """Append up to 10,000 events, all or none, from a JSON array or NDJSON.

    Each has an `idempotency_key` of its own; the header `Idempotency-Key` is refused.
    """
    # For OpenAPI: routes/writes.py answers before the router is asked.


@router.get("", response_model=EventPage, responses=responses(BadRequest) | answer(examples.EVENTS))
def list_events(request: Request, caller: Reading, wanted: Annotated[EventListing, Query()]) -> Response:
    """Events, newest first. All filters hold together; follow `next_cursor` for more."""
    wanted = caller.narrow(wanted)
    page = listing.list_events(_reader(request, caller), wanted)
    _record_read(request, caller, "list", wanted, len(page.events))
    body = f'{{"events":[{",".join(page.events)}],"next_cursor":{json.dumps(page.next_cursor)}}}'
    if page.next_cursor is None:
        return _json(body)
    following = request.url.include_query_params(cursor=page.next_cursor)
    return _json(body, {"Link": f'<{following.path}?{following.query}>; rel="next"'})


@router.get("/count", responses=answer(examples.COUNT))
def count_events(request: Request, caller: Reading, wanted: Annotated[EventFilter, Query()]) -> Count:
    """How many events there are among the first `COUNT_LIMIT` that are looked at."""
    wanted, limit = caller.narrow(wanted), request.app.state.settings.count_limit
    count, capped = aggregates.count_events(_reader(request, caller), wanted, limit)
    _record_read(request, caller, "count", wanted, count)
    return Count(count=count, capped=capped)


@router.get("/histogram", response_model=Histogram, responses=answer(examples.HISTOGRAM))
def count_by_time(request: Request, caller: Reading, wanted: Annotated[HistogramQuery, Query()]) -> Response:
    """How many events there are in each minute, hour, day, week or month of a time zone, at most 2,000 of them.

    Without `start` or `end` the range is that of the events. Weeks begin on Monday.
    """
    wanted = caller.narrow(wanted)
    buckets = aggregates.count_by_time(_reader(request, caller), wanted)
    _record_read(request, caller, "histogram", wanted, sum(bucket.events for bucket in buckets))
    head = f'"interval":"{wanted.interval}","time_zone":"{wanted.time_zone}"'
    return _json(f'{{{head},"buckets":[{",".join(bucket.json for bucket in buckets)}]}}')


@router.get("/top", response_model=Top, responses=answer(examples.TOP))
def count_by_value(request: Request, caller: Reading, wanted: Annotated[TopQuery, Query()]) -> Any:
    """The most frequent values of a field. Events without the field do not count."""
    wanted = caller.narrow(wanted)
    values = aggregates.count_by_value(_reader(request, caller), wanted)
    _record_read(request, caller, "top", wanted, sum(value._mapping["count"] for value in values))
    return {"field": wanted.field, "values": [row._mapping for row in values]}


@router.get("/{event_id}", response_model=Event, responses=responses(EventNotFound) | answer(examples.EVENT))
def get_event(request: Request, caller: Reading, event_id: Annotated[int, Path(le=MAX_ID, ge=-MAX_ID)]) -> Response:
    """One event by its id."""
    event = lookup.read_event(request.app.state.reader, event_id, caller.tenant)
    _record_read(request, caller, "get", None, 1, id=event_id)
    return _json(event)


def _reader(request: Request, caller: Key) -> Reader:
    """What the caller sees. Second to the filter, which caller.narrow() has bound to the same tenant."""
    reader: Reader = request.app.state.reader
    return reader.seen_by(caller.tenant)


def _record_read(request: Request, caller: Key, call: str, wanted: EventFilter | None, count: int, **more: int) -> None:
    reads: ReadLog = request.app.state.reads
    reads.record(caller, call, wanted, count, **more)


def _json(body: str, headers: dict[str, str] | None = None) -> Response:
    """PostgreSQL has made the JSON: the model stands in the OpenAPI document, and validates nothing again."""
    return Response(body, headers=headers, media_type="application/json")
