"""The FastAPI entry point: builds the app and wires what the other modules own. `uvicorn main:app`."""

import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import FrameType
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import State
from starlette.types import Receive, Scope, Send

import migrations
import problems
from auth import Authenticator, api_key_in_force
from config import Settings, load_settings
from db import open_database, open_owner, open_replica
from edge.limits import Limits
from housekeeping.rounds import keep_house
from ingest.reads import ReadLog
from ingest.writer import Writer
from keys.memory import KeyMemory
from proofs.checkpoints import Checkpoints
from proofs.signing import signer_in_force
from proofs.sink import sink_at
from proofs.watch import LedgerWatch
from queries.exports import Exports
from queries.reader import Reader
from queries.replica import ReplicaWatch
from queries.stream import Feed
from routes import docs, events, exports, holds, keys, ledger, operations, redactions
from routes.direct import DirectWrites
from routes.writes import Writes
from telemetry import Metrics, Telemetry, configure_logging


class Parts(State):
    """What the app is made of. Starlette looks attributes up in Python code, which costs an event some 3 µs."""

    def __setattr__(self, key: Any, value: Any) -> None:
        object.__setattr__(self, key, value)


class AuditService(FastAPI):
    """FastAPI, with the write path and telemetry before it instead of inside."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.state = Parts()
        self.state.metrics = Metrics()
        self.telemetry = Telemetry(Writes(super().__call__), self.state.metrics)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self
        await self.telemetry(scope, receive, send)


@contextmanager
def calling_on_stop(callback: Callable[[], None]) -> Iterator[None]:
    """While the block runs, call back on the event loop when the process is told to stop.

    The server first waits for the answers under way and only then ends the lifespan: too late for a stream.
    """
    loop = asyncio.get_running_loop()
    in_main_thread = threading.current_thread() is threading.main_thread()  # elsewhere signals are not ours
    numbers = (signal.SIGINT, signal.SIGTERM) if in_main_thread else ()
    handlers = {number: handler for number in numbers if callable(handler := signal.getsignal(number))}

    def on_signal(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(callback)
        handlers[signal.Signals(number)](number, frame)

    for number in handlers:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def create_app(settings: Settings | None = None) -> FastAPI:
    """The app; settings not given are read when it starts, never at import."""

    @asynccontextmanager
    async def lifespan(app: AuditService) -> AsyncIterator[dict[str, Any]]:
        app.state.settings = settings or load_settings()
        configure_logging(app.state.settings)
        app.state.limits = Limits(app.state.settings.rate_limit)
        api_key = api_key_in_force(app.state.settings)
        signer = signer_in_force(app.state.settings)
        with (
            open_database(app.state.settings) as database,
            open_owner(app.state.settings, database) as owner,
            open_replica(app.state.settings, database) as replica,
        ):
            if app.state.settings.run_migrations:
                migrations.upgrade(owner.url, database.url.username)
            app.state.database = database
            app.state.owner = owner
            memory = KeyMemory(database)
            app.state.authenticator = Authenticator(api_key, memory)
            app.state.reader = Reader(replica, replica.url, app.state.settings.query_timeout)
            app.state.exports = Exports(app.state.reader, app.state.metrics.exports)
            streams_a_key = app.state.settings.max_streams_per_key
            app.state.feed = Feed(app.state.reader, database, app.state.metrics.streams, streams_a_key)
            app.state.writer = Writer(database, owner)
            app.state.reads = ReadLog(app.state.writer, app.state.metrics, is_on=app.state.settings.audit_reads)
            app.state.checkpoints = Checkpoints(database, signer, sink_at(app.state.settings.checkpoint_sink))
            watch_ledger = LedgerWatch(app.state.checkpoints, app.state.metrics)
            await asyncio.to_thread(watch_ledger.look)
            background = [
                asyncio.create_task(watch_ledger.run(app.state.settings.checkpoint_interval.total_seconds())),
                asyncio.create_task(keep_house(owner, app.state.settings, app.state.metrics)),
                asyncio.create_task(memory.write_uses_now_and_then()),
            ]
            if replica is not database:
                watch = ReplicaWatch(database, app.state.reader, app.state.metrics)
                background.append(asyncio.create_task(watch.run()))
            try:
                with calling_on_stop(app.state.feed.end_streams):
                    yield {"direct": DirectWrites(app, app.telemetry)}
            finally:
                for task in background:
                    task.cancel()
                app.state.feed.stop()
                await memory.stop()
                await app.state.reads.stop()
                await app.state.writer.stop()
                app.state.reader.close()

    app = AuditService(
        title="Audit service",
        summary="Who did what and when, kept so that nobody can quietly change it.",
        version="0.1.0",
        docs_url=None,  # routes/docs.py has it, without a third party's host
        redoc_url=None,
        lifespan=lifespan,
    )
    problems.install_handlers(app)
    app.include_router(exports.router)  # before events: /events/{event_id} would take its paths
    app.include_router(events.router)
    app.include_router(ledger.router)
    app.include_router(holds.router)
    app.include_router(redactions.router)
    app.include_router(keys.router)
    app.include_router(operations.router)
    app.include_router(docs.router)
    return app


app = create_app()
