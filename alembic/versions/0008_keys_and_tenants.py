"""API keys, and tenants apart: who may write what, and who sees what."""

import sqlalchemy as sa

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


READER = "audit_tenant_reader"
INDEX = "audit_events_tenant_timestamp_id"


def upgrade() -> None:
    with op.get_context().autocommit_block():
        _create_reader()
        _build_index()
    _create_keys()
    _keep_tenants_apart()


def _scalar(statement: str) -> object:
    return op.get_bind().scalar(sa.text(statement))


def _create_reader() -> None:
    """The role under which keys bound to a tenant read. Roles belong to the whole cluster: it may be there already."""
    try:
        if not _scalar(f"SELECT 1 FROM pg_roles WHERE rolname = '{READER}'"):
            op.execute(
                f"DO $$ BEGIN CREATE ROLE {READER} NOLOGIN;"
                " EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL; END $$"
            )
        if not _scalar(f"SELECT pg_has_role('{READER}', '{_right_to_set()}')"):
            op.execute(f"GRANT {READER} TO CURRENT_USER")
    except sa.exc.DBAPIError as error:
        if getattr(error.orig, "pgcode", None) != "42501":
            raise
        raise RuntimeError(
            f"{error.orig}The migration needs the role {READER}, and may not make it. Nothing was changed.\n"
            f"Let a superuser run: CREATE ROLE {READER} NOLOGIN; GRANT {READER} TO {_scalar('SELECT current_user')};"
        ) from None


def _right_to_set() -> str:
    """PostgreSQL 16 tells the right to switch to a role from that to use its privileges."""
    return "SET" if _scalar("SELECT current_setting('server_version_num')::int >= 160000") else "MEMBER"


def _build_index() -> None:
    """Partition by partition, without keeping a writer. Events without a tenant are not in it, and cost nothing."""
    # Building concurrently waits for older transactions, and nobody queues behind it meanwhile.
    op.execute("SET lock_timeout = 0")
    columns = "(tenant, timestamp DESC, id DESC) WHERE tenant IS NOT NULL"
    op.execute(f"CREATE INDEX IF NOT EXISTS {INDEX} ON ONLY audit_events {columns}")
    partitions = op.get_bind().scalars(
        sa.text(
            "SELECT inhrelid::regclass::text FROM pg_inherits"
            " WHERE inhparent = 'audit_events'::regclass AND NOT inhdetachpending"
        )
    )
    for partition in list(partitions):
        index = f"{partition}_tenant_timestamp_id_idx"
        # An interrupted build leaves an invalid index, which IF NOT EXISTS would take for done.
        if _scalar(f"SELECT 1 FROM pg_index WHERE indexrelid = to_regclass('{index}') AND NOT indisvalid"):
            op.execute(f"DROP INDEX CONCURRENTLY {index}")
        op.execute(f"CREATE INDEX CONCURRENTLY IF NOT EXISTS {index} ON {partition} {columns}")
        op.execute(f"ALTER INDEX {INDEX} ATTACH PARTITION {index}")
    op.execute("SET lock_timeout = '5s'")


def _keep_tenants_apart() -> None:
    """Under its role a reader sees the events of the tenants that audit.tenants names: while it names none, nothing.

    The tables' owner sees everything, as before. Partitions grant the role nothing, so there is no way round.
    """
    op.execute("ALTER TABLE audit_events ENABLE ROW LEVEL SECURITY")
    # = ANY, not =: an equality would join the query's own in an equivalence class, and lose it the index's order.
    op.execute(
        f"CREATE POLICY audit_events_of_tenants ON audit_events FOR SELECT TO {READER}"
        " USING (tenant = ANY (current_setting('audit.tenants', true)::text[]))"
    )
    op.execute(f"GRANT SELECT ON audit_events, ledger_head TO {READER}")
    if not _scalar(f"SELECT has_schema_privilege('{READER}', current_schema(), 'USAGE')"):
        op.execute(f"DO $$ BEGIN EXECUTE format('GRANT USAGE ON SCHEMA %I TO {READER}', current_schema()); END $$")


def _create_keys() -> None:
    op.execute(
        """
        CREATE TABLE api_keys (
            id text NOT NULL,
            secret_hash bytea NOT NULL,
            name text NOT NULL,
            scopes text[] NOT NULL,
            tenant text,
            event_types text[],
            expires_at timestamptz,
            created_by text NOT NULL,
            created_at timestamptz NOT NULL,
            revoked_by text,
            revoked_at timestamptz,
            last_used_at timestamptz,
            CONSTRAINT api_keys_pkey PRIMARY KEY (id),
            CONSTRAINT api_keys_secret_hash_has_32_bytes CHECK (octet_length(secret_hash) = 32),
            CONSTRAINT api_keys_scopes_are_known
                CHECK (cardinality(scopes) > 0 AND scopes <@ ARRAY['write', 'read', 'admin']),
            CONSTRAINT api_keys_event_types_are_some CHECK (cardinality(event_types) > 0),
            CONSTRAINT api_keys_are_revoked_by_somebody CHECK ((revoked_at IS NULL) = (revoked_by IS NULL))
        )
        """
    )


def downgrade() -> None:
    """Forgets the keys; that they were made stays in the log. The role stays, for other databases may use it."""
    op.execute("DROP TABLE api_keys")
    op.execute("DROP POLICY audit_events_of_tenants ON audit_events")
    op.execute("ALTER TABLE audit_events DISABLE ROW LEVEL SECURITY")
    op.execute(f"REVOKE SELECT ON audit_events, ledger_head FROM {READER}")
    op.execute(f"DROP INDEX {INDEX}")
