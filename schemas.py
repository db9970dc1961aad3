"""What a client may send and what it gets, as pydantic models.

Every model is strict and refuses unknown fields: a typo must not lose data or widen a query.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, Json, StringConstraints, model_validator

from fields import (
    MAX_PATTERNS,
    EventId,
    Interval,
    IpAddress,
    IpNetwork,
    KeyId,
    Metadata,
    Outcome,
    Patterns,
    Scope,
    Text255,
    Text1024,
    Timestamp,
    TimestampOut,
    TimeZone,
    TraceId,
    names,
)

MAX_EVENT_BYTES = 65_535  # the bound of one entry in a C2SP tlog-tiles bundle (16-bit length)
MAX_ID = 2**63 - 1
SCOPES = get_args(Scope)

EVENT_EXAMPLE: dict[str, Any] = {
    "event_type": "order.create",
    "actor": "alice",
    "timestamp": "2026-11-24T09:30:00.000000Z",
    "tenant": "acme",
    "resource": "order/1234",
    "outcome": "success",
    "source": "shop",
    "source_ip": "203.0.113.7",
    "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736",
    "metadata": {"amount": 99.5, "currency": "EUR"},
}


class EventIn(BaseModel):
    """An event as a client sends it: who did what, and optionally when, to what, from where."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [EVENT_EXAMPLE]})

    event_type: Text255 = Field(description="What happened, like LOGIN or order.create")
    actor: Text255 = Field(description="Who did it: a user or a service")
    timestamp: Timestamp | None = Field(None, description="When it happened; the server's clock where left out")
    tenant: Text255 | None = Field(None, description="Whose log it belongs to, where several share one service")
    resource: Text1024 | None = Field(None, description="What it was done to, like order/1234")
    outcome: Outcome | None = None
    source: Text255 | None = Field(None, description="The service that reported it")
    source_ip: IpAddress | None = Field(None, description="Where the actor came from")
    trace_id: TraceId | None = Field(None, description="W3C trace id, 32 lower-case hex digits")
    metadata: Metadata | None = Field(None, description="Anything else: a JSON object with I-JSON numbers")
    idempotency_key: Text255 | None = Field(
        None, description="Makes a retry safe: the same key, per tenant, is the same event"
    )

    @model_validator(mode="after")
    def _check_size(self) -> "EventIn":
        text = self.model_dump_json(exclude_none=True)
        # A character takes four bytes at the most: of the usual event none are counted.
        if len(text) > MAX_EVENT_BYTES // 4 and len(text.encode()) > MAX_EVENT_BYTES:
            raise ValueError(f"the event is larger than {MAX_EVENT_BYTES} bytes of JSON")
        return self


class Event(BaseModel):
    """An event as it stands in the log."""

    model_config = ConfigDict(from_attributes=True)

    id: int = Field(description="Position in the log: 1, 2, 3 … in the order of commits")
    event_type: str
    actor: str
    timestamp: TimestampOut
    recorded_at: TimestampOut = Field(description="When it was committed here; rises with id")
    tenant: str | None
    resource: str | None
    outcome: str | None
    source: str | None
    source_ip: str | None
    trace_id: str | None
    metadata: dict[str, Any] | None
    redacted_at: TimestampOut | None = Field(
        description="When actor, resource, source_ip and metadata were erased; null where they were not"
    )


PUBLIC_FIELDS = tuple(Event.model_fields)


class EventPage(BaseModel):
    """Events in the order asked for, and where the next page begins."""

    events: list[Event]
    next_cursor: str | None = Field(description="Send it as `cursor` for the next page; null on the last")


class EventFilter(BaseModel):
    """Which events. All conditions hold together; of several actors, or event types, any."""

    model_config = ConfigDict(extra="forbid")

    actor: Patterns = Field([], description="Repeatable: any of them. A trailing `*` makes a prefix of it: `user.*`")
    event_type: Patterns = Field([], description="Repeatable: any of them. A trailing `*` makes a prefix of it")
    start: Timestamp | None = Field(None, description="The earliest timestamp, inclusive")
    end: Timestamp | None = Field(None, description="The latest timestamp, exclusive")
    tenant: Text255 | None = None
    resource: Text1024 | None = None
    outcome: Outcome | None = None
    source: Text255 | None = None
    source_ip: IpNetwork | None = Field(None, description="An address, or a network that contains it: `10.0.0.0/8`")
    trace_id: TraceId | None = None
    metadata: Json[Metadata] | None = Field(None, description="A JSON object that the event's metadata contains")

    @model_validator(mode="after")
    def _check_range(self) -> "EventFilter":
        if self.start is not None and self.end is not None and self.start >= self.end:
            raise ValueError("start must be earlier than end")
        return self


