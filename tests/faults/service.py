"""The service as it ships, in processes of its own, on PostgreSQL behind a proxy of its own."""

import http.client
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
from conftest import API_KEY, eventually, free_port
from network import Link, Proxy
from sqlalchemy.engine import URL

from config import ROOT

WORKERS = 2
ANSWER_TIMEOUT_S = 20
_STOP_TIMEOUT_S = 25  # the grace period is 20 s


class Service:
    """One replica: a supervisor, its workers, and the way to the database."""

    def __init__(self, database_url: URL, log: Path) -> None:
        assert database_url.port is not None
        self.proxy = Proxy(database_url.port)
        self.port = free_port()
        self.log = log
        self._log_seen = 0
        self._url = database_url.set(drivername="postgresql", port=self.proxy.port)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it is ready with all its workers."""
        environment = {
            **os.environ,
            "API_KEY": API_KEY,
            "DATABASE_URL": self._url.render_as_string(hide_password=False),
            "HOST": "127.0.0.1",
            "PORT": str(self.port),
            "WORKERS": str(WORKERS),
        }
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "cli.py", "serve"], cwd=ROOT, env=environment, stdout=output, stderr=output
            )
        self.wait_until_whole()

    def wait_until_whole(self) -> None:
        """Wait until the service is ready and every worker that died has a successor."""
        eventually(lambda: self._is_ready() and len(self.workers()) == WORKERS, seconds=30)

    def workers(self) -> list[psutil.Process]:
        """The processes that answer requests."""
        assert self._process is not None
        found = []
        for child in psutil.Process(self._process.pid).children():
            with suppress(psutil.NoSuchProcess):
                if child.status() != psutil.STATUS_ZOMBIE and "resource_tracker" not in " ".join(child.cmdline()):
                    found.append(child)
        return found

    def worker_of(self, link: Link) -> psutil.Process | None:
        """The worker at the other end of a connection to the database, where it lives still."""
        return next((worker for worker in self.workers() if link.client_port in _ports(worker, "laddr")), None)

    def connect_to(self, worker: psutil.Process) -> http.client.HTTPConnection:
        """A connection that this worker answers. The kernel gives each to any of them, so it takes some tries.

        Where the supervisor has replaced it meanwhile, for it was slow, any worker's will do.
        """
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_TIMEOUT_S)
            connection.connect()
            if not worker.is_running() or self._who_accepted(connection.sock.getsockname()[1]) == worker:
                return connection
            connection.close()

    def _who_accepted(self, port: int) -> psutil.Process:
        found: list[psutil.Process] = []

        def look() -> bool:
            found.extend(worker for worker in self.workers() if port in _ports(worker, "raddr"))
            return bool(found)

        eventually(look)
        return found[0]

    def kill(self) -> None:
        """SIGKILL to the supervisor and all its workers."""
        family = self._family()
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._wait_for(family)

    def kill_supervisor(self) -> None:
        """SIGKILL to the supervisor alone: its workers must notice, or they would hold the port."""
        assert self._process is not None
        family = self._family()
        self._process.kill()
        self._wait_for(family)

    def _family(self) -> list[psutil.Process]:
        assert self._process is not None
        supervisor = psutil.Process(self._process.pid)
        return [supervisor, *supervisor.children(recursive=True)]

    def _wait_for(self, family: list[psutil.Process]) -> None:
        assert self._process is not None
        self._process.wait()
        _, left = psutil.wait_procs(family, timeout=_STOP_TIMEOUT_S)
        assert not left, "workers outlive their supervisor"

    def stop(self) -> int:
        """SIGTERM, and wait; the exit status."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(_STOP_TIMEOUT_S)

    def close(self) -> None:
        """Leave no process behind, whatever happened."""
        if self._process is not None and self._process.poll() is None:
            self.kill()
        self.proxy.close()

    def new_tracebacks(self) -> list[str]:
        """Log lines with a traceback since the last call: nobody foresaw what they tell of."""
        with self.log.open("rb") as lines:
            lines.seek(self._log_seen)
            text = lines.read().decode()
            self._log_seen = lines.tell()
        return [line for line in text.splitlines() if "Traceback" in line]

    def _is_ready(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/ready")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def _ports(worker: psutil.Process, end: str) -> set[int]:
    """The ports at one end of the worker's connections."""
    with suppress(psutil.NoSuchProcess):
        return {getattr(connection, end).port for connection in worker.net_connections("tcp") if connection.raddr}
    return set()
