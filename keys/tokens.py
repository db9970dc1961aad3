"""What a key looks like: `audit_<id>_<secret><checksum>`, all three in base62, so that secret scanners find leaks.

The checksum is the CRC-32 of what stands before it, as in GitHub's tokens: whoever scans tells a key from a
look-alike without asking the service, and so does the service without asking its database. It protects nothing.
"""

import hashlib
import re
import secrets
import zlib
from dataclasses import dataclass

PATTERN = r"audit_[0-9A-Za-z]{12}_[0-9A-Za-z]{49}"  # for secret scanners; in the README too
_ID_LENGTH, _SECRET_BYTES, _SECRET_LENGTH, _CHECKSUM_LENGTH = 12, 32, 43, 6
_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_TOKEN = re.compile(PATTERN)


@dataclass(frozen=True)
class Token:
    """A key taken apart. The secret is known as its digest only."""

    id: str
    secret_hash: bytes


def make_token() -> str:
    """A new key: 12 random digits of id, 256 random bits of secret."""
    key_id = "".join(secrets.choice(_DIGITS) for _ in range(_ID_LENGTH))
    secret = _base62(int.from_bytes(secrets.token_bytes(_SECRET_BYTES)), _SECRET_LENGTH)
    unchecked = f"audit_{key_id}_{secret}"
    return unchecked + _checksum(unchecked)


def parse_token(text: str) -> Token | None:
    """The parts of a well-formed key, or None where the form or the checksum is wrong."""
    if not _TOKEN.fullmatch(text) or text[-_CHECKSUM_LENGTH:] != _checksum(text[:-_CHECKSUM_LENGTH]):
        return None
    _, key_id, secret = text[:-_CHECKSUM_LENGTH].split("_")
    return Token(key_id, hashlib.sha256(secret.encode()).digest())


def _checksum(text: str) -> str:
    return _base62(zlib.crc32(text.encode()), _CHECKSUM_LENGTH)


def _base62(number: int, length: int) -> str:
    digits = ""
    while len(digits) < length:
        number, digit = divmod(number, 62)
        digits = _DIGITS[digit] + digits
    return digits
