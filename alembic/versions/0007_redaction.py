"""Redaction: which files still hold erased data, and idempotency keys that tell nothing of their request any more."""

import sqlalchemy as sa

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

# A key whose event was redacted has no request hash, and every repetition of it is taken for the first request.
_TELLS_APART = "key.request_hash <> decode(event.request_hash, 'hex')"
_KNOWS_NO_MORE = f"coalesce({_TELLS_APART}, false)"


def upgrade() -> None:
    op.execute(
        """
        CREATE TABLE rewrites_due (
            relation text NOT NULL,
            erased_by bigint NOT NULL,
            CONSTRAINT rewrites_due_pkey PRIMARY KEY (relation)
        )
        """
    )
    op.execute("ALTER TABLE idempotency_keys ALTER COLUMN request_hash DROP NOT NULL")
    _change_append_events(_TELLS_APART, _KNOWS_NO_MORE)


def _change_append_events(old: str, new: str) -> None:
    """Change one condition of the function as it stands: its text is in the migration that made it."""
    function = op.get_bind().scalar(sa.text("SELECT pg_get_functiondef('append_events'::regproc)"))
    if function.count(old) != 1:
        raise RuntimeError("append_events() is not the one that the migrations made. Nothing was changed.")
    op.get_bind().exec_driver_sql(function.replace(old, new).replace("%", "%%"))


def downgrade() -> None:
    """Keys of redacted events keep standing for them, and every repetition of one is a conflict."""
    _change_append_events(_KNOWS_NO_MORE, _TELLS_APART)
    op.execute("UPDATE idempotency_keys SET request_hash = '' WHERE request_hash IS NULL")
    op.execute("ALTER TABLE idempotency_keys ALTER COLUMN request_hash SET NOT NULL")
    op.execute("DROP TABLE rewrites_due")
