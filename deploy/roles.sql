-- The service's role, for psql 15 or newer, run by a superuser or a role with CREATEROLE. May be run again at any time.
-- Makes the role of the environment's DB_USER and DB_PASSWORD, and the one under which it reads for keys that are bound
-- to a tenant; what it may do, `alembic upgrade head` says.
\set ON_ERROR_STOP on
\getenv service_role DB_USER
\getenv service_password DB_PASSWORD
SELECT :'service_role' = current_user AS is_owner \gset
\if :is_owner
\warn 'DB_USER and DB_OWNER_USER are one: the service can change and delete events. See docs/security.md.'
\else
SELECT 'CREATE ROLE audit_tenant_reader NOLOGIN'
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'audit_tenant_reader') \gexec
SELECT format('CREATE ROLE %I', :'service_role')
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = :'service_role') \gexec
SELECT format('ALTER ROLE %I LOGIN NOCREATEDB NOCREATEROLE PASSWORD %L', :'service_role', :'service_password') \gexec
SELECT format('GRANT audit_tenant_reader TO %I', :'service_role')
WHERE NOT pg_has_role(:'service_role', 'audit_tenant_reader', 'MEMBER') \gexec
\endif
