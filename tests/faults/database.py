"""PostgreSQL for the faults: reached over TCP, killed and frozen whole, on a disk small enough to be filled."""

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
from conftest import BINARIES, eventually, execute, free_port
from sqlalchemy.engine import URL
from sqlalchemy.exc import OperationalError

from cluster import SUPERUSER, Cluster, ClusterError

SERVERS = tuple(BINARIES)
DEFAULT_SERVER = "debian15" if "debian15" in BINARIES else "embedded"
CAN_MOUNT = os.geteuid() == 0
_DISK_MIB = 768


class Postgres:
    """One server, with what can befall it."""

    def __init__(self, name: str, disk: Path) -> None:
        self._port = free_port()
        self._ballast = disk / "ballast"
        options = {"listen_addresses": "127.0.0.1", "port": str(self._port), "max_wal_size": "128MB"}
        self.cluster = Cluster(BINARIES[name], disk / "postgres", options)

    def url(self, database: str = "postgres") -> URL:
        return URL.create("postgresql+psycopg2", SUPERUSER, host="127.0.0.1", port=self._port, database=database)

    def processes(self) -> list[psutil.Process]:
        """The postmaster, and every process under it."""
        postmaster = psutil.Process(self.cluster.pid())
        return [postmaster, *postmaster.children(recursive=True)]

    def send(self, number: signal.Signals) -> None:
        """The signal to all of its processes, the postmaster first, so that it starts no new ones."""
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def crash(self) -> None:
        """SIGKILL, as a power cut would be but for the disk's cache."""
        processes = self.processes()
        self.send(signal.SIGKILL)
        psutil.wait_procs(processes, timeout=10)

    def backend_of(self, client_port: int) -> psutil.Process:
        """The server's process for the connection that comes from this port."""
        statement = f"SELECT pid FROM pg_stat_activity WHERE client_port = {client_port}"
        return psutil.Process(execute(self.url(), statement))

    def fill_disk(self) -> None:
        """Leave no free block."""
        block = bytes(1024 * 1024)
        with self._ballast.open("wb", buffering=0) as ballast, suppress(OSError):
            while ballast.write(block) == len(block):
                pass

    def switch_wal(self) -> None:
        """Use up the WAL segments that are there already: then the next one needs the disk."""
        for _ in range(12):
            with suppress(OperationalError):
                execute(self.url(), "SELECT pg_switch_wal(), pg_logical_emit_message(false, 'faults', 'x')")

    def free_disk(self) -> None:
        self._ballast.unlink(missing_ok=True)

    def end(self) -> None:
        """Whatever state a failed round left it in."""
        self.free_disk()
        if self.cluster.is_running():
            self.send(signal.SIGCONT)
            self.cluster.stop("immediate")

    def ensure_running(self) -> None:
        """Start it where it is down, as init would, until it takes connections."""
        eventually(self._comes_up)

    def _comes_up(self) -> bool:
        try:
            self.cluster.start()
            execute(self.url(), "SELECT 1")
        except (ClusterError, OperationalError):
            return False
        return True


@contextmanager
def running_postgres(name: str, disk_mib: int = _DISK_MIB) -> Iterator[Postgres]:
    """A server on a disk of its own, a tmpfs, where we may mount one."""
    with tempfile.TemporaryDirectory(prefix="audit-faults-") as folder, ExitStack() as stack:
        disk = Path(folder)
        disk.chmod(0o711)  # the server may run as another user than we do
        if CAN_MOUNT:
            options = f"size={disk_mib}m,mode=711"
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "audit-faults", disk], check=True)
            stack.callback(lambda: subprocess.run(["umount", "--lazy", disk], check=True))
        postgres = Postgres(name, disk)
        stack.callback(postgres.end)
        postgres.cluster.start()
        yield postgres
