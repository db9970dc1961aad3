"""`make run` as a newcomer types it: an empty directory, a copy of the project, nothing else."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import SIGNER, copy_of_the_project, eventually, free_port

NOBODY = 65534


def system_python() -> str | None:
    """An interpreter that every user of the machine can run, with venv, or None."""
    for name in ("/usr/bin/python3", "/usr/local/bin/python3"):
        script = "import ensurepip, sys; sys.exit(sys.version_info < (3, 11))"
        if (
            Path(name).exists()
            and subprocess.run([name, "-c", script], capture_output=True, check=False).returncode == 0
        ):
            return name
    return None


@contextmanager
def make_run(folder: Path, user: int | None) -> Iterator[tuple[str, str]]:
    """`make run`, until it listens; then its curl line and its whole output; afterwards Ctrl-C."""
    environment = {**os.environ, "PORT": str(free_port()), "HOME": str(folder)}
    command = ["make", "run", *([f"PYTHON={system_python()}"] if user is not None else [])]
    log = folder.parent / f"output-{time.monotonic_ns()}"
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            user=user,
            group=user,
            extra_groups=None if user is None else [],
        )
    try:
        eventually(lambda: "Ctrl-C stops" in log.read_text() or process.poll() is not None, seconds=300)
        assert process.poll() is None, log.read_text()
        text = log.read_text()
        yield text[text.index("curl -X POST") : text.index("Ctrl-C stops")].strip(), text
    finally:
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does with Ctrl-C
        process.wait(60)
    assert '"message": "Application shutdown complete."' in log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize("user", [None, NOBODY])
def test_make_run_from_an_empty_directory(tmp_path: Path, user: int | None) -> None:
    if user is not None and (os.geteuid() != 0 or system_python() is None):
        pytest.skip("needs root, and an interpreter that an ordinary user can reach, with venv")
    folder = tmp_path / "project"
    folder.mkdir()
    copy_of_the_project(folder)
    for parent in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        parent.chmod(0o711)
    if user is not None:
        for path in (folder, *folder.rglob("*")):
            shutil.chown(path, user, user)

    with make_run(folder, user) as (curl, output):
        event = json.loads(subprocess.check_output(["bash", "-c", f"{curl} --silent --fail"], text=True))
        assert (event["id"], event["event_type"], event["actor"]) == (1, "LOGIN", "alice")
        key = re.findall(r"API key: (\S+)", output)
        assert key == [(folder / ".data" / "api_key").read_text().strip()]
        assert re.findall(r"public key, for whoever verifies: (\S+)", output) == [str(SIGNER.verifier)]
    assert not (folder / ".data" / "postgres" / "postmaster.pid").exists(), "the database is still running"

    with make_run(folder, user) as (curl, output):
        event = json.loads(subprocess.check_output(["bash", "-c", f"{curl} --silent --fail"], text=True))
        assert event["id"] == 2, "the second start found the log of the first"
        assert re.findall(r"API key: (\S+)", output) == key
        assert "pip install" not in output
