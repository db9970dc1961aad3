"""/legal-holds: place, list, look at and release them. All need the scope admin."""

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response

from auth import Admin
from housekeeping import holds
from problems import Forbidden, HoldNotFound, InvalidFields, Unauthorized, Unavailable, responses
from routes import examples
from routes.bodies import BODY_PROBLEMS, BoundedRoute
from routes.examples import answer
from schemas import LegalHold, LegalHoldFilter, LegalHoldIn, LegalHoldPage

router = APIRouter(
    route_class=BoundedRoute,
    prefix="/legal-holds",
    tags=["legal holds"],
    responses=responses(Unauthorized, Forbidden, InvalidFields, Unavailable),
)

HoldId = Annotated[int, Path(ge=1, lt=2**63)]


@router.post("", status_code=201, response_model=LegalHold, responses=BODY_PROBLEMS | answer(examples.HOLD, 201))
def place_hold(request: Request, response: Response, caller: Admin, wanted: LegalHoldIn) -> Any:
    """Keep the events that it names from retention, until it is released. Recorded as `audit.hold.place`."""
    wanted.tenant = caller.narrow_tenant(wanted.tenant, "body.tenant")
    hold = holds.place_hold(request.app.state.database, wanted, caller.name)
    response.headers["Location"] = f"/legal-holds/{hold.id}"
    return hold


@router.get("", response_model=LegalHoldPage, responses=answer(examples.HOLDS))
def list_holds(request: Request, caller: Admin, wanted: Annotated[LegalHoldFilter, Query()]) -> Any:
    """Legal holds, oldest first, released ones too; follow `next_after` for more."""
    return holds.list_holds(request.app.state.database, wanted, caller.tenant)


@router.get("/{hold_id}", response_model=LegalHold, responses=responses(HoldNotFound) | answer(examples.HOLD))
def get_hold(request: Request, caller: Admin, hold_id: HoldId) -> Any:
    """One legal hold by its id."""
    return holds.find_hold(request.app.state.database, hold_id, caller.tenant)


@router.delete(
    "/{hold_id}", response_model=LegalHold, responses=responses(HoldNotFound) | answer(examples.RELEASED_HOLD)
)
def release_hold(request: Request, caller: Admin, hold_id: HoldId) -> Any:
    """Release a hold; it stays as history. Recorded as `audit.hold.release`, once."""
    return holds.release_hold(request.app.state.database, hold_id, caller.name, caller.tenant)
