"""`python cli.py verify --export`: an export proves itself, offline, with proofs that were fetched before."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import API_KEY, SIGNER, run_cli
from sqlalchemy.engine import URL
from test_verify import ODD, plain

from ledger.notes import generate_signer
from verifier.differences import PERSONAL, ROW
from verifier.export import NO_PROOF, NOT_PROVED

NOWHERE = URL.create("postgresql", host="127.0.0.1", port=1)
COUNT = 300


@pytest.fixture
def export(client: httpx.Client, tmp_path: Path) -> Path:
    """An export of COUNT events, one of which is redacted, beside its proofs."""
    answer = client.post("/events/batch", json=[*ODD, *plain(COUNT - len(ODD))])
    assert answer.status_code == 201, answer.text
    answer = client.post("/redactions", json={"ids": [17], "reason": "Request 1", "dry_run": False})
    assert answer.status_code == 200, answer.text
    path = tmp_path / "events.ndjson"
    path.write_bytes(client.get("/events/export").content)
    status, lines, complaints = run_cli(
        NOWHERE, "ledger", "prove", "--url", str(client.base_url), "--export", str(path), API_KEY=API_KEY
    )
    assert status == 0, complaints
    (tmp_path / "proofs").write_text("".join(f"{line}\n" for line in lines))
    return path


def verify(export: Path, key: str = str(SIGNER.verifier)) -> tuple[int, list[str], str]:
    proofs = str(export.with_name("proofs"))
    return run_cli(NOWHERE, "verify", "--export", str(export), "--proofs", proofs, "--key", key)


def edit(path: Path, number: int, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the object in one line of a file."""
    lines = path.read_text().split("\n")
    members = json.loads(lines[number])
    change(members)
    lines[number] = json.dumps(members)
    path.write_text("\n".join(lines))


def test_an_export_as_it_came_is_proved(export: Path) -> None:
    status, said, complaints = verify(export)
    assert status == 0, complaints
    assert said[0] == f"{COUNT + 1} events, 1 of them redacted; the largest tree has {COUNT + 1} leaves"
    assert said[1] == "OK: every event is as it was recorded, in the order in which it was."
    compressed = export.with_name("events.ndjson.gz")
    compressed.write_bytes(gzip.compress(export.read_bytes()))
    assert verify(compressed)[:2] == (0, said)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("actor", "eve", PERSONAL),
        ("metadata", {"n": 1.5}, PERSONAL),
        ("redacted_at", "2026-01-01T00:00:00.000000Z", PERSONAL),
        ("nonce", None, PERSONAL),
        ("nonce", "xx", PERSONAL),
        ("event_type", "LOGOUT", ROW),
        ("timestamp", "2026-01-01T00:00:00.000000Z", ROW),
        ("outcome", "denied", ROW),
    ],
)
def test_a_changed_event_is_named(export: Path, name: str, value: Any, said: str) -> None:
    edit(export, 99, lambda event: event.update({name: value}))
    status, _, complaints = verify(export)
    assert (status, f"audit-service: Event 100: {said}" in complaints) == (1, True), complaints


def test_an_event_that_stands_elsewhere_or_was_made_up_has_no_proof(export: Path) -> None:
    edit(export, COUNT, lambda event: event.update({"id": COUNT + 2}))
    status, _, complaints = verify(export)
    assert (status, f"Event {COUNT + 2}: {NO_PROOF}" in complaints) == (1, True), complaints


def test_a_proof_that_does_not_hold_is_named(export: Path) -> None:
    proofs = export.with_name("proofs")
    edit(proofs, 99, lambda proof: proof.update({"leaf_index": 100}))
    edit(proofs, 100, lambda proof: proof["inclusion_path"].pop())
    edit(proofs, 101, lambda proof: proof["inclusion_path"].append("?"))
    status, _, complaints = verify(export)
    assert status == 1
    for event_id in (100, 101, 102):
        assert f"Event {event_id}: {NOT_PROVED}" in complaints


def test_a_cut_export_is_told(export: Path) -> None:
    export.write_text("".join(f"{line}\n" for line in export.read_text().split("\n")[:200]))
    status, _, complaints = verify(export)
    assert (status, "The export is cut" in complaints) == (1, True)
    export.write_text(export.read_text()[:-5])
    assert verify(export)[0] == 2


def test_a_checkpoint_of_another_key_proves_nothing(export: Path) -> None:
    status, said, complaints = verify(export, str(generate_signer(SIGNER.name).verifier))
    assert (status, said) == (2, [])
    assert "has not signed it" in complaints
