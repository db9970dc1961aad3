"""What the service's role may do in the database; everything else is the owner's, under whom this is set.

Set anew whenever Alembic runs, and not by a migration: privileges are what the newest schema asks for.
"""

from sqlalchemy import Connection, text

# Reached through audit_events, partitions need no privilege of their own, and have none.
SERVICE_PRIVILEGES = {
    "alembic_version": "SELECT",
    "audit_events": "SELECT, INSERT",
    "idempotency_keys": "SELECT, INSERT",
    "ledger_head": "SELECT, UPDATE (size, frontier, recorded_at)",
    "ledger_tiles": "SELECT, INSERT",
    "legal_holds": "SELECT, INSERT, UPDATE (released_by, released_at)",
}
# Tables that the service's role never touches.
OWNERS_OWN = frozenset({"rewrites_due"})

_ROLE = text("SELECT rolname = current_user AS is_owner, rolsuper FROM pg_roles WHERE rolname = :role")
_TABLES = text(
    "SELECT relname FROM pg_class WHERE relnamespace = current_schema()::regnamespace AND relkind IN ('r', 'p')"
    " AND (relname = ANY (:ours) OR starts_with(relname, 'audit_events_'))"
)


class RoleMissing(Exception):
    """The role that DATABASE_URL names does not exist. The message has the statement that makes it."""


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
    return f"The role {quoted} is a superuser, whom no privilege holds." if found.rolsuper else None
