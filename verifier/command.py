"""`python cli.py verify`: a plain verdict. Status 0: nobody changed the log, 1: somebody did, 2: nothing was told."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from config import Settings
from db import open_database
from ledger.notes import NoteError, Verifier, open_checkpoint, parse_note, parse_tree_head, parse_verifier
from problems import Problem
from verifier.database import Verdict, verify_database
from verifier.promises import Promise

_MOST_LINES = 20  # of what differs


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--key", metavar="VKEY", help="the log's public key")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="a checkpoint that you kept")
    parser.add_argument("--jobs", type=int, help="processes that read the database (as many as there are cores)")
    parser.set_defaults(run=verify)


def verify(settings: Settings, arguments: Namespace) -> int:
    """Verify the log in the way that the arguments name."""
    try:
        key = None if arguments.key is None else parse_verifier(arguments.key)
        return _verify_database(settings, arguments, key)
    except (NoteError, OSError) as error:
        print(f"audit-service: {error}", file=sys.stderr)
    except Problem as problem:
        print(f"audit-service: {problem.detail}", file=sys.stderr)
    return 2


def _verify_database(settings: Settings, arguments: Namespace, key: Verifier | None) -> int:
    kept = [] if arguments.checkpoint is None else [read_promise(arguments.checkpoint, key)]
    with open_database(settings) as database, tqdm(unit=" events", desc="verifying") as progress:

        def advance(count: int, total: int) -> None:
            progress.total = total
            progress.update(count)

        verdict = verify_database(database.url, kept, advance, key, arguments.jobs)
    _describe(verdict, key)
    complaints = [*map(str, verdict.differences[:_MOST_LINES]), *verdict.complaints]
    if len(verdict.differences) > _MOST_LINES:
        complaints.append(f"… and {len(verdict.differences) - _MOST_LINES} more.")
    first = f" The first wrong event is {verdict.differences[0].first_id}." if verdict.differences else ""
    return conclude(complaints, first, _basis(kept))


def read_promise(path: Path, key: Verifier | None) -> Promise:
    """The checkpoint in this file, its signature checked where the key is known; raises NoteError, OSError."""
    note = path.read_text(encoding="utf-8")
    head = parse_tree_head(parse_note(note).text) if key is None else open_checkpoint(note, key)[0]
    return Promise(head, f"the checkpoint in {path}")


def conclude(complaints: Sequence[str], first: str, basis: str) -> int:
    """Print what is wrong and the verdict; return the exit status."""
    for complaint in complaints:
        print(f"audit-service: {complaint}", file=sys.stderr)
    if complaints:
        print(f"CHANGED: the log is not what was recorded.{first}")
        return 1
    print("OK: every event is as it was recorded, in the order in which it was.")
    print(basis)
    return 0


def _describe(verdict: Verdict, key: Verifier | None) -> None:
    newest = verdict.first_id + verdict.size - 1
    print(f"{verdict.size} events, ids {verdict.first_id} to {newest}, root {verdict.root.hex()}")
    if verdict.checkpoints:
        print(
            f"{verdict.checkpoints} checkpoints in the database{'' if key else ', signatures unchecked without --key'}"
        )
    if verdict.dropped:
        print(f"The first {verdict.dropped} were dropped by retention: their hashes are in the tree.")
    if verdict.redacted:
        print(f"{verdict.redacted} were redacted: their hashes are in the tree.")
    if verdict.adoption is not None:
        print(f"Event {verdict.adoption.event_id} vouches for {verdict.adoption.count} rows from before the ledger.")
    elif verdict.adopted:
        print(f"Nothing vouches for {verdict.adopted} rows from before the ledger: see `ledger adopt`.")


def _basis(kept: Sequence[Promise]) -> str:
    """What the verdict rests on: without a checkpoint from outside a whole rewrite cannot be told."""
    if kept:
        return f"It begins with the {kept[0].head.size} events of {kept[0].where}."
    return "Whoever could write all of it anew is found by a checkpoint that you kept: --checkpoint FILE."
