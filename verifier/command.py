"""`python cli.py verify`: a plain verdict. Status 0: nobody changed the log, 1: somebody did, 2: nothing was told."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from config import Settings
from db import open_database
from ledger.notes import NoteError, open_checkpoint, parse_note, parse_tree_head, parse_verifier
from problems import Problem
from verifier.database import Verdict, verify_database
from verifier.promises import Promise

_MOST_LINES = 20  # of what differs


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--key", metavar="VKEY", help="the log's public key")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="a checkpoint that you kept")
    parser.add_argument("--jobs", type=int, help="processes (as many as there are cores)")
    parser.set_defaults(run=verify)


def verify(settings: Settings, arguments: Namespace) -> int:
    try:
        return _verify_database(settings, arguments)
    except (NoteError, OSError) as error:
        print(f"audit-service: {arguments.checkpoint or arguments.key}: {error}", file=sys.stderr)
        return 2
    except Problem as problem:
        print(f"audit-service: {problem.detail}", file=sys.stderr)
        return 2


def _verify_database(settings: Settings, arguments: Namespace) -> int:
    promises = [] if arguments.checkpoint is None else [read_promise(arguments.checkpoint, arguments.key)]
    with open_database(settings) as database, tqdm(unit=" events", desc="verifying") as progress:

        def advance(count: int, total: int) -> None:
            progress.total = total
            progress.update(count)

        verdict = verify_database(database.url, promises, advance, arguments.jobs)
    return _print_verdict(verdict, promises)


def read_promise(path: Path, key: str | None) -> Promise:
    """The checkpoint in this file, its signature checked where the key is given; raises NoteError, OSError."""
    note = path.read_text()
    if key is None:
        return Promise(parse_tree_head(parse_note(note).text), f"the checkpoint in {path}")
    return Promise(open_checkpoint(note, parse_verifier(key))[0], f"the checkpoint in {path}")


def _print_verdict(verdict: Verdict, promises: Sequence[Promise]) -> int:
    newest = verdict.first_id + verdict.size - 1
    print(f"{verdict.size} events, ids {verdict.first_id} to {newest}, root {verdict.root.hex()}")
    if verdict.dropped:
        print(f"The first {verdict.dropped} were dropped by retention: their hashes are in the tree.")
    if verdict.redacted:
        print(f"{verdict.redacted} were redacted: their hashes are in the tree.")
    if verdict.adoption is not None:
        print(f"Event {verdict.adoption.event_id} vouches for {verdict.adoption.count} rows from before the ledger.")
    elif verdict.adopted:
        print(f"Nothing vouches for {verdict.adopted} rows from before the ledger: see `ledger adopt`.")
    complaints = [*map(str, verdict.differences[:_MOST_LINES]), *verdict.complaints]
    if len(verdict.differences) > _MOST_LINES:
        complaints.append(f"… and {len(verdict.differences) - _MOST_LINES} more.")
    for complaint in complaints:
        print(f"audit-service: {complaint}", file=sys.stderr)
    if complaints:
        first = f" The first wrong event is {verdict.differences[0].first_id}." if verdict.differences else ""
        print(f"CHANGED: the log is not what was recorded.{first}")
        return 1
    print("OK: every event is as it was recorded, in the order in which it was.")
    print(_known(promises))
    return 0


def _known(promises: Sequence[Promise]) -> str:
    """What the verdict rests on: without a checkpoint from outside a whole rewrite cannot be told."""
    if promises:
        return f"It begins with the {promises[0].head.size} events of {promises[0].where}."
    return "Whoever could write all of it anew is found by a checkpoint that you kept: --checkpoint FILE."
