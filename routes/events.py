"""/events: append one or many, list them, get one."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response

import cloudevents
import queries
from append import Appended, Prepared, prepare_event
from auth import Caller
from db import Database
from ingest import Writer
from problems import (
    BadRequest,
    BodyTooLarge,
    EventNotFound,
    IdempotencyConflict,
    InvalidFields,
    MalformedBody,
    Unauthorized,
    Unavailable,
    UnsupportedMediaType,
    responses,
)
from schemas import (
    BatchReceipt,
    Event,
    EventFilter,
    EventIn,
    EventPage,
    parse_event,
    parse_event_lines,
    parse_events,
)

MAX_BODY_BYTES = 1024 * 1024
MAX_BATCH_BYTES = 16 * 1024 * 1024
MAX_BATCH_EVENTS = 10_000
MAX_ID = 2**63 - 1

router = APIRouter(prefix="/events", tags=["events"], responses=responses(Unauthorized, InvalidFields, Unavailable))

_EVENT_SCHEMA = EventIn.model_json_schema()
_CLOUDEVENT_SCHEMA: dict[str, Any] = {"type": "object", "description": "A CloudEvent 1.0 with the extension actor"}
_EVENT_BODY = {
    "required": True,
    "content": {
        "application/json": {"schema": _EVENT_SCHEMA},
        cloudevents.STRUCTURED: {"schema": _CLOUDEVENT_SCHEMA},
        cloudevents.BATCH: {"schema": {"type": "array", "items": _CLOUDEVENT_SCHEMA}},
    },
}
_BATCH_BODY = {
    "required": True,
    "content": {
        "application/json": {"schema": {"type": "array", "maxItems": MAX_BATCH_EVENTS, "items": _EVENT_SCHEMA}},
        "application/x-ndjson": {"schema": {"type": "string", "description": "One event a line"}},
    },
}
_WRITE_PROBLEMS = responses(MalformedBody, IdempotencyConflict, BodyTooLarge, UnsupportedMediaType)


@router.post(
    "", status_code=201, response_model=Event, openapi_extra={"requestBody": _EVENT_BODY}, responses=_WRITE_PROBLEMS
)
async def create_event(request: Request, response: Response, caller: Caller) -> Any:
    """Append one event, or a CloudEvents batch. 201 means that it is committed.

    With an idempotency key, in `Idempotency-Key` or in the body, a repetition answers 200 with the first event.
    """
    media_type = _media_type(request)
    if media_type == cloudevents.BATCH:
        return await _append_batch(request, response, cloudevents.parse_batch)
    if cloudevents.is_binary(request.headers) and media_type == "application/json":
        event = cloudevents.parse_binary(request.headers, await _read_body(request, MAX_BODY_BYTES))
    elif media_type == cloudevents.STRUCTURED:
        event = cloudevents.parse_structured(await _read_body(request, MAX_BODY_BYTES))
    elif media_type == "application/json":
        event = _with_headers(parse_event(await _read_body(request, MAX_BODY_BYTES)), request.headers)
    else:
        raise UnsupportedMediaType(f"Send application/json or {cloudevents.STRUCTURED}.")
    (prepared,), appended = await _append(request, [event])
    response.headers["Location"] = f"/events/{appended.ids[0]}"
    if appended.replayed:
        response.status_code = 200
        response.headers["Idempotent-Replay"] = "true"
        return get_event(request, caller, appended.ids[0])
    return {**prepared.members, "id": appended.ids[0], "recorded_at": appended.recorded_at}


@router.post(
    "/batch",
    status_code=201,
    response_model=BatchReceipt,
    openapi_extra={"requestBody": _BATCH_BODY},
    responses=_WRITE_PROBLEMS,
)
async def create_events(request: Request, response: Response, caller: Caller) -> Any:
    """Append up to 10,000 events, all or none, from a JSON array or NDJSON."""
    parsers: dict[str, Callable[[bytes], list[EventIn]]] = {
        "application/json": parse_events,
        "application/x-ndjson": parse_event_lines,
        cloudevents.BATCH: cloudevents.parse_batch,
    }
    parse = parsers.get(_media_type(request))
    if parse is None:
        raise UnsupportedMediaType(f"Send one of {', '.join(parsers)}.")
    return await _append_batch(request, response, parse)


@router.get("", response_model=EventPage, responses=responses(BadRequest))
def list_events(request: Request, response: Response, caller: Caller, wanted: Annotated[EventFilter, Query()]) -> Any:
    """Events, newest first. All filters hold together; follow `next_cursor` for more."""
    database: Database = request.app.state.database
    with database.transaction() as connection:
        page = queries.list_events(connection, wanted)
    if page.next_cursor is not None:
        following = request.url.include_query_params(cursor=page.next_cursor)
        response.headers["Link"] = f'<{following.path}?{following.query}>; rel="next"'
    return page


@router.get("/{event_id}", response_model=Event, responses=responses(EventNotFound))
def get_event(request: Request, caller: Caller, event_id: Annotated[int, Path(le=MAX_ID, ge=-MAX_ID)]) -> Any:
    """One event by its id."""
    database: Database = request.app.state.database
    with database.transaction() as connection:
        return queries.get_event(connection, event_id)


async def _append_batch(request: Request, response: Response, parse: Callable[[bytes], list[EventIn]]) -> Any:
    events = parse(await _read_body(request, MAX_BATCH_BYTES))
    if len(events) > MAX_BATCH_EVENTS:
        raise BodyTooLarge(f"The batch has {len(events)} events, and {MAX_BATCH_EVENTS} are the most.")
    if not events:
        raise InvalidFields(errors=[{"location": "body", "message": "must hold at least one event"}])
    _, appended = await _append(request, events)
    receipt = BatchReceipt(
        count=len(events),
        first_id=min(appended.ids),
        last_id=max(appended.ids),
        ids=list(appended.ids),
        replayed=len(appended.replayed),
    )
    if len(appended.replayed) == len(events):
        response.headers["Idempotent-Replay"] = "true"
    return Response(receipt.model_dump_json(), 201, response.headers, "application/json")


async def _append(request: Request, events: Sequence[EventIn]) -> tuple[Sequence[Prepared], Appended]:
    """Append and count; the one way in for every format."""
    now = datetime.now(UTC)
    _refuse_the_future(events, now + request.app.state.settings.max_clock_skew)
    prepared = [prepare_event(event, now) for event in events]
    writer: Writer = request.app.state.writer
    appended = await writer.append(prepared, request.state.body_bytes)
    request.app.state.metrics.events.inc(len(events) - len(appended.replayed))
    return prepared, appended


def _refuse_the_future(events: Sequence[EventIn], latest: datetime) -> None:
    errors = [
        {
            "location": "body.timestamp" if len(events) == 1 else f"body.{index}.timestamp",
            "message": "lies further in the future than clocks may differ (MAX_CLOCK_SKEW)",
        }
        for index, event in enumerate(events)
        if event.timestamp is not None and event.timestamp > latest
    ]
    if errors:
        raise InvalidFields(errors=errors)


def _with_headers(event: EventIn, headers: Mapping[str, str]) -> EventIn:
    """The event with its Idempotency-Key and traceparent, where the body did not say them itself."""
    key = headers.get("idempotency-key")
    if key is not None:
        if event.idempotency_key not in (None, key):
            raise InvalidFields(errors=[{"location": "headers.Idempotency-Key", "message": "differs from the body's"}])
        if not 1 <= len(key) <= 255:
            raise InvalidFields(
                errors=[{"location": "headers.Idempotency-Key", "message": "must have 1 to 255 characters"}]
            )
        event.idempotency_key = key
    if event.trace_id is None and (traceparent := headers.get("traceparent")):
        event.trace_id = cloudevents.trace_id_of(traceparent)
    return event


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()


async def _read_body(request: Request, limit: int) -> bytes:
    """The body; raises BodyTooLarge as soon as it is."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise BodyTooLarge(f"The body is larger than {limit} bytes.")
    request.state.body_bytes = len(body)
    return bytes(body)
