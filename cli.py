"""Operator commands: python cli.py COMMAND."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pydantic import ValidationError
from tqdm import tqdm

from auth import api_key_in_force
from config import ConfigurationError, Settings, load_settings
from db import Database, open_database, open_owner
from housekeeping import adoption, holds, redaction, rewrite
from problems import Problem
from schemas import LegalHold, LegalHoldFilter, LegalHoldIn, RedactionIn
from server import serve_alone, serve_with_workers


def main() -> int:
    """Run one command; a wrong setting is told in one line, without a traceback."""
    parser = ArgumentParser(prog="cli.py", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("serve", help="run the service until it is told to stop").set_defaults(run=serve)
    commands.add_parser("run", help="try it on this machine: migrate, serve, show the API key").set_defaults(run=run)
    _add_hold_commands(commands.add_parser("holds", help="place, list and release legal holds"))
    _add_redact_command(commands.add_parser("redact", help="erase personal data; a dry run without --yes"))
    _add_ledger_commands(commands.add_parser("ledger", help="what is done with the Merkle tree"))
    arguments = parser.parse_args()
    try:
        return int(arguments.run(load_settings(), arguments))
    except ConfigurationError as error:
        print(f"audit-service: {error}", file=sys.stderr)
        return 2


def serve(settings: Settings, _: Namespace) -> int:
    """Serve HTTP until SIGINT or SIGTERM, then finish the requests under way."""
    api_key_in_force(settings)  # a missing one stops the start here, in one line
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
    place.set_defaults(run=_on_holds, act=_place_hold)
    release = actions.add_parser("release", help="release a hold by its id")
    release.add_argument("id", type=int)
    release.set_defaults(run=_on_holds, act=_release_hold)
    for action in (place, release):
        action.add_argument("--by", required=True, help="who asks for it, for the record")
    listing = actions.add_parser("list", help="those in force")
    listing.add_argument("--all", action="store_true", help="released ones too")
    listing.set_defaults(run=_on_holds, act=_list_holds)


def _on_holds(settings: Settings, arguments: Namespace) -> int:
    """Do it on the configured database and print each hold as a line of JSON."""
    try:
        with open_database(settings) as database:
            for hold in arguments.act(database, arguments):
                print(LegalHold.model_validate(hold).model_dump_json())
    except ValidationError as error:
        print(f"audit-service: {error.errors()[0]['msg']}", file=sys.stderr)
        return 2
    except Problem as problem:
        print(f"audit-service: {problem.detail}", file=sys.stderr)
        return 1
    return 0


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
            print(f"{len(extent.ids)} events to redact, {extent.held} kept by legal holds")
            if not arguments.yes:
                print("Nothing was erased: this was a dry run. Add --yes to erase.")
                return 0
            return _redact(database, wanted, arguments.by, len(extent.ids))
    except ValidationError as error:
        print(f"audit-service: {error.errors()[0]['msg']}", file=sys.stderr)
        return 2
    except Problem as problem:
        reasons = [f"{error['location'].removeprefix('body.')} {error['message']}" for error in problem.errors]
        print(f"audit-service: {'; '.join(reasons) or problem.detail}", file=sys.stderr)
        return 1


def _redact(database: Database, wanted: RedactionIn, by: str, expected: int) -> int:
    """Status 1 where files still hold what was erased: the service goes on trying."""
    name = redaction.new_name()
    with tqdm(total=expected, unit=" events", desc="redacting") as progress:
        for count in redaction.redact(database, wanted, by, name):
            progress.update(count)
    with tqdm(total=len(rewrite.relations_due(database)), unit=" tables", desc="rewriting") as progress:
        for _ in rewrite.rewrite_erased(database):
            progress.update()
    print(f"Recorded as {name}")
    if due := rewrite.relations_due(database):
        print(f"Erased, and still in the files of: {', '.join(due)}. See runbook.md, Redact.", file=sys.stderr)
        return 1
    return 0


def _add_ledger_commands(parser: ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    actions.add_parser("adopt", help="vouch for the rows from before the ledger").set_defaults(run=_on_adoption)


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

  curl -X POST {url}/events -H 'X-API-Key: {api_key}' -H 'Content-Type: application/json' \\
       -d '{{"event_type": "LOGIN", "actor": "alice"}}'

  Ctrl-C stops the service and its database.
"""


if __name__ == "__main__":
    sys.exit(main())
