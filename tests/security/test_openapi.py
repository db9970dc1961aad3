"""Every call of the OpenAPI document, with requests that schemathesis makes from it, to the service as it ships."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import API_KEY, served
from sqlalchemy.engine import URL

pytestmark = pytest.mark.security

HERE = Path(__file__).parent


def test_every_answer_is_one_that_the_document_tells_of(one_database_url: URL, tmp_path: Path) -> None:
    log = tmp_path / "service.log"
    with served(one_database_url, log, TRUSTED_PROXIES="127.0.0.0/8") as client:
        client.post("/events/batch", json=[{"event_type": "first", "actor": "alice"}] * 300)
        command = [
            str(Path(sys.executable).parent / "schemathesis"),
            f"--config-file={HERE / 'schemathesis.toml'}",
            "run",
            f"{client.base_url}/openapi.json",
            f"--header=X-API-Key: {API_KEY}",
        ]
        environment = {**os.environ, "SCHEMATHESIS_HOOKS": "from_everywhere", "PYTHONPATH": str(HERE)}
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
