"""Who is calling, and what they may do."""

import asyncio
import hashlib
import hmac
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request, Security
from fastapi.security import APIKeyHeader, HTTPBearer
from sqlalchemy import Row

from config import ConfigurationError, Settings, kept_secret
from edge.limits import Limits
from fields import Scope
from keys.memory import KeyMemory
from keys.tokens import Token, parse_token
from problems import Forbidden, Problem, Unauthorized
from schemas import SCOPES, EventFilter

Filter = TypeVar("Filter", bound=EventFilter)


@dataclass(frozen=True, slots=True)
class Key:
    """A key that was presented and accepted. Name and id may be logged; the key itself never is."""

    name: str
    scopes: frozenset[Scope]
    id: str = "root"
    tenant: str | None = None  # bound to it: others do not exist
    event_types: tuple[str, ...] | None = None  # prefixes of what it may write; None: anything

    def require(self, scope: Scope) -> None:
        """Raises Forbidden where the key does not carry the scope."""
        if scope not in self.scopes:
            raise Forbidden(f"This call needs a key with the scope {scope}.")

    def narrow(self, wanted: Filter) -> Filter:
        """The filter for what the key may see; raises Forbidden where it asks for another tenant's events."""
        if self.tenant is None:
            return wanted
        return wanted.model_copy(update={"tenant": self.narrow_tenant(wanted.tenant, "query.tenant")})

    def narrow_tenant(self, wanted: str | None, location: str) -> str | None:
        """The tenant that a call is about: the key's own where it is bound; raises Forbidden for another."""
        if self.tenant is None or wanted == self.tenant:
            return wanted
        if wanted is not None:
            raise Forbidden(_OTHER_TENANT, [{"location": location, "message": OTHER_TENANT_MESSAGE}])
        return self.tenant


_OTHER_TENANT = "This API key is bound to a tenant, and to no other."
OTHER_TENANT_MESSAGE = "is not the tenant that the key is bound to: leave it out"

ROOT_KEY = Key("root", frozenset(SCOPES))


class Authenticator:
    """Tells who presents a key: the root key, known as a digest only, or one of the database's."""

    def __init__(self, api_key: str, memory: KeyMemory) -> None:
        self._digest = _digest(api_key)
        self._memory = memory

    async def identify(self, presented: str | None) -> Key:
        """The key's identity; raises Unauthorized, or DatabaseUnavailable where that cannot be known.

        Waits for nothing where the key is remembered, and takes the same time for every wrong secret.
        """
        known = self.recall(presented)
        return await self._look_up(known) if isinstance(known, Token) else known

    def recall(self, presented: str | None) -> Key | Token:
        """The same without waiting: where the database must be asked, the token that is to be looked up."""
        if presented is None:
            raise Unauthorized()
        if hmac.compare_digest(_digest(presented), self._digest):
            return ROOT_KEY
        token = parse_token(presented)
        if token is None:
            raise Unauthorized(_NOT_VALID)
        remembered = self._memory.recall(token.id)
        return token if remembered is None else self._accept(token, remembered.row)

    async def _look_up(self, token: Token) -> Key:
        return self._accept(token, await self._memory.look_up(token.id))

    async def cut_when_refused(self, presented: str | None, cut: Callable[[], None]) -> None:
        """Look again at the key of an answer without end, now and then, and cut it once the key is refused."""
        while True:
            await asyncio.sleep(RECHECK_S)
            try:
                await self.identify(presented)
            except Unauthorized:
                cut()
                return
            except Problem:
                continue  # not known: nor is anything read from the database meanwhile

    def _accept(self, token: Token, row: Row[Any] | None) -> Key:
        # Of an id that there is not, a digest is compared all the same.
        is_right = hmac.compare_digest(token.secret_hash, _NO_DIGEST if row is None else bytes(row.secret_hash))
        if row is None or not is_right:
            raise Unauthorized(_NOT_VALID)
        now_s = time.time()
        if row.revoked_at is not None:
            raise Unauthorized("This API key was revoked.")
        if row.expires_at is not None and row.expires_at.timestamp() <= now_s:
            raise Unauthorized("This API key has expired.")
        self._memory.note_use(row.id, now_s)
        return _key_of(row)


