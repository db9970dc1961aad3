"""Reads: read-only, one statement each but for scans, on connections that no write waits for.

There are three kinds, each with a pool of its own, so that the slow ones leave the pages alone.

A walk reads an index in its order and stops when it has enough. It is prepared, once a connection, and planned
without its values and without sorts and bitmaps: which plan it has never depends on statistics (seals.py tells how
it leaves partitions out all the same).
A search is planned for its values, so that PostgreSQL weighs its indexes and leaves sealed partitions out.
A scan is a search whose rows are fetched bit by bit, in a transaction: for exports and streams, a few at a time.

Keys bound to a tenant read on connections of their own, under a role to which PostgreSQL shows the events of those
tenants only that a setting names. It is set in the transaction of each statement and ends with it: where it is
forgotten, nothing is seen. A role of their own, for a connection that changes its role plans everything anew.
"""

import copy
import itertools
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import psycopg2
from anyio import CapacityLimiter, to_thread
from sqlalchemy import Connection, CursorResult, Engine, Executable, Row, create_engine, event
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import URL
from sqlalchemy.engine.interfaces import IsolationLevel
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from db import CONNECT_ARGS, Database, problem_of
from problems import DatabaseUnavailable, InternalError, InvalidFields, Problem, QueryTimeout
from queries.seals import SEALS, Seal, sealed_months

DIALECT = postgresql.psycopg2.dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy's
SEALS_MAX_AGE_S = 60.0
MAX_PREPARED = 50  # statements a connection; 26 partitions make a plan of about 200 kB

# With those of db.py few enough that two workers fit into PostgreSQL's 100: docs/queries.md has the sum.
_POOL_SIZE = 6
_BOUND_POOL_SIZE = 3
TENANT_ROLE = "audit_tenant_reader"  # alembic/versions/0008_keys_and_tenants.py makes it
_SET_TENANTS = "SELECT set_config('audit.tenants', %(audit_tenants)s::text[]::text, true)"
_SCANS = 4  # at the same time; others wait their turn
# jit: compiling a plan over many partitions takes longer than running it.
_READ_OPTIONS = "-c default_transaction_read_only=on -c jit=off"
WALK_OPTIONS = "-c plan_cache_mode=force_generic_plan" + "".join(
    f" -c enable_{node}=off" for node in ("seqscan", "bitmapscan", "sort", "incremental_sort")
)
_QUERY_CANCELED, _INVALID_PARAMETER_VALUE = "57014", "22023"
Result = TypeVar("Result")
_numbers = itertools.count(1)
_PARAMETER = re.compile(r"%\((\w+)\)s|%%")


class _Pools:
    """Connections for each kind of read, opened as they are needed."""

    def __init__(self, url: URL, query_timeout: timedelta, size: int, options: str) -> None:
        self.searches = _create_engine(url, query_timeout, size, options)
        self.walks = _create_engine(url, query_timeout, size, f"{WALK_OPTIONS} {options}")
        self.scans = _create_engine(url, query_timeout, _SCANS, options, isolation_level="READ COMMITTED")
        event.listen(self.walks, "before_cursor_execute", _execute_prepared, retval=True)

    def close(self) -> None:
        for engine in (self.walks, self.searches, self.scans):
            engine.dispose()


class Reader:
    """Answers single statements from one database, the writes' own or a replica of it."""

    def __init__(self, database: Database, url: URL, query_timeout: timedelta) -> None:
        self._database = database
        self._seals: Sequence[Seal] = []
        self._seals_expire_at = 0.0
        self._pools = _Pools(url, query_timeout, _POOL_SIZE, "")
        self._bound_pools = _Pools(url, query_timeout, _BOUND_POOL_SIZE, f"-c role={TENANT_ROLE}")
        for engine in (self._bound_pools.walks, self._bound_pools.searches):
            event.listen(engine, "before_cursor_execute", _execute_for_tenants, retval=True)
        self._scan_threads = CapacityLimiter(_SCANS)
        self._tenants: Sequence[str] | None = None
        self._unbound = self

    def seen_by(self, *tenants: str | None) -> "Reader":
        """The reader for a caller who is bound to these tenants; of None this one, which sees everything."""
        if None in tenants:
            return self._unbound
        bound = copy.copy(self._unbound)
        bound._tenants = [tenant for tenant in tenants if tenant is not None]
        bound._pools = self._bound_pools
        return bound

    def walk(self, sql: str, values: Mapping[str, Any]) -> Sequence[Row[Any]]:
        """Rows by an ordered index; raises DatabaseUnavailable, SchemaNotReady or QueryTimeout."""
        return self._ask(self._pools.walks, lambda walks: walks.exec_driver_sql(sql, values))

    def search(self, statement: Executable) -> Sequence[Row[Any]]:
        """Rows by whatever plan suits the values; raises what walk() raises."""
        return self._ask(self._pools.searches, lambda searches: searches.execute(statement))

    async def scan(self, work: Callable[[Connection], Result]) -> Result:
        """Call work in a transaction of its own, in a thread that waits for no other kind of read.

        Raises what walk() raises.
        """
        return await to_thread.run_sync(self._scan, work, limiter=self._scan_threads)

    def _scan(self, work: Callable[[Connection], Result]) -> Result:
        self._database.require_schema()
        with _translated_errors(), self._pools.scans.connect() as connection:
            if self._tenants is not None:
                connection.exec_driver_sql(_SET_TENANTS, {"audit_tenants": self._tenants})
            return work(connection)

    def seals(self) -> Sequence[Seal]:
        """The seals of finished months, as they were in the last minute; raises what walk() raises."""
        if self._unbound is not self:
            return self._unbound.seals()
        now = time.monotonic()
        if now >= self._seals_expire_at:
            self._seals = sealed_months(self.search(SEALS))
            self._seals_expire_at = now + SEALS_MAX_AGE_S
        return self._seals

    def _ask(self, engine: Engine, execute: Callable[[Connection], CursorResult[Any]]) -> Sequence[Row[Any]]:
        self._database.require_schema()
        with _translated_errors():
            try:
                return self._fetch(engine, execute)
            except DBAPIError as error:
                if not error.connection_invalidated:
                    raise
            # The database was restarted since: SQLAlchemy has emptied the pool, and a read may be asked twice.
            return self._fetch(engine, execute)

    def _fetch(self, engine: Engine, execute: Callable[[Connection], CursorResult[Any]]) -> Sequence[Row[Any]]:
        with engine.connect() as connection:
            if self._tenants is not None:
                connection.execution_options(tenants=self._tenants)
            return execute(connection).all()

    def close(self) -> None:
        self._pools.close()
        self._bound_pools.close()


