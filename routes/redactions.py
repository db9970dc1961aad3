"""/redactions: erase personal data. Needs the scope admin."""

from typing import Any

from fastapi import APIRouter, Request

from auth import Admin
from housekeeping import redaction
from problems import Forbidden, InvalidFields, Unauthorized, Unavailable, responses
from routes import examples
from routes.bodies import BODY_PROBLEMS, BoundedRoute
from routes.examples import answer
from schemas import Redaction, RedactionIn

MOST_EVENTS_A_CALL = 10_000

router = APIRouter(
    route_class=BoundedRoute,
    prefix="/redactions",
    tags=["redaction"],
    responses=responses(Unauthorized, Forbidden, InvalidFields, Unavailable),
)


@router.post("", response_model=Redaction, responses=BODY_PROBLEMS | answer(examples.REDACTION))
def redact(request: Request, caller: Admin, wanted: RedactionIn) -> Any:
    """Erase the personal data of events, 10,000 at the most a call; a dry run unless `dry_run` is false.

    Call again until `remaining` is 0. What was erased is recorded as `audit.redaction`. A legal hold keeps its events.
    """
    if caller.tenant is not None:
        raise Forbidden("This call needs a key that is bound to no tenant.")
    database = request.app.state.owner
    if wanted.dry_run:
        extent = redaction.measure(database, wanted, caller.name)
        return Redaction(redaction=None, dry_run=True, count=extent.count, held=extent.held, remaining=extent.count)
    name = redaction.new_name()
    batches = list(redaction.redact(database, wanted, caller.name, name, MOST_EVENTS_A_CALL))
    left = redaction.measure(database, wanted, caller.name)
    recorded = name if batches else None
    return Redaction(redaction=recorded, dry_run=False, count=sum(batches), held=left.held, remaining=left.count)
