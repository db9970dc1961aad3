"""Which revision the database is at, which one this code needs, and how to get there."""

import time
from functools import cache

from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text
from sqlalchemy.engine import URL

from alembic import command
from config import ROOT

UPGRADE_COMMAND = "alembic upgrade head"

# Any constant will do; all that migrate this database must use the same one.
_MIGRATION_LOCK = 0x6175646974  # "audit"


def alembic_config(url: URL | None = None, service_role: str | None = None) -> Config:
    """Alembic's configuration; env.py takes the owner's URL and the service's role from here, or else the settings."""
    config = Config(str(ROOT / "alembic.ini"))
    config.attributes["url"] = url
    config.attributes["service_role"] = service_role
    return config


@cache
def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(alembic_config())


def head() -> str:
    """The revision this code was written for."""
    revision = _scripts().get_current_head()
    assert revision is not None, "alembic/versions is empty"  # noqa: S101 - shipped with the code
    return revision


def missing_revisions(connection: Connection) -> list[str]:
    """The revisions still to be applied, oldest first; empty when the schema serves this code.

    A database ahead of the code (a newer release migrated it) has none missing: migrations only add
    what older code can live with, so replicas of two releases can share it during a deployment.
    """
    current = _current_revision(connection)
    ordered = [script.revision for script in _scripts().walk_revisions()][::-1]
    if current is None:
        return ordered
    if current not in ordered:
        return []
    return ordered[ordered.index(current) + 1 :]


def _current_revision(connection: Connection) -> str | None:
    if connection.scalar(text("SELECT to_regclass('alembic_version')")) is None:
        return None
    revision: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return revision


def upgrade(url: URL, service_role: str | None = None) -> None:
    """Migrate to head as the owner, and give the service's role its privileges.

    Safe to call from every replica at once: env.py lets one through at a time.
    """
    command.upgrade(alembic_config(url, service_role), "head")


def take_migration_lock(connection: Connection) -> None:
    """Wait until nobody else migrates this database; the lock goes with the connection.

    Polls, for a session that waits inside pg_advisory_lock() holds a snapshot, and the other one's
    CREATE INDEX CONCURRENTLY would wait for that snapshot: a deadlock.
    """
    statement = text("SELECT pg_try_advisory_lock(:key)")
    while not connection.scalar(statement, {"key": _MIGRATION_LOCK}):
        connection.rollback()
        time.sleep(0.2)
    connection.commit()
