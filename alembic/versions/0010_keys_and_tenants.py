"""API keys, and tenants apart: who may write what, and who sees what."""

from alembic import op

revision = "0010"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
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
    """Forgets the keys; that they were made stays in the log."""
    op.execute("DROP TABLE api_keys")