class EventListing(EventFilter):
    """Which events, and which page of them."""

    limit: int = Field(100, ge=1, le=1000, description="How many events a page has at the most")
    order: Literal["desc", "asc"] = Field("desc", description="Newest first, or oldest first, by timestamp and id")
    cursor: Annotated[str, StringConstraints(min_length=1, max_length=512)] | None = Field(
        None, description="`next_cursor` of the page before, with the same filters and order"
    )


class ExportQuery(EventFilter):
    """Which events to export, and how each is written."""

    format: Literal["ndjson", "csv"] = Field("ndjson", description="A JSON object a line, or RFC 4180 with a header")
    after: int | None = Field(
        None,
        ge=-MAX_ID,
        le=MAX_ID,
        description="Resume behind the event with this id: the last one received",
    )
    snapshot: int | None = Field(
        None,
        ge=0,
        le=MAX_ID,
        description="Resume up to this id: that of the first answer's `Audit-Snapshot`",
    )


class HistogramQuery(EventFilter):
    """Which events, and how long each bucket is."""

    interval: Interval = Field(description="How long each bucket is")
    time_zone: TimeZone = Field("UTC", description="IANA name of the zone in which days begin: `Europe/Berlin`")


class TopQuery(EventFilter):
    """Which events, and which of their fields to count."""

    field: Literal["actor", "event_type", "resource", "outcome", "source", "tenant"]
    n: int = Field(10, ge=1, le=100, description="How many values at the most")


class Count(BaseModel):
    """How many events there are."""

    count: int
    capped: bool = Field(description="Whether there may be more: no more than COUNT_LIMIT events are looked at")


class Bucket(BaseModel):
    """From its start to the next one's."""

    start: TimestampOut
    count: int


class Histogram(BaseModel):
    """Every bucket of the range, empty ones too, in order."""

    interval: Interval
    time_zone: str
    buckets: list[Bucket]


class ValueCount(BaseModel):
    """A value and how many events have it."""

    value: str
    count: int


class Top(BaseModel):
    """The most frequent values, the most frequent first."""

    field: str
    values: list[ValueCount]


def _names(member: str) -> dict[str, Any]:
    """In JSON Schema: the member is there, and is not null."""
    return {"required": [member], "properties": {member: {"not": {"type": "null"}}}}


class LegalHoldIn(BaseModel):
    """Whose events to keep: those that match all of tenant, actor and resource which are given."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={
            "examples": [{"actor": "alice", "reason": "Case 2026-117"}],
            "anyOf": [_names("tenant"), _names("actor"), _names("resource")],
        },
    )

    tenant: Text255 | None = None
    actor: Text255 | None = None
    resource: Text1024 | None = None
    reason: Text1024

    @model_validator(mode="after")
    def _check_subject(self) -> "LegalHoldIn":
        if self.tenant is None and self.actor is None and self.resource is None:
            raise ValueError("name at least one of tenant, actor and resource")
        return self


class LegalHold(BaseModel):
    """A legal hold, in force until it is released."""

    model_config = ConfigDict(from_attributes=True)

    id: int
    tenant: str | None
    actor: str | None
    resource: str | None
    reason: str
    created_by: str = Field(description="The name of the key that placed it")
    created_at: TimestampOut
    released_by: str | None
    released_at: TimestampOut | None
    keeps: str | None = Field(description="The partition that retention would have dropped last, were it not for this")


class LegalHoldPage(BaseModel):
    """Legal holds, oldest first."""

    legal_holds: list[LegalHold]
    next_after: int | None = Field(description="Send it as `after` for the next page; null on the last")


class LegalHoldFilter(BaseModel):
    """Which legal holds to list."""

    model_config = ConfigDict(extra="forbid")

    active: bool | None = Field(None, description="true: those in force; false: those released; left out: both")
    after: int = Field(0, ge=0, lt=2**63, description="`next_after` of the page before")
    limit: int = Field(100, ge=1, le=1000)


class RedactionIn(BaseModel):
    """Whose personal data to erase: that of all events of an actor, or of single events."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={
            "examples": [{"actor": "alice", "reason": "Request 2026-31"}],
            "oneOf": [_names("actor"), _names("ids")],
        },
    )

    actor: Text255 | None = Field(None, description="The person: every event that has it as its actor")
    tenant: Text255 | None = Field(None, description="With actor: only in this tenant's events")
    ids: Annotated[list[EventId], Field(min_length=1, max_length=1000)] | None = Field(
        None, description="Instead of actor: the events with these ids"
    )
    reason: Text1024 = Field(description="Kept for ever, so it must not name the person")
    dry_run: bool = Field(True, description="Count, and erase nothing")

    @model_validator(mode="after")
    def _check_subject(self) -> "RedactionIn":
        if (self.actor is None) == (self.ids is None):
            raise ValueError("name either an actor or ids")
        if self.tenant is not None and self.actor is None:
            raise ValueError("tenant goes with actor")
        if self.actor is not None and names(self.reason, self.actor):
            raise ValueError("reason must not name the person: it is kept for ever")
        return self


