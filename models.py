"""The tables, as the newest migration leaves them. `alembic check` finds where the two differ."""

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    DateTime,
    Index,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
)
from sqlalchemy.dialects.postgresql import INET, JSONB

metadata = MetaData()

# One row an event. Partitioned by month of recorded_at, so each partition is an unbroken run of ids.
audit_events = Table(
    "audit_events",
    metadata,
    Column("id", BigInteger, nullable=False, autoincrement=False),
    Column("event_type", Text, nullable=False),
    Column("actor", Text, nullable=False),
    Column("timestamp", DateTime(timezone=True), nullable=False),
    Column("recorded_at", DateTime(timezone=True), nullable=False),
    Column("tenant", Text),
    Column("resource", Text),
    Column("outcome", Text),
    Column("source", Text),
    Column("source_ip", INET),
    Column("trace_id", Text),
    Column("metadata", JSONB(none_as_null=True)),
    Column("nonce", LargeBinary),
    Column("personal_hash", LargeBinary),
    Column("redacted_at", DateTime(timezone=True)),
    PrimaryKeyConstraint("id", "recorded_at", name="audit_events_pkey"),
    CheckConstraint("outcome IN ('success', 'failure', 'denied', 'unknown')", name="audit_events_outcome_is_known"),
    CheckConstraint("trace_id ~ '^[0-9a-f]{32}$'", name="audit_events_trace_id_is_32_hex_digits"),
    CheckConstraint("jsonb_typeof(metadata) = 'object'", name="audit_events_metadata_is_an_object"),
    CheckConstraint("octet_length(nonce) = 16", name="audit_events_nonce_has_16_bytes"),
    CheckConstraint("octet_length(personal_hash) = 32", name="audit_events_personal_hash_has_32_bytes"),
    postgresql_partition_by="RANGE (recorded_at)",
)

_columns = audit_events.c
Index("audit_events_actor_timestamp_id", _columns.actor, _columns.timestamp.desc(), _columns.id.desc())
Index("audit_events_event_type_timestamp_id", _columns.event_type, _columns.timestamp.desc(), _columns.id.desc())
Index("audit_events_timestamp_id", _columns.timestamp.desc(), _columns.id.desc())
Index(
    "audit_events_metadata",
    _columns.metadata,
    postgresql_using="gin",
    postgresql_ops={"metadata": "jsonb_path_ops"},
)
