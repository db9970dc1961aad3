"""POST /events and /events/batch as plain ASGI: FastAPI's routing and dependencies cost three times what the work does.

Every format ends in one list of events, which is appended whole. routes/events.py documents both calls.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import NamedTuple, TypeVar

import orjson
from starlette.datastructures import State
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Receive, Scope, Send

import problems
from auth import OTHER_TENANT_MESSAGE, Key, admit
from ingest import cloudevents
from ingest.append import Appended, Prepared, prepare_event
from ingest.parse import MAX_ERRORS, parse_event, parse_event_lines, parse_events
from ingest.records import SERVICE
from problems import BodyTooLarge, Forbidden, IdempotencyConflict, InvalidFields, Problem, UnsupportedMediaType
from queries import lookup
from routes.bodies import MAX_BODY_BYTES, Headers, Room, read_body
from schemas import PUBLIC_FIELDS, Event, EventIn

MAX_BATCH_BYTES = 16 * 1024 * 1024
MAX_BATCH_EVENTS = 10_000
MAX_INLINE_BYTES = 256 * 1024  # of a body that the event loop parses itself: some 50 ms where it is lists of numbers

Made = TypeVar("Made")

Answer = tuple[int, list[tuple[bytes, bytes]], bytes]
Locate = Callable[[int, str], str]  # where a field of the event at this index stands in the body

_BATCH_PARSERS: dict[bytes, Callable[[bytes], list[EventIn]]] = {
    b"application/json": parse_events,
    b"application/x-ndjson": parse_event_lines,
    cloudevents.BATCH.encode(): cloudevents.parse_batch,
}

_BATCH_HAS_KEYS = "goes with one event: in a batch each has an idempotency_key of its own"
_CLOUDEVENT_HAS_A_KEY = "goes with a plain event: the key of a CloudEvent is its source and id"


class Writes:
    """ASGI middleware that answers the two calls that append, and passes on everything else.

    Stands outside FastAPI, whose own layers would cost a tenth of the rate.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._handlers: dict[str, Callable[[State, Key, Headers, Receive, Room], Awaitable[Answer]]] = {
            "/events": _create_event,
            "/events/batch": _create_events,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        handler = self._handlers.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if handler is None:
            await self.app(scope, receive, send)
            return
        state: State = scope["app"].state
        headers: Headers = dict(scope["headers"])
        scope["state"]["route"] = scope["path"]
        try:
            caller = await admit(scope, headers)
            caller.require("write")
            with state.writer.room(caller.id) as room:
                status, answer_headers, body = await handler(state, caller, headers, receive, room)
        except ClientDisconnect:
            return
        except Problem as problem:
            await problems.respond_to(Request(scope), problem)(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": status, "headers": [*answer_headers, *json_fields(body)]})
        await send({"type": "http.response.body", "body": body})


async def _create_event(state: State, caller: Key, headers: Headers, receive: Receive, room: Room) -> Answer:
    parse = parser_of_one(headers)
    if parse is None:
        return await _append_batch(state, caller, headers, receive, room, cloudevents.parse_batch)
    event = await _beside_others(parse, await read_body(headers, receive, room, MAX_BODY_BYTES))
    one = prepare_one(state, caller, headers, event)
    try:
        appended = await _append(state, [one.prepared])
    except IdempotencyConflict:
        raise IdempotencyConflict() from None  # which event it was needs no saying
    if appended.replayed:
        return await replay(state, caller, appended.ids[0])
    return one.created(appended)


def parser_of_one(headers: Headers) -> Callable[[bytes], EventIn] | None:
    """What reads the one event that the headers announce, in whichever format; None where they announce a batch."""
    media_type = _media_type(headers)
    if media_type == b"application/json" and b"ce-specversion" not in headers:
        return lambda body: _with_key(parse_event(body), headers)
    if media_type == cloudevents.BATCH.encode():
        return None
    if media_type not in (b"application/json", cloudevents.STRUCTURED.encode()):
        raise UnsupportedMediaType(f"Send application/json or {cloudevents.STRUCTURED}.")
    _refuse_key(headers, _CLOUDEVENT_HAS_A_KEY)
    if media_type == b"application/json":
        return lambda body: cloudevents.parse_binary(headers, body)
    return cloudevents.parse_structured


class One(NamedTuple):
    """One event, ready to append."""

    event: EventIn
    trace_id: str | None  # the request's
    prepared: Prepared

    def created(self, appended: Appended) -> Answer:
        event_id = appended.ids[0]
        members = {
            **self.event.__dict__,
            "id": event_id,
            "timestamp": self.prepared.timestamp,
            "trace_id": self.event.trace_id or self.trace_id,
            "recorded_at": appended.recorded_at,
            "redacted_at": None,
        }
        return 201, [_location(event_id)], orjson.dumps({name: members[name] for name in PUBLIC_FIELDS})


def prepare_one(state: State, caller: Key, headers: Headers, event: EventIn) -> One:
    trace_id = _trace_id(headers)
    (prepared,) = _prepare(state, caller, [event], trace_id, _in_event)
    return One(event, trace_id, prepared)


async def replay(state: State, caller: Key, event_id: int) -> Answer:
    """The event that a repeated key stands for."""
    row = await state.database.in_thread(lookup.find_event, state.database, event_id, caller.tenant)
    body = Event.model_validate(row).model_dump_json().encode()
    return 200, [_location(event_id), (b"idempotent-replay", b"true")], body


def _location(event_id: int) -> tuple[bytes, bytes]:
    return b"location", b"/events/%d" % event_id


def json_fields(body: bytes) -> tuple[tuple[bytes, bytes], ...]:
    return (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))


async def _create_events(state: State, caller: Key, headers: Headers, receive: Receive, room: Room) -> Answer:
    parse = _BATCH_PARSERS.get(_media_type(headers))
    if parse is None:
        raise UnsupportedMediaType(f"Send one of {b', '.join(_BATCH_PARSERS).decode()}.")
    return await _append_batch(state, caller, headers, receive, room, parse)


async def _append_batch(
    state: State, caller: Key, headers: Headers, receive: Receive, room: Room, parse: Callable[[bytes], list[EventIn]]
) -> Answer:
    _refuse_key(headers, _CLOUDEVENT_HAS_A_KEY if parse is cloudevents.parse_batch else _BATCH_HAS_KEYS)
    trace_id = _trace_id(headers)
    # Neither body nor parsed events get a name: they must be gone while the batch waits.
    prepared = await _beside_others(
        lambda body: _prepare(state, caller, _limited(parse(body)), trace_id, _in_batch),
        await read_body(headers, receive, room, MAX_BATCH_BYTES),
    )
    appended = await _append(state, prepared)
    receipt = {
        "count": len(prepared),
        "first_id": min(appended.ids),
        "last_id": max(appended.ids),
        "ids": appended.ids,
        "replayed": len(appended.replayed),
    }
    replay = [(b"idempotent-replay", b"true")] if len(appended.replayed) == len(prepared) else []
    return 201, replay, orjson.dumps(receipt)


async def _beside_others(work: Callable[[bytes], Made], body: bytes) -> Made:
    """What work makes of the body: of a large one in a thread, so that the other requests have their turns."""
    return work(body) if len(body) <= MAX_INLINE_BYTES else await asyncio.to_thread(work, body)


def _limited(events: list[EventIn]) -> list[EventIn]:
    if len(events) > MAX_BATCH_EVENTS:
        raise BodyTooLarge(f"The batch has {len(events)} events, and {MAX_BATCH_EVENTS} are the most.")
    if not events:
        raise InvalidFields(errors=[{"location": "body", "message": "must hold at least one event"}])
    return events


def _prepare(
    state: State, caller: Key, events: Sequence[EventIn], trace_id: str | None, locate: Locate
) -> list[Prepared]:
    now = datetime.now(UTC)
    _refuse_our_own_source(events, locate)
    if caller.tenant is not None or caller.event_types is not None:
        _keep_within(caller, events, locate)
    _refuse_the_future(events, now + state.settings.max_clock_skew, locate)
    return [prepare_event(event, now, trace_id) for event in events]


async def _append(state: State, prepared: Sequence[Prepared]) -> Appended:
    appended: Appended = await state.writer.append(prepared)
    state.metrics.events.inc(len(prepared) - len(appended.replayed))
    return appended


def _keep_within(caller: Key, events: Sequence[EventIn], locate: Locate) -> None:
    """Give events the tenant that the key is bound to; raises Forbidden, which names each field that says otherwise."""
    errors = []
    for index, event in enumerate(events):
        if caller.tenant is not None:
            if event.tenant not in (None, caller.tenant):
                errors.append({"location": locate(index, "tenant"), "message": OTHER_TENANT_MESSAGE})
            event.tenant = caller.tenant
        if caller.event_types is not None and not event.event_type.startswith(caller.event_types):
            message = f"must begin like one of the key's own: {', '.join(caller.event_types)}"
            errors.append({"location": locate(index, "event_type"), "message": message})
    if errors:
        raise Forbidden("This API key may not write this. Nothing was stored.", errors[:MAX_ERRORS])


def _refuse_the_future(events: Sequence[EventIn], latest: datetime, locate: Locate) -> None:
    errors = [
        {
            "location": locate(index, "timestamp"),
            "message": "lies further in the future than clocks may differ (MAX_CLOCK_SKEW)",
        }
        for index, event in enumerate(events)
        if event.timestamp is not None and event.timestamp > latest
    ]
    if errors:
        raise InvalidFields(errors=errors)


def _refuse_our_own_source(events: Sequence[EventIn], locate: Locate) -> None:
    """What the service says of itself must be its own word: verification and redaction go by it."""
    errors = [
        {
            "location": locate(index, "source"),
            "message": f"{SERVICE} is the service itself",
        }
        for index, event in enumerate(events)
        if event.source == SERVICE
    ]
    if errors:
        raise InvalidFields(errors=errors)


def _in_event(_: int, name: str) -> str:
    return f"body.{name}"


def _in_batch(index: int, name: str) -> str:
    return f"body.{index}.{name}"


def _trace_id(headers: Headers) -> str | None:
    """What events have where they say none themselves."""
    traceparent = headers.get(b"traceparent")
    return None if traceparent is None else cloudevents.trace_id_of(traceparent.decode("latin-1"))


def _with_key(event: EventIn, headers: Headers) -> EventIn:
    """The event with its Idempotency-Key, where the body did not say it itself."""
    if b"idempotency-key" in headers:
        try:
            key = headers[b"idempotency-key"].decode()
        except UnicodeDecodeError:
            raise _wrong_key("must be UTF-8") from None
        if event.idempotency_key not in (None, key):
            raise _wrong_key("differs from the body's")
        if not 1 <= len(key) <= 255 or "\0" in key:
            raise _wrong_key("must have 1 to 255 characters")
        event.idempotency_key = key
    return event


def _refuse_key(headers: Headers, message: str) -> None:
    """A key that nobody heeds would promise a safe retry in vain."""
    if b"idempotency-key" in headers:
        raise _wrong_key(message)


def _wrong_key(message: str) -> InvalidFields:
    return InvalidFields(errors=[{"location": "headers.Idempotency-Key", "message": message}])


def _media_type(headers: Headers) -> bytes:
    return headers.get(b"content-type", b"application/json").partition(b";")[0].strip().lower()
