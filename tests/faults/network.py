"""A TCP proxy between one service and PostgreSQL: it cuts connections in mid-flush and lets packets vanish.

It knows nothing of the protocol but whose turn it is: what a client sends after the server spoke is a new request.
"""

import ctypes
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

_FLUSH_MARK = b"append_events"  # only the writer's connection says this
_CHUNK_BYTES = 64 * 1024
_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27  # Linux, asm-generic/socket.h
_BPF_RETURN = 0x06  # BPF_RET | BPF_K: with 0, drop the whole packet


@dataclass
class Trap:
    """Springs once, at a request of a writer's connection."""

    spring: Callable[["Link"], None]
    turns_to_pass: int = 0  # requests that it lets through first
    only_flushes: bool = False
    after_passing: bool = False  # spring when the server has the request, or before it gets it
    sprung: threading.Event = field(default_factory=threading.Event)

    def go_off(self, link: "Link") -> None:
        self.spring(link)
        self.sprung.set()


class Link:
    """One connection of the service to PostgreSQL, both ends of it."""

    def __init__(self, proxy: "Proxy", client: socket.socket, server: socket.socket) -> None:
        self.client_port: int = client.getpeername()[1]  # the service's end
        self.server_port: int = server.getsockname()[1]  # what PostgreSQL takes for its client
        self._is_writer = False
        self._request_head = b""
        self.request_bytes_left: int | None = None  # of this many more bytes the last one ends the connection
        self.answer_bytes_left: int | None = None
        self._proxy, self._client, self._server = proxy, client, server
        self._server_spoke = True
        self._lit = threading.Event()
        self._lit.set()
        self._runner = threading.Thread(target=self._run, daemon=True)
        self._runner.start()

    def cut(self) -> None:
        """End both sides at once."""
        self._lit.set()
        for end in (self._client, self._server):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut_after_request(self) -> None:
        """End both sides when the server has this request whole: a message is a type, its length, its body."""
        self.request_bytes_left = 1 + int.from_bytes(self._request_head[1:5])

    def darken(self) -> None:
        """From now on packets vanish, unacknowledged, as those to a host that is lost."""
        self._lit.clear()
        for end in (self._client, self._server):
            _drop_packets(end)

    def relight(self) -> None:
        """The network is back; what either side gave up meanwhile is refused by its own kernel."""
        for end in (self._client, self._server):
            with suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)
        self._lit.set()

    def join(self) -> None:
        self._runner.join()

    def _run(self) -> None:
        with self._client, self._server:
            answers = threading.Thread(target=self._pump, args=[self._pass_answers], daemon=True)
            answers.start()
            self._pump(self._pass_requests)
            answers.join()
        self._proxy.forget(self)

    def _pump(self, pass_all: Callable[[], None]) -> None:
        """One direction, until either end closes; then so does the other."""
        with suppress(OSError):
            pass_all()
        self.cut()

    def _pass_requests(self) -> None:
        for chunk in self._chunks(self._client):
            self._is_writer = self._is_writer or _FLUSH_MARK in chunk
            trap = self._proxy.trap_for(chunk) if self._server_spoke and self._is_writer else None
            if self._server_spoke:
                self._request_head = chunk[:5]
            self._server_spoke = False
            if trap and not trap.after_passing:
                trap.go_off(self)
            self.request_bytes_left = self._pass_on(chunk, self._server, self.request_bytes_left)
            if trap and trap.after_passing:
                trap.go_off(self)

    def _pass_answers(self) -> None:
        for chunk in self._chunks(self._server):
            self._server_spoke = True
            self.answer_bytes_left = self._pass_on(chunk, self._client, self.answer_bytes_left)

    def _chunks(self, source: socket.socket) -> Iterator[bytes]:
        while chunk := source.recv(_CHUNK_BYTES):
            self._lit.wait()
            yield chunk

    def _pass_on(self, chunk: bytes, target: socket.socket, bytes_left: int | None) -> int | None:
        self._lit.wait()
        target.sendall(chunk[:bytes_left])
        if bytes_left is None:
            return None
        if bytes_left <= len(chunk):
            self.cut()
        return max(bytes_left - len(chunk), 0)


class Proxy:
    """Listens on a port of its own for one service."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._trap: Trap | None = None
        self._links: set[Link] = set()
        self._is_dark = False
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    def arm(self, trap: Trap | None) -> None:
        """Set the trap for the next flush, instead of the one before; None takes it away."""
        with self._lock:
            self._trap = trap

    def trap_for(self, request: bytes) -> Trap | None:
        """The trap, where this request springs it."""
        with self._lock:
            if self._trap is None or (self._trap.only_flushes and _FLUSH_MARK not in request):
                return None
            if self._trap.turns_to_pass:
                self._trap.turns_to_pass -= 1
                return None
            trap, self._trap = self._trap, None
            return trap

    def darken(self) -> None:
        """The service's host loses its network: connections there are, and those that it still makes."""
        with self._lock:
            self._is_dark = True
            links = set(self._links)
        for link in links:
            link.darken()

    def relight(self) -> None:
        with self._lock:
            self._is_dark = False
            links = set(self._links)
        for link in links:
            link.relight()

    def forget(self, link: Link) -> None:
        with self._lock:
            self._links.discard(link)

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        with self._lock:
            links = set(self._links)
        for link in links:
            link.relight()
            link.cut()
            link.join()
        self._acceptor.join()

    def _accept(self) -> None:
        with self._listener:
            while True:
                try:
                    client, _ = self._listener.accept()
                except OSError:
                    return
                self._connect(client)

    def _connect(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(("127.0.0.1", self._server_port))
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link = Link(self, client, server)
        except OSError:
            client.close()  # the server is down, and its client learns so
            return
        with self._lock:
            self._links.add(link)
            is_dark = self._is_dark
        if is_dark:
            link.darken()


def _drop_packets(end: socket.socket) -> None:
    """Attach a filter that drops whatever arrives at the socket, acknowledgements included (socket(7))."""
    program = ctypes.create_string_buffer(struct.pack("HBBI", _BPF_RETURN, 0, 0, 0))
    with suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HL", 1, ctypes.addressof(program)))
