"""CloudEvents 1.0 over HTTP (binary, structured, batch) as events of ours. Pure functions.

type → event_type, time → timestamp, subject → resource, source → source, data → metadata, and the extensions
actor (required), tenant, outcome, sourceip, traceparent. source and id together are the idempotency key, for
the specification makes that pair unique. datacontenttype and dataschema say how to read data and are not kept.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import Any, get_args
from urllib.parse import unquote_to_bytes

from fields import Outcome
from ingest.parse import event_from_members, parse_json
from problems import InvalidFields
from schemas import EventIn

STRUCTURED = "application/cloudevents+json"
BATCH = "application/cloudevents-batch+json"

# attribute → field of EventIn
_FIELDS = {
    "type": "event_type",
    "time": "timestamp",
    "subject": "resource",
    "source": "source",
    "data": "metadata",
    "actor": "actor",
    "tenant": "tenant",
    "outcome": "outcome",
    "sourceip": "source_ip",
}
_TEXT = {"type": "string", "minLength": 1, "maxLength": 255}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    """An attribute that is not set may be null (CloudEvents JSON event format)."""
    return {"anyOf": [schema, {"type": "null"}]}


_ADDRESS = [{"type": "string", "format": "ipv4"}, {"type": "string", "format": "ipv6"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "description": "A CloudEvent 1.0 with the extension actor",
    "required": ["specversion", "id", "source", "type", "actor"],
    "additionalProperties": False,
    "properties": {
        "specversion": {"const": "1.0"},
        "id": {"type": "string", "minLength": 1},
        "source": _TEXT,
        "type": _TEXT,
        "actor": _TEXT,
        "time": _or_null({"type": "string", "format": "date-time"}),
        "subject": _or_null({"type": "string", "minLength": 1, "maxLength": 1024}),
        "data": _or_null({"type": "object"}),
        "tenant": _or_null(_TEXT),
        "outcome": _or_null({"enum": get_args(Outcome)}),
        "sourceip": {"anyOf": [*_ADDRESS, {"type": "null"}]},
        "traceparent": _or_null({"type": "string"}),
        "datacontenttype": _or_null({"type": "string"}),
        "dataschema": _or_null({"type": "string"}),
    },
}
_ATTRIBUTES = {field: attribute for attribute, field in _FIELDS.items()}
_PASSED_OVER = {"specversion", "id", "datacontenttype", "dataschema", "traceparent"}
_QUOTED = re.compile(rb'"((?:[^"\\]|\\.)*)"')
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}", re.ASCII)


def trace_id_of(traceparent: str) -> str | None:
    """The trace id of a W3C traceparent (Trace Context section 3.2), or None where it is not one."""
    match = _TRACEPARENT.fullmatch(traceparent.strip())
    return match[1] if match and match[1] != "0" * 32 else None


def parse_binary(headers: Mapping[bytes, bytes], body: bytes) -> EventIn:
    """Binary mode: attributes in percent-encoded ce- headers, data in the body (HTTP binding section 3.1)."""
    attributes: dict[str, Any] = {}
    for name, value in headers.items():
        if name.startswith(b"ce-"):
            attribute = name[3:].decode("latin-1")
            attributes[attribute] = _decode_header(attribute, value)
    if body:
        attributes["data"] = parse_json(body)
    return _event(attributes, "headers")


def parse_structured(body: bytes) -> EventIn:
    """Structured mode: one JSON object (HTTP binding section 3.2)."""
    return _event(parse_json(body), "body")


def parse_batch(body: bytes) -> list[EventIn]:
    """Batch mode: a JSON array (HTTP binding section 3.3)."""
    array = parse_json(body)
    if not isinstance(array, list):
        raise InvalidFields(errors=[{"location": "body", "message": "must be an array of CloudEvents"}])
    return [_event(attributes, "body", str(index)) for index, attributes in enumerate(array)]


def _event(attributes: Any, *location: str) -> EventIn:
    if not isinstance(attributes, dict):
        raise _invalid(location, "", "must be a CloudEvent, a JSON object")
    if attributes.get("specversion") != "1.0":
        raise _invalid(location, "specversion", "must be 1.0")
    for name in ("id", "source"):
        if not isinstance(attributes.get(name), str) or not attributes[name]:
            raise _invalid(location, name, "must be a string that is not empty")
    for name in ("datacontenttype", "dataschema", "traceparent"):
        if not isinstance(attributes.get(name), str | None):
            raise _invalid(location, name, "must be a string")
    if unknown := sorted(attributes.keys() - _FIELDS.keys() - _PASSED_OVER):
        raise _invalid(location, unknown[0], "is an attribute that this service cannot keep")
    members = {_FIELDS[name]: value for name, value in attributes.items() if name in _FIELDS}
    pair = f"{attributes['source']}\0{attributes['id']}".encode(errors="surrogatepass")
    members["idempotency_key"] = f"cloudevent:{hashlib.sha256(pair).hexdigest()}"
    if isinstance(traceparent := attributes.get("traceparent"), str):
        members["trace_id"] = trace_id_of(traceparent)
    return event_from_members(members, _ATTRIBUTES, *location)


def _invalid(location: tuple[str, ...], name: str, message: str) -> InvalidFields:
    return InvalidFields(errors=[{"location": ".".join(filter(None, (*location, name))), "message": message}])


def _decode_header(attribute: str, value: bytes) -> str:
    """First without its double quotes, then percent-decoded, once (HTTP binding section 3.1.3.2)."""
    if quoted := _QUOTED.fullmatch(value):
        value = re.sub(rb"\\(.)", rb"\1", quoted[1])
    try:
        return unquote_to_bytes(value).decode("utf-8")
    except UnicodeDecodeError:
        raise _invalid(("headers",), attribute, "must be percent-encoded UTF-8") from None
