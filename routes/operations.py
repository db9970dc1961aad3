"""/health, /ready and /metrics: for orchestrators and monitoring, without a key."""

from typing import Literal

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from db import Database
from problems import Unavailable, responses
from proofs.checkpoints import Checkpoints
from routes import examples
from routes.examples import answer

router = APIRouter(tags=["operations"])


class Health(BaseModel):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """The service can take events."""

    status: Literal["ready"] = "ready"
    revision: str


@router.get("/health", responses=answer(Health().model_dump()))
async def health() -> Health:
    """Alive: says nothing of the database, so that an outage of it does not get the service restarted."""
    return Health()


@router.get("/ready", responses=responses(Unavailable) | answer(examples.READY))
async def ready(request: Request) -> Readiness:
    """Migrated and writable, and nothing contradicts the ledger; else 503 with the reason."""
    database: Database = request.app.state.database
    revision = await database.in_thread(database.check_ready)
    checkpoints: Checkpoints = request.app.state.checkpoints
    checkpoints.require_consistent()
    return Readiness(revision=revision)


@router.get("/metrics", response_class=Response, responses=answer(examples.METRICS, media_type="text/plain"))
async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    return Response(request.app.state.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)
