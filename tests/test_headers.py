"""What answers tell browsers and caches, and the documentation page in a real browser."""

import re
import shutil
from pathlib import Path

import httpx
import pytest
from conftest import served
from playwright.sync_api import sync_playwright
from sqlalchemy.engine import URL

from edge.headers import ASSETS

LOGIN = {"event_type": "LOGIN", "actor": "alice"}
CHROMIUM = shutil.which("chromium")


def answers(client: httpx.Client) -> list[httpx.Response]:
    return [
        client.post("/events", json=LOGIN),
        client.post("/events", content=b"{"),
        client.post("/keys", json={"name": "shop", "scopes": ["read"]}),
        client.get("/events"),
        client.get("/events/export"),
        client.get("/events/1", headers={"X-API-Key": "wrong"}),
        client.get("/nothing"),
        client.get("/health"),
        client.get("/metrics"),
        client.get("/openapi.json"),
        client.delete("/events"),
    ]


def test_every_answer_forbids_sniffing_keeping_and_framing(client: httpx.Client) -> None:
    for answer in answers(client):
        assert answer.headers.get_list("X-Content-Type-Options") == ["nosniff"]
        assert answer.headers.get_list("Cache-Control") == ["no-store"]
        assert answer.headers["Content-Security-Policy"] == "default-src 'none'; frame-ancestors 'none'"


def test_the_documentation_loads_nothing_from_another_host(client: httpx.Client) -> None:
    page = client.get("/docs")
    assert "script-src 'self';" in page.headers["Content-Security-Policy"]
    assert "//" not in page.text
    for path, media_type in ASSETS.items():
        asset = client.get(path)
        assert asset.status_code == 200
        assert asset.headers["Content-Type"].startswith(media_type)
    assert {f"/{path}" for path in re.findall(r'(?:src|href)="([^"]+)"', page.text)} == set(ASSETS)


def test_no_answer_says_what_software_made_it(database_url: URL, tmp_path: Path) -> None:
    with served(database_url, tmp_path / "log") as client:
        for answer in answers(client):
            assert "Server" not in answer.headers
            assert not re.search(r"uvicorn|starlette|fastapi", str(answer.headers), re.IGNORECASE)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
def test_a_browser_shows_the_documentation_and_breaks_no_rule_of_its_policy(client: httpx.Client) -> None:
    asked: list[str] = []
    said: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(f"{client.base_url}/docs")
        page.locator(".opblock").first.wait_for(timeout=30_000)
        browser.close()
    assert said == []
    assert [url for url in asked if not url.startswith((str(client.base_url), "data:"))] == []
