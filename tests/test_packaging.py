"""What cannot be run here is linted: the image's recipe, the workflow, the requirements."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from config import ROOT

TOOLS = Path(sys.executable).parent


@pytest.mark.parametrize(
    "command", [["hadolint", "Dockerfile"], ["jactionlint", "--profile", "correctness", ".github/workflows/ci.yml"]]
)
def test_linted(command: list[str]) -> None:
    result = subprocess.run([TOOLS / command[0], *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("file", ["requirements.txt", "requirements-dev.txt"])
def test_every_requirement_is_pinned_and_has_its_reason(file: str) -> None:
    lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith(("#", "-r"))]
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==\S+ +# \S.*", line)] == []


def test_what_is_installed_is_what_is_pinned() -> None:
    installed = subprocess.check_output([sys.executable, "-m", "pip", "freeze"], text=True, stderr=subprocess.DEVNULL)
    versions = {
        name.lower().replace("_", "-"): version
        for name, _, version in (line.partition("==") for line in installed.splitlines())
    }
    for file in ("requirements.txt", "requirements-dev.txt"):
        for name, version in re.findall(r"^([a-z0-9-]+)==(\S+)", (ROOT / file).read_text(), re.MULTILINE):
            assert versions[name] == version


def test_the_bill_of_materials_names_what_is_pinned(tmp_path: Path) -> None:
    """`make sbom`, which asks nobody: cyclonedx-py checks what it writes against the schema of CycloneDX."""
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, tmp_path)
    command = ["make", "--old-file=.venv/dev.installed", f"BIN={TOOLS}", "sbom"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    bill = json.loads((tmp_path / "sbom.json").read_text())
    assert (bill["bomFormat"], bill["$schema"].startswith("http://cyclonedx.org/schema/")) == ("CycloneDX", True)
    named = {(part["name"], part["version"], part["purl"]) for part in bill["components"]}
    pinned = re.findall(r"^([a-z0-9-]+)==(\S+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert "fastapi" in dict(pinned)
    assert named == {(name, version, f"pkg:pypi/{name}@{version}") for name, version in pinned}


def test_env_files_never_reach_git_or_the_image() -> None:
    assert ".env\n" in (ROOT / ".gitignore").read_text()
    assert (ROOT / ".dockerignore").read_text().splitlines()[1] == "*"


def test_every_package_reaches_the_image() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"bench"}
    copied = re.findall(r"^COPY (\w+) \1$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert set(copied) == packages | {"alembic"}
    assert packages <= {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines()}
