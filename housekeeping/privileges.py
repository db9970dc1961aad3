"""What the service's role may do in the database; everything else is the owner's, under whom this is set.

Set anew whenever Alembic runs, and not by a migration: privileges are what the newest schema asks for.
"""

import psycopg2.errors
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from queries.reader import TENANT_ROLE

# Reached through audit_events, partitions need no privilege of their own, and have none.
SERVICE_PRIVILEGES = {
    "alembic_version": "SELECT",
    "api_keys": "SELECT, INSERT, UPDATE (revoked_by, revoked_at, expires_at, last_used_at)",
    "audit_events": "SELECT, INSERT",
    "idempotency_keys": "SELECT, INSERT",
    "ledger_checkpoints": "SELECT, INSERT",
    "ledger_cosignatures": "SELECT, INSERT",
    "ledger_head": "SELECT, UPDATE (size, frontier, recorded_at)",
    "ledger_tiles": "SELECT, INSERT",
    "legal_holds": "SELECT, INSERT, UPDATE (released_by, released_at)",
}
# Tables that the service's role never touches.
OWNERS_OWN = frozenset({"rewrites_due"})

_ROLE = text("SELECT rolname = current_user AS is_owner, rolsuper FROM pg_roles WHERE rolname = :role")
_MAY_SWITCH = text("SELECT pg_has_role(:role, :tenant_role, 'MEMBER')")
_POLICY = text(
    "SELECT 1 FROM pg_policies WHERE schemaname = current_schema() AND policyname = 'audit_events_of_service'"
    " AND roles = ARRAY[CAST(:role AS name)]"
)
_TABLES = text(
    "SELECT relname FROM pg_class WHERE relnamespace = current_schema()::regnamespace AND relkind IN ('r', 'p')"
    " AND (relname = ANY (:ours) OR starts_with(relname, 'audit_events_'))"
)


class RoleMissing(Exception):
    """A role that DATABASE_URL names, or that it needs, is not there. The message has the statement that mends it."""


def grant_privileges(connection: Connection, role: str) -> str | None:
    """Leave the role with these privileges and no others; return what keeps them from meaning anything, if any.

    Owned by the role itself, the database is as open as before. Raises RoleMissing. The caller commits.
    """
    quoted = connection.dialect.identifier_preparer.quote_identifier(role)
    found = connection.execute(_ROLE, {"role": role}).one_or_none()
    if found is None:
        raise RoleMissing(
            f"DATABASE_URL names the role {quoted}, which does not exist. Make it, and run this again:"
            f" CREATE ROLE {quoted} LOGIN PASSWORD '…' (docs/security.md, Database roles)"
        )
    if found.is_owner:
        return None
    tables = set(connection.scalars(_TABLES, {"ours": [*SERVICE_PRIVILEGES, *OWNERS_OWN]}))
    if tables:
        connection.exec_driver_sql(f"REVOKE ALL ON {', '.join(sorted(tables))} FROM {quoted}")
    for table in sorted(tables & SERVICE_PRIVILEGES.keys()):
        connection.exec_driver_sql(f"GRANT {SERVICE_PRIVILEGES[table]} ON {table} TO {quoted}")
    if "api_keys" in tables:
        _let_it_see_every_tenant(connection, role, quoted)
    return f"The role {quoted} is a superuser, whom no privilege holds." if found.rolsuper else None


def _let_it_see_every_tenant(connection: Connection, role: str, quoted: str) -> None:
    """Row-level security holds for all but the owner: the service sees all, and switches roles for bound keys."""
    if not connection.scalar(_POLICY, {"role": role}):
        connection.exec_driver_sql("DROP POLICY IF EXISTS audit_events_of_service ON audit_events")
        connection.exec_driver_sql(
            f"CREATE POLICY audit_events_of_service ON audit_events TO {quoted} USING (true) WITH CHECK (true)"
        )
    if connection.scalar(_MAY_SWITCH, {"role": role, "tenant_role": TENANT_ROLE}):
        return
    statement = f"GRANT {TENANT_ROLE} TO {quoted}"
    try:
        with connection.begin_nested():
            connection.exec_driver_sql(statement)
    except DBAPIError as error:
        if not isinstance(error.orig, psycopg2.errors.InsufficientPrivilege):
            raise
        raise RoleMissing(
            f"{quoted} cannot read as {TENANT_ROLE}, as it does for keys bound to a tenant. Let a superuser run:"
            f" {statement}; then run this again (docs/security.md, Database roles)"
        ) from None
