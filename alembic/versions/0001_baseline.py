"""The table as it was before Alembic: adopted where it exists, created where it does not."""

import sqlalchemy as sa

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# column → the types it may have had
EXPECTED = {
    "id": {"integer", "bigint"},
    "event_type": {"character varying", "text"},
    "actor": {"character varying", "text"},
    "timestamp": {"timestamp without time zone", "timestamp with time zone"},
}


def upgrade() -> None:
    columns = sa.text(
        "SELECT column_name::text, data_type::text FROM information_schema.columns"
        " WHERE table_schema = current_schema AND table_name = 'audit_events'"
    )
    found: dict[str, str] = {name: data_type for name, data_type in op.get_bind().execute(columns)}
    if found:
        _refuse_another_shape(found)
        return
    op.execute(
        """
        CREATE TABLE audit_events (
            id serial PRIMARY KEY,
            event_type varchar NOT NULL,
            actor varchar NOT NULL,
            timestamp timestamp NOT NULL
        )
        """
    )


def _refuse_another_shape(found: dict[str, str]) -> None:
    wrong = [
        f"{name} is {found.get(name, 'missing')}, expected {' or '.join(sorted(types))}"
        for name, types in EXPECTED.items()
        if found.get(name) not in types
    ]
    wrong += [f"{name} is unknown to this service" for name in sorted(found.keys() - EXPECTED.keys())]
    if wrong:
        raise RuntimeError(f"audit_events exists and cannot be adopted: {'; '.join(wrong)}. Nothing was changed.")


def downgrade() -> None:
    """Leaves the table: it may be older than Alembic, and it holds the log."""
