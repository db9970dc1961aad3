"""Reading a request's body: never more than the call accepts, and of nobody who has no key.

FastAPI by itself reads a body whole before it looks at who sends it.
"""

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.datastructures import State
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive

from auth import admit
from ingest.parse import parse_json
from problems import BadRequest, BodyTooLarge, MalformedBody, responses

MAX_BODY_BYTES = 1024 * 1024

BODY_PROBLEMS = responses(MalformedBody, BodyTooLarge)

Headers = dict[bytes, bytes]  # names in lower case; of a repeated one the last counts
Room = Callable[[int], None]  # see Writer.room()


class BoundedRoute(APIRoute):
    """A route whose body is read by read_body(), after its caller was admitted."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()
        if self.body_field is None:
            return answer

        async def answer_bounded(request: Request) -> Response:
            headers: Headers = dict(request.scope["headers"])
            caller = await admit(request.scope, headers)
            state: State = request.app.state
            with state.writer.room(caller.id) as room:
                try:
                    body = await read_body(headers, request.receive, room, MAX_BODY_BYTES)
                except ClientDisconnect:
                    raise BadRequest("The body is not whole.") from None
                if body:  # of none, FastAPI says which fields are missing, once it knows that the caller may
                    parse_json(body)  # FastAPI would take UTF-16 too, and has three answers to what is no JSON
                return await answer(Request(request.scope, _again(body)))

        return answer_bounded


def _again(body: bytes) -> Callable[[], Awaitable[Message]]:
    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


async def read_body(headers: Headers, receive: Receive, room: Room, limit: int) -> bytes:
    """The body; raises BodyTooLarge as soon as it is known to be, and QueueFull where there is no room for it."""
    announced = headers.get(b"content-length", b"0")
    if announced.isdigit() and int(announced) > limit:
        raise _body_too_large(limit)
    chunks: list[bytes] = []
    size = 0
    while True:
        message: Any = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect()
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        room(len(chunks[-1]))
        if size > limit:
            raise _body_too_large(limit)
        if not message.get("more_body", False):
            return b"".join(chunks)


def _body_too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"The body is larger than {limit} bytes.")
