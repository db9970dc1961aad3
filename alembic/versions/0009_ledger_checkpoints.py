"""Checkpoints that the service signed, and what witnesses signed under them: both are kept."""

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        """
        CREATE TABLE ledger_checkpoints (
            origin text NOT NULL,
            size bigint NOT NULL,
            root bytea NOT NULL,
            note text NOT NULL,
            signed_at timestamptz NOT NULL,
            CONSTRAINT ledger_checkpoints_pkey PRIMARY KEY (origin, size),
            CONSTRAINT ledger_checkpoints_size_is_not_negative CHECK (size >= 0),
            CONSTRAINT ledger_checkpoints_root_has_32_bytes CHECK (octet_length(root) = 32)
        )
        """
    )
    op.execute(
        """
        CREATE TABLE ledger_cosignatures (
            origin text NOT NULL,
            size bigint NOT NULL,
            witness text NOT NULL,
            signature text NOT NULL,
            signed_at timestamptz NOT NULL,
            CONSTRAINT ledger_cosignatures_pkey PRIMARY KEY (origin, size, witness)
        )
        """
    )


def downgrade() -> None:
    """The tree stays; what was signed of it is gone, but for the copies that others hold."""
    op.execute("DROP TABLE ledger_checkpoints, ledger_cosignatures")
