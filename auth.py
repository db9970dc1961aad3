"""API keys: who is calling, and what they may do."""

import hashlib
import hmac
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import Depends, Request, Security
from fastapi.security import APIKeyHeader, HTTPBearer

from config import ConfigurationError, Settings
from edge.limits import Limits
from problems import Forbidden, Unauthorized

Scope = Literal["write", "read", "admin"]


@dataclass(frozen=True)
class Key:
    """A key that was presented and accepted. The name may be logged; the key itself never is."""

    name: str
    scopes: frozenset[Scope]


ROOT_KEY = Key("root", frozenset({"write", "read", "admin"}))


class Authenticator:
    """Knows the root key, as a digest only."""

    def __init__(self, api_key: str) -> None:
        self._digest = _digest(api_key)

    def identify(self, presented: str | None) -> Key:
        """The key's identity; raises Unauthorized. Takes the same time for every wrong key."""
        if presented is None:
            raise Unauthorized()
        if not hmac.compare_digest(_digest(presented), self._digest):
            raise Unauthorized("This API key is not valid.")
        return ROOT_KEY


def _digest(key: str) -> bytes:
    # Equal lengths for compare_digest; latin-1 is how ASGI servers decode header bytes.
    return hashlib.sha256(key.encode("latin-1")).digest()


def api_key_in_force(settings: Settings) -> str:
    """API_KEY; in development, where it is not set, one that is made once and kept under the data directory."""
    if settings.api_key is not None:
        return settings.api_key
    if not settings.in_development:
        raise ConfigurationError("API_KEY: not set. Make one with `openssl rand -hex 32`")
    path = settings.data_dir / "api_key"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        return path.read_text().strip()
    with open(descriptor, "w") as file:
        file.write(secrets.token_hex(32) + "\n")
    return path.read_text().strip()


def presented_key(headers: Mapping[bytes, bytes]) -> str | None:
    """The key of X-API-Key, or else that of Authorization: Bearer."""
    if (key := headers.get(b"x-api-key")) is not None:
        return key.decode("latin-1")
    scheme, _, credentials = headers.get(b"authorization", b"").partition(b" ")
    return credentials.strip().decode("latin-1") if scheme.lower() == b"bearer" else None


# For OpenAPI, so that /docs can send a key; presented_key() does the reading.
_header = APIKeyHeader(name="X-API-Key", auto_error=False)
_bearer = HTTPBearer(auto_error=False)


def admit(scope: Any, headers: Mapping[bytes, bytes]) -> Key:
    """The caller's key, within its limits; raises Unauthorized, RateLimited or TooManyFailures."""
    state = scope["app"].state
    limits: Limits = state.limits
    address = scope["client"][0] if scope.get("client") else None
    limits.refuse_after_failures(address)
    presented = presented_key(headers)
    try:
        key: Key = state.authenticator.identify(presented)
    except Unauthorized:
        if presented is not None:
            limits.record_failure(address)
        raise
    scope["state"]["key_name"] = key.name
    if limits.rate is not None:
        scope["state"]["rate_fields"] = limits.spend(key.name)
    return key


async def identify_caller(
    request: Request, header: Annotated[Any, Security(_header)], bearer: Annotated[Any, Security(_bearer)]
) -> Key:
    """The caller's key, from either header; raises Unauthorized."""
    return admit(request.scope, dict(request.scope["headers"]))


Caller = Annotated[Key, Security(identify_caller)]


def require_admin(caller: Caller) -> Key:
    """The caller's key, which carries the scope admin; raises Forbidden."""
    if "admin" not in caller.scopes:
        raise Forbidden("This call needs a key with the scope admin.")
    return caller


Admin = Annotated[Key, Depends(require_admin)]
