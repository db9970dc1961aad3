"""Operator commands: python cli.py COMMAND."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from tqdm import tqdm

from auth import api_key_in_force
from config import ConfigurationError, Settings, load_settings, parse_duration
from db import Database, open_database, open_owner
from housekeeping import adoption, holds, redaction, rewrite
from keys import store as keys
from ledger.notes import NoteError, Signer, decode_note, generate_signer, parse_verifier
from problems import Problem
from proofs.checkpoints import find_newest
from proofs.continuation import record_continuation
from proofs.signing import signer_in_force
from proofs.witnesses import WitnessRefused, keep_cosignature, request_cosignature, send_to_witness
from schemas import (
    SCOPES,
    ApiKey,
    ApiKeyFilter,
    ApiKeyIn,
    LegalHold,
    LegalHoldFilter,
    LegalHoldIn,
    NewApiKey,
    RedactionIn,
)
from server import serve_alone, serve_with_workers
from verifier import command as verify


def main() -> int:
    """Run one command; a wrong setting is told in one line, without a traceback."""
    parser = ArgumentParser(prog="cli.py", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("serve", help="run the service until it is told to stop").set_defaults(run=serve)
    commands.add_parser("run", help="try it on this machine: migrate, serve, show the API key").set_defaults(run=run)
    _add_hold_commands(commands.add_parser("holds", help="place, list and release legal holds"))
    _add_key_commands(commands.add_parser("keys", help="make, list, revoke and rotate API keys"))
    _add_redact_command(commands.add_parser("redact", help="erase personal data; a dry run without --yes"))
    _add_ledger_commands(commands.add_parser("ledger", help="what is done with the Merkle tree"))
    verify.add_arguments(commands.add_parser("verify", help="proof that nobody changed the log"))
    arguments = parser.parse_args()
    try:
        return int(arguments.run(load_settings(), arguments))
    except ConfigurationError as error:
        print(f"audit-service: {error}", file=sys.stderr)
        return 2


def serve(settings: Settings, _: Namespace) -> int:
    """Serve HTTP until SIGINT or SIGTERM, then finish the requests under way."""
    api_key_in_force(settings)  # a missing one stops the start here, in one line; so does a signing key
    signer_in_force(settings)
    return serve_with_workers(settings) if settings.workers > 1 else serve_alone(settings)


def run(settings: Settings, _: Namespace) -> int:
    """`make run`: serve in development, on a migrated database, and print how to send the first event."""
    settings = replace(settings, environment="development", run_migrations=True)
    return serve_alone(settings, _banner(settings, api_key_in_force(settings)))


def _add_hold_commands(parser: ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    place = actions.add_parser("place", help="keep the events that match all that is named")
    for name in ("tenant", "actor", "resource"):
        place.add_argument(f"--{name}")
    place.add_argument("--reason", required=True)
    place.set_defaults(run=_on_database, model=LegalHold, act=_place_hold)
    release = actions.add_parser("release", help="release a hold by its id")
    release.add_argument("id", type=int)
    release.set_defaults(run=_on_database, model=LegalHold, act=_release_hold)
    for action in (place, release):
        action.add_argument("--by", required=True, help="who asks for it, for the record")
    listing = actions.add_parser("list", help="those in force")
    listing.add_argument("--all", action="store_true", help="released ones too")
    listing.set_defaults(run=_on_database, model=LegalHold, act=_list_holds)


def _on_database(settings: Settings, arguments: Namespace) -> int:
    """Do it on the configured database and print what comes of it, each as a line of JSON."""
    try:
        with open_database(settings) as database:
            for row in arguments.act(database, arguments):
                print(arguments.model.model_validate(row).model_dump_json())
    except ValidationError as error:
        print(f"audit-service: {_first_complaint(error)}", file=sys.stderr)
        return 2
    except Problem as problem:
        print(f"audit-service: {_in_one_line(problem)}", file=sys.stderr)
        return 1
    return 0


def _first_complaint(error: ValidationError) -> str:
    first = error.errors()[0]
    return ": ".join([*map(str, first["loc"][:1]), first["msg"]])


def _in_one_line(problem: Problem) -> str:
    return "; ".join([problem.detail, *(f"{error['location']}: {error['message']}" for error in problem.errors)])


def _place_hold(database: Database, arguments: Namespace) -> Iterator[Any]:
    wanted = {name: getattr(arguments, name) for name in LegalHoldIn.model_fields}
    yield holds.place_hold(database, LegalHoldIn(**wanted), arguments.by)


def _release_hold(database: Database, arguments: Namespace) -> Iterator[Any]:
    yield holds.release_hold(database, arguments.id, arguments.by)


def _list_holds(database: Database, arguments: Namespace) -> Iterator[Any]:
    after: int | None = 0
    while after is not None:
        page = holds.list_holds(database, LegalHoldFilter(active=None if arguments.all else True, after=after))
        yield from page.legal_holds
        after = page.next_after


def _add_key_commands(parser: ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    create = actions.add_parser("create", help="make a key, which is shown this once")
    create.add_argument("--name", required=True, help="who uses it")
    create.add_argument("--scopes", required=True, nargs="+", choices=SCOPES)
    create.add_argument("--tenant", help="the only one whose events it writes and sees")
    create.add_argument("--event-types", nargs="+", metavar="PREFIX", help="what it writes begins with one of these")
    create.add_argument("--expires-at", help="RFC 3339, like 2027-12-31T00:00:00Z")
    create.set_defaults(run=_on_database, model=NewApiKey, act=_create_key)
    listing = actions.add_parser("list", help="those that work")
    listing.add_argument("--all", action="store_true", help="revoked and expired ones too")
    listing.add_argument("--tenant")
    listing.set_defaults(run=_on_database, model=ApiKey, act=_list_keys)
    revoke = actions.add_parser("revoke", help="revoke a key by its id: refused everywhere within 5 s")
    revoke.set_defaults(run=_on_database, model=ApiKey, act=_revoke_key)
    rotate = actions.add_parser("rotate", help="make a key that replaces another; both work for the grace period")
    rotate.add_argument("--grace", default="7d", help="how long the old one works on, like 90s, 24h or 7d (default)")
    rotate.set_defaults(run=_on_database, model=NewApiKey, act=_rotate_key)
    for action in (revoke, rotate):
        action.add_argument("id")
    for action in (create, revoke, rotate):
        action.add_argument("--by", required=True, help="who asks for it, for the record")


def _create_key(database: Database, arguments: Namespace) -> Iterator[Any]:
    wanted = {name: getattr(arguments, name) for name in ApiKeyIn.model_fields}
    yield keys.create_key(database, ApiKeyIn(**wanted), arguments.by)


def _list_keys(database: Database, arguments: Namespace) -> Iterator[Any]:
    wanted = ApiKeyFilter(active=None if arguments.all else True, tenant=arguments.tenant)
    while True:
        page = keys.list_keys(database, wanted)
        yield from page.keys
        if page.next_after is None:
            return
        wanted.after = page.next_after


def _revoke_key(database: Database, arguments: Namespace) -> Iterator[Any]:
    yield keys.revoke_key(database, arguments.id, arguments.by)


def _rotate_key(database: Database, arguments: Namespace) -> Iterator[Any]:
    yield keys.rotate_key(database, arguments.id, parse_duration("--grace", arguments.grace), arguments.by)


def _add_redact_command(parser: ArgumentParser) -> None:
    parser.add_argument("--actor", help="the person: all events that have it as their actor")
    parser.add_argument("--tenant", help="with --actor: only in this tenant's events")
    parser.add_argument("--id", type=int, action="append", dest="ids", help="an event; may be repeated")
    parser.add_argument("--reason", required=True, help="for the record, which must not name the person")
    parser.add_argument("--by", required=True, help="who asks for it, for the record")
    parser.add_argument("--yes", action="store_true", help="erase; otherwise only count")
    parser.set_defaults(run=_on_redaction)


def _on_redaction(settings: Settings, arguments: Namespace) -> int:
    """Count what would be erased and, with --yes, erase it and take it out of the files."""
    try:
        wanted = RedactionIn(**{name: getattr(arguments, name) for name in ("actor", "tenant", "ids", "reason")})
        with open_database(settings) as service, open_owner(settings, service) as database:
            extent = redaction.measure(database, wanted, arguments.by)
            print(f"{extent.count} events to redact, {extent.held} kept by legal holds")
            if not arguments.yes:
                print("Nothing was erased: this was a dry run. Add --yes to erase.")
                return 0
            return _redact(database, wanted, arguments.by, extent.count)
    except ValidationError as error:
        print(f"audit-service: {error.errors()[0]['msg']}", file=sys.stderr)
        return 2
    except Problem as problem:
        reasons = [f"{error['location'].removeprefix('body.')} {error['message']}" for error in problem.errors]
        print(f"audit-service: {'; '.join(reasons) or problem.detail}", file=sys.stderr)
        return 1


def _redact(database: Database, wanted: RedactionIn, by: str, expected: int) -> int:
    """Status 1 where files still hold what was erased: the service goes on trying."""
    name, is_recorded = redaction.new_name(), False
    with tqdm(total=expected, unit=" events", desc="redacting") as progress:
        for count in redaction.redact(database, wanted, by, name):
            progress.update(count)
            is_recorded = True
    with tqdm(total=len(rewrite.relations_due(database)), unit=" tables", desc="rewriting") as progress:
        for _ in rewrite.rewrite_erased(database):
            progress.update()
    print(f"Recorded as {name}" if is_recorded else "Nothing was found to erase, and nothing recorded.")
    if due := rewrite.relations_due(database):
        print(f"Erased, and still in the files of: {', '.join(due)}. See runbook.md, Redact.", file=sys.stderr)
        return 1
    return 0


def _add_ledger_commands(parser: ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    keygen = actions.add_parser("keygen", help="make the pair of keys with which checkpoints are signed and verified")
    keygen.add_argument("--origin", help="the log's name, like audit.example.com/log; LEDGER_ORIGIN where left out")
    keygen.set_defaults(run=_on_keygen)
    verify.add_prove_arguments(actions.add_parser("prove", help="print the proofs of an export's events"))
    actions.add_parser("adopt", help="vouch for the rows from before the ledger").set_defaults(run=_on_adoption)
    request = actions.add_parser("cosign-request", help="print what a witness is asked to sign")
    cosign = actions.add_parser("cosign", help="keep what a witness signed, and serve it")
    source = cosign.add_mutually_exclusive_group(required=True)
    source.add_argument("--url", help="the witness' submission prefix: ask it there")
    source.add_argument("--request", help="the file that cosign-request printed; the answer comes on standard input")
    for action in (request, cosign):
        action.add_argument("--witness", required=True, metavar="VKEY", help="the witness' public key")
        action.add_argument("--old-size", type=_leaf_count, help="what it signed last, where that was not kept here")
    request.set_defaults(run=_on_ledger, act=_print_cosign_request)
    cosign.set_defaults(run=_on_ledger, act=_cosign)
    going_on = actions.add_parser("continue", help="after a restored backup: record what the old log vouched for")
    going_on.add_argument("--checkpoint", required=True, help="the file with the old log's last checkpoint")
    going_on.add_argument("--key", required=True, metavar="VKEY", help="the old log's public key")
    going_on.add_argument("--by", required=True, help="who asks for it, for the record")
    going_on.set_defaults(run=_on_ledger, act=_continue_log)


def _leaf_count(argument: str) -> int:
    count = int(argument)
    if count < 0:
        raise ValueError(argument)
    return count


def _on_keygen(settings: Settings, arguments: Namespace) -> int:
    """Print the pair; the secret half is for LEDGER_SIGNING_KEY, the other for whoever verifies."""
    origin = arguments.origin or settings.ledger_origin
    if origin is None:
        raise ConfigurationError("LEDGER_ORIGIN: not set, and no --origin given")
    signer = generate_signer(origin)
    print(f"LEDGER_SIGNING_KEY={signer.secret_text()}\nPublic key: {signer.verifier}")
    return 0


def _on_ledger(settings: Settings, arguments: Namespace) -> int:
    """Do it with the configured database and the log's key; whatever it lacks is told in a line."""
    signer = signer_in_force(settings)
    try:
        with open_database(settings) as database:
            arguments.act(database, signer, arguments)
    except (Problem, NoteError, WitnessRefused, OSError) as error:
        print(f"audit-service: {error}", file=sys.stderr)
        return 1
    return 0