class Redaction(BaseModel):
    """What one call erased, or would erase."""

    redaction: str | None = Field(description="`resource` of the events that record it; null where nothing was erased")
    dry_run: bool
    count: int = Field(description="Events whose personal data this call erased, or would erase")
    held: int = Field(description="Events that a legal hold keeps as they are")
    remaining: int = Field(description="Events still to be erased: call again until it is 0")


class ApiKeyIn(BaseModel):
    """What a new key may do, and for how long."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={
            "examples": [
                {"name": "shop", "scopes": ["write"], "tenant": "acme", "event_types": ["order.", "LOGIN"]},
                {"name": "auditor", "scopes": ["read"], "expires_at": "2027-12-31T00:00:00Z"},
            ]
        },
    )

    name: Text255 = Field(description="Who uses it: stands in the log where this key does something")
    scopes: Annotated[list[Scope], Field(min_length=1, max_length=3)]
    tenant: Text255 | None = Field(None, description="The only tenant whose events it writes and sees; else all")
    event_types: Annotated[list[Text255], Field(min_length=1, max_length=MAX_PATTERNS)] | None = Field(
        None, description="The event types that it writes begin with one of these; else any"
    )
    expires_at: Timestamp | None = Field(None, description="From when on it is refused; left out: never")

    @model_validator(mode="after")
    def _order(self) -> "ApiKeyIn":
        self.scopes = sorted(set(self.scopes), key=SCOPES.index)
        return self


class ApiKey(BaseModel):
    """A key, without its secret."""

    model_config = ConfigDict(from_attributes=True)

    id: str
    name: str
    scopes: list[str]
    tenant: str | None
    event_types: list[str] | None
    expires_at: TimestampOut | None
    created_by: str = Field(description="The name of the key that made it")
    created_at: TimestampOut
    revoked_by: str | None
    revoked_at: TimestampOut | None
    last_used_at: TimestampOut | None = Field(description="To the minute, and written within the next one")


class NewApiKey(ApiKey):
    """A key that was just made."""

    key: str = Field(description="What to send as `X-API-Key`. Shown this once: the service keeps a digest only")


class ApiKeyPage(BaseModel):
    """Keys in the order of their ids."""

    keys: list[ApiKey]
    next_after: str | None = Field(description="Send it as `after` for the next page; null on the last")


class ApiKeyFilter(BaseModel):
    """Which keys to list."""

    model_config = ConfigDict(extra="forbid")

    tenant: Text255 | None = Field(None, description="Those bound to this tenant")
    active: bool | None = Field(None, description="true: those that work; false: revoked or expired; left out: both")
    after: KeyId | None = Field(None, description="`next_after` of the page before")
    limit: int = Field(100, ge=1, le=1000)


class BatchReceipt(BaseModel):
    """Where the events of a batch stand in the log, in the order in which they were sent."""

    count: int = Field(description="How many events the batch had")
    first_id: int = Field(description="The lowest id")
    last_id: int = Field(description="The highest id")
    ids: list[int]
    replayed: int = Field(description="How many of them were stored before, under the same idempotency key")
