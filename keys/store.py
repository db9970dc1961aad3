"""The keys in the database. Each is made, rotated and revoked together with the event that says so.

`tenant`, where a function takes it, is that of a caller who is bound to one: keys of others do not exist for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, bindparam, func, insert, select, text, update

from db import Database
from ingest.records import own_event, record
from keys.tokens import make_token, parse_token
from models import api_keys
from problems import InvalidFields, KeyNotFound
from schemas import ApiKeyFilter, ApiKeyIn, EventIn

_columns = api_keys.c
_PUBLIC = [column for column in _columns if column is not _columns.secret_hash]
_WORKS = _columns.revoked_at.is_(None) & (_columns.expires_at.is_(None) | (_columns.expires_at > func.now()))

# Index: api_keys_pkey.
_FIND = select(api_keys).where(_columns.id == func.any(bindparam("ids")))
_MARK_USED = text(
    "UPDATE api_keys SET last_used_at = used.at FROM unnest(:ids ::text[], :moments ::timestamptz[]) AS used (id, at)"
    " WHERE api_keys.id = used.id AND (last_used_at IS NULL OR last_used_at < used.at)"
)


@dataclass(frozen=True)
class KeyPage:
    """Rows of api_keys without their digests, and the id after which the next page begins, if there is one."""

    keys: Sequence[Row[Any]]
    next_after: str | None


def create_key(database: Database, wanted: ApiKeyIn, by: str) -> dict[str, Any]:
    """Make a key; its columns, and `key`, which nobody can tell again. Raises InvalidFields."""
    if wanted.expires_at is not None and wanted.expires_at <= datetime.now(UTC):
        raise InvalidFields(errors=[{"location": "body.expires_at", "message": "must lie in the future"}])
    with database.transaction() as connection:
        made = _insert(connection, wanted, by)
        record(connection, _change("create", made, by, wanted.model_dump(mode="json", exclude_none=True)))
    return made


def rotate_key(database: Database, key_id: str, grace: timedelta, by: str) -> dict[str, Any]:
    """Make a key that may do what the old one may; the old one goes on working for the grace period at the most.

    Raises KeyNotFound where there is no such key, or it does not work any more.
    """
    expire = update(api_keys).where(_columns.id == key_id, _WORKS).returning(*_PUBLIC)
    with database.transaction() as connection:
        old = connection.execute(expire.values(expires_at=func.least(_columns.expires_at, func.now() + grace))).first()
        if old is None:
            raise KeyNotFound(f"There is no API key {key_id} that works.")
        names = set(ApiKeyIn.model_fields) - {"expires_at"}
        made = _insert(connection, ApiKeyIn(**{name: old._mapping[name] for name in names}), by)
        replaced = {"replaced_by": made["id"], "expires_at": old.expires_at.isoformat()}
        record(connection, _change("rotate", old._asdict(), by, replaced))
    return made


def revoke_key(database: Database, key_id: str, by: str, tenant: str | None = None) -> Row[Any]:
    """Revoke a key, once: revoked again it stays as it is. Raises KeyNotFound."""
    revoke = update(api_keys).where(_columns.id == key_id, _columns.revoked_at.is_(None), *_of(tenant))
    with database.transaction() as connection:
        key = connection.execute(revoke.values(revoked_by=by, revoked_at=func.now()).returning(*_PUBLIC)).one_or_none()
        if key is not None:
            record(connection, _change("revoke", key._asdict(), by, None))
            return key
        key = connection.execute(select(*_PUBLIC).where(_columns.id == key_id, *_of(tenant))).one_or_none()
    if key is None:
        raise KeyNotFound(f"There is no API key with the id {key_id}.")
    return key


def list_keys(database: Database, wanted: ApiKeyFilter) -> KeyPage:
    """A page of keys. Index: api_keys_pkey; keys are few, so those of a tenant have none of their own."""
    statement = select(*_PUBLIC).where(*_of(wanted.tenant)).order_by(_columns.id).limit(wanted.limit + 1)
    if wanted.after is not None:
        statement = statement.where(_columns.id > wanted.after)
    if wanted.active is not None:
        statement = statement.where(_WORKS == wanted.active)
    with database.transaction() as connection:
        rows = connection.execute(statement).all()
    keys = rows[: wanted.limit]
    return KeyPage(keys, keys[-1].id if len(rows) > len(keys) else None)


def find_keys(database: Database, ids: Sequence[str]) -> dict[str, Row[Any]]:
    """Those of the keys that there are, by id, revoked and expired ones too."""
    with database.transaction() as connection:
        return {row.id: row for row in connection.execute(_FIND, {"ids": list(ids)})}


def mark_used(database: Database, uses: Mapping[str, datetime]) -> None:
    """Note when each key was used last, in one statement; what is known to be later stays."""
    with database.transaction() as connection:
        connection.execute(_MARK_USED, {"ids": list(uses), "moments": list(uses.values())})


def _insert(connection: Connection, wanted: ApiKeyIn, by: str) -> dict[str, Any]:
    secret = make_token()
    token = parse_token(secret)
    assert token is not None  # noqa: S101 - for mypy; it was made a line above
    values = {**wanted.model_dump(), "id": token.id, "secret_hash": token.secret_hash, "created_by": by}
    row = connection.execute(insert(api_keys).values(**values, created_at=func.now()).returning(*_PUBLIC)).one()
    return {**row._mapping, "key": secret}


def _of(tenant: str | None) -> list[ColumnElement[bool]]:
    return [] if tenant is None else [_columns.tenant == tenant]


def _change(verb: str, key: Mapping[str, Any], by: str, metadata: dict[str, Any] | None) -> EventIn:
    """The event stands in the log of the tenant that the key is bound to."""
    resource = f"keys/{key['id']}"
    return own_event(f"audit.key.{verb}", by, tenant=key["tenant"], resource=resource, metadata=metadata)
