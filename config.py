"""Settings, read from the environment and from .env: the only place that does.

A variable in the environment wins over the same one in .env; an empty one counts as not set.
A wrong value stops the start with the variable's name, and never with its value.
"""

import ipaddress
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Literal, cast, get_args

from dotenv import dotenv_values
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

ROOT = Path(__file__).resolve().parent

Environment = Literal["production", "development"]
LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]

# The values that .env.example and countless tutorials carry. Everybody knows them.
PLACEHOLDERS = frozenset(
    {
        *("change-me", "changeme", "change-me-too", "change-me-as-well", "your-api-key", "your_api_key"),
        "PRIVATE+KEY+audit.example/log+406856bf+AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
    }
)


class ConfigurationError(Exception):
    """A setting is missing or wrong. The message names the variable and says what to do."""


@dataclass(frozen=True)
class Rate:
    """So many in so many seconds."""

    count: int
    seconds: int


@dataclass(frozen=True)
class Settings:
    """What an operator can choose. Secrets are left out of the repr."""

    environment: Environment = "production"
    database_url: URL | None = field(default=None, repr=False)  # None: the embedded server
    database_owner_url: URL | None = field(default=None, repr=False)  # None: the same role as database_url's
    database_read_url: URL | None = field(default=None, repr=False)  # None: reads go to the same database
    api_key: str | None = field(default=None, repr=False)
    data_dir: Path = ROOT / ".data"
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    run_migrations: bool = False
    max_clock_skew: timedelta = timedelta(minutes=5)
    idempotency_window: timedelta = timedelta(days=30)
    query_timeout: timedelta = timedelta(seconds=10)
    count_limit: int = 1_000_000
    retention: timedelta | None = None  # None: keep for ever
    audit_reads: bool = False
    ledger_origin: str | None = None  # None: the name of the signing key
    ledger_signing_key: str | None = field(default=None, repr=False)
    checkpoint_sink: str | None = field(default=None, repr=False)  # a file, or a URL that may hold a password
    checkpoint_interval: timedelta = timedelta(seconds=10)
    rate_limit: Rate | None = None  # requests a key, in each process
    max_streams_per_key: int = 10_000  # in each worker: as many as that serves
    trusted_proxies: tuple[str, ...] = ()  # whose X-Forwarded-For and -Proto are believed
    tls_cert_file: str | None = None
    tls_key_file: str | None = None
    log_level: LogLevel = "INFO"
    log_writes: bool = False

    @property
    def in_development(self) -> bool:
        return self.environment == "development"


def load_settings(environ: Mapping[str, str] | None = None, env_file: Path | None = ROOT / ".env") -> Settings:
    """Read every setting once; raise ConfigurationError at the first wrong one."""
    values: dict[str, str | None] = dict(dotenv_values(env_file)) if env_file else {}
    values.update(os.environ if environ is None else environ)
    read = _Reader(values)

    environment = read.choice("ENVIRONMENT", Settings.environment, get_args(Environment))
    settings = Settings(
        environment=cast(Environment, environment),
        database_url=_read_database_url(read),
        database_owner_url=_read_owner_url(read),
        database_read_url=_parse_url("DATABASE_READ_URL", read.text("DATABASE_READ_URL")),
        api_key=_read_api_key(read),
        data_dir=Path(read.text("DATA_DIR") or Settings.data_dir).absolute(),
        host=read.text("HOST") or Settings.host,
        port=read.port("PORT", Settings.port),
        workers=read.count("WORKERS", Settings.workers),
        run_migrations=read.boolean("RUN_MIGRATIONS"),
        max_clock_skew=read.duration("MAX_CLOCK_SKEW", Settings.max_clock_skew, may_be_zero=True),
        idempotency_window=read.duration("IDEMPOTENCY_WINDOW", Settings.idempotency_window),
        query_timeout=read.duration("QUERY_TIMEOUT", Settings.query_timeout),
        count_limit=read.count("COUNT_LIMIT", Settings.count_limit, highest=10**9),
        retention=read.days("RETENTION_DAYS"),
        audit_reads=read.boolean("AUDIT_READS"),
        ledger_origin=read.text("LEDGER_ORIGIN"),
        ledger_signing_key=_read_signing_key(read),
        checkpoint_sink=read.text("CHECKPOINT_SINK"),
        checkpoint_interval=read.duration("CHECKPOINT_INTERVAL", Settings.checkpoint_interval),
        rate_limit=read.rate("RATE_LIMIT"),
        max_streams_per_key=read.count("MAX_STREAMS_PER_KEY", Settings.max_streams_per_key, highest=10_000),
        trusted_proxies=read.networks("TRUSTED_PROXIES"),
        tls_cert_file=read.file("TLS_CERT_FILE"),
        tls_key_file=read.file("TLS_KEY_FILE"),
        log_level=cast(LogLevel, read.choice("LOG_LEVEL", Settings.log_level, get_args(LogLevel))),
        log_writes=read.boolean("LOG_WRITES"),
    )
    if settings.database_owner_url is not None and settings.database_url is None:
        raise ConfigurationError("DATABASE_OWNER_URL: set, and DATABASE_URL, under which the service works, is not")
    if (settings.tls_cert_file is None) != (settings.tls_key_file is None):
        raise ConfigurationError("TLS_CERT_FILE: needs TLS_KEY_FILE beside it, and the other way round")
    if not settings.in_development:
        _refuse_placeholders(settings)
    return settings


