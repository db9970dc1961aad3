"""Who gets in: the key in either header, and nobody without it."""

import base64
from pathlib import Path

import httpx
import pytest
from conftest import API_KEY

from auth import api_key_in_force
from config import ConfigurationError, Settings
from keys.tokens import make_token

PROTECTED = [("POST", "/events"), ("GET", "/events"), ("GET", "/events/1")]


@pytest.mark.parametrize(("method", "path"), PROTECTED)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-API-Key": ""},
        {"X-API-Key": "wrong"},
        {"X-API-Key": API_KEY + "x"},
        {"X-API-Key": API_KEY[:-1]},
        {"X-API-Key": API_KEY.upper()},
        {"X-API-Key": make_token()},
        {"X-API-Key": make_token()[:-1] + "!"},
        {"X-API-Key": b"\xff\xfe"},
        {"Authorization": API_KEY},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic " + base64.b64encode(API_KEY.encode()).decode()},
        {"X-API-Key": "wrong", "Authorization": f"Bearer {API_KEY}"},
    ],
)
def test_a_missing_or_wrong_key_is_a_401(
    client: httpx.Client, method: str, path: str, headers: dict[str, str | bytes]
) -> None:
    with httpx.Client(base_url=client.base_url) as stranger:
        response = stranger.request(method, path, headers=headers)  # type: ignore[arg-type]  # one value is bytes
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"].startswith("Bearer")
    assert response.headers["Content-Type"] == "application/problem+json"
    assert response.json()["type"] == "urn:audit:problem:unauthorized"


def test_nothing_is_read_of_a_body_before_the_key_is_known_to_be_right(client: httpx.Client) -> None:
    with httpx.Client(base_url=client.base_url) as stranger:
        assert stranger.post("/events", content=b"{").status_code == 401


@pytest.mark.parametrize("headers", [{"X-API-Key": API_KEY}, {"Authorization": f"Bearer {API_KEY}"}])
def test_the_key_is_taken_from_either_header(client: httpx.Client, headers: dict[str, str]) -> None:
    with httpx.Client(base_url=client.base_url) as caller:
        assert caller.get("/events", headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/docs", "/openapi.json"])
def test_operations_and_documentation_need_no_key(client: httpx.Client, path: str) -> None:
    with httpx.Client(base_url=client.base_url) as stranger:
        assert stranger.get(path).status_code == 200


def test_in_development_a_key_is_made_once_and_kept_private(tmp_path: Path) -> None:
    settings = Settings(environment="development", data_dir=tmp_path / "data")
    key = api_key_in_force(settings)
    assert len(key) >= 32
    assert api_key_in_force(settings) == key
    assert (tmp_path / "data" / "api_key").stat().st_mode & 0o077 == 0


def test_in_production_a_missing_key_stops_the_start() -> None:
    with pytest.raises(ConfigurationError, match=r"^API_KEY: not set"):
        api_key_in_force(Settings())
