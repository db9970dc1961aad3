"""Operator commands: python cli.py COMMAND."""

import argparse
import signal
import socket
import sys
from dataclasses import replace

import uvicorn

from auth import api_key_in_force
from config import ConfigurationError, Settings, load_settings
from main import create_app

GRACE_PERIOD_S = 20  # for requests under way when the service is told to stop


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
    return _serve(settings, banner=None)


def run(settings: Settings) -> int:
    """`make run`: serve in development, on a migrated database, and print how to send the first event."""
    settings = replace(settings, environment="development", run_migrations=True)
    return _serve(settings, _banner(settings, api_key_in_force(settings)))


def _serve(settings: Settings, banner: str | None) -> int:
    config = uvicorn.Config(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE_PERIOD_S,
    )
    server = _Server(config, banner)
    # uvicorn handles both signals while it runs and raises them again afterwards: then the stop was clean.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0 if server.started else 1))
    server.run()
    return 0 if server.started else 1


class _Server(uvicorn.Server):
    """Prints its banner once it listens."""

    def __init__(self, config: uvicorn.Config, banner: str | None) -> None:
        super().__init__(config)
        self._banner = banner

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self._banner:
            print(self._banner, flush=True)


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
