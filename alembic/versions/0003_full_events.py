"""The event's full columns, bigint id, timestamptz, and monthly partitions by recorded_at.

The old table becomes the first partition, and keeps every row in place. While it is prepared, readers
and writers go on: the new id and timestamp are filled beside the old ones a few thousand rows at a time
(changing their type would rewrite the table under an exclusive lock), a trigger fills them for rows that
arrive meanwhile, indexes are built concurrently, constraints validated afterwards. Each step can be done
again, so a migration that was interrupted resumes. The swap at the end changes catalogs only, in one
transaction with Alembic's version.
"""

import sys

import sqlalchemy as sa

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

BLOCKS_A_BATCH = 128  # 1 MiB of table, about 10,000 rows: some 100 ms a transaction

NEW_COLUMNS = """
    tenant text,
    resource text,
    outcome text,
    source text,
    source_ip inet,
    trace_id text,
    metadata jsonb,
    nonce bytea,
    personal_hash bytea,
    redacted_at timestamptz
"""

CHECKS = {
    "audit_events_outcome_is_known": "outcome IN ('success', 'failure', 'denied', 'unknown')",
    "audit_events_trace_id_is_32_hex_digits": "trace_id ~ '^[0-9a-f]{32}$'",
    "audit_events_metadata_is_an_object": "jsonb_typeof(metadata) = 'object'",
    "audit_events_nonce_has_16_bytes": "octet_length(nonce) = 16",
    "audit_events_personal_hash_has_32_bytes": "octet_length(personal_hash) = 32",
}

INDEXES = {
    "actor_timestamp_id": "(actor, {timestamp} DESC, {id} DESC)",
    "event_type_timestamp_id": "(event_type, {timestamp} DESC, {id} DESC)",
    "timestamp_id": "({timestamp} DESC, {id} DESC)",
    "metadata": "USING gin (metadata jsonb_path_ops)",
}


def upgrade() -> None:
    with op.get_context().autocommit_block():
        _refuse_rows_that_cannot_be_carried()
        _add_columns()
        _fill_columns()
        _build_indexes()
        _validate_constraints()
    _swap()
    _create_months()


def _scalar(statement: str) -> object:
    return op.get_bind().scalar(sa.text(statement))


def _refuse_rows_that_cannot_be_carried() -> None:
    """Stop before anything changes, with the number of offending rows and the statement that mends them."""
    refusals = [
        (
            f"{column} IS NULL",
            f"rows have no {column}",
            f"UPDATE audit_events SET {column} = '{value}' WHERE {column} IS NULL",
        )
        for column, value in (("event_type", "unknown"), ("actor", "unknown"), ("timestamp", "1970-01-01 00:00"))
    ]
    refusals += [
        (
            "id IS NULL",
            "rows have no id",
            "UPDATE audit_events SET id = (SELECT max(id) FROM audit_events) + n FROM (SELECT ctid AS c,"
            " row_number() OVER () AS n FROM audit_events WHERE id IS NULL) AS numbered WHERE ctid = c",
        ),
        (
            "NOT timestamp BETWEEN '0001-01-01' AND '9999-12-31 23:59:59.999999'",
            "rows have a timestamp outside the years 1 to 9999",
            "UPDATE audit_events SET timestamp = '1970-01-01 00:00'"
            " WHERE NOT timestamp BETWEEN '0001-01-01' AND '9999-12-31 23:59:59.999999'",
        ),
        (
            "id IN (SELECT id FROM audit_events GROUP BY id HAVING count(*) > 1)",
            "rows share their id with another row",
            "SELECT * FROM audit_events WHERE id IN"
            " (SELECT id FROM audit_events GROUP BY id HAVING count(*) > 1) ORDER BY id",
        ),
    ]
    for condition, complaint, remedy in refusals:
        if count := _scalar(f"SELECT count(*) FROM audit_events WHERE {condition}"):
            raise RuntimeError(
                f"{count} {complaint}, and the migration must not decide for you. Nothing was changed.\n"
                f"Mend them, for example with: {remedy}"
            )


def _add_columns() -> None:
    """Catalog changes only: no row is rewritten for a column that is null or has a constant default."""
    adopted_at = _scalar("SELECT date_trunc('milliseconds', clock_timestamp())::text")
    op.execute("ALTER TABLE audit_events ALTER COLUMN event_type TYPE text, ALTER COLUMN actor TYPE text")
    op.execute(
        f"ALTER TABLE audit_events ADD COLUMN IF NOT EXISTS recorded_at timestamptz DEFAULT '{adopted_at}' NOT NULL"
    )
    op.execute("ALTER TABLE audit_events ADD COLUMN IF NOT EXISTS new_id bigint")
    op.execute("ALTER TABLE audit_events ADD COLUMN IF NOT EXISTS new_timestamp timestamptz")
    for column in NEW_COLUMNS.split(","):
        op.execute(f"ALTER TABLE audit_events ADD COLUMN IF NOT EXISTS {column.strip()}")
    op.execute(
        """
        CREATE OR REPLACE FUNCTION audit_events_fill() RETURNS trigger LANGUAGE plpgsql
        SET timezone = 'UTC' AS $$
        BEGIN
            NEW.new_id := NEW.id;
            NEW.new_timestamp := NEW.timestamp::timestamptz;
            RETURN NEW;
        END $$
        """
    )
    op.execute(
        "CREATE OR REPLACE TRIGGER audit_events_fill BEFORE INSERT OR UPDATE ON audit_events"
        " FOR EACH ROW EXECUTE FUNCTION audit_events_fill()"
    )


