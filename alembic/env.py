"""How Alembic reaches the database: one migration at a time, one replica at a time, and never a long lock."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, create_engine
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool

from alembic import context
from config import load_settings
from db import owner_url
from housekeeping.privileges import RoleMissing, grant_privileges
from migrations import take_migration_lock
from models import metadata

# lock_timeout: a statement that cannot have its lock gives up, so that writers never queue behind it.
# timezone: `timestamp without time zone` is read as UTC.
_OPTIONS = "-c timezone=UTC -c lock_timeout=5s -c statement_timeout=0 -c idle_in_transaction_session_timeout=0"


@contextmanager
def _target() -> Iterator[tuple[URL, str | None]]:
    """The owner's URL, and the service's role where there is one beside it."""
    attributes = context.config.attributes
    if attributes.get("url") is not None:
        yield attributes["url"], attributes.get("service_role")
        return
    settings = load_settings()
    with owner_url(settings) as configured:
        yield configured, settings.database_url.username if settings.database_url is not None else None


def _include_name(name: str | None, type_: str, parent_names: object) -> bool:
    """Autogenerate looks at the tables of models.py; partitions are made while the service runs."""
    return type_ != "table" or name in metadata.tables


def _migrate(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=metadata,
        include_name=_include_name,
        compare_server_default=True,
        transaction_per_migration=True,
    )
    with context.begin_transaction():
        context.run_migrations()


def _grant(connection: Connection, service_role: str) -> None:
    try:
        warning = grant_privileges(connection, service_role)
    except RoleMissing as error:
        raise SystemExit(str(error)) from None
    connection.commit()
    if warning:
        logging.getLogger("audit.migrations").warning(warning)


if not logging.getLogger().handlers:  # run by hand: say what happens, in plain lines
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("alembic.runtime.migration").setLevel(logging.INFO)

if context.is_offline_mode():
    raise SystemExit("--sql is not supported: the migrations look at the database to adopt and to resume.")

with _target() as (url, service_role):
    engine = create_engine(url, poolclass=NullPool, connect_args={"options": _OPTIONS, "connect_timeout": 10})
    # The lock has a connection of its own: the migrations end transactions, and sessions, as they please.
    with engine.connect() as lock_holder, engine.connect() as connection:
        take_migration_lock(lock_holder)
        _migrate(connection)
        if service_role is not None:
            _grant(connection, service_role)
