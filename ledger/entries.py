"""What goes into the Merkle tree over the log: canonical bytes, and the hash of an event's personal part.

Pure functions, no I/O. An event's personal part stands in its entry only as a salted hash, so entries,
tiles and proofs hold no personal data. The entry, the leaf and the tree are made where the id is known: in
append_events(): alembic/versions/0005_append_events.py and 0010_lighter_flush.py.
"""

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import orjson
import rfc8785

TILE_WIDTH = 256  # hashes in a full tile (c2sp.org/tlog-tiles)
NONCE_BYTES = 16

_MAX_SAFE_INTEGER = 2**53 - 1  # beyond it a JSON number is what its nearest double is (RFC 8785 section 3.2.2.3)
_PERSONAL_FIELDS = ("actor", "resource", "source_ip", "metadata")


def format_timestamp(moment: datetime) -> str:
    """RFC 3339 in UTC, always with six fractional digits and Z: the one spelling in entries and answers."""
    if moment.tzinfo is not UTC:
        moment = moment.astimezone(UTC)
    return f"{moment.isoformat(timespec='microseconds')[:26]}Z"


def canonical_json(value: Any) -> bytes:
    """RFC 8785 canonical JSON. Fast where orjson's sorted output is known to be the same, else by the book."""
    if _sorts_and_prints_alike(value):
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    return rfc8785.dumps(_as_doubles(value))


def personal_part(event: Mapping[str, Any]) -> dict[str, Any]:
    """The members of an event that say something of a person; null ones left out."""
    return {name: event[name] for name in _PERSONAL_FIELDS if event.get(name) is not None}


def hash_personal_part(nonce: bytes, personal: Mapping[str, Any]) -> bytes:
    """SHA-256(nonce ‖ JCS(personal part)): without the nonce it cannot be guessed at."""
    return hashlib.sha256(nonce + canonical_json(personal)).digest()


def _sorts_and_prints_alike(value: Any) -> bool:
    """Whether orjson prints this as RFC 8785 asks: no unsafe integers, no names beyond ASCII, floats with a point.

    Both print the shortest digits that read back as the same double; exponents and whole numbers they spell
    differently, and outside this range there are such. orjson sorts names by code point and RFC 8785 by UTF-16
    unit: alike for ASCII.
    """
    if value is None or isinstance(value, (str, bool)):
        return True
    if isinstance(value, int):
        return -_MAX_SAFE_INTEGER <= value <= _MAX_SAFE_INTEGER
    if isinstance(value, float):
        return 1e-4 <= abs(value) < 1e15 and not value.is_integer()
    if isinstance(value, dict):
        return all(name.isascii() and _sorts_and_prints_alike(member) for name, member in value.items())
    if isinstance(value, list):
        return all(map(_sorts_and_prints_alike, value))
    return False


def _as_doubles(value: Any) -> Any:
    """Integers beyond the safe range as the doubles they stand for: jsonb returns 1e22 as an integer."""
    if isinstance(value, dict):
        return {name: _as_doubles(member) for name, member in value.items()}
    if isinstance(value, list):
        return [_as_doubles(member) for member in value]
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > _MAX_SAFE_INTEGER:
        return float(value)
    return value
