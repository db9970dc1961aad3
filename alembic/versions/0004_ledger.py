"""The ledger: the tree's head and full tiles, and the keys that make a retry safe.

Rows from before stay as they are and are not in the tree: it starts at the next id.
"""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Held to the end: no event may come between reading the highest id and the head that continues it.
    op.execute("LOCK TABLE audit_events IN SHARE ROW EXCLUSIVE MODE")
    op.execute(
        """
        CREATE TABLE ledger_head (
            singleton boolean NOT NULL DEFAULT true,
            first_id bigint NOT NULL,
            size bigint NOT NULL,
            frontier bytea[] NOT NULL,
            recorded_at timestamptz NOT NULL,
            CONSTRAINT ledger_head_pkey PRIMARY KEY (singleton),
            CONSTRAINT ledger_head_is_one_row CHECK (singleton),
            CONSTRAINT ledger_head_size_is_not_negative CHECK (size >= 0)
        )
        """
    )
    op.execute(
        """
        CREATE TABLE ledger_tiles (
            level smallint NOT NULL,
            tile_index bigint NOT NULL,
            hashes bytea NOT NULL,
            CONSTRAINT ledger_tiles_pkey PRIMARY KEY (level, tile_index),
            CONSTRAINT ledger_tiles_hold_256_hashes CHECK (octet_length(hashes) = 8192)
        )
        """
    )
    op.execute(
        """
        CREATE TABLE idempotency_keys (
            tenant text NOT NULL,
            key text NOT NULL,
            event_id bigint NOT NULL,
            request_hash bytea NOT NULL,
            recorded_at timestamptz NOT NULL,
            CONSTRAINT idempotency_keys_pkey PRIMARY KEY (tenant, key)
        )
        """
    )
    op.execute("CREATE INDEX idempotency_keys_recorded_at ON idempotency_keys (recorded_at)")
    # Hashes do not compress.
    op.execute("ALTER TABLE ledger_tiles ALTER COLUMN hashes SET STORAGE EXTERNAL")
    # The head changes with every flush: room on its page lets each change stay there (HOT).
    op.execute("ALTER TABLE ledger_head SET (fillfactor = 10, autovacuum_vacuum_threshold = 1000)")
    op.execute(
        """
        WITH newest AS (SELECT id, recorded_at FROM audit_events ORDER BY id DESC LIMIT 1)
        INSERT INTO ledger_head (first_id, size, frontier, recorded_at)
        SELECT coalesce((SELECT id FROM newest), 0) + 1, 0, '{}',
               greatest((SELECT recorded_at FROM newest), clock_timestamp())
        """
    )


def downgrade() -> None:
    """The events stay; the tree over them, and what retries were known, are gone."""
    op.execute("DROP TABLE ledger_head, ledger_tiles, idempotency_keys")
