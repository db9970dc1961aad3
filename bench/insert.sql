-- pgbench script: one row like those the service writes, in a transaction of its own. load.py fills in what starts with a dollar sign.
-- The values cost the client and the server next to nothing: constant arrays, and bytes of the numbers drawn.
\set actor random_zipfian(1, $actor_count, $exponent)
\set tenant 1 + (:actor - 1) % $tenant_count
\set event_type random_zipfian(1, $event_type_count, $exponent)
\set kind 1 + (:event_type - 1) % $kind_count
\set source 1 + (:event_type - 1) % $source_count
\set outcome random(1, $outcome_count)
\set number random(100000000, 999999999)
\set took_ms random(0, 999)
\set age_ms random(0, 3599999)
INSERT INTO audit_events (event_type, actor, timestamp, tenant, resource, outcome, source, source_ip, trace_id, metadata, nonce, personal_hash)
VALUES (
    ('$event_types'::text[])[:event_type],
    'user-' || :actor,
    now() - :age_ms * interval '1 ms',
    ('$tenants'::text[])[:tenant],
    ('$kinds'::text[])[:kind] || '/' || :number,
    ('$outcomes'::text[])[:outcome],
    ('$sources'::text[])[:source],
    NULL,
    NULL,
    ('{"request": "r' || :number || '", "region": "eu", "took_ms": ' || :took_ms || '}')::jsonb,
    int8send(:number) || int8send(:age_ms),
    int8send(:number) || int8send(:age_ms) || int8send(:actor) || int8send(:took_ms)
);