def _read_database_url(read: "_Reader") -> URL | None:
    """DATABASE_URL wins; else the DB_ parts, which DB_HOST switches on; else None."""
    if url := _parse_url("DATABASE_URL", read.text("DATABASE_URL")):
        return url
    if host := read.text("DB_HOST"):
        return URL.create(
            "postgresql+psycopg2",
            username=read.text("DB_USER") or "audit",
            password=read.text("DB_PASSWORD"),
            host=host,
            port=read.port("DB_PORT", 5432),
            database=read.text("DB_NAME") or "audit",
        )
    return None


def _read_owner_url(read: "_Reader") -> URL | None:
    """DATABASE_OWNER_URL wins; else, with DB_OWNER_USER, the DB_ parts with that user; else None."""
    if url := _parse_url("DATABASE_OWNER_URL", read.text("DATABASE_OWNER_URL")):
        return url
    user, database = read.text("DB_OWNER_USER"), _read_database_url(read)
    if user is None or database is None or read.text("DATABASE_URL"):
        return None
    return database._replace(username=user, password=read.text("DB_OWNER_PASSWORD"))


def _parse_url(name: str, text: str | None) -> URL | None:
    if text is None:
        return None
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        # `from None`: the cause would carry the URL, and with it the password.
        raise ConfigurationError(f"{name}: not a URL like postgresql://user:password@host:5432/name") from None
    if url.drivername not in ("postgresql", "postgres", "postgresql+psycopg2"):
        raise ConfigurationError(f"{name}: must start with postgresql:// (PostgreSQL is the only database)")
    return url.set(drivername="postgresql+psycopg2")


def _read_api_key(read: "_Reader") -> str | None:
    key = read.text("API_KEY")
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigurationError("API_KEY: only printable ASCII characters without spaces can travel in a header")
    return key


def _read_signing_key(read: "_Reader") -> str | None:
    """LEDGER_SIGNING_KEY wins; else the content of LEDGER_SIGNING_KEY_FILE; else None."""
    file = read.file("LEDGER_SIGNING_KEY_FILE")
    return read.text("LEDGER_SIGNING_KEY") or (Path(file).read_text().strip() if file else None)


def _refuse_placeholders(settings: Settings) -> None:
    secrets = {"API_KEY": settings.api_key, "LEDGER_SIGNING_KEY": settings.ledger_signing_key}
    urls = {
        "DB_PASSWORD": settings.database_url,
        "DB_OWNER_PASSWORD": settings.database_owner_url,
        "DATABASE_READ_URL": settings.database_read_url,
    }
    for name, url in urls.items():
        secrets[name] = url.password if url is not None else None
    for name, value in secrets.items():
        if value in PLACEHOLDERS:
            raise ConfigurationError(
                f"{name}: still a placeholder, which anybody can guess. Make one with "
                f"`openssl rand -hex 32`, or set ENVIRONMENT=development on a machine of your own"
            )


