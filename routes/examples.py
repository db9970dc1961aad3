"""What each call answers, for the OpenAPI document: one log of two events, whose hashes and proofs hold."""

import json
from typing import Any

from schemas import EVENT_EXAMPLE, PUBLIC_FIELDS

_NONCE = "d4735e3a265e16eee03f59718b9b5d03"
_PERSONAL_HASH = "48cc487fb3f13bd47476f46c582c52f7d08ef263ee83e18eb8690557312341b1"
_RECORDED_AT = "2026-11-24T09:30:00.012345Z"
_FIRST_LEAF = "AHuEAQzBBxyQAASQVsiKtLAjnJ78FgplA3zQhfHnyz0="
_CURSOR = "WzEsICI2ZDY0NDk1NjZjYzI1OTRmIiwgIjIwMjYtMTEtMjRUMDk6MzA6MDArMDA6MDAiLCAyXQ"
_ENTRY = (
    f'{{"event_type":"order.create","id":2,"outcome":"success","personal_hash":"{_PERSONAL_HASH}",'
    f'"recorded_at":"{_RECORDED_AT}","source":"shop","tenant":"acme",'
    '"timestamp":"2026-11-24T09:30:00.000000Z","trace_id":"4bf92f3577b34da6a3ce929d0e0e4736"}'
)

_STORED = {"id": 2, **EVENT_EXAMPLE, "recorded_at": _RECORDED_AT, "redacted_at": None}
EVENT: dict[str, Any] = {name: _STORED[name] for name in PUBLIC_FIELDS}
RECEIPT = {"count": 2, "first_id": 1, "last_id": 2, "ids": [1, 2], "replayed": 0}
EVENTS: dict[str, Any] = {"events": [EVENT], "next_cursor": _CURSOR}
COUNT = {"count": 1234, "capped": False}
HISTOGRAM = {
    "interval": "day",
    "time_zone": "Europe/Berlin",
    "buckets": [
        {"start": "2026-11-22T23:00:00.000000Z", "count": 0},
        {"start": "2026-11-23T23:00:00.000000Z", "count": 2},
    ],
}
TOP = {"field": "actor", "values": [{"value": "alice", "count": 1201}, {"value": "bob", "count": 33}]}
_EXPORTED = {**EVENT, "nonce": _NONCE, "personal_hash": _PERSONAL_HASH}
EXPORT_NDJSON = "\n".join(json.dumps(line) for line in (_EXPORTED, {"complete": True, "count": 1, "snapshot": 2}))
EXPORT_CSV = "\r\n".join(
    [
        ",".join(_EXPORTED),
        f'2,"order.create","alice",2026-11-24T09:30:00.000000Z,{_RECORDED_AT},"acme","order/1234",success,"shop",'
        '203.0.113.7,4bf92f3577b34da6a3ce929d0e0e4736,"{""amount"": 99.5, ""currency"": ""EUR""}",,'
        f"{_NONCE},{_PERSONAL_HASH}",
        ',"export.complete",,,,,,,,,,"{""count"":1,""snapshot"":2}",,,',
    ]
)
STREAM = f"id: 2\ndata: {json.dumps(EVENT)}\n\n"

CHECKPOINT = (
    "audit.example.com/log\n2\nIN9UpbpoTQP5Wr8OIg9oH3yEcjzJmn4oSkqyQoDXzFE=\n\n— audit.example.com/log"
    " RgRBjKWbCqxfKcrgeJqBDxkQmWCtzgt3gKpsR8wEc0cNdVYB1ekIDvl4Zq0sx4gTVBZKCwbUQuDOujZFfQ70cJ719wA=\n"
)
PROOF: dict[str, Any] = {
    "event_id": 2,
    "leaf_index": 1,
    "tree_size": 2,
    "entry": _ENTRY,
    "inclusion_path": [_FIRST_LEAF],
    "checkpoint": CHECKPOINT,
}
CONSISTENCY: dict[str, Any] = {"from": 1, "to": 2, "consistency_path": ["kyIpp0kpvcq8f8y4fnY2aQT3Pu5tVFqtXBPy7QTfyfk="]}

KEY = {
    "id": "4fJ0sZq81KxW",
    "name": "shop",
    "scopes": ["write"],
    "tenant": "acme",
    "event_types": ["order.", "LOGIN"],
    "expires_at": None,
    "created_by": "root",
    "created_at": "2026-11-24T09:30:00.000000Z",
    "revoked_by": None,
    "revoked_at": None,
    "last_used_at": "2026-11-24T10:02:00.000000Z",
}
KEYS = {"keys": [KEY], "next_after": None}
NEW_KEY = {**KEY, "last_used_at": None, "key": "audit_4fJ0sZq81KxW_…"}
REVOKED_KEY = {**KEY, "revoked_by": "root", "revoked_at": "2026-11-25T08:00:00.000000Z"}

HOLD = {
    "id": 1,
    "tenant": None,
    "actor": "alice",
    "resource": None,
    "reason": "Case 2026-117",
    "created_by": "legal",
    "created_at": "2026-11-24T09:30:00.000000Z",
    "released_by": None,
    "released_at": None,
    "keeps": None,
}
HOLDS = {"legal_holds": [HOLD], "next_after": None}
RELEASED_HOLD = {**HOLD, "released_by": "legal", "released_at": "2027-03-01T12:00:00.000000Z"}

REDACTION = {"redaction": None, "dry_run": True, "count": 1201, "held": 0, "remaining": 1201}

READY = {"status": "ready", "revision": "0010"}
METRICS = "audit_events_recorded_total 2.0\n"


def answer(example: Any, status: int = 200, media_type: str = "application/json") -> dict[int | str, dict[str, Any]]:
    """A route's `responses`: what it answers where all is well."""
    return {status: {"content": {media_type: {"example": example}}}}
