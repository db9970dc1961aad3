"""/events: append one, list them, get one."""

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response
from starlette.concurrency import run_in_threadpool

import ingest
import queries
from auth import Caller
from db import Database
from problems import (
    BadRequest,
    BodyTooLarge,
    EventNotFound,
    InvalidFields,
    MalformedBody,
    Unauthorized,
    Unavailable,
    UnsupportedMediaType,
    responses,
)
from schemas import Event, EventFilter, EventIn, EventPage, parse_event

MAX_BODY_BYTES = 1024 * 1024
MAX_ID = 2**63 - 1

router = APIRouter(prefix="/events", tags=["events"], responses=responses(Unauthorized, InvalidFields, Unavailable))

_EVENT_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": EventIn.model_json_schema()}},
    }
}


@router.post(
    "",
    status_code=201,
    response_model=Event,
    openapi_extra=_EVENT_BODY,
    responses=responses(MalformedBody, BodyTooLarge, UnsupportedMediaType),
)
async def create_event(request: Request, response: Response, caller: Caller) -> Any:
    """Append one event. 201 means that it is committed."""
    event = parse_event(await read_json_body(request))
    (row,) = await run_in_threadpool(ingest.append_events, request.app.state.database, [event])
    request.app.state.metrics.events.inc()
    response.headers["Location"] = f"/events/{row.id}"
    return row


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


async def read_json_body(request: Request) -> bytes:
    """The body, at most MAX_BODY_BYTES of application/json."""
    content_type = request.headers.get("content-type", "application/json")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise UnsupportedMediaType()
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise BodyTooLarge(f"The body is larger than {MAX_BODY_BYTES} bytes.")
    return bytes(body)