def parse_duration(name: str, value: str) -> timedelta:
    """A duration like 90s, 5m, 24h or 30d; raises ConfigurationError, which names what it was for."""
    parts = re.fullmatch(r"(\d{1,6})([smhd])", value, re.ASCII)
    if parts is None:
        raise ConfigurationError(f"{name}: must be a number and s, m, h or d, like 90s or 30d")
    unit = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}[parts[2]]
    return timedelta(**{unit: int(parts[1])})


def kept_secret(path: Path, make: Callable[[], str]) -> str:
    """The secret in this file, which is made the first time, for its owner's eyes only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        return path.read_text().strip()
    with open(descriptor, "w") as file:
        file.write(make() + "\n")
    return path.read_text().strip()


class _Reader:
    """Typed access to variables; each method names the variable it refuses."""

    def __init__(self, values: Mapping[str, str | None]) -> None:
        self._values = values

    def text(self, name: str) -> str | None:
        return self._values.get(name) or None

    def boolean(self, name: str) -> bool:
        value = (self.text(name) or "false").lower()
        if value not in ("true", "false", "1", "0", "yes", "no"):
            raise ConfigurationError(f"{name}: must be true or false")
        return value in ("true", "1", "yes")

    def port(self, name: str, default: int) -> int:
        value = self.text(name) or str(default)
        if not (value.isascii() and value.isdecimal() and 0 < int(value) < 65536):
            raise ConfigurationError(f"{name}: must be a port number, 1 to 65535")
        return int(value)

    def count(self, name: str, default: int, highest: int = 999) -> int:
        value = self.text(name) or str(default)
        if not (value.isascii() and value.isdecimal() and 0 < int(value) <= highest):
            raise ConfigurationError(f"{name}: must be a number from 1 to {highest}")
        return int(value)

    def duration(self, name: str, default: timedelta, *, may_be_zero: bool = False) -> timedelta:
        value = self.text(name)
        if value is None:
            return default
        duration = parse_duration(name, value)
        if not duration and not may_be_zero:
            raise ConfigurationError(f"{name}: must be longer than nothing: 1s at the least")
        return duration

    def rate(self, name: str) -> Rate | None:
        value = self.text(name)
        if value is None:
            return None
        parts = re.fullmatch(r"(\d{1,9})/([smh])", value, re.ASCII)
        if parts is None or int(parts[1]) == 0:
            raise ConfigurationError(f"{name}: must be a number and /s, /m or /h, like 1000/s")
        return Rate(int(parts[1]), {"s": 1, "m": 60, "h": 3600}[parts[2]])

    def networks(self, name: str) -> tuple[str, ...]:
        given = tuple(filter(None, (part.strip() for part in (self.text(name) or "").split(","))))
        try:
            return tuple(str(ipaddress.ip_network(part)) for part in given)
        except ValueError:
            raise ConfigurationError(f"{name}: must be addresses or networks, like 10.0.0.7,10.1.0.0/16") from None

    def file(self, name: str) -> str | None:
        value = self.text(name)
        if value is not None and not os.access(value, os.R_OK):
            raise ConfigurationError(f"{name}: there is no file that can be read")
        return value

    def days(self, name: str) -> timedelta | None:
        value = self.text(name)
        if value is None:
            return None
        if not (re.fullmatch(r"\d{1,5}", value, re.ASCII) and int(value) > 0):
            raise ConfigurationError(f"{name}: must be a whole number of days, 1 to 99999")
        return timedelta(days=int(value))

    def choice(self, name: str, default: str, allowed: tuple[str, ...]) -> str:
        value = self.text(name) or default
        if value not in allowed:
            raise ConfigurationError(f"{name}: must be one of {', '.join(allowed)}")
        return value
