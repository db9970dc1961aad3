"""What mutations begin with: a good request of every kind, and values that have broken services before."""

import base64
import hashlib
import json
import zlib
from dataclasses import dataclass, field
from typing import Any

from schemas import EventListing

DEEPEST = 100_000
INJECTED = b"x-injected"  # a header that no answer may have

EVENT: dict[str, Any] = {
    "event_type": "order.create",
    "actor": "alice",
    "timestamp": "2026-11-24T09:30:00.000000Z",
    "tenant": "acme",
    "resource": "order/1234",
    "outcome": "success",
    "source": "shop",
    "source_ip": "203.0.113.7",
    "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736",
    "metadata": {"amount": 99.5, "lines": [{"sku": "a", "count": 2}, None, True]},
}
CLOUDEVENT: dict[str, Any] = {
    "specversion": "1.0",
    "id": "1",
    "source": "/shop",
    "type": "order.create",
    "actor": "alice",
    "time": "2026-11-24T09:30:00Z",
    "subject": "order/1234",
    "tenant": "acme",
    "outcome": "success",
    "sourceip": "203.0.113.7",
    "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    "data": {"amount": 99.5},
}
FILTERS: dict[str, str] = {
    "actor": "alice",
    "event_type": "order.*",
    "start": "2020-01-01T00:00:00Z",
    "end": "2030-01-01T00:00:00Z",
    "tenant": "acme",
    "resource": "order/1234",
    "outcome": "success",
    "source": "shop",
    "source_ip": "203.0.113.0/24",
    "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736",
    "metadata": '{"amount": 99.5}',
}


@dataclass(frozen=True)
class Seed:
    """A request that the service takes, before anything is done to it."""

    method: str
    path: str
    body: Any = None  # JSON; of NDJSON the list of its lines
    query: dict[str, str] = field(default_factory=dict)
    media_type: str = "application/json"
    fields: dict[str, str] = field(default_factory=dict)


WRITES = [
    Seed("POST", "/events", EVENT),
    Seed("POST", "/events", {"event_type": "LOGIN", "actor": "alice", "idempotency_key": "a key"}),
    Seed("POST", "/events/batch", [EVENT, {"event_type": "LOGIN", "actor": "bob"}]),
    Seed("POST", "/events/batch", [EVENT, {"event_type": "LOGIN", "actor": "bob"}], media_type="application/x-ndjson"),
    Seed("POST", "/events", CLOUDEVENT, media_type="application/cloudevents+json"),
    Seed("POST", "/events", [CLOUDEVENT], media_type="application/cloudevents-batch+json"),
    Seed(
        "POST",
        "/events",
        {"amount": 99.5},
        fields={f"ce-{name}": value for name, value in CLOUDEVENT.items() if name != "data"},
    ),
]
ADMIN = [
    Seed("POST", "/keys", {"name": "shop", "scopes": ["write"], "tenant": "acme", "event_types": ["order."]}),
    Seed("POST", "/keys", {"name": "auditor", "scopes": ["read"], "expires_at": "2099-12-31T00:00:00Z"}),
    Seed("POST", "/legal-holds", {"tenant": "acme", "actor": "alice", "resource": "x", "reason": "Case 117"}),
    # Nobody's: what it erases would not be there to be counted.
    Seed("POST", "/redactions", {"actor": "nobody at all", "reason": "Request 1", "dry_run": True}),
    Seed("POST", "/redactions", {"ids": [2**62], "reason": "Request 1", "dry_run": True}),
    Seed("DELETE", "/keys/4fJ0sZq81KxW"),
    Seed("DELETE", "/legal-holds/4611686018427387904"),
]
READS = [
    Seed("GET", "/events", query={**FILTERS, "limit": "10", "order": "asc"}),
    Seed("GET", "/events", query={"limit": "3"}),
    Seed("GET", "/events/count", query=FILTERS),
    Seed("GET", "/events/histogram", query={**FILTERS, "interval": "month", "time_zone": "Europe/Berlin"}),
    Seed("GET", "/events/top", query={**FILTERS, "field": "actor", "n": "3"}),
    Seed("GET", "/events/export", query={**FILTERS, "format": "csv", "after": "0", "snapshot": "20"}),
    Seed("GET", "/events/export", query={"after": "0", "snapshot": "20"}, fields={"Accept-Encoding": "gzip"}),
    Seed("GET", "/events/stream", query=FILTERS, fields={"Last-Event-ID": "3"}),
    Seed("GET", "/events/1"),
    Seed("GET", "/events/0/proof"),  # not of one that there is: that waits for a checkpoint, up to a second
    Seed("GET", "/ledger/checkpoint", query={"cosigned": "false"}),
    Seed("GET", "/ledger/consistency", query={"from": "3", "to": "40"}),
    Seed("GET", "/ledger/tile/0/000.p/40", fields={"If-None-Match": '"x"'}),
    Seed("GET", "/ledger/tile/entries/000.p/40", fields={"Accept-Encoding": "gzip"}),
    Seed("GET", "/keys", query={"active": "true", "tenant": "acme", "limit": "3", "after": "4fJ0sZq81KxW"}),
    Seed("GET", "/legal-holds", query={"active": "false", "after": "0", "limit": "3"}),
    Seed("GET", "/legal-holds/1"),
    Seed("GET", "/health"),
    Seed("GET", "/ready"),
]