def _fill_columns() -> None:
    """Walk the table in blocks. Rows written after the trigger was made need nothing, so the end stays put."""
    blocks = _scalar("SELECT pg_relation_size('audit_events') / current_setting('block_size')::int")
    assert isinstance(blocks, int)  # noqa: S101 - for mypy; the statement returns bigint
    fill = sa.text(
        "UPDATE audit_events SET new_id = id, new_timestamp = timestamp::timestamptz"
        " WHERE ctid >= CAST(:first AS tid) AND ctid < CAST(:end AS tid) AND new_id IS NULL"
    )
    for block in range(0, blocks, BLOCKS_A_BATCH):
        op.get_bind().execute(fill, {"first": f"({block},0)", "end": f"({block + BLOCKS_A_BATCH},0)"})
        if block % (BLOCKS_A_BATCH * 100) == 0 and block:
            print(f"0003: {100 * block // blocks} % of the rows carried over", file=sys.stderr)
    op.execute("VACUUM (ANALYZE) audit_events")


def _build_indexes() -> None:
    """Those of the partitioned table, and the unique one that becomes the primary key."""
    # Building concurrently waits for older transactions, and nobody queues behind it meanwhile.
    op.execute("SET lock_timeout = 0")
    _build_index("UNIQUE INDEX", "pkey", "(new_id, recorded_at)")
    for name, definition in INDEXES.items():
        _build_index("INDEX", name, definition.format(timestamp="new_timestamp", id="new_id"))
    op.execute("SET lock_timeout = '5s'")


def _build_index(kind: str, name: str, definition: str) -> None:
    index = f"audit_events_adopted_{name}"
    # An interrupted build leaves an invalid index, which IF NOT EXISTS would take for done.
    if _scalar(f"SELECT 1 FROM pg_index WHERE indexrelid = to_regclass('{index}') AND NOT indisvalid"):
        op.execute(f"DROP INDEX CONCURRENTLY {index}")
    op.execute(f"CREATE {kind} CONCURRENTLY IF NOT EXISTS {index} ON audit_events {definition}")


def _validate_constraints() -> None:
    """Add each constraint unchecked, then check it without blocking anybody."""
    bound = _adoption_bound()
    not_null = {f"audit_events_{c}_not_null": f"{c} IS NOT NULL" for c in _columns_that_become_not_null()}
    for name, condition in {**CHECKS, **not_null, "audit_events_adopted_bound": f"recorded_at < '{bound}'"}.items():
        op.execute(f"ALTER TABLE audit_events DROP CONSTRAINT IF EXISTS {name}")
        op.execute(f"ALTER TABLE audit_events ADD CONSTRAINT {name} CHECK ({condition}) NOT VALID")
        op.execute(f"ALTER TABLE audit_events VALIDATE CONSTRAINT {name}")
    for name, column in zip(not_null, _columns_that_become_not_null(), strict=True):
        # The validated constraint spares SET NOT NULL its scan under an exclusive lock.
        op.execute(f"ALTER TABLE audit_events ALTER COLUMN {column} SET NOT NULL")
        op.execute(f"ALTER TABLE audit_events DROP CONSTRAINT {name}")


def _columns_that_become_not_null() -> tuple[str, ...]:
    return ("new_id", "event_type", "actor", "new_timestamp")


def _adoption_bound() -> object:
    """One microsecond past the moment of adoption, which the default of recorded_at remembers."""
    expression = _scalar(
        "SELECT pg_get_expr(adbin, adrelid) FROM pg_attrdef JOIN pg_attribute"
        " ON attrelid = adrelid AND attnum = adnum"
        " WHERE adrelid = 'audit_events'::regclass AND attname = 'recorded_at'"
    )
    return _scalar(f"SELECT (({expression}) + interval '1 microsecond')::text")


