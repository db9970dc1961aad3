"""`python cli.py verify --export`: an export proves itself, offline, with proofs that were fetched before."""

import gzip
import json
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
from conftest import API_KEY, SIGNER, run_cli, settings_for
from sqlalchemy.engine import URL
from test_verify import ODD, plain

from ledger.notes import generate_signer
from queries.lines import EXPORTED_FIELDS
from verifier.command import add_arguments
from verifier.command import verify as verify_by
from verifier.differences import PERSONAL, ROW
from verifier.entries import MEMBERS
from verifier.export import MORE_MEMBERS, NO_PROOF, NOT_IN_ORDER, NOT_PROVED

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


def rewrite_lines(path: Path, change: Callable[[list[str]], object]) -> None:
    """Change the lines of a file, the last of which is empty."""
    lines = path.read_text().split("\n")
    change(lines)
    path.write_text("\n".join(lines))


def test_the_members_that_are_looked_for_are_those_that_exports_have() -> None:
    assert frozenset(EXPORTED_FIELDS) == MEMBERS


def test_what_stands_behind_the_last_line_is_told(export: Path) -> None:
    rewrite_lines(export, lambda lines: lines.insert(-1, lines[98].replace("1", "2")))
    status, _, complaints = verify(export)
    assert (status, complaints.count("There is more behind the last line of the export.")) == (1, 1), complaints


@pytest.mark.parametrize("place", [100, 150])
def test_an_event_that_stands_twice_is_told(export: Path, place: int) -> None:
    rewrite_lines(export, lambda lines: lines.insert(place, lines[99]))
    edit(export, COUNT + 2, lambda totals: totals.update({"count": COUNT + 2}))
    status, _, complaints = verify(export)
    assert (status, f"Event 100: {NOT_IN_ORDER}\n" in complaints) == (1, True), complaints


def test_members_that_no_export_has_are_told(export: Path) -> None:
    edit(export, 99, lambda event: event.update({"severity": "critical"}))
    status, _, complaints = verify(export)
    assert (status, f"Event 100: {MORE_MEMBERS}\n" in complaints) == (1, True), complaints


def test_a_last_line_that_says_more_is_none(export: Path) -> None:
    edit(export, COUNT + 1, lambda totals: totals.update({"actor": "eve"}))
    status, _, complaints = verify(export)
    assert (status, "it lacks the last line" in complaints) == (1, True), complaints


@pytest.mark.parametrize(
    ("honest", "twice"),
    [('"actor":', '"actor":"eve","actor":'), ('"metadata":', '"metadata":[{"m":1,"m":1}],"nothing":')],
)
def test_a_name_that_stands_twice_is_no_json_that_all_read_alike(export: Path, honest: str, twice: str) -> None:
    def change(lines: list[str]) -> None:
        assert honest in lines[99]
        lines[99] = lines[99].replace(honest, twice)

    rewrite_lines(export, change)
    status, said, complaints = verify(export)
    assert (status, said) == (2, [])
    assert "no JSON object whose names differ" in complaints


UNLIKE_PROOFS: list[dict[str, Any]] = [
    {"inclusion_path": ["é"]},
    {"inclusion_path": "é"},
    {"inclusion_path": [1]},
    {"leaf_index": "1"},
    {"leaf_index": 1e300},
    {"leaf_index": -(2**63)},
    {"checkpoint": []},
    {"checkpoint": "é"},
    {"entry": None},
    {"event_id": "1"},
]


def test_proofs_that_hold_anything_never_end_in_a_traceback(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    proofs = export.with_name("proofs")
    honest = proofs.read_bytes()
    for members in UNLIKE_PROOFS:
        proofs.write_bytes(honest)
        rewrite_lines(proofs, lambda lines: lines.insert(99, json.dumps(json.loads(lines.pop(99)) | members)))  # noqa: B023 - at once
        assert verify_here(export, capsys) in (1, 2), members


NOISE = [
    b"\xff",
    b"\0",
    b"[",
    b"[1]",
    b"null",
    b'"id"',
    b"7",
    b"{}",
    b'{"id":[]}',
    b"NaN",
    b"1e999",
    b'"\\ud800"',
    b"\n",
]


@pytest.mark.parametrize("name", ["events.ndjson", "proofs"])
def test_files_that_hold_anything_never_end_in_a_traceback(
    export: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path, random = export.with_name(name), Random(0)  # noqa: S311 - no secret
    honest = path.read_bytes()
    deep = [b"[" * 900 + b"]" * 900, b"[" * 100_000, b'{"a":' * 900 + b"1" + b"}" * 900]
    for number in range(100):
        noise = random.choice([*NOISE, *deep])
        at = random.choice([random.randrange(len(honest)), honest.find(b'"metadata":') + 11, 0])
        path.write_bytes(honest[:at] + noise + honest[at + random.choice([0, 1, 4, 100]) :])
        if number % 3 == 0:
            packed = bytearray(gzip.compress(path.read_bytes()))
            packed[random.randrange(len(packed))] ^= 1 << random.randrange(8)
            path.write_bytes(packed)
        assert verify_here(export, capsys) in (0, 1, 2)


def verify_here(export: Path, capsys: pytest.CaptureFixture[str]) -> int:
    """The status that the command ends with, in this process; whatever it raises comes out."""
    parser = ArgumentParser()
    add_arguments(parser)
    proofs = str(export.with_name("proofs"))
    arguments = ["--export", str(export), "--proofs", proofs, "--key", str(SIGNER.verifier)]
    status = verify_by(settings_for(NOWHERE), parser.parse_args(arguments))
    capsys.readouterr()
    return status


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
