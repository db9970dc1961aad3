"""The types of fields: what a value must be, wherever it comes from, and the one spelling in which it is kept."""

import ipaddress
import json
import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BeforeValidator,
    Field,
    PlainSerializer,
    StringConstraints,
    WithJsonSchema,
)

from ledger.entries import format_timestamp

MAX_SAFE_INTEGER = 2**53 - 1  # I-JSON, RFC 7493 section 2.2
MAX_METADATA_DEPTH = 32
MAX_METADATA_KEYS = 1_000  # of all its objects together
MAX_METADATA_BYTES = 65_535  # as jsonb prints it, where it has numbers that grow by this: 1e308 has 309 digits
MAX_PATTERNS = 100  # actors, or event types, in one filter

_RFC3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)", re.ASCII)
_TIMESTAMP_EXPECTED = "must be an RFC 3339 date-time with an offset, like 2026-11-24T09:30:00Z"


def _refuse_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("must not contain the NUL character, which PostgreSQL cannot store")
    return text


def _parse_timestamp(value: object) -> object:
    """RFC 3339 section 5.6, in UTC. Digits beyond the microsecond are cut off."""
    if not isinstance(value, str):
        return value  # pydantic says what it expected
    if not _RFC3339.fullmatch(value):
        raise ValueError(_TIMESTAMP_EXPECTED)
    try:
        return datetime.fromisoformat(value.upper()).astimezone(UTC)
    except OverflowError:
        raise ValueError("must lie in the years 1 to 9999, in UTC") from None
    except ValueError:
        raise ValueError(_TIMESTAMP_EXPECTED) from None


def _normalise_ip(text: str) -> str:
    """The one spelling that PostgreSQL prints for the address, for that is what is hashed and read back."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise ValueError("must be an IPv4 or IPv6 address") from None
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.scope_id is not None:
        raise ValueError("must not carry a zone, which means nothing outside its host")
    high, low = divmod(int(address), 2**32)
    if high == 0xFFFF or (high == 0 and low > 0xFFFF):  # dotted: IPv4-mapped and -compatible
        return f"::{'ffff:' if high else ''}{ipaddress.IPv4Address(low)}"
    return str(address)


def _normalise_network(text: str) -> str:
    """An address, or a network in CIDR notation, as PostgreSQL's inet reads it."""
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ValueError("must be an IPv4 or IPv6 address, or a network like 10.0.0.0/8") from None
    if "%" in text:
        raise ValueError("must not carry a zone, which means nothing outside its host")
    if "/" in text and ipaddress.ip_interface(text).ip != network.network_address:
        raise ValueError(f"has bits set beyond its prefix length: either an address, or the network {network}")
    return str(network)


def _check_pattern(text: str) -> str:
    """A trailing * stands for any end; * alone would be no filter at all."""
    if text == "*":
        raise ValueError("must have at least one character before the *")
    if len(text) > 255 and not text.endswith("*"):
        raise ValueError("must have at most 255 characters")
    return text


def _without_repetition(values: list[str]) -> list[str]:
    return sorted(set(values))


def _check_time_zone(name: str) -> str:
    """One of the IANA database: PostgreSQL would take UTC+3 too, and mean three hours west."""
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError("must be the IANA name of a time zone, like Europe/Berlin") from None
    return name


def _check_metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    tally = _Tally()
    _check_json(metadata, MAX_METADATA_DEPTH, tally)
    if tally.keys > MAX_METADATA_KEYS:
        raise ValueError(f"must not have more than {MAX_METADATA_KEYS} keys")
    if tally.added_digits and _printed_bytes(metadata) + tally.added_digits > MAX_METADATA_BYTES:
        raise ValueError(
            f"must not be larger than {MAX_METADATA_BYTES} bytes with its numbers written without exponent"
        )
    return metadata


@dataclass(slots=True)
class _Tally:
    """What metadata has of what is bounded over the whole of it."""

    keys: int = 0
    added_digits: int = 0  # where jsonb prints what Python writes with an exponent


def _check_json(value: object, depth: int, tally: _Tally) -> None:
    """Refuse what I-JSON (RFC 7493) or jsonb cannot carry unchanged, and count what there is."""
    if depth == 0:
        raise ValueError(f"must not nest deeper than {MAX_METADATA_DEPTH} levels")
    if isinstance(value, dict):
        tally.keys += len(value)
        for key, member in value.items():
            _refuse_nul(key)
            _check_json(member, depth - 1, tally)
    elif isinstance(value, list):
        for member in value:
            _check_json(member, depth - 1, tally)
    elif isinstance(value, str):
        _refuse_nul(value)
    elif isinstance(value, float):
        _check_float(value, tally)
    elif isinstance(value, int) and abs(value) > MAX_SAFE_INTEGER:
        raise ValueError(f"must not contain an integer beyond ±{MAX_SAFE_INTEGER}; send it as a string")


def _check_float(value: float, tally: _Tally) -> None:
    if 1e-4 <= abs(value) < 1e16 or value == 0:
        return  # repr() writes it out
    if not math.isfinite(value):
        raise ValueError("must not contain a number outside the range of IEEE 754 doubles")
    written = repr(value)
    tally.added_digits += len(format(Decimal(written), "f")) - len(written)


def _printed_bytes(metadata: dict[str, Any]) -> int:
    """How long it is as jsonb prints it, which is with spaces, as Python does."""
    return len(json.dumps(metadata, ensure_ascii=False).encode(errors="surrogatepass"))


def names(text: str, person: str) -> bool:
    """Whether the text has the person's name in it, as a word or several, in whatever case."""
    return re.search(rf"(?<!\w){re.escape(person.casefold())}(?!\w)", text.casefold()) is not None


EventId = Annotated[int, Field(ge=-(2**63) + 1, le=2**63 - 1)]
Text255 = Annotated[str, StringConstraints(min_length=1, max_length=255), AfterValidator(_refuse_nul)]
Text1024 = Annotated[str, StringConstraints(min_length=1, max_length=1024), AfterValidator(_refuse_nul)]
TraceId = Annotated[str, StringConstraints(pattern="^[0-9a-f]{32}$")]
IpAddress = Annotated[
    str,
    AfterValidator(_normalise_ip),
    WithJsonSchema({"anyOf": [{"type": "string", "format": "ipv4"}, {"type": "string", "format": "ipv6"}]}),
]
Metadata = Annotated[
    dict[str, Any],
    AfterValidator(_check_metadata),
    WithJsonSchema({"type": "object", "maxProperties": MAX_METADATA_KEYS}),
]
Outcome = Literal["success", "failure", "denied", "unknown"]
IpNetwork = Annotated[str, AfterValidator(_normalise_network)]
Pattern = Annotated[
    str, StringConstraints(min_length=1, max_length=256), AfterValidator(_refuse_nul), AfterValidator(_check_pattern)
]
Patterns = Annotated[list[Pattern], Field(max_length=MAX_PATTERNS), AfterValidator(_without_repetition)]
Scope = Literal["write", "read", "admin"]
KeyId = Annotated[str, StringConstraints(pattern="^[0-9A-Za-z]{12}$")]
Interval = Literal["minute", "hour", "day", "week", "month"]
TimeZone = Annotated[str, StringConstraints(max_length=64), AfterValidator(_check_time_zone)]
Timestamp = Annotated[AwareDatetime, BeforeValidator(_parse_timestamp)]
TimestampOut = Annotated[datetime, PlainSerializer(format_timestamp, when_used="json")]