def cursor_of(*content: Any) -> str:
    """A cursor as queries/cursors.py makes it, with anything in it."""
    return base64.urlsafe_b64encode(json.dumps(content).encode()).decode().rstrip("=")


# The fingerprint of a listing without filters: whoever has a cursor can make others.
_NO_FILTERS = hashlib.sha256(EventListing().model_dump_json(exclude={"cursor", "limit"}).encode()).hexdigest()[:16]
_IDS: list[Any] = [1, 2**63 - 1, 2**63, -1, float("inf"), float("nan"), "1", [], None, True, 1.5]
CURSORS = [
    cursor_of(1, _NO_FILTERS, when, event_id)
    for when in ("2026-11-24T09:30:00+00:00", "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "now", 7, None)
    for event_id in _IDS
] + [cursor_of(), cursor_of(2), "e30", "W10", "bm90IGpzb24", "=", "____", "A" * 512]

TEXTS = [
    "",
    " ",
    "*",
    "a*",
    "**",
    "%",
    "_",
    "%_%",
    "\\",
    "100\\%_",
    "'; DROP TABLE audit_events; --",
    "' OR '1'='1",
    "1); DELETE FROM audit_events WHERE (1=1",
    "$$; SELECT pg_sleep(10); $$",
    "\\'; SELECT pg_sleep(10) --",
    "%s%(id)s{0}%n",
    "{{7*7}}${7*7}",
    "\r\nX-Injected: yes\r\n\r\n",
    "a\r\nX-Injected: yes",
    '"}\n{"level": "INFO", "message": "forged"',
    "\0",
    "a\0b",
    "\ud800",
    "\udfff\ud800",
    "\ufeff",
    "\ufffe\uffff",
    "\u2028\u2029\u0085",
    "\u202egnp",
    "\U0001f648" * 255,
    "é" * 256,
    "ß" * 1024,
    "x" * 255,
    "x" * 256,
    "x" * 1025,
    "x" * 66_000,
    "../../../etc/passwd",
    "<script>alert(1)</script>",
    "=cmd|'/c calc'!A1",
    "null",
    "true",
    "NaN",
    "-Infinity",
    "1e400",
    "0x10",
    "१२",
    "9" * 400,
    "-1",
    "2026-02-30T00:00:00Z",
    "2026-11-24T24:00:00Z",
    "2026-11-24T23:59:60Z",
    "2026-11-24T09:30:00",
    "0000-01-01T00:00:00Z",
    "0001-01-01T00:00:00+23:59",
    "9999-12-31T23:59:59.999999999-23:59",
    "2026-11-24t09:30:00.1234567890123456789z",
    "::ffff:1.2.3.4",
    "::1%lo",
    "0177.0.0.1",
    "1.2.3.4/33",
    "::/0",
    "10.0.0.1/8",
    "UTC+3",
    "posixrules",
    "Europe",
    ".",
    "audit-service",
    "audit.key.create",
    "audit_4fJ0sZq81KxW_" + "0" * 49,
    '{"a": NaN}',
    '{"a": 1e400}',
    '{"a": "\\u0000"}',
    '{"a": "\\ud800"}',
    "[" * 600,
    '{"a":' * 600,
]
NUMBERS = [0, -0.0, -1, 1.5, 2**31, 2**53, 2**53 + 1, -(2**63), 2**63, 2**64, 10**400, 1e308, 5e-324, True]


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + closing * depth


# Put in where a value stands, as they are: no JSON library writes them.
LITERALS = [
    "NaN",
    "-Infinity",
    "1e999999",
    "-",
    "01",
    "1" * 5_000,
    "1." + "0" * 5_000,
    "1e-" + "9" * 100,
    '"\\ud800"',
    '"\\u0000"',
    '"\\x41"',
    "'x'",
    "undefined",
    nested(33),
    nested(600),
    '{"a":' * 40 + "1" + "}" * 40,
    "{" + ",".join(f'"k{number}":{number}' for number in range(1_500)) + "}",
    '{"a":1,"a":2}',
    "[" + "1," * 3_000 + "1]",
]
BROKEN_UTF8 = [
    b"\xff",
    b"\xc0\xaf",
    b"\xe0\x80\xaf",
    b"\xf0\x80\x80\xaf",
    b"\xed\xa0\x80",
    b"\xf4\x90\x80\x80",
    b"\xf8\x88\x80\x80\x80",
    b"\xe2\x82",
    b"\x80",
    b"\xfe\xff",
]
BOMB = zlib.compress(bytes(10 * 1024 * 1024), 9, wbits=31)  # 10 MiB of zeros in 10 KB

MEDIA_TYPES = [
    "",
    "text/plain",
    "application/x-ndjson",
    "application/cloudevents+json",
    "application/cloudevents-batch+json",
    "application/json; charset=utf-16",
    "application/json;" + ";" * 100,
    "APPLICATION/JSON",
    "multipart/form-data; boundary=x",
    "application/x-www-form-urlencoded",
    "application/xml",
    "é/é",
]
# Fields that something in the service reads, or that mean something to a server.
FIELDS = [
    "Idempotency-Key",
    "traceparent",
    "X-Request-ID",
    "X-Forwarded-For",
    "X-Forwarded-Proto",
    "Accept-Encoding",
    "Accept",
    "Last-Event-ID",
    "Content-Encoding",
    "Expect",
    "Upgrade",
    "Cookie",
    "Range",
    "Host",
    "Connection",
    "If-None-Match",
    "Origin",
    "X-HTTP-Method-Override",
    "ce-specversion",
    "ce-actor",
    "ce-id",
    "ce-type",
    "ce-source",
    "ce-unknown",
]
PATHS = [
    "/events/%00",
    "/events/%2e%2e/keys",
    "/events/../keys",
    "//events",
    "/events/",
    "/events/1e3/proof",
    "/ledger/tile/0/x001/000",
    "/ledger/tile/64/000",
    "/ledger/tile/0/000.p/257",
    "/ledger/tile/0/x999/x999/x999/x999/999",
    "/ledger/tile/entries/../../../events",
    "/ledger/tile/\u0660/000",
    "/EVENTS",
    "/events;x=1",
    "/events/0x1",
    "/events/9223372036854775808",
    "/events/-9223372036854775808",
    "/events/1.0",
    "/events/%F0%9F%99%88",
    "/events/%ff",
    "/keys/%2e%2e",
    "/keys/short",
    "/docs/../../config.py",
    "/docs/%2e%2e/%2e%2e/config.py",
    "/docs",
    "/openapi.json",
    "/metrics",
    "/.env",
    "/x" * 400,
    "http://other.example/events",
    "*",
]
METHODS = ["HEAD", "OPTIONS", "PUT", "PATCH", "DELETE", "TRACE", "GET", "POST", "PROPFIND", "get"]
