"""Every way a request can fail, and how each becomes application/problem+json (RFC 9457).

Problem
├── BadRequest                 400
│   ├── MalformedBody          400
│   └── InvalidCursor          400
├── Unauthorized               401
├── Forbidden                  403
├── NotFound                   404
│   ├── CheckpointNotFound     404
│   ├── EventNotFound          404
│   ├── HoldNotFound           404
│   ├── KeyNotFound            404
│   └── TileNotFound           404
├── MethodNotAllowed           405
├── RequestTimeout             408
├── IdempotencyConflict        409
├── BodyTooLarge               413
├── UnsupportedMediaType       415
├── InvalidFields              422
├── RateLimited                429, with Retry-After
├── TooManyFailures            429, with Retry-After
├── TooManyStreams             429, with Retry-After
├── HeadTooLarge               431
├── InternalError              500
└── Unavailable                503, with Retry-After
    ├── DatabaseUnavailable    503
    ├── SchemaNotReady         503
    ├── LedgerInconsistent     503
    ├── CheckpointNotKept      503
    ├── QueryTimeout           503
    ├── QueueFull              503
    ├── TooManyReaders         503
    ├── ShuttingDown           503
    └── OutcomeUnknown         503

A class's docstring is the sentence a caller reads when no more is known; `code` never changes.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match

logger = logging.getLogger("audit.problems")


class Problem(Exception):
    """The request failed."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal-error"
    title: ClassVar[str] = "Internal error"
    headers: Mapping[str, str] = {}

    def __init__(self, detail: str | None = None, errors: Sequence[Mapping[str, str]] = ()) -> None:
        self.detail = detail or (type(self).__doc__ or "").strip()
        self.errors = list(errors)
        super().__init__(self.detail)


class BadRequest(Problem):
    """The request could not be understood."""

    status, code, title = 400, "bad-request", "Bad request"


class MalformedBody(BadRequest):
    """The body is not well-formed JSON in UTF-8."""

    code, title = "malformed-body", "Malformed body"


class InvalidCursor(BadRequest):
    """This cursor is not one that the service gave. Start without a cursor."""

    code, title = "invalid-cursor", "Invalid cursor"


class Unauthorized(Problem):
    """A valid API key is needed, in X-API-Key or in Authorization: Bearer."""

    status, code, title = 401, "unauthorized", "Unauthorized"
    headers: Mapping[str, str] = {"WWW-Authenticate": 'Bearer realm="audit"'}


class Forbidden(Problem):
    """This API key is valid, and may not do this: `detail` names the scope that it lacks, or `errors` the field."""

    status, code, title = 403, "forbidden", "Forbidden"


class NotFound(Problem):
    """There is nothing at this path."""

    status, code, title = 404, "not-found", "Not found"


class CheckpointNotFound(NotFound):
    """There is no such checkpoint yet."""

    code, title = "checkpoint-not-found", "Checkpoint not found"


class EventNotFound(NotFound):
    """There is no event with this id."""

    code, title = "event-not-found", "Event not found"


class HoldNotFound(NotFound):
    """There is no legal hold with this id."""

    code, title = "hold-not-found", "Legal hold not found"


class KeyNotFound(NotFound):
    """There is no API key with this id."""

    code, title = "key-not-found", "API key not found"


class TileNotFound(NotFound):
    """The tree has no such tile or bundle, or retention pruned the events of it."""

    code, title = "tile-not-found", "Tile not found"


class MethodNotAllowed(Problem):
    """This path does not answer that method."""

    status, code, title = 405, "method-not-allowed", "Method not allowed"


class RequestTimeout(Problem):
    """The request did not arrive in time: 10 s for its head, 60 s for its body. Nothing was stored."""

    status, code, title = 408, "request-timeout", "Request timeout"


class RateLimited(Problem):
    """This key has made as many requests as RATE_LIMIT lets it. Nothing was stored; wait."""

    status, code, title = 429, "rate-limited", "Rate limited"

    def __init__(self, retry_after_s: int = 1, fields: Sequence[tuple[bytes, bytes]] = ()) -> None:
        super().__init__()
        rate_fields = {name.decode(): value.decode() for name, value in fields}
        self.headers = {"Retry-After": str(retry_after_s), **rate_fields}


class TooManyFailures(Problem):
    """This address presented too many keys that are not valid. Wait, whatever key comes next."""

    status, code, title = 429, "too-many-failures", "Too many failures"
    headers: Mapping[str, str] = {"Retry-After": "1"}


class TooManyStreams(Problem):
    """This key has as many streams open here as MAX_STREAMS_PER_KEY lets it. Close one."""

    status, code, title = 429, "too-many-streams", "Too many streams"
    headers: Mapping[str, str] = {"Retry-After": "5"}


class HeadTooLarge(Problem):
    """The request's head has more than 100 fields or 65,536 bytes, or its trailers or a chunk's extensions have."""

    status, code, title = 431, "head-too-large", "Head too large"


class IdempotencyConflict(Problem):
    """This idempotency key was used before, with another event. Nothing was stored."""

    status, code, title = 409, "idempotency-conflict", "Idempotency conflict"


class BodyTooLarge(Problem):
    """The body is larger than this call accepts."""

    status, code, title = 413, "body-too-large", "Body too large"


class UnsupportedMediaType(Problem):
    """The body's Content-Type is not one that this call accepts."""

    status, code, title = 415, "unsupported-media-type", "Unsupported media type"


class InvalidFields(Problem):
    """At least one field or parameter is wrong; `errors` names each."""

    status, code, title = 422, "invalid-fields", "Invalid fields"


class InternalError(Problem):
    """Internal error. The log has the detail under this request id."""


