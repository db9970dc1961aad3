"""The tables, as the newest migration leaves them. `alembic check` finds where the two differ."""

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Identity,
    Index,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    SmallInteger,
    Table,
    Text,
    text,
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

# One row: the tree's right edge. Whoever writes events holds its lock to the commit.
ledger_head = Table(
    "ledger_head",
    metadata,
    Column("singleton", Boolean, nullable=False, server_default=text("true")),
    Column("first_id", BigInteger, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("frontier", ARRAY(LargeBinary), nullable=False),
    Column("recorded_at", DateTime(timezone=True), nullable=False),
    PrimaryKeyConstraint("singleton", name="ledger_head_pkey"),
    CheckConstraint("singleton", name="ledger_head_is_one_row"),
    CheckConstraint("size >= 0", name="ledger_head_size_is_not_negative"),
)

# Full tiles of every level, and nothing else. A tile's root is its hash in the tile one level up.
ledger_tiles = Table(
    "ledger_tiles",
    metadata,
    Column("level", SmallInteger, nullable=False, autoincrement=False),
    Column("tile_index", BigInteger, nullable=False, autoincrement=False),
    Column("hashes", LargeBinary, nullable=False),
    Column("root", LargeBinary, nullable=False),
    PrimaryKeyConstraint("level", "tile_index", name="ledger_tiles_pkey"),
    CheckConstraint("octet_length(hashes) = 8192", name="ledger_tiles_hold_256_hashes"),
    CheckConstraint("octet_length(root) = 32", name="ledger_tiles_root_has_32_bytes"),
)

# What the service signed, one row a checkpoint; origin is the name of the log and of its key.
ledger_checkpoints = Table(
    "ledger_checkpoints",
    metadata,
    Column("origin", Text, nullable=False),
    Column("size", BigInteger, nullable=False, autoincrement=False),
    Column("root", LargeBinary, nullable=False),
    Column("note", Text, nullable=False),  # text and signature, as it is served
    Column("signed_at", DateTime(timezone=True), nullable=False),
    PrimaryKeyConstraint("origin", "size", name="ledger_checkpoints_pkey"),
    CheckConstraint("size >= 0", name="ledger_checkpoints_size_is_not_negative"),
    CheckConstraint("octet_length(root) = 32", name="ledger_checkpoints_root_has_32_bytes"),
)

# What witnesses signed under them. witness is its key, in the form of a vkey; signature a line of a signed note.
ledger_cosignatures = Table(
    "ledger_cosignatures",
    metadata,
    Column("origin", Text, nullable=False),
    Column("size", BigInteger, nullable=False, autoincrement=False),
    Column("witness", Text, nullable=False),
    Column("signature", Text, nullable=False),
    Column("signed_at", DateTime(timezone=True), nullable=False),
    PrimaryKeyConstraint("origin", "size", "witness", name="ledger_cosignatures_pkey"),
)

# The first answer to each key. tenant is '' where the event has none.
idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("tenant", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("event_id", BigInteger, nullable=False),
    Column("request_hash", LargeBinary),  # NULL: the event was redacted
    Column("recorded_at", DateTime(timezone=True), nullable=False),
    PrimaryKeyConstraint("tenant", "key", name="idempotency_keys_pkey"),
    Index("idempotency_keys_recorded_at", "recorded_at"),
)

# Whose events retention must keep: those that all of the three match which are given. Released ones stay, as history.
legal_holds = Table(
    "legal_holds",
    metadata,
    Column("id", BigInteger, Identity(always=True), nullable=False),
    Column("tenant", Text),
    Column("actor", Text),
    Column("resource", Text),
    Column("reason", Text, nullable=False),
    Column("created_by", Text, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False),
    Column("released_by", Text),
    Column("released_at", DateTime(timezone=True)),
    Column("keeps", Text),  # the partition at which it stopped retention last
    PrimaryKeyConstraint("id", name="legal_holds_pkey"),
    CheckConstraint("num_nonnulls(tenant, actor, resource) > 0", name="legal_holds_name_whose_events"),
    CheckConstraint("(released_at IS NULL) = (released_by IS NULL)", name="legal_holds_are_released_by_somebody"),
)

# Tables whose files still hold what was erased, for PostgreSQL overwrites nothing; and the newest transaction, as a
# number of 64 bits, that erased something there.
rewrites_due = Table(
    "rewrites_due",
    metadata,
    Column("relation", Text, nullable=False),
    Column("erased_by", BigInteger, nullable=False),
    PrimaryKeyConstraint("relation", name="rewrites_due_pkey"),
)

# Keys but for the root key, which is a setting. Revoked and expired ones stay, so that the log's names mean something.
api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Text, nullable=False),
    Column("secret_hash", LargeBinary, nullable=False),  # SHA-256; the secret has 256 random bits, so no salt
    Column("name", Text, nullable=False),
    Column("scopes", ARRAY(Text), nullable=False),
    Column("tenant", Text),
    Column("event_types", ARRAY(Text)),  # prefixes of what it may write
    Column("expires_at", DateTime(timezone=True)),
    Column("created_by", Text, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False),
    Column("revoked_by", Text),
    Column("revoked_at", DateTime(timezone=True)),
    Column("last_used_at", DateTime(timezone=True)),  # to the minute
    PrimaryKeyConstraint("id", name="api_keys_pkey"),
    CheckConstraint("octet_length(secret_hash) = 32", name="api_keys_secret_hash_has_32_bytes"),
    CheckConstraint(
        "cardinality(scopes) > 0 AND scopes <@ ARRAY['write', 'read', 'admin']", name="api_keys_scopes_are_known"
    ),
    CheckConstraint("cardinality(event_types) > 0", name="api_keys_event_types_are_some"),
    CheckConstraint("(revoked_at IS NULL) = (revoked_by IS NULL)", name="api_keys_are_revoked_by_somebody"),
)

_columns = audit_events.c
Index("audit_events_actor_timestamp_id", _columns.actor, _columns.timestamp.desc(), _columns.id.desc())
Index("audit_events_event_type_timestamp_id", _columns.event_type, _columns.timestamp.desc(), _columns.id.desc())
Index("audit_events_timestamp_id", _columns.timestamp.desc(), _columns.id.desc())
Index(
    "audit_events_tenant_timestamp_id",
    _columns.tenant,
    _columns.timestamp.desc(),
    _columns.id.desc(),
    postgresql_where=_columns.tenant.is_not(None),
)
Index(
    "audit_events_metadata",
    _columns.metadata,
    postgresql_using="gin",
    postgresql_ops={"metadata": "jsonb_path_ops"},
)
