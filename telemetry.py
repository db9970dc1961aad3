"""What operators see of the service: one JSON log line a request, metrics, and request ids.

Never a key, a body or a query string in any of them.
"""

import json
import logging
import multiprocessing
import os
import random
import re
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
    values,
)
from prometheus_client.multiprocess import MultiProcessCollector
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import problems
from config import Settings
from edge.headers import Headers, headers_for

logger = logging.getLogger("audit.access")

disable_created_metrics()  # type: ignore[no-untyped-call]  # prometheus-client's; a second series nobody asks for

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Metrics:
    """The service's own metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "audit_http_requests", "Requests answered", ["method", "route", "status"], registry=self.registry
        )
        self.duration = Histogram(
            "audit_http_request_duration_seconds", "Time to answer", ["method", "route"], registry=self.registry
        )
        self.events = Counter("audit_events_recorded", "Events committed to the log", registry=self.registry)
        self.partitions = self.gauge("audit_partitions", "Monthly partitions, coming ones included")
        self.partitions_dropped = Counter(
            "audit_partitions_dropped", "Partitions that retention dropped", registry=self.registry
        )
        self.first_event = self.gauge("audit_first_event_id", "The lowest id that is kept")
        self.first_event_recorded = self.gauge("audit_first_event_recorded_seconds", "When it was, in Unix time")
        self.reads_dropped = Counter(
            "audit_reads_dropped", "Reads that left no audit.read event", registry=self.registry
        )
        self.exports = Gauge(
            "audit_exports_open", "Exports under way", registry=self.registry, multiprocess_mode="livesum"
        )
        self.streams = Gauge(
            "audit_streams_open", "Streams listened to", registry=self.registry, multiprocess_mode="livesum"
        )
        self.legal_holds = self.gauge("audit_legal_holds", "Legal holds in force")

    def gauge(self, name: str, documentation: str) -> Gauge:
        """One about the database, which every worker looks at: the newest look counts."""
        return Gauge(name, documentation, registry=self.registry, multiprocess_mode="mostrecent")

    def exposition(self) -> bytes:
        """In Prometheus' text format; of all workers together where there are several (see server.py)."""
        if multiprocessing.parent_process() is None:
            return generate_latest(self.registry)
        every_worker = CollectorRegistry()
        MultiProcessCollector(every_worker)  # type: ignore[no-untyped-call]  # prometheus-client's
        return generate_latest(every_worker)


def count_under_one_process_id() -> None:
    """For a worker, which never forks: its process id is asked for once, and not at each of four counts a request.

    Comes before the first Metrics is made. The class is prometheus-client's own, for servers that number workers.
    """
    process_id = os.getpid()
    values.ValueClass = values.MultiProcessValue(lambda: process_id)  # type: ignore[no-untyped-call]


class JsonFormatter(logging.Formatter):
    """One JSON object a line; `extra={"fields": {...}}` adds members."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure_logging(settings: Settings) -> None:
    """Send every logger's lines, uvicorn's too, to standard output as JSON."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=settings.log_level, handlers=[handler], force=True)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    logging.getLogger("uvicorn.access").disabled = True  # the lines below say more


class Telemetry:
    """ASGI middleware: gives each request an id, counts and logs it, and answers what no handler caught."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = self.begin(scope)
        status: int | None = None

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *self.fields(scope, message["status"])]
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        except Exception:
            logging.getLogger("audit.errors").exception(
                "unhandled exception", extra={"fields": {"request_id": scope["state"]["request_id"]}}
            )
            if status is not None:
                raise  # the answer is under way; the server must cut the connection
            response = problems.respond(Request(scope), problems.InternalError())
            await response(scope, receive, send_with_headers)
        finally:
            self.record(scope, status, started)

    def begin(self, scope: Scope) -> float:
        """Give the request its id; the moment, for record()."""
        scope.setdefault("state", {})["request_id"] = _request_id(scope)
        return time.perf_counter()

    def fields(self, scope: Scope, status: int) -> Headers:
        """The headers that each answer carries beside its own."""
        state = scope["state"]
        request_id = (b"x-request-id", state["request_id"].encode())
        return (request_id, *headers_for(scope["path"], status), *state.get("rate_fields", ()))

    def record(self, scope: Scope, status: int | None, started: float) -> None:
        """Count the request, and log it; no status means that nobody was there to take the answer."""
        seconds = time.perf_counter() - started
        state = scope["state"]
        route = state.get("route") or getattr(scope.get("route"), "path", "unmatched")
        # A client must not invent label values.
        count, observe = self._series(scope["method"] if route != "unmatched" else "any", route, status)
        count()
        observe(seconds)
        settings: Settings = scope["app"].state.settings
        if status == 201 and not settings.log_writes:
            return  # the event is its own record
        fields = {
            "method": scope["method"],
            "route": route,
            "status": status,
            "duration_ms": round(seconds * 1000, 3),
            "request_id": state["request_id"],
            "key": state.get("key_name"),
        }
        logger.info("request", extra={"fields": fields})

    @cache  # noqa: B019 - looking a series up by its labels costs more than all the rest; there are few
    def _series(
        self, method: str, route: str, status: int | None
    ) -> tuple[Callable[[], None], Callable[[float], None]]:
        duration = self.metrics.duration.labels(method, route)
        return self.metrics.requests.labels(method, route, status).inc, duration.observe


def _request_id(scope: Scope) -> str:
    """The caller's X-Request-ID where it is fit for a log line and a header, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(given := value.decode("latin-1")):
            return str(given)
    return f"{random.getrandbits(128):032x}"
