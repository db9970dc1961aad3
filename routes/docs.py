"""/docs: the interactive documentation. The page and all it loads come from this service, never from another host."""

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse

from edge.headers import ASSETS

_STATIC = Path(__file__).parent / "static"

router = APIRouter(include_in_schema=False)


@router.get("/docs")
async def show_documentation() -> FileResponse:
    """The page, which reads /openapi.json."""
    return FileResponse(_STATIC / "docs.html", media_type="text/html")


def _serve(path: str, media_type: str) -> None:
    async def asset() -> FileResponse:
        return FileResponse(_STATIC / Path(path).name, media_type=media_type)

    router.add_api_route(path, asset, methods=["GET"])


for _path, _media_type in ASSETS.items():
    _serve(_path, _media_type)
