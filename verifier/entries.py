"""The two hashes of an event, by the book: of its personal part, and of its entry in the tree.

Shares the canonical encoding and the hash functions with the code that writes, and nothing else.
"""

from collections.abc import Mapping
from typing import Any, Literal

from ledger.entries import canonical_json, hash_personal_part, personal_part
from ledger.tree import hash_leaf

REDACTED = {"actor": "[redacted]"}  # all that is left of a personal part that was erased

Personal = Literal["intact", "redacted", "changed"]

# What an event of an export has, and nothing else.
MEMBERS = frozenset(
    "id event_type actor timestamp recorded_at tenant resource outcome source source_ip trace_id metadata redacted_at"
    " nonce personal_hash".split()
)
_NAMES = ("event_type", "outcome", "personal_hash", "recorded_at", "source", "tenant", "timestamp", "trace_id")


def leaf_of(event: Mapping[str, Any]) -> bytes:
    """The event's hash in the tree (RFC 6962 section 2.1). Moments and hashes are texts, as in GET /events/export."""
    return hash_leaf(entry_of(event))


def entry_of(event: Mapping[str, Any]) -> bytes:
    """RFC 8785 canonical JSON of what is not personal; null members left out."""
    members = {name: event[name] for name in _NAMES if event.get(name) is not None}
    return canonical_json({"id": event["id"], **members})


def check_personal_part(event: Mapping[str, Any]) -> Personal:
    """Whether the personal part is what the event's hash commits to; of a redacted one nothing is left to hash."""
    personal = personal_part(event)
    if event["redacted_at"] is not None:
        return "redacted" if event["nonce"] is None and personal == REDACTED else "changed"
    if event["nonce"] is None or event["personal_hash"] is None:
        return "changed"
    try:
        computed = hash_personal_part(bytes.fromhex(event["nonce"]), personal)
    except (ValueError, TypeError):  # not what JSON can be: nobody recorded it
        return "changed"
    return "intact" if computed.hex() == event["personal_hash"] else "changed"