def _print_cosign_request(database: Database, signer: Signer, arguments: Namespace) -> None:
    print(_cosign_request(database, signer, arguments), end="")


def _cosign_request(database: Database, signer: Signer, arguments: Namespace) -> str:
    checkpoint = find_newest(database, signer.verifier)
    return request_cosignature(database, checkpoint, parse_verifier(arguments.witness), arguments.old_size)


def _cosign(database: Database, signer: Signer, arguments: Namespace) -> None:
    if arguments.url:
        request = _cosign_request(database, signer, arguments)
        answer = send_to_witness(arguments.url, request)
    else:
        request = decode_note(Path(arguments.request).read_bytes())
        answer = decode_note(sys.stdin.buffer.read())
    size = keep_cosignature(database, signer.verifier, request, parse_verifier(arguments.witness), answer)
    print(f"The checkpoint of size {size} has the witness' signature: GET /ledger/checkpoint?cosigned=true")


def _continue_log(database: Database, signer: Signer, arguments: Namespace) -> None:
    note = decode_note(Path(arguments.checkpoint).read_bytes())
    found = record_continuation(database, note, parse_verifier(arguments.key), signer.name, arguments.by)
    print(
        f"{found.old.origin} vouched for {found.old.size} events: at least {found.kept_at_least} are here,"
        f" at most {found.lost_at_most} are lost."
    )
    print(f"Recorded as audit.ledger.continue. {signer.name} goes on.")


