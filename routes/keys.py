"""/keys: make, list and revoke keys. All need the scope admin; a key bound to a tenant manages that tenant's only."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from auth import Admin, Key
from fields import KeyId
from keys import store
from problems import Forbidden, InvalidFields, KeyNotFound, Unauthorized, Unavailable, responses
from routes import examples
from routes.bodies import BODY_PROBLEMS, BoundedRoute
from routes.examples import answer
from schemas import ApiKey, ApiKeyFilter, ApiKeyIn, ApiKeyPage, NewApiKey

router = APIRouter(
    route_class=BoundedRoute,
    prefix="/keys",
    tags=["keys"],
    responses=responses(Unauthorized, Forbidden, InvalidFields, Unavailable),
)


@router.post("", status_code=201, response_model=NewApiKey, responses=BODY_PROBLEMS | answer(examples.NEW_KEY, 201))
def create_key(request: Request, caller: Admin, wanted: ApiKeyIn) -> Any:
    """Make a key, which is shown in this answer only. Recorded as `audit.key.create`."""
    wanted.tenant = caller.narrow_tenant(wanted.tenant, "body.tenant")
    wanted.event_types = _narrow_event_types(caller, wanted.event_types)
    return store.create_key(request.app.state.database, wanted, caller.name)


@router.get("", response_model=ApiKeyPage, responses=answer(examples.KEYS))
def list_keys(request: Request, caller: Admin, wanted: Annotated[ApiKeyFilter, Query()]) -> Any:
    """Keys by their ids, without their secrets, revoked and expired ones too; follow `next_after` for more."""
    wanted.tenant = caller.narrow_tenant(wanted.tenant, "query.tenant")
    return store.list_keys(request.app.state.database, wanted)


@router.delete("/{key_id}", response_model=ApiKey, responses=responses(KeyNotFound) | answer(examples.REVOKED_KEY))
def revoke_key(request: Request, caller: Admin, key_id: KeyId) -> Any:
    """Revoke a key: every replica refuses it within 5 s. It stays as history. Recorded as `audit.key.revoke`, once."""
    return store.revoke_key(request.app.state.database, key_id, caller.name, caller.tenant)


def _narrow_event_types(caller: Key, wanted: list[str] | None) -> list[str] | None:
    """Nobody gives away more than he has; who asks for nothing gets the same."""
    if caller.event_types is None:
        return wanted
    if wanted is None:
        return list(caller.event_types)
    if all(prefix.startswith(caller.event_types) for prefix in wanted):
        return wanted
    message = f"must each begin like one of the caller's own: {', '.join(caller.event_types)}"
    errors = [{"location": "body.event_types", "message": message}]
    raise Forbidden("This API key cannot give away more than it may.", errors)
