\set rank random_zipfian(1, {actors}, {exponent})
\set tenant (:rank - 1) % {tenants}
\set type random_zipfian(1, {types}, {exponent})
\set kind 1 + (:type - 1) % {kinds}
\set source 1 + (:type - 1) % {sources}
\set outcome random(1, {outcomes})
\set number random(100000000, 999999999)
\set duration random(0, 999)
\set age random(0, 3599999)
INSERT INTO audit_events (id, event_type, actor, timestamp, recorded_at, tenant, resource, outcome, source, source_ip, trace_id, metadata, nonce, personal_hash) VALUES (nextval('bench_ids'), ('{type_names}'::text[])[:type], 'user-' || :rank, now() - :age * interval '1 ms', now(), ('{tenant_names}'::text[])[1 + :tenant], ('{kind_names}'::text[])[:kind] || '/' || :number, ('{outcome_names}'::text[])[:outcome], ('{source_names}'::text[])[:source], NULL, NULL, ('{{"request": "r' || :number || '", "region": "eu-1", "duration_ms": ' || :duration || '}}')::jsonb, int8send(:number) || int8send(:age), int8send(:number) || int8send(:age) || int8send(:rank) || int8send(:type));
