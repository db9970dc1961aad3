"""A PostgreSQL server of our own, run from a folder of binaries, reached through a Unix socket only.

Works as an ordinary user and as root, where the server, which refuses root, runs as `nobody`.
Several processes may share one server: the last to leave stops it, and the kernel does the counting.
"""

import fcntl
import os
import pwd
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psycopg2
from sqlalchemy.engine import URL

SUPERUSER = "postgres"
_SOCKET_PATH_LIMIT = 100  # sun_path holds 104 bytes on macOS, 108 on Linux


class ClusterError(Exception):
    """The server cannot be run. The message says why and what to do."""


class Cluster:
    """One data directory and the server on it."""

    def __init__(self, binaries: Path, data_dir: Path, options: Mapping[str, str] | None = None) -> None:
        self.binaries = binaries
        self.data_dir = data_dir
        self.options = dict(options or {})
        self._owner = _server_user()

    def url(self, database: str = SUPERUSER) -> URL:
        """Where the running server is reached. Only its owner and root can enter the socket's folder."""
        return URL.create(
            "postgresql+psycopg2",
            username=SUPERUSER,
            database=database,
            query={"host": str(self._socket_dir_in_use())},
        )

    def start(self) -> None:
        """Create the data directory if need be, and start the server if it does not run."""
        self._prepare()
        if self.is_running():
            return
        settings = {"listen_addresses": "", "unix_socket_directories": str(self._new_socket_dir()), **self.options}
        arguments = " ".join(f"-c {name}='{value}'" for name, value in settings.items())
        self._run("pg_ctl", "-D", self.data_dir, "-w", "-l", self.data_dir / "server.log", "-o", arguments, "start")

    def stop(self, mode: str = "fast") -> None:
        """Stop the server and wait for it: `fast` ends the sessions, `immediate` is a crash."""
        socket_dir = self._socket_dir_in_use()
        self._run("pg_ctl", "-D", self.data_dir, "-w", "-m", mode, "stop")
        if socket_dir != self.data_dir:
            socket_dir.rmdir()

    def is_running(self) -> bool:
        return self._status("pg_ctl", "-D", self.data_dir, "status") == 0

    def pid(self) -> int:
        """The postmaster's process id."""
        return int(self._postmaster_line(1))

    def create_database(self, name: str) -> None:
        """Create the database if it is not there yet."""
        connection = psycopg2.connect(self.url().set(drivername="postgresql").render_as_string(hide_password=False))
        try:
            connection.autocommit = True
            cursor = connection.cursor()
            cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", (name,))
            if cursor.fetchone() is None:
                cursor.execute(f'CREATE DATABASE "{name}"')
        finally:
            connection.close()

    def _prepare(self) -> None:
        self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._owner is not None:
            _let_through(self._owner, [self.data_dir, self.binaries])
            os.chown(self.data_dir, self._owner.pw_uid, self._owner.pw_gid)
        elif self.data_dir.stat().st_uid != os.geteuid():
            raise ClusterError(
                f"{self.data_dir} belongs to another user, for an earlier run was root's. "
                f"Run as root again, or move the folder away to start with an empty log"
            )
        version_file = self.data_dir / "PG_VERSION"
        if not version_file.exists():
            options = ["--auth=trust", "--encoding=UTF8", "--no-locale", f"--username={SUPERUSER}"]
            self._run("initdb", "-D", self.data_dir, *options)
        elif version_file.read_text().strip() != (ours := self._major_version()):
            raise ClusterError(
                f"{self.data_dir} was made by PostgreSQL {version_file.read_text().strip()} and these binaries "
                f"are PostgreSQL {ours}: pg_dump it with the old release, or move it away to start empty"
            )

    def _major_version(self) -> str:
        printed = subprocess.check_output([self.binaries / "postgres", "--version"], text=True)  # noqa: S603
        return printed.split()[2].split(".")[0]

    def _new_socket_dir(self) -> Path:
        """The data directory, which only its owner can enter, or a short-named folder as private as that."""
        if len(str(self.data_dir / ".s.PGSQL.5432")) < _SOCKET_PATH_LIMIT:
            return self.data_dir
        socket_dir = Path(tempfile.mkdtemp(prefix="audit-pg-"))
        if self._owner is not None:
            os.chown(socket_dir, self._owner.pw_uid, self._owner.pw_gid)
        return socket_dir

    def _socket_dir_in_use(self) -> Path:
        return Path(self._postmaster_line(5))

    def _postmaster_line(self, number: int) -> str:
        """postmaster.pid: pid, data directory, start time, port, socket directory, … one a line."""
        try:
            return (self.data_dir / "postmaster.pid").read_text().splitlines()[number - 1]
        except (OSError, IndexError) as error:
            raise ClusterError(f"no PostgreSQL server runs on {self.data_dir}") from error

    def _run(self, program: str, *arguments: str | Path) -> None:
        # Output goes to a file: the server would inherit a pipe and keep it open for its whole life.
        with tempfile.TemporaryFile("w+") as output:
            if status := self._status(program, *arguments, output=output.fileno()):
                output.seek(0)
                log = self.data_dir / "server.log"
                tail = log.read_text(errors="replace").splitlines()[-5:] if log.exists() else []
                said = "\n  ".join([*output.read().strip().splitlines()[-5:], *tail])
                raise ClusterError(f"{program} failed with status {status}:\n  {said}")

    def _status(self, program: str, *arguments: str | Path, output: int = subprocess.DEVNULL) -> int:
        owner = self._owner
        return subprocess.run(  # noqa: S603 - programs and arguments are ours
            [self.binaries / program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            check=False,
            cwd="/",
            umask=0o077,
            user=owner and owner.pw_uid,
            group=owner and owner.pw_gid,
            extra_groups=None if owner is None else [],
        ).returncode


@contextmanager
def shared_cluster(cluster: Cluster) -> Iterator[Cluster]:
    """Run the server while the block does, beside any other process that does the same.

    Every user holds a shared lock on one file; who can turn it into an exclusive one is the last.
    The locks end with their process, however it ends; a server so left behind is found by the next.
    """
    cluster.data_dir.parent.mkdir(parents=True, exist_ok=True)
    with _lock_file(cluster.data_dir, "start") as starting, _lock_file(cluster.data_dir, "use") as using:
        fcntl.flock(starting, fcntl.LOCK_EX)
        cluster.start()
        fcntl.flock(using, fcntl.LOCK_SH)
        fcntl.flock(starting, fcntl.LOCK_UN)
        try:
            yield cluster
        finally:
            fcntl.flock(starting, fcntl.LOCK_EX)
            if _is_last_user(using) and cluster.is_running():
                cluster.stop()


@contextmanager
def _lock_file(data_dir: Path, name: str) -> Iterator[int]:
    descriptor = os.open(data_dir.with_name(f"{data_dir.name}.{name}.lock"), os.O_CREAT | os.O_RDWR, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _is_last_user(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _server_user() -> pwd.struct_passwd | None:
    """Whom the server runs as: None means ourselves."""
    return pwd.getpwnam("nobody") if os.geteuid() == 0 else None


def _let_through(user: pwd.struct_passwd, paths: list[Path]) -> None:
    """Make each folder above the paths searchable (o+x, not readable) where the user could not pass."""
    for folder in {parent for path in paths for parent in path.resolve().parents}:
        mode = folder.stat()
        if mode.st_uid != user.pw_uid and not mode.st_mode & stat.S_IXOTH:
            folder.chmod(stat.S_IMODE(mode.st_mode) | stat.S_IXOTH)
            print(
                f"{folder}: made searchable (o+x), for PostgreSQL refuses to run as root and runs as {user.pw_name}",
                file=sys.stderr,
            )
