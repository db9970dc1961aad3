"""The headers that tell a browser, or a cache, what it may do with an answer. Encoded once, the same for every answer.

What is answered is data of the log: no page may be made of it, and no cache may keep it, but for tiles, which never
change: the caller's own cache may.
"""

from collections.abc import Mapping, Sequence

Headers = Sequence[tuple[bytes, bytes]]

# Content-Security-Policy Level 3. Swagger UI styles its elements one by one, so inline styles are let in; no
# inline script is, and nothing from another host.
_DATA_POLICY = b"default-src 'none'; frame-ancestors 'none'"
_PAGE_POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def _headers(policy: bytes, cache: bytes) -> Headers:
    return (
        (b"x-content-type-options", b"nosniff"),
        (b"cache-control", cache),
        (b"content-security-policy", policy),
        (b"referrer-policy", b"no-referrer"),
    )


DATA_HEADERS = _headers(_DATA_POLICY, b"no-store")
ASSETS = {
    "/docs/swagger-ui-bundle.js": "text/javascript",
    "/docs/swagger-ui.css": "text/css",
    "/docs/start.js": "text/javascript",
    "/docs/favicon-32x32.png": "image/png",
}
_BY_PATH: Mapping[str, Headers] = {
    "/docs": _headers(_PAGE_POLICY, b"no-store"),
    **{path: _headers(_DATA_POLICY, b"public, max-age=3600") for path in ASSETS},
}


_TILE_HEADERS = _headers(_DATA_POLICY, b"private, max-age=31536000, immutable")  # RFC 8246
_TILES = "/ledger/tile/"


def headers_for(path: str, status: int) -> Headers:
    """What every answer at this path carries."""
    if path.startswith(_TILES) and status in (200, 304):
        return _TILE_HEADERS
    return _BY_PATH.get(path, DATA_HEADERS)
