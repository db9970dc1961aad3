"""The flush as one statement: append_events() locks the head, stores the events and grows the tree.

Nobody holds the head's lock while a client thinks, is frozen or has gone: the lock lives inside one statement.
See docs/decisions/0002-one-statement-a-flush.md.
"""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

# RFC 8785 canonical JSON of an event's entry: names in order, null members left out. to_json() escapes a string
# as the RFC does; the five other members hold nothing that needs it.
AUDIT_ENTRY = """
CREATE FUNCTION audit_entry(
    id bigint, event_type text, "timestamp" text, recorded_at text, tenant text, outcome text, source text,
    trace_id text, personal_hash text
) RETURNS bytea LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT convert_to(
        '{"event_type":' || to_json(event_type)::text
        || ',"id":' || id
        || coalesce(',"outcome":"' || outcome || '"', '')
        || ',"personal_hash":"' || personal_hash
        || '","recorded_at":"' || recorded_at || '"'
        || coalesce(',"source":' || to_json(source)::text, '')
        || coalesce(',"tenant":' || to_json(tenant)::text, '')
        || ',"timestamp":"' || "timestamp" || '"'
        || coalesce(',"trace_id":"' || trace_id || '"', '')
        || '}',
        'UTF8'
    )
$$
"""

# RFC 3339 in UTC, with six fractional digits and Z.
AUDIT_MOMENT = """
CREATE FUNCTION audit_moment(moment timestamptz) RETURNS text LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT to_char(moment AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')
$$
"""

# events: a JSON array of the events of several submissions, one after the other; each submission is stored whole
# or not at all. starts: the position (from 1) at which each submission begins; NULL where no event has a key.
# retried_from: NULL, or where this flush was sent before and its outcome is unknown, an id that it cannot have
# reached below: events that it did store are found by their personal hash, which is random.
#
# ids: of each event, in order; NULL where its submission was refused. replayed: positions of events whose key was
# known. conflicting: positions of events whose key was known with another event.
APPEND_EVENTS = """
CREATE FUNCTION append_events(
    events json, starts integer[], retried_from bigint,
    OUT recorded_at timestamptz, OUT next_id bigint, OUT ids bigint[], OUT replayed integer[],
    OUT conflicting integer[]
) LANGUAGE plpgsql AS $$
DECLARE
    head ledger_head;
    moment text;
    leaves bytea[];
    found_hashes text[];
    found_ids bigint[];
BEGIN
    SELECT * INTO head FROM ledger_head FOR UPDATE;
    IF NOT FOUND THEN
        RAISE 'ledger_head is empty: restore it from a backup; it must not be made anew by hand';
    END IF;
    -- From here to the commit nobody else appends.
    recorded_at := greatest(clock_timestamp(), head.recorded_at);
    IF retried_from IS NOT NULL THEN
        SELECT
            array_agg(encode(e.personal_hash, 'hex')), array_agg(e.id),
            coalesce(max(e.recorded_at), append_events.recorded_at)
        INTO found_hashes, found_ids, recorded_at
        FROM audit_events AS e
        WHERE e.id >= retried_from AND e.personal_hash IN (
            SELECT decode(sent ->> 'personal_hash', 'hex') FROM json_array_elements(events) AS sent
        );
    END IF;
    moment := audit_moment(recorded_at);
    WITH event AS MATERIALIZED (
        SELECT sent.*, sent.ordinality::integer AS position
        FROM ROWS FROM (
            json_to_recordset(events) AS (
                event_type text, actor text, "timestamp" text, tenant text, resource text, outcome text,
                source text, source_ip inet, trace_id text, metadata jsonb, nonce text, personal_hash text,
                idempotency_key text, request_hash text
            )
        ) WITH ORDINALITY AS sent
    ), known AS MATERIALIZED (
        SELECT event.position, found.id, NULL::boolean AS is_other
        FROM event JOIN unnest(found_hashes, found_ids) AS found (personal_hash, id) USING (personal_hash)
        UNION ALL
        SELECT event.position, key.event_id, key.request_hash <> decode(event.request_hash, 'hex')
        FROM event, LATERAL (
            SELECT k.event_id, k.request_hash FROM idempotency_keys AS k
            WHERE k.tenant = coalesce(event.tenant, '') AND k.key = event.idempotency_key LIMIT 1
        ) AS key
        WHERE event.idempotency_key IS NOT NULL AND event.personal_hash <> ALL (coalesce(found_hashes, '{}'))
    ), refused AS MATERIALIZED (
        SELECT DISTINCT width_bucket(position, starts) AS submission FROM known WHERE is_other
    ), fresh AS MATERIALIZED (
        SELECT event.*, head.first_id + head.size - 1 + row_number() OVER (ORDER BY position) AS id
        FROM event
        WHERE position NOT IN (SELECT known.position FROM known)
        AND (starts IS NULL OR width_bucket(position, starts) NOT IN (SELECT submission FROM refused))
    ), stored AS (
        INSERT INTO audit_events (
            id, recorded_at, event_type, actor, timestamp, tenant, resource, outcome, source, source_ip, trace_id,
            metadata, nonce, personal_hash
        )
        SELECT
            id, append_events.recorded_at, event_type, actor, timestamp::timestamptz, tenant, resource, outcome,
            source, source_ip, trace_id, metadata, decode(nonce, 'hex'), decode(personal_hash, 'hex')
        FROM fresh
    ), stored_keys AS (
        INSERT INTO idempotency_keys (tenant, key, event_id, request_hash, recorded_at)
        SELECT
            coalesce(tenant, ''), idempotency_key, id, decode(request_hash, 'hex'), append_events.recorded_at
        FROM fresh WHERE idempotency_key IS NOT NULL
    )
    SELECT
        array_agg(
            sha256(
                '\\x00' || audit_entry(
                    id, event_type, timestamp, moment, tenant, outcome, source, trace_id, personal_hash
                )
            ) ORDER BY id
        ),
        (
            SELECT array_agg(coalesce(fresh.id, known.id) ORDER BY event.position)
            FROM event LEFT JOIN fresh USING (position)
            LEFT JOIN known ON known.position = event.position
                AND width_bucket(event.position, starts) NOT IN (SELECT submission FROM refused)
        ),
        (SELECT coalesce(array_agg(position), '{}') FROM known WHERE NOT is_other),
        (SELECT coalesce(array_agg(position), '{}') FROM known WHERE is_other)
    INTO leaves, ids, replayed, conflicting
    FROM fresh;
    next_id := head.first_id + head.size + coalesce(cardinality(leaves), 0);
    IF leaves IS NOT NULL THEN
        PERFORM grow_ledger(head, leaves, recorded_at);
    END IF;
END
$$
"""

