"""Operator commands: python cli.py COMMAND."""

import argparse
import sys
from dataclasses import replace

from auth import api_key_in_force
from config import ConfigurationError, Settings, load_settings
from server import serve_alone, serve_with_workers


def main() -> int:
    """Run one command; a wrong setting is told in one line, without a traceback."""
    parser = argparse.ArgumentParser(prog="cli.py", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("serve", help="run the service until it is told to stop").set_defaults(run=serve)
    commands.add_parser("run", help="try it on this machine: migrate, serve, show the API key").set_defaults(run=run)
    arguments = parser.parse_args()
    try:
        return int(arguments.run(load_settings()))
    except ConfigurationError as error:
        print(f"audit-service: {error}", file=sys.stderr)
        return 2


def serve(settings: Settings) -> int:
    """Serve HTTP until SIGINT or SIGTERM, then finish the requests under way."""
    api_key_in_force(settings)  # a missing one stops the start here, in one line
    return serve_with_workers(settings) if settings.workers > 1 else serve_alone(settings)


def run(settings: Settings) -> int:
    """`make run`: serve in development, on a migrated database, and print how to send the first event."""
    settings = replace(settings, environment="development", run_migrations=True)
    return serve_alone(settings, _banner(settings, api_key_in_force(settings)))


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
