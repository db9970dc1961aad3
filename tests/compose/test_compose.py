"""The Docker Compose walk of the README, for real: build, start, migrate, use, outage, stop."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from conftest import copy_of_the_project, eventually, free_port

from config import ROOT

SECRETS = ("change-me", "change-me-too", "change-me-as-well")
LOGIN = {"event_type": "LOGIN", "actor": "alice"}


def engine_missing() -> str | None:
    """Why Compose cannot be run here, or None."""
    if shutil.which("docker") is None:
        return "there is no docker command"
    for command in (["docker", "info"], ["docker", "compose", "version"]):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            return f"`{' '.join(command)}` failed: {result.stderr.strip().splitlines()[-1:]}"
    return None


REASON = engine_missing()
pytestmark = [pytest.mark.compose, pytest.mark.skipif(REASON is not None, reason=f"no Docker engine: {REASON}")]


class Stack:
    """The project, copied as a clone would have it, run under a Compose project name of its own."""

    def __init__(self, folder: Path) -> None:
        copy_of_the_project(folder)
        shutil.copy(folder / ".env.example", folder / ".env")
        port = free_port()
        self.folder = folder
        # An empty variable of the environment would hide the same one in .env from Compose.
        self.environment = {name: value for name, value in os.environ.items() if value}
        self.environment |= {"COMPOSE_PROJECT_NAME": f"audit-test-{os.getpid()}", "PUBLISH_PORT": str(port)}
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"X-API-Key": "change-me"}, timeout=30)

    def compose(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            ["docker", "compose", *arguments],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert not check or result.returncode == 0, result.stdout + result.stderr
        return result

    def in_service(self, *command: str) -> str:
        return self.compose("exec", "-T", "audit-service", *command).stdout.strip()

    def as_root(self, *command: str) -> subprocess.CompletedProcess[str]:
        return self.compose("exec", "-T", "--user", "0", "audit-service", *command, check=False)

    def as_service_role(self, statement: str) -> subprocess.CompletedProcess[str]:
        psql = 'PGPASSWORD=change-me-too psql --host=127.0.0.1 --username=audit_service --command="$1" "$POSTGRES_DB"'
        return self.compose("exec", "-T", "audit-postgres", "sh", "-c", psql, "sh", statement, check=False)

    def inspect(self, service: str, template: str) -> str:
        container = self.compose("ps", "-q", service).stdout.strip()
        return subprocess.check_output(["docker", "inspect", "--format", template, container], text=True).strip()

    def answers(self) -> bool:
        try:
            return self.client.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def post(self) -> httpx.Response:
        return self.client.post("/events", json=LOGIN)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("compose"))
    try:
        yield stack
    finally:
        stack.client.close()
        stack.compose("down", "-v", "--rmi", "local", "--remove-orphans", check=False)


def test_the_walk_of_the_readme(stack: Stack) -> None:
    stack.compose("up", "--build", "-d")
    eventually(stack.answers)

    # Before the migration: alive, not ready, and no event is taken.
    for response in (stack.client.get("/ready"), stack.post(), stack.client.get("/events")):
        assert response.status_code == 503
        assert "0001" in response.json()["detail"]
        assert "alembic upgrade head" in response.json()["detail"]
        assert int(response.headers["Retry-After"]) > 0
    assert stack.client.get("/health").status_code == 200

    assert "0001" in stack.in_service("alembic", "history")
    stack.in_service("alembic", "upgrade", "head")

    # After it, without a restart.
    assert stack.client.get("/ready").status_code == 200
    response = stack.post()
    assert response.status_code == 201
    assert stack.client.get(response.headers["Location"]).json() == response.json()
    assert stack.in_service("alembic", "check") == "No new upgrade operations detected."

    # The role under which it works can neither change nor delete events.
    for statement in ("UPDATE audit_events SET actor = 'eve'", "DELETE FROM audit_events", "TRUNCATE audit_events"):
        refused = stack.as_service_role(statement)
        assert refused.returncode != 0
        assert "permission denied for table audit_events" in refused.stderr

    # As little as it needs: no root, no writable root file system, no capabilities, healthy.
    assert stack.in_service("id", "-u") == "10001"
    assert stack.compose("exec", "-T", "audit-service", "touch", "/app/x", check=False).returncode != 0
    assert stack.inspect("audit-service", "{{.HostConfig.ReadonlyRootfs}} {{.HostConfig.CapDrop}}") == "true [ALL]"
    eventually(lambda: stack.inspect("audit-service", "{{.State.Health.Status}}") == "healthy")

    # And nothing that it does not need, wherever it may lie: looked for as root.
    for absent in ("/app/tests", "/app/bench", "/app/.git", "/venv/bin/pip", "/root/.cache/pip"):
        assert stack.as_root("test", "!", "-e", absent).returncode == 0, absent
    for absent in ("gcc", "cc", "g++", "make"):
        assert stack.as_root("sh", "-c", f"command -v {absent}").returncode != 0, absent
    labels = json.loads(stack.inspect("audit-service", "{{json .Config.Labels}}"))
    assert not set(SECRETS) & set(labels.values())

    # An outage of the database: 503 with Retry-After, and recovery without a restart.
    stack.compose("stop", "audit-postgres")
    response = stack.post()
    assert response.status_code == 503
    assert int(response.headers["Retry-After"]) > 0
    assert stack.client.get("/health").status_code == 200
    stack.compose("start", "audit-postgres")
    eventually(lambda: stack.post().status_code == 201)

    # A stop is clean; the log outlives the containers.
    stack.compose("stop", "audit-service")
    assert stack.inspect("audit-service", "{{.State.ExitCode}}") == "0"
    logs = stack.compose("logs", "--no-color", "audit-service").stdout
    assert '"message": "Application shutdown complete."' in logs
    assert not [secret for secret in SECRETS if secret in logs]
    stack.compose("down")
    stack.compose("up", "-d")
    eventually(stack.answers)
    assert [event["id"] for event in stack.client.get("/events").json()["events"]] == [2, 1]


def test_run_migrations_makes_the_container_migrate_by_itself(stack: Stack) -> None:
    stack.compose("down", "-v")
    environment = (stack.folder / ".env").read_text()
    (stack.folder / ".env").write_text(environment.replace("RUN_MIGRATIONS=false", "RUN_MIGRATIONS=true"))
    stack.compose("up", "-d")
    eventually(stack.answers)
    assert stack.client.get("/ready").status_code == 200
    assert stack.post().json()["id"] == 1


def test_the_backup_and_restore_of_the_runbook(stack: Stack) -> None:
    section = (ROOT / "runbook.md").read_text().partition("## Back up and restore")[2].partition("\n## ")[0]
    commands = [line.strip() for line in section.splitlines() if line.startswith("    ")]
    before = stack.client.get("/events").json()
    for command in commands:
        subprocess.run(["bash", "-c", command], cwd=stack.folder, env=stack.environment, check=True)
        if "pg_dump" in command:
            assert stack.post().status_code == 201, "the service runs while it is backed up"
    eventually(stack.answers)
    assert stack.client.get("/events").json() == before
    assert stack.post().json()["id"] == before["events"][0]["id"] + 1
