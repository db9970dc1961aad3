"""Bodies as events: JSON, arrays and NDJSON, with errors that name each wrong field and the event that it is in."""

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from problems import InvalidFields, MalformedBody, Problem, field_errors
from schemas import EventIn

MAX_ERRORS = 100  # a batch of 10,000 wrong events needs no answer of megabytes

_events: TypeAdapter[list[EventIn]] = TypeAdapter(list[EventIn])


def parse_event(body: bytes) -> EventIn:
    """One event from a JSON body; raises MalformedBody or InvalidFields, which names each wrong field."""
    try:
        return EventIn.model_validate_json(body)
    except ValidationError as error:
        raise _problem_of(error, "body") from None


def parse_events(body: bytes) -> list[EventIn]:
    """Events from a JSON array; an error's location has the event's index, like body.17.actor."""
    try:
        return _events.validate_json(body)
    except ValidationError as error:
        raise _problem_of(error, "body") from None


def parse_event_lines(body: bytes) -> list[EventIn]:
    """Events from NDJSON, one a line; empty lines are passed over. Errors name the line's index from 0."""
    events: list[EventIn] = []
    for index, line in enumerate(filter(None, map(bytes.strip, body.split(b"\n")))):
        try:
            events.append(EventIn.model_validate_json(line))
        except ValidationError as error:
            raise _problem_of(error, "body", str(index)) from None
    return events


def event_from_members(members: dict[str, Any], names: Mapping[str, str], *location: str) -> EventIn:
    """An event from parsed members; `names` turns a field's name into the one that the client knows."""
    try:
        return EventIn.model_validate(members)
    except ValidationError as error:
        raise _problem_of(error, *location, names=names) from None


def parse_json(body: bytes) -> Any:
    """Any JSON, as strict as that of events: UTF-8 only, no lone surrogates, 200 levels. Raises MalformedBody."""
    try:
        return from_json(body)
    except ValueError as error:
        raise MalformedBody(f"body: {error}") from None


def _problem_of(error: ValidationError, *location: str, names: Mapping[str, str] | None = None) -> Problem:
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    if errors[0]["type"] == "json_invalid":
        return MalformedBody(f"{'.'.join(location)}: {errors[0]['msg']}")
    if names:
        for each in errors:
            each["loc"] = tuple(names.get(str(part), part) for part in each["loc"])
    return InvalidFields(errors=field_errors(errors[:MAX_ERRORS], *location))