class Unavailable(Problem):
    """The service cannot answer now. Try again."""

    status, code, title = 503, "unavailable", "Unavailable"
    headers: Mapping[str, str] = {"Retry-After": "1"}


class DatabaseUnavailable(Unavailable):
    """The database does not answer. Nothing was stored; try again."""

    code, title = "database-unavailable", "Database unavailable"


class SchemaNotReady(Unavailable):
    """The database schema is not at the revision this service needs. Run: alembic upgrade head"""

    code, title = "schema-not-ready", "Schema not ready"
    headers: Mapping[str, str] = {"Retry-After": "5"}


class LedgerInconsistent(Unavailable):
    """The log contradicts a checkpoint that was signed: nothing is signed until an operator has looked."""

    code, title = "ledger-inconsistent", "Ledger inconsistent"


class CheckpointNotKept(Unavailable):
    """A checkpoint that has this event is not in CHECKPOINT_SINK yet, and is not handed out before. Try again."""

    code, title = "checkpoint-not-kept", "Checkpoint not kept"
    headers: Mapping[str, str] = {"Retry-After": "5"}


class QueryTimeout(Unavailable):
    """The query took longer than QUERY_TIMEOUT. Narrow it: start and end, an actor, an event type."""

    code, title = "query-timeout", "Query timeout"


class QueueFull(Unavailable):
    """More events are waiting to be written than this service holds. Nothing was stored; try again."""

    code, title = "queue-full", "Queue full"


class TooManyReaders(Unavailable):
    """As many exports or streams are open as this process serves at a time. Try again."""

    code, title = "too-many-readers", "Too many readers"
    headers: Mapping[str, str] = {"Retry-After": "5"}


class ShuttingDown(Unavailable):
    """This process is stopping. Nothing was stored; try again, and another one answers."""

    code, title = "shutting-down", "Shutting down"


class OutcomeUnknown(Unavailable):
    """The database was lost during the commit: the event may be stored. Only a keyed retry is safe."""

    code, title = "outcome-unknown", "Outcome unknown"


def install_handlers(app: FastAPI) -> None:
    """Make a problem document of every exception a route raises; telemetry.py has the ones nobody foresaw."""
    app.exception_handler(Problem)(_handle_problem)
    app.exception_handler(HTTPException)(_handle_http_exception)
    app.exception_handler(RequestValidationError)(_handle_validation_error)
    app.exception_handler(Exception)(_pass_on)


_DOCUMENT_SCHEMA = {
    "type": "object",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string", "format": "uri"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["location", "message"],
                "properties": {"location": {"type": "string"}, "message": {"type": "string"}},
            },
        },
        "request_id": {"type": "string"},
    },
}


def responses(*classes: type[Problem]) -> dict[int | str, dict[str, Any]]:
    """For OpenAPI: the problems that a route may answer, beside those that any route may."""
    documented: dict[int | str, dict[str, Any]] = {}
    every: tuple[type[Problem], ...] = (RequestTimeout, RateLimited, HeadTooLarge, InternalError, *classes)
    for cls in every:
        example = {**document(cls(), None), "request_id": "3e039e4563954a4b87bf87e7e3443a33"}
        content = {"application/problem+json": {"schema": _DOCUMENT_SCHEMA, "example": example}}
        documented[cls.status] = {"description": cls.title, "content": content}
    return documented


def field_errors(errors: Sequence[Any], *prefix: str) -> list[dict[str, str]]:
    """Pydantic's errors as `{location, message}`; location is dotted, like `body.metadata.size`."""
    return [
        {
            "location": ".".join(map(str, (*prefix, *error["loc"]))),
            "message": error["msg"].removeprefix("Value error, "),
        }
        for error in errors
    ]


def document(problem: Problem, request_id: str | None) -> dict[str, Any]:
    """The problem document's members (RFC 9457 section 3.1) and two of ours: errors, request_id."""
    members: dict[str, Any] = {
        "type": f"urn:audit:problem:{problem.code}",
        "title": problem.title,
        "status": problem.status,
        "detail": problem.detail,
    }
    if problem.errors:
        members["errors"] = problem.errors
    if request_id is not None:
        members["request_id"] = request_id
    return members


def respond(request: Request, problem: Problem, headers: Mapping[str, str] | None = None) -> Response:
    """The HTTP response for a problem."""
    body = json.dumps(document(problem, getattr(request.state, "request_id", None)))
    return Response(
        body,
        status_code=problem.status,
        headers={**problem.headers, **(headers or {})},
        media_type="application/problem+json",
    )


def respond_to(request: Request, problem: Problem) -> Response:
    """The HTTP response for a problem that a route raised; one of ours goes into the log."""
    if problem.status >= 500:
        logger.warning("%s: %s", problem.code, problem.detail)
    return respond(request, problem)


async def _handle_problem(request: Request, problem: Problem) -> Response:
    return respond_to(request, problem)


async def _handle_http_exception(request: Request, error: HTTPException) -> Response:
    """Starlette's own refusals: no route, or a route without that method."""
    refusals: dict[int, type[Problem]] = {404: NotFound, 405: MethodNotAllowed}
    headers = {"Allow": ", ".join(_methods_of(request))} if error.status_code == 405 else error.headers
    return respond(request, refusals.get(error.status_code, BadRequest)(), headers)


def _methods_of(request: Request) -> list[str]:
    """All that the path answers (RFC 9110 section 15.5.6); Starlette names those of the first route that fits."""
    routes = request.app.router.routes
    return [
        method
        for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in routes)
    ]


async def _pass_on(request: Request, error: Exception) -> Response:
    """To telemetry.py: Starlette's own answer would be plain text."""
    raise error


async def _handle_validation_error(request: Request, error: RequestValidationError) -> Response:
    return respond(request, InvalidFields(errors=field_errors(error.errors())))