def _on_adoption(settings: Settings, _: Namespace) -> int:
    """Adopt the rows from before the ledger or, where that was done, check them: status 1 where they differ."""
    try:
        with open_database(settings) as service, open_owner(settings, service) as database:
            with database.transaction() as connection:
                recorded, count = adoption.find_adoption(connection), adoption.count_rows(connection)
            with tqdm(total=count, unit=" rows", desc="hashing") as progress:
                if recorded is not None:
                    difference = adoption.check(database, recorded, progress.update)
                else:
                    difference, recorded = None, adoption.adopt(database, progress.update)
    except Problem as problem:
        print(f"audit-service: {problem.detail}", file=sys.stderr)
        return 1
    if recorded is None:
        print("There is nothing to adopt: no row is older than the ledger.")
    else:
        print(f"Event {recorded.event_id} vouches for {recorded.count} rows, root {recorded.root.hex()}.")
    if difference is not None:
        print(f"audit-service: {difference}", file=sys.stderr)
    return 0 if difference is None else 1


def _banner(settings: Settings, api_key: str) -> str:
    url = f"http://{settings.host}:{settings.port}"
    return f"""
  Audit service on {url}    API docs: {url}/docs
  API key: {api_key}
  The log's public key, for whoever verifies: {signer_in_force(settings).verifier}

  curl -X POST {url}/events -H 'X-API-Key: {api_key}' -H 'Content-Type: application/json' \\
       -d '{{"event_type": "LOGIN", "actor": "alice"}}'

  Ctrl-C stops the service and its database.
"""


if __name__ == "__main__":
    sys.exit(main())