def _swap() -> None:
    """The prepared table becomes the first partition of the new one. Catalog changes only."""
    bound = _adoption_bound()
    op.execute("LOCK TABLE audit_events IN ACCESS EXCLUSIVE MODE")
    op.execute("DROP TRIGGER audit_events_fill ON audit_events")
    op.execute("DROP FUNCTION audit_events_fill()")
    op.execute("ALTER TABLE audit_events DROP COLUMN id, DROP COLUMN timestamp")
    op.execute("DROP INDEX ix_audit_events_event_type, ix_audit_events_actor")
    op.execute("ALTER TABLE audit_events RENAME COLUMN new_id TO id")
    op.execute("ALTER TABLE audit_events RENAME COLUMN new_timestamp TO timestamp")
    op.execute("ALTER TABLE audit_events ALTER COLUMN recorded_at DROP DEFAULT")
    op.execute(
        "ALTER TABLE audit_events ADD CONSTRAINT audit_events_adopted_pkey"
        " PRIMARY KEY USING INDEX audit_events_adopted_pkey"
    )
    op.execute("ALTER TABLE audit_events RENAME TO audit_events_adopted")
    _create_partitioned_table()
    op.execute(
        f"ALTER TABLE audit_events ATTACH PARTITION audit_events_adopted FOR VALUES FROM (MINVALUE) TO ('{bound}')"
    )
    op.execute("ALTER TABLE audit_events_adopted DROP CONSTRAINT audit_events_adopted_bound")


def _create_partitioned_table() -> None:
    checks = ", ".join(f"CONSTRAINT {name} CHECK ({condition})" for name, condition in CHECKS.items())
    op.execute(
        f"""
        CREATE TABLE audit_events (
            id bigint NOT NULL,
            event_type text NOT NULL,
            actor text NOT NULL,
            timestamp timestamptz NOT NULL,
            recorded_at timestamptz NOT NULL,
            {NEW_COLUMNS},
            CONSTRAINT audit_events_pkey PRIMARY KEY (id, recorded_at),
            {checks}
        ) PARTITION BY RANGE (recorded_at)
        """
    )
    for name, definition in INDEXES.items():
        op.execute(
            f"CREATE INDEX audit_events_{name} ON audit_events {definition.format(timestamp='timestamp', id='id')}"
        )


def _create_months() -> None:
    """From the moment of adoption to three months from now."""
    months = sa.text(
        "SELECT to_char(month, 'YYYY_MM'), greatest(month, CAST(:bound AS timestamptz))::text,"
        " (month + interval '1 month')::text"
        " FROM generate_series(date_trunc('month', CAST(:bound AS timestamptz)),"
        " now() + interval '3 months', interval '1 month') AS month"
    )
    for name, start, end in op.get_bind().execute(months, {"bound": _partition_bound()}).all():
        op.execute(
            f"CREATE TABLE audit_events_{name} PARTITION OF audit_events FOR VALUES FROM ('{start}') TO ('{end}')"
        )


def _partition_bound() -> object:
    """The upper bound of the adopted partition."""
    return _scalar(
        "SELECT substring(pg_get_expr(relpartbound, oid) FROM $$TO \\('([^']+)'\\)$$)"
        " FROM pg_class WHERE oid = 'audit_events_adopted'::regclass"
    )


def downgrade() -> None:
    """Back to the four columns. What they cannot hold moves to audit_events_0003_columns, which stays."""
    op.execute("LOCK TABLE audit_events IN ACCESS EXCLUSIVE MODE")
    if _scalar("SELECT 1 FROM audit_events WHERE id > 2147483647 LIMIT 1"):
        raise RuntimeError("audit_events holds ids beyond integer, which the older table cannot hold")
    op.execute("CREATE TABLE IF NOT EXISTS audit_events_0003_columns (LIKE audit_events)")
    op.execute(
        "INSERT INTO audit_events_0003_columns SELECT * FROM audit_events WHERE num_nonnulls(tenant, resource,"
        " outcome, source, source_ip, trace_id, metadata, nonce, personal_hash, redacted_at) > 0"
    )
    op.execute(
        "CREATE TABLE audit_events_0002 (id integer NOT NULL, event_type varchar NOT NULL,"
        " actor varchar NOT NULL, timestamp timestamp NOT NULL)"
    )
    op.execute(
        "INSERT INTO audit_events_0002 SELECT id, event_type, actor, timestamp AT TIME ZONE 'UTC' FROM audit_events"
    )
    op.execute("DROP TABLE audit_events")
    op.execute("ALTER TABLE audit_events_0002 RENAME TO audit_events")
    op.execute("ALTER TABLE audit_events ADD CONSTRAINT audit_events_pkey PRIMARY KEY (id)")
    op.execute("CREATE SEQUENCE audit_events_id_seq AS integer OWNED BY audit_events.id")
    op.execute("SELECT setval('audit_events_id_seq', coalesce(max(id), 0) + 1, false) FROM audit_events")
    op.execute("ALTER TABLE audit_events ALTER COLUMN id SET DEFAULT nextval('audit_events_id_seq')")
    for column in ("event_type", "actor", "timestamp"):
        op.execute(f"CREATE INDEX ix_audit_events_{column} ON audit_events ({column})")
