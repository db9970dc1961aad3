"""The FastAPI entry point: builds the app and wires what the other modules own. `uvicorn main:app`."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

import migrations
import problems
from auth import Authenticator, api_key_in_force
from config import Settings, load_settings
from db import open_database
from housekeeping import keep_house
from ingest import Writer
from reader import Reader
from routes import events, holds, operations
from routes.writes import Writes
from telemetry import Metrics, Telemetry, configure_logging


class AuditService(FastAPI):
    """FastAPI, with the write path and telemetry before it instead of inside."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.state.metrics = Metrics()
        self._outermost = Telemetry(Writes(super().__call__), self.state.metrics)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self
        await self._outermost(scope, receive, send)


def create_app(settings: Settings | None = None) -> FastAPI:
    """The app; settings not given are read when it starts, never at import."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.settings = settings or load_settings()
        configure_logging(app.state.settings)
        app.state.authenticator = Authenticator(api_key_in_force(app.state.settings))
        with open_database(app.state.settings) as database:
            if app.state.settings.run_migrations:
                migrations.upgrade(database.url)
            app.state.database = database
            app.state.reader = Reader(database, database.url, app.state.settings.query_timeout)
            app.state.writer = Writer(database)
            housekeeping = asyncio.create_task(keep_house(database, app.state.settings, app.state.metrics))
            try:
                yield
            finally:
                housekeeping.cancel()
                await app.state.writer.stop()
                app.state.reader.close()

    app = AuditService(
        title="Audit service",
        summary="Who did what and when, kept so that nobody can quietly change it.",
        version="0.1.0",
        lifespan=lifespan,
    )
    problems.install_handlers(app)
    app.include_router(events.router)
    app.include_router(holds.router)
    app.include_router(operations.router)
    return app


app = create_app()
