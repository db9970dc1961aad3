"""How the app is served: uvicorn, in this process or in several workers that a supervisor keeps alive.

Each worker listens on a socket of its own (SO_REUSEPORT) and writes each answer with one system call.
"""

import asyncio
import gc
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
from contextlib import suppress
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.supervisors import Multiprocess

from config import ConfigurationError, Settings
from edge.direct import DirectProtocol
from main import create_app
from telemetry import count_under_one_process_id

GRACE_PERIOD_S = 20  # for requests under way when the service is told to stop
BACKLOG = 2048
UNSENT_BYTES = 64 * 1024  # what the kernel keeps of an answer beyond what is on its way


def serve_alone(settings: Settings, banner: str | None = None) -> int:
    """Serve in this process until SIGINT or SIGTERM; the exit status."""
    _let_others_finish()
    server = _Server(_config(_settled(create_app(settings)), settings), banner)
    # uvicorn handles both signals while it runs and raises them again afterwards: then the stop was clean.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0 if server.started else 1))
    server.run()
    return 0 if server.started else 1


def serve_with_workers(settings: Settings) -> int:
    """Serve in WORKERS processes. One that dies or hangs for 5 s is replaced; they end with this process."""
    config = _config("server:worker_app", settings, factory=True, workers=settings.workers)
    with tempfile.TemporaryDirectory(prefix="audit-metrics-") as folder:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder  # the workers inherit it, and count in its files
        supervisor = Multiprocess(config, sockets=[_claim_port(settings.host, settings.port)])
        supervisor.run()
    # One that stopped as it was told ends by the signal, which is negative.
    return 1 if any((process.exitcode or 0) > 0 for process in supervisor.processes) else 0


def worker_app() -> FastAPI:
    """The app in a worker process, which stops when its supervisor is gone, however that ended."""
    count_under_one_process_id()
    _let_others_finish()
    threading.Thread(target=_end_with_supervisor, name="audit-supervisor-watch", daemon=True).start()
    return _settled(create_app())


def _let_others_finish() -> None:
    """A request that comes in wakes this process, and must not interrupt what PostgreSQL or a client is at.

    On two full cores that happened to every third event. Without it requests are read more at a time: 6 % more of them.
    """
    if sys.platform == "linux":
        with suppress(OSError):  # not allowed here: only slower
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # the threads to come inherit it


def _settled(app: FastAPI) -> FastAPI:
    """What was imported lives for ever: the garbage collector need not walk through it while requests wait.

    A request leaves few cycles behind. Looking for them a thirtieth as often saves 4 of 66 µs an event.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)
    return app


def _end_with_supervisor() -> None:
    supervisor = multiprocessing.parent_process()
    if supervisor is not None:
        supervisor.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _config(app: Any, settings: Settings, **options: Any) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=OneWriteProtocol,
        log_config=None,
        access_log=False,
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=list(settings.trusted_proxies),
        ssl_certfile=settings.tls_cert_file,
        ssl_keyfile=settings.tls_key_file,
        server_header=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=GRACE_PERIOD_S,
        **options,
    )


class _Server(uvicorn.Server):
    """Prints its banner once it listens."""

    def __init__(self, config: uvicorn.Config, banner: str | None) -> None:
        super().__init__(config)
        self._banner = banner

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self._banner:
            print(self._banner, flush=True)


class OneWriteProtocol(DirectProtocol):
    """uvicorn's protocol, which writes head and body apart; here both leave at the end of the loop's turn.

    The second system call, and the client's second wake-up, cost an eighth of the rate of POST /events.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        # Else it takes some 4 MB, and then nothing until a third of that has left: of a client that takes 20 kB/s
        # one could not tell for a minute that it takes anything.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        super().connection_made(_OneWriteTransport(transport, self.loop))


_PASSED_ON = (
    "abort",
    "get_extra_info",
    "get_write_buffer_size",
    "is_closing",
    "pause_reading",
    "resume_reading",
    "set_protocol",
    "writelines",  # of what is whole: leaves at once
)


class _OneWriteTransport(asyncio.Transport):
    """Passes everything on to the transport, and what is written as late as the loop's next turn."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._held: list[bytes] = []
        for name in _PASSED_ON:
            setattr(self, name, getattr(transport, name))

    def write(self, data: Any) -> None:
        if not self._held:
            self._loop.call_soon(self._release)
        self._held.append(data)

    def close(self) -> None:
        self._release()
        self._transport.close()

    def _release(self) -> None:
        held, self._held = self._held, []
        if held and not self._transport.is_closing():
            self._transport.write(held[0] if len(held) == 1 else b"".join(held))


class _PortOfEach(socket.socket):
    """Bound, and handed to a worker it becomes a socket of the worker's own on the same port.

    The kernel then deals connections out evenly. Of one shared socket the worker that wakes first takes them
    all: with 64 clients one of two workers did all the work.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _bind, self.getsockname()[:2]


def _claim_port(host: str, port: int) -> socket.socket:
    """The port, which the workers will share; raises ConfigurationError where another program has it."""
    try:
        with socket.create_server((host, port), family=_family(host)):
            pass  # without SO_REUSEPORT: fails where anybody listens
        return _bind(host, port)
    except OSError as error:
        raise ConfigurationError(f"PORT: cannot listen on {host}:{port}: {os.strerror(error.errno or 0)}") from None


def _bind(host: str, port: int) -> socket.socket:
    bound = _PortOfEach(_family(host), socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    bound.bind((host, port))
    return bound


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
