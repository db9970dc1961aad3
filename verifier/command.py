"""`python cli.py verify`: a plain verdict. Status 0: nobody changed the log, 1: somebody did, 2: nothing was told."""

import asyncio
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from auth import api_key_in_force
from config import ConfigurationError, Settings
from db import open_database
from ledger.notes import NoteError, Verifier, decode_note, open_checkpoint, parse_note, parse_tree_head, parse_verifier
from problems import Problem
from proofs.sink import FileSink
from verifier.database import Verdict, verify_database
from verifier.differences import Difference
from verifier.export import NoExport, proofs_of, verify_export
from verifier.promises import Promise
from verifier.remote import RemoteError, verify_remote

_MOST_LINES = 20  # of what differs


_Way = Callable[[Settings, Namespace, Verifier | None], int]


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--key", metavar="VKEY", help="the log's public key")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="a checkpoint that you kept")
    parser.add_argument("--url", help="verify from outside, over HTTP: needs --key, and goes on from --checkpoint")
    parser.add_argument("--all", action="store_true", help="with --url: what was verified before, too")
    parser.add_argument(
        "--pruned", type=int, default=0, metavar="LEAF", help="with --url: retention dropped the leaves below this one"
    )
    parser.add_argument(
        "--export", type=Path, metavar="FILE", help="verify an NDJSON export offline: needs --key, --proofs"
    )
    parser.add_argument("--proofs", type=Path, metavar="FILE", help="what `ledger prove` printed for it")
    parser.add_argument("--jobs", type=int, help="processes that read the database (as many as there are cores)")
    parser.set_defaults(run=verify)


def add_prove_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--url", required=True, help="where the service is")
    parser.add_argument("--export", type=Path, required=True, metavar="FILE", help="an NDJSON export, gzip or not")
    parser.set_defaults(run=prove)


def verify(settings: Settings, arguments: Namespace) -> int:
    """Verify the log in the way that the arguments name."""
    way: _Way = _verify_database if arguments.url is None else _verify_remote
    if arguments.export is not None:
        way = _verify_export
    try:
        return way(settings, arguments, None if arguments.key is None else parse_verifier(arguments.key))
    except (NoteError, RemoteError, NoExport, OSError) as error:
        print(f"audit-service: {error}", file=sys.stderr)
    except Problem as problem:
        print(f"audit-service: {problem.detail}", file=sys.stderr)
    return 2


def prove(settings: Settings, arguments: Namespace) -> int:
    """`ledger prove`: print the proofs of an export's events."""

    async def print_proofs() -> None:
        with tqdm(unit=" proofs", desc="proving") as progress:
            async for line in proofs_of(arguments.url, api_key_in_force(settings), arguments.export):
                sys.stdout.buffer.write(line)
                progress.update(1)

    try:
        asyncio.run(print_proofs())
    except (RemoteError, NoExport, OSError) as error:
        print(f"audit-service: {error}", file=sys.stderr)
        return 1
    return 0


def _verify_database(settings: Settings, arguments: Namespace, key: Verifier | None) -> int:
    kept = [] if arguments.checkpoint is None else [read_promise(arguments.checkpoint, key)]
    with open_database(settings) as database, tqdm(unit=" events", desc="verifying") as progress:
        verdict = verify_database(database.url, kept, _progress(progress), key, arguments.jobs)
    _describe(verdict, key)
    complaints = [*_first_of(verdict.differences), *verdict.complaints]
    first = f" The first wrong event is {verdict.differences[0].first_id}." if verdict.differences else ""
    return conclude(complaints, first, _basis(kept))


def _verify_remote(settings: Settings, arguments: Namespace, key: Verifier | None) -> int:
    """Go on from the checkpoint that was kept and keep the new one instead, if all is well."""
    if key is None or arguments.checkpoint is None:
        raise ConfigurationError("verify --url: needs --key, and --checkpoint: a file, made the first time")
    sink = FileSink(arguments.checkpoint)
    kept = sink.read()
    old = None if kept is None else open_checkpoint(kept, key)[0]
    with tqdm(unit=" entries", desc="verifying") as progress:
        seen = asyncio.run(
            verify_remote(
                arguments.url,
                api_key_in_force(settings),
                key,
                old,
                _progress(progress),
                pruned=arguments.pruned,
                is_whole=arguments.all,
            )
        )
    print(
        f"{seen.head.origin}: {seen.head.size} events, root {seen.head.root.hex()}, checked from leaf {seen.start} on"
    )
    if seen.pruned > seen.start:
        print(
            f"Entries below leaf {seen.pruned} are not served: you say that retention dropped those below"
            f" {arguments.pruned}. Their hashes are in the tree."
        )
    basis = f"Nothing was known of this log: its checkpoint is trusted from now on, in {arguments.checkpoint}."
    if old is not None:
        basis = (
            f"It begins with the tree of {old.size} events that you had a checkpoint of; {arguments.checkpoint} is new."
        )
    if seen.start:
        basis = f"{basis} Entries below leaf {seen.start} were not read: --all reads them."
    if not seen.complaints:
        sink.write(seen.note)
    since = max(seen.start, seen.pruned)
    return conclude(_first_of(seen.complaints), "", basis, f"entry from leaf {since} on" if since else "entry")


def _verify_export(_: Settings, arguments: Namespace, key: Verifier | None) -> int:
    if key is None or arguments.proofs is None:
        raise ConfigurationError("verify --export: needs --key, and --proofs: the file that `ledger prove` printed")
    with tqdm(unit=" events", desc="verifying") as progress:
        proved = verify_export(arguments.export, arguments.proofs, key, progress.update)
    print(f"{proved.count} events, {proved.redacted} of them redacted; the largest tree has {proved.largest} leaves")
    complaints = _first_of(proved.differences)
    if not proved.is_complete:
        complaints.append("The export is cut: it lacks the last line, which says how many events it has.")
    if proved.has_more:
        complaints.append("There is more behind the last line of the export.")
    return conclude(complaints, "", "What is not in the export, for instance because of its filters, it does not show.")


def _first_of(differences: Sequence[Difference | str]) -> list[str]:
    lines = [str(difference) for difference in differences[:_MOST_LINES]]
    if len(differences) > _MOST_LINES:
        lines.append(f"… and {len(differences) - _MOST_LINES} more.")
    return lines


def _progress(bar: "tqdm[NoReturn]") -> Callable[[int, int], object]:
    def advance(count: int, total: int) -> None:
        bar.total = total
        bar.update(count)

    return advance


def read_promise(path: Path, key: Verifier | None) -> Promise:
    """The checkpoint in this file, its signature checked where the key is known; raises NoteError, OSError."""
    note = decode_note(path.read_bytes())
    head = parse_tree_head(parse_note(note).text) if key is None else open_checkpoint(note, key)[0]
    return Promise(head, f"the checkpoint in {path}")


def conclude(complaints: Sequence[str], first: str, basis: str, what: str = "event") -> int:
    """Print what is wrong and the verdict, on every `what`; return the exit status."""
    for complaint in complaints:
        print(f"audit-service: {complaint}", file=sys.stderr)
    if complaints:
        print(f"CHANGED: the log is not what was recorded.{first}")
        return 1
    print(f"OK: every {what} is as it was recorded, in the order in which it was.")
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