def _create_engine(
    url: URL, query_timeout: timedelta, size: int, options: str, isolation_level: IsolationLevel = "AUTOCOMMIT"
) -> Engine:
    timeout_ms = int(query_timeout.total_seconds() * 1000)
    options = f"{CONNECT_ARGS['options']} -c statement_timeout={timeout_ms} {_READ_OPTIONS} {options}"
    return create_engine(
        url,
        isolation_level=isolation_level,
        pool_size=size,
        max_overflow=0,
        pool_timeout=5,
        pool_pre_ping=isolation_level != "AUTOCOMMIT",  # else _ask() finds out and asks again
        pool_reset_on_return=None if isolation_level == "AUTOCOMMIT" else "rollback",
        connect_args={**CONNECT_ARGS, "options": options},
    )


@contextmanager
def _translated_errors() -> Iterator[None]:
    try:
        yield
    except PoolTimeout:
        raise DatabaseUnavailable("Every connection for reads is in use. Try again.") from None
    except DBAPIError as error:
        # `from None`: the driver's exception quotes statement and parameters.
        if not isinstance(error.orig, psycopg2.Error):
            raise InternalError() from None
        raise _problem_of(error.orig) from None


def _problem_of(error: psycopg2.Error) -> Problem:
    if error.pgcode == _QUERY_CANCELED:
        return QueryTimeout()
    if error.pgcode == _INVALID_PARAMETER_VALUE:  # a time zone that Python knows and this PostgreSQL does not
        return InvalidFields(error.diag.message_primary)
    return problem_of(error)


def _execute_prepared(
    connection: Any, cursor: Any, statement: str, parameters: Any, context: object, executemany: bool
) -> tuple[str, Any]:
    """SQLAlchemy's hook before each statement: PREPARE it where this connection has not yet, and EXECUTE it.

    The statements that were used last are kept, for a plan takes memory and filters make many statements.
    """
    known: dict[str, str] = connection.info.setdefault("prepared", {})
    name = known.pop(statement, None)
    names = list(dict.fromkeys(filter(None, _PARAMETER.findall(statement))))
    if name is None:
        if len(known) >= MAX_PREPARED:
            cursor.execute(f"DEALLOCATE {known.pop(next(iter(known)))}")
        name = f"walk_{next(_numbers)}"
        numbers = {parameter: f"${number}" for number, parameter in enumerate(names, 1)}
        cursor.execute(f"PREPARE {name} AS {_PARAMETER.sub(lambda m: numbers[m[1]] if m[1] else '%', statement)}")
    known[statement] = name
    values = ", ".join(f"%({parameter})s" for parameter in names)
    return f"EXECUTE {name} ({values})" if names else f"EXECUTE {name}", parameters


def _execute_for_tenants(
    connection: Connection, cursor: object, statement: str, parameters: Any, context: object, executemany: bool
) -> tuple[str, Any]:
    """SQLAlchemy's hook: say for whom this one statement reads.

    Sent together the two are one implicit transaction (PostgreSQL 15, section 55.2.2.1), and the setting is local to
    it: so it costs no round trip, and is gone before anybody else gets the connection, however the statement ends.
    """
    tenants = connection.get_execution_options().get("tenants", [])
    return f"{_SET_TENANTS}; {statement}", {**dict(parameters), "audit_tenants": tenants}
