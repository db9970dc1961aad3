"""Legal holds: whose events retention must keep. Each is placed and released together with the event that says so.

A hold keeps the events that match all of tenant, actor and resource which it names, and with them whole partitions.
`tenant`, where a function takes it, is that of a caller who is bound to one: holds of others do not exist for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Row, func, insert, select, update

from db import Database
from ingest.records import own_event, record
from models import legal_holds
from problems import HoldNotFound
from schemas import EventIn, LegalHoldFilter, LegalHoldIn

_columns = legal_holds.c


@dataclass(frozen=True)
class HoldPage:
    """Rows of legal_holds, oldest first, and the id after which the next page begins, if there is one."""

    legal_holds: Sequence[Row[Any]]
    next_after: int | None


def place_hold(database: Database, wanted: LegalHoldIn, by: str) -> Row[Any]:
    """Place a hold; from the commit on, whatever it names and is not dropped yet stays."""
    with database.transaction() as connection:
        values = {**wanted.model_dump(), "created_by": by, "created_at": func.now()}
        hold = connection.execute(insert(legal_holds).values(values).returning(legal_holds)).one()
        subject = wanted.model_dump(exclude_none=True)
        record(connection, _change("place", hold, by, subject))
    return hold


def release_hold(database: Database, hold_id: int, by: str, tenant: str | None = None) -> Row[Any]:
    """Release a hold, once: released again it stays as it is. Raises HoldNotFound. Index: legal_holds_pkey."""
    release = update(legal_holds).where(_columns.id == hold_id, _columns.released_at.is_(None), *_of(tenant))
    values = {"released_by": by, "released_at": func.now()}
    with database.transaction() as connection:
        hold = connection.execute(release.values(values).returning(legal_holds)).one_or_none()
        if hold is not None:
            record(connection, _change("release", hold, by, None))
    return hold if hold is not None else find_hold(database, hold_id, tenant)


def find_hold(database: Database, hold_id: int, tenant: str | None = None) -> Row[Any]:
    """The hold with this id; raises HoldNotFound. Index: legal_holds_pkey."""
    with database.transaction() as connection:
        hold = connection.execute(select(legal_holds).where(_columns.id == hold_id, *_of(tenant))).one_or_none()
    if hold is None:
        raise HoldNotFound(f"There is no legal hold with the id {hold_id}.")
    return hold


def list_holds(database: Database, wanted: LegalHoldFilter, tenant: str | None = None) -> HoldPage:
    """A page of holds. Index: legal_holds_pkey."""
    statement = select(legal_holds).where(_columns.id > wanted.after).order_by(_columns.id).limit(wanted.limit + 1)
    statement = statement.where(*_of(tenant))
    if wanted.active is not None:
        statement = statement.where(_columns.released_at.is_(None) == wanted.active)
    with database.transaction() as connection:
        rows = connection.execute(statement).all()
    holds = rows[: wanted.limit]
    return HoldPage(holds, holds[-1].id if len(rows) > len(holds) else None)


def _of(tenant: str | None) -> list[ColumnElement[bool]]:
    return [] if tenant is None else [_columns.tenant == tenant]


def _change(verb: str, hold: Row[Any], by: str, metadata: dict[str, Any] | None) -> EventIn:
    resource = f"legal-holds/{hold.id}"
    return own_event(f"audit.hold.{verb}", by, tenant=hold.tenant, resource=resource, metadata=metadata)
