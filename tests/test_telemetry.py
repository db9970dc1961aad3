"""Logs, metrics and request ids, of a service that runs as a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import API_KEY, execute, running_app, served, settings_for
from sqlalchemy.engine import URL

from config import ROOT
from main import create_app

LOGIN = {"event_type": "LOGIN", "actor": "alice-the-secret-actor"}


def lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def requests(log: Path) -> list[dict[str, Any]]:
    return [line for line in lines(log) if line["logger"] == "audit.access"]


def test_one_json_line_a_request_and_none_for_a_successful_post(database_url: URL, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with served(database_url, log) as client:
        assert client.post("/events", json=LOGIN).status_code == 201
        client.get("/events?actor=alice-the-secret-actor", headers={"X-Request-ID": "my-id.1"})
        client.get("/events/1", headers={"X-API-Key": "a-wrong-key"})
        client.get("/nothing/here")
        client.post("/events", content=b"{")
        execute(database_url, "ALTER TABLE audit_events ADD CONSTRAINT no CHECK (actor <> 'mallory-the-secret-actor')")
        assert client.post("/events", json={**LOGIN, "actor": "mallory-the-secret-actor"}).status_code == 500
    seen = [(line["method"], line["route"], line["status"], line["key"]) for line in requests(log)]
    assert seen == [
        ("GET", "/events", 200, "root"),
        ("GET", "/events/{event_id}", 401, None),
        ("GET", "unmatched", 404, None),
        ("POST", "/events", 400, "root"),
        ("POST", "/events", 500, "root"),
    ]
    assert requests(log)[0]["request_id"] == "my-id.1"
    assert all(line["duration_ms"] > 0 for line in requests(log))
    for secret in (API_KEY, "a-wrong-key", "secret-actor", "/nothing/here"):
        assert secret not in log.read_text()


def test_log_writes_adds_a_line_for_each_post(database_url: URL, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with served(database_url, log, LOG_WRITES="true") as client:
        client.post("/events", json=LOGIN)
    assert [(line["method"], line["status"]) for line in requests(log)] == [("POST", 201)]
    assert "secret-actor" not in log.read_text()


@pytest.mark.parametrize("given", ["two words", "x" * 129, "a\tb", "<script>", ""])
def test_an_unfit_request_id_is_replaced(client: httpx.Client, given: str) -> None:
    answered = client.get("/health", headers={"X-Request-ID": given}).headers["X-Request-ID"]
    assert answered != given
    assert len(answered) == 32


def sample(metrics: str, name: str) -> float:
    return sum(float(line.rpartition(" ")[2]) for line in metrics.splitlines() if line.startswith(name))


def test_metrics_count_requests_and_events(client: httpx.Client) -> None:
    before = client.get("/metrics").text
    client.post("/events", json=LOGIN)
    client.post("/events", json={})
    for path in ("/a", "/b"):
        client.get(path)
    after = client.get("/metrics").text

    def grew(name: str) -> float:
        return sample(after, name) - sample(before, name)

    assert grew("audit_events_recorded_total") == 1
    assert grew('audit_http_requests_total{method="POST",route="/events",status="201"}') == 1
    assert grew('audit_http_requests_total{method="POST",route="/events",status="422"}') == 1
    assert grew('audit_http_requests_total{method="any",route="unmatched",status="404"}') == 2
    assert grew('audit_http_request_duration_seconds_count{method="POST",route="/events"}') == 2


def test_the_process_stops_at_once_on_a_wrong_setting(database_url: URL) -> None:
    environment = {**os.environ, "DATABASE_URL": "postgresql://u:hidden@h/d", "API_KEY": "change-me"}
    result = subprocess.run(
        [sys.executable, "cli.py", "serve"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr.startswith("audit-service: API_KEY: still a placeholder")
    assert len(result.stderr.splitlines()) == 1


def test_an_error_nobody_foresaw_in_a_route_is_a_problem_document(database_url: URL) -> None:
    settings = settings_for(database_url)
    app = create_app(settings)

    def broken() -> None:
        raise RuntimeError("the-secret-detail")

    app.add_api_route("/broken", broken)
    with running_app(settings, app) as client:
        answer = client.get("/broken")
    assert (answer.status_code, answer.headers["Content-Type"]) == (500, "application/problem+json")
    assert answer.json()["request_id"] == answer.headers["X-Request-ID"]
    assert "the-secret-detail" not in answer.text
