"""Legal holds: whose events retention must keep, why, and by whose word."""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        """
        CREATE TABLE legal_holds (
            id bigint GENERATED ALWAYS AS IDENTITY,
            tenant text,
            actor text,
            resource text,
            reason text NOT NULL,
            created_by text NOT NULL,
            created_at timestamptz NOT NULL,
            released_by text,
            released_at timestamptz,
            keeps text,
            CONSTRAINT legal_holds_pkey PRIMARY KEY (id),
            CONSTRAINT legal_holds_name_whose_events CHECK (num_nonnulls(tenant, actor, resource) > 0),
            CONSTRAINT legal_holds_are_released_by_somebody CHECK ((released_at IS NULL) = (released_by IS NULL))
        )
        """
    )


def downgrade() -> None:
    """Forgets the holds; that they were placed stays in the log."""
    op.execute("DROP TABLE legal_holds")
