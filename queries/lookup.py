"""One event by its id: of the log as it is being written, or as the readers see it."""

from typing import Any

from sqlalchemy import Row, bindparam, select

from db import Database
from models import audit_events
from problems import EventNotFound
from queries.lines import EVENT_JSON
from queries.reader import DIALECT, Reader
from queries.seals import recorded_condition, recorded_values

_columns = audit_events.c


def find_event(database: Database, event_id: int, tenant: str | None = None) -> Row[Any]:
    """The event with this id, of the tenant where one is given; raises EventNotFound. Index: audit_events_pkey."""
    statement = select(audit_events).where(_columns.id == event_id)
    if tenant is not None:
        statement = statement.where(_columns.tenant == tenant)
    with database.transaction() as connection:
        row = connection.execute(statement).one_or_none()
    if row is None:
        raise EventNotFound(f"There is no event with the id {event_id}.")
    return row


# Index: audit_events_pkey, of the one sealed partition that may have the id, and of those that are not sealed.
_EVENT = (
    select(EVENT_JSON)
    .where(_columns.id == bindparam("id"), recorded_condition(_columns.recorded_at))
    .select_from(audit_events)
)
_EVENT_SQL = str(_EVENT.compile(dialect=DIALECT))
_EVENT_OF_TENANT_SQL = str(_EVENT.where(_columns.tenant == bindparam("tenant")).compile(dialect=DIALECT))


def read_event(reader: Reader, event_id: int, tenant: str | None = None) -> str:
    """The event with this id, as JSON, of the tenant where one is given; raises EventNotFound."""
    values: dict[str, Any] = recorded_values(reader.seals(), lambda seal: seal.first_id <= event_id <= seal.last_id)
    sql = _EVENT_SQL if tenant is None else _EVENT_OF_TENANT_SQL
    rows = reader.seen_by(tenant).walk(sql, {"id": event_id, "tenant": tenant, **values})
    if not rows:
        raise EventNotFound(f"There is no event with the id {event_id}.")
    return str(rows[0][0])