def _key_of(row: Row[Any]) -> Key:
    event_types = None if row.event_types is None else tuple(row.event_types)
    return Key(row.name, frozenset(row.scopes), row.id, row.tenant, event_types)


RECHECK_S = 2.0
_NOT_VALID = "This API key is not valid."
_NO_DIGEST = bytes(32)


def _digest(key: str) -> bytes:
    # Equal lengths for compare_digest; latin-1 is how ASGI servers decode header bytes.
    return hashlib.sha256(key.encode("latin-1")).digest()


def api_key_in_force(settings: Settings) -> str:
    """API_KEY; in development, where it is not set, one that is made once and kept under the data directory."""
    if settings.api_key is not None:
        return settings.api_key
    if not settings.in_development:
        raise ConfigurationError("API_KEY: not set. Make one with `openssl rand -hex 32`")
    return kept_secret(settings.data_dir / "api_key", lambda: secrets.token_hex(32))


def presented_key(headers: Mapping[bytes, bytes]) -> str | None:
    """The key of X-API-Key, or else that of Authorization: Bearer."""
    if (key := headers.get(b"x-api-key")) is not None:
        return key.decode("latin-1")
    scheme, _, credentials = headers.get(b"authorization", b"").partition(b" ")
    return credentials.strip().decode("latin-1") if scheme.lower() == b"bearer" else None


# For OpenAPI, so that /docs can send a key; presented_key() does the reading.
_header = APIKeyHeader(name="X-API-Key", auto_error=False)
_bearer = HTTPBearer(auto_error=False)


async def admit(scope: Any, headers: Mapping[bytes, bytes]) -> Key:
    """The caller's key, within its limits; raises Unauthorized, RateLimited, TooManyFailures or DatabaseUnavailable.

    Waits for nothing where the key is remembered. Of one request it counts the first time only.
    """
    if (admitted := scope["state"].get("caller")) is not None:
        known: Key = admitted
        return known
    state = scope["app"].state
    limits: Limits = state.limits
    address = scope["client"][0] if scope.get("client") else None
    limits.refuse_after_failures(address)
    presented = presented_key(headers)
    try:
        key: Key = await state.authenticator.identify(presented)
    except Unauthorized:
        if presented is not None:
            limits.record_failure(address)
        raise
    return _admitted(scope, key)


def admit_at_once(scope: Any, headers: Mapping[bytes, bytes]) -> Key | None:
    """The same without waiting: None where the database must be asked, or a proxy tells the caller's address."""
    known: Key | None = scope["state"].get("caller")
    if known is not None:
        return known
    state = scope["app"].state
    limits: Limits = state.limits
    if state.settings.trusted_proxies and limits.has_failures():
        return None
    limits.refuse_after_failures(scope["client"][0] if scope["client"] else None)
    key: Key | Token = state.authenticator.recall(presented_key(headers))
    return None if isinstance(key, Token) else _admitted(scope, key)


def _admitted(scope: Any, key: Key) -> Key:
    scope["state"]["key_name"] = key.name
    scope["state"]["rate_fields"] = scope["app"].state.limits.spend(key.id)
    scope["state"]["caller"] = key
    return key


async def identify_caller(
    request: Request, header: Annotated[Any, Security(_header)], bearer: Annotated[Any, Security(_bearer)]
) -> Key:
    """The caller's key, from either header; raises Unauthorized."""
    return await admit(request.scope, dict(request.scope["headers"]))


Caller = Annotated[Key, Security(identify_caller)]


def _requiring(scope: Scope) -> Callable[[Key], Awaitable[Key]]:
    async def require(caller: Caller) -> Key:
        caller.require(scope)
        return caller

    return require


# What a route's parameter says of its caller: the key, which carries the scope.
Writing = Annotated[Key, Depends(_requiring("write"))]
Reading = Annotated[Key, Depends(_requiring("read"))]
Admin = Annotated[Key, Depends(_requiring("admin"))]