# The tree's right edge after these leaves, and the tiles that they fill (RFC 6962 section 2.1; c2sp.org/tlog-tiles).
GROW_LEDGER = """
CREATE FUNCTION grow_ledger(head ledger_head, leaves bytea[], moment timestamptz)
RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    edge bytea[] := head.frontier;
    depth integer := cardinality(head.frontier);
    grown bigint := head.size;
    height integer;
    node bytea;
BEGIN
    FOREACH node IN ARRAY leaves LOOP
        grown := grown + 1;
        height := 0;
        WHILE grown >> height & 1 = 0 LOOP
            node := sha256('\\x01' || edge[depth] || node);
            depth := depth - 1;
            height := height + 1;
            IF height = 8 THEN
                PERFORM store_leaf_tile(head, leaves, (grown >> 8) - 1, node);
            ELSIF height & 7 = 0 THEN
                INSERT INTO ledger_tiles (level, tile_index, hashes, root)
                SELECT height / 8 - 1, (grown >> height) - 1, string_agg(below.root, '' ORDER BY tile_index), node
                FROM ledger_tiles AS below
                WHERE below.level = height / 8 - 2
                AND below.tile_index >= ((grown >> height) - 1) << 8 AND below.tile_index < (grown >> height) << 8;
            END IF;
        END LOOP;
        depth := depth + 1;
        edge[depth] := node;
    END LOOP;
    UPDATE ledger_head SET size = grown, frontier = edge[1:depth], recorded_at = moment;
END
$$
"""

# A full tile of leaves: those of earlier flushes are computed from their rows again.
STORE_LEAF_TILE = """
CREATE FUNCTION store_leaf_tile(head ledger_head, leaves bytea[], number bigint, tile_root bytea)
RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO ledger_tiles (level, tile_index, hashes, root)
    SELECT 0, number, string_agg(hash, '' ORDER BY position), tile_root
    FROM (
        SELECT id - head.first_id AS position, audit_leaf(audit_events) AS hash
        FROM audit_events WHERE id >= head.first_id + number * 256 AND id < head.first_id + head.size
        UNION ALL
        SELECT head.size + ordinality - 1, hash
        FROM unnest(leaves) WITH ORDINALITY AS fresh (hash, ordinality)
        WHERE head.size + ordinality > number * 256 AND head.size + ordinality <= number * 256 + 256
    ) AS leaf;
END
$$
"""

AUDIT_LEAF = """
CREATE FUNCTION audit_leaf(event audit_events) RETURNS bytea LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT sha256('\\x00' || audit_entry(
        event.id, event.event_type, audit_moment(event.timestamp), audit_moment(event.recorded_at), event.tenant,
        event.outcome, event.source, event.trace_id, encode(event.personal_hash, 'hex')
    ))
$$
"""

# Root of 2^n hashes side by side: for the tiles that are there already.
TILE_ROOT = """
CREATE FUNCTION pg_temp.tile_root(hashes bytea) RETURNS bytea LANGUAGE plpgsql AS $$
BEGIN
    WHILE octet_length(hashes) > 32 LOOP
        hashes := (
            SELECT string_agg(sha256('\\x01' || substr(hashes, 64 * n + 1, 64)), '' ORDER BY n)
            FROM generate_series(0, octet_length(hashes) / 64 - 1) AS n
        );
    END LOOP;
    RETURN hashes;
END
$$
"""


def upgrade() -> None:
    op.execute("ALTER TABLE ledger_tiles ADD COLUMN root bytea")
    op.get_bind().exec_driver_sql(TILE_ROOT)
    op.execute("UPDATE ledger_tiles SET root = pg_temp.tile_root(hashes)")
    op.execute(
        "ALTER TABLE ledger_tiles ALTER COLUMN root SET NOT NULL,"
        " ADD CONSTRAINT ledger_tiles_root_has_32_bytes CHECK (octet_length(root) = 32)"
    )
    for function in (AUDIT_ENTRY, AUDIT_MOMENT, AUDIT_LEAF, STORE_LEAF_TILE, GROW_LEDGER, APPEND_EVENTS):
        op.get_bind().exec_driver_sql(function)  # op.execute() would take HH24:MI for a parameter


def downgrade() -> None:
    for name in ("append_events", "grow_ledger", "store_leaf_tile", "audit_leaf", "audit_moment", "audit_entry"):
        op.execute(f"DROP FUNCTION {name}")
    op.execute("ALTER TABLE ledger_tiles DROP COLUMN root")
