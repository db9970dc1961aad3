"""The three single-column indexes: by event type, by actor, by timestamp."""

import sqlalchemy as sa

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

COLUMNS = ("event_type", "actor", "timestamp")


def upgrade() -> None:
    with op.get_context().autocommit_block():
        # Building concurrently waits for older transactions, and nobody queues behind it meanwhile.
        op.execute("SET lock_timeout = 0")
        for column in COLUMNS:
            _drop_half_built(f"ix_audit_events_{column}")
            op.execute(f"CREATE INDEX CONCURRENTLY IF NOT EXISTS ix_audit_events_{column} ON audit_events ({column})")
        op.execute("SET lock_timeout = '5s'")


def _drop_half_built(index: str) -> None:
    """An interrupted CREATE INDEX CONCURRENTLY leaves an invalid index, which IF NOT EXISTS would take for done."""
    invalid = sa.text("SELECT 1 FROM pg_index WHERE indexrelid = to_regclass(:index) AND NOT indisvalid")
    if op.get_bind().scalar(invalid, {"index": index}):
        op.execute(f"DROP INDEX CONCURRENTLY {index}")


def downgrade() -> None:
    with op.get_context().autocommit_block():
        op.execute("SET lock_timeout = 0")
        for column in COLUMNS:
            op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS ix_audit_events_{column}")
        op.execute("SET lock_timeout = '5s'")
