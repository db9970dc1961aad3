"""TLS: to PostgreSQL, as far as sslmode asks for it, and of the service's own, in each worker."""

import os
import pwd
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from conftest import API_KEY, BINARIES, eventually, execute, free_port, running_cluster, served
from sqlalchemy.engine import URL
from sqlalchemy.exc import OperationalError

from cluster import SUPERUSER, Cluster
from db import Database
from problems import DatabaseUnavailable


@dataclass(frozen=True)
class Certificate:
    """Its own authority, for `localhost` and 127.0.0.1."""

    certificate: Path
    key: Path


def make_certificate(folder: Path, name: str) -> Certificate:
    made = Certificate(folder / f"{name}.pem", folder / f"{name}.key")
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "ed25519", "-noenc", "-days", "2", *subject]
    subprocess.run([*command, "-keyout", str(made.key), "-out", str(made.certificate)], check=True, capture_output=True)
    return made


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    return make_certificate(tmp_path, "server")


@pytest.fixture
def postgres(certificate: Certificate) -> Iterator[URL]:
    """A server that is reached over TCP and speaks TLS; it takes connections without, too."""
    if "debian15" not in BINARIES:
        pytest.skip("needs PostgreSQL 15 of Debian: the embedded one was built without TLS")
    port = free_port()
    with running_cluster(BINARIES["debian15"]) as cluster:
        cluster.stop()
        _give_to_the_server(cluster, certificate)
        tls = {"ssl": "on", "ssl_cert_file": "server.pem", "ssl_key_file": "server.key"}
        cluster.options |= {"listen_addresses": "127.0.0.1", "port": str(port), **tls}
        cluster.start()
        yield URL.create("postgresql+psycopg2", SUPERUSER, host="127.0.0.1", port=port, database="postgres")


def _give_to_the_server(cluster: Cluster, certificate: Certificate) -> None:
    for file in (certificate.certificate, certificate.key):
        copy = Path(shutil.copy(file, cluster.data_dir / file.name))
        copy.chmod(0o600)
        if os.geteuid() == 0:
            owner = pwd.getpwuid(cluster.data_dir.stat().st_uid)
            os.chown(copy, owner.pw_uid, owner.pw_gid)


IN_USE = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"


@pytest.mark.parametrize(("mode", "uses_tls"), [("disable", False), ("require", True), ("verify-full", True)])
def test_sslmode_is_what_the_url_says(postgres: URL, certificate: Certificate, mode: str, uses_tls: bool) -> None:
    url = postgres.update_query_dict({"sslmode": mode, "sslrootcert": str(certificate.certificate)})
    assert execute(url, IN_USE) is uses_tls
    database = Database(url)
    with database.engine.connect() as connection:  # as the service connects
        assert connection.exec_driver_sql(IN_USE).scalar() is uses_tls
    database.close()


def test_a_server_that_the_authority_does_not_vouch_for_is_refused(postgres: URL, tmp_path: Path) -> None:
    stranger = make_certificate(tmp_path, "stranger")
    url = postgres.update_query_dict({"sslmode": "verify-full", "sslrootcert": str(stranger.certificate)})
    with pytest.raises(OperationalError, match="certificate verify failed"):
        execute(url, "SELECT 1")
    database = Database(url)
    with pytest.raises(DatabaseUnavailable):
        database.check_ready()
    database.close()


def test_a_server_without_tls_is_refused_where_it_is_required(own_cluster: Cluster) -> None:
    port = free_port()
    own_cluster.stop()
    own_cluster.options |= {"listen_addresses": "127.0.0.1", "port": str(port)}
    own_cluster.start()
    url = URL.create("postgresql+psycopg2", SUPERUSER, host="127.0.0.1", port=port, database="postgres")
    with pytest.raises(OperationalError, match="does not support SSL"):
        execute(url.update_query_dict({"sslmode": "require"}), "SELECT 1")


def test_every_worker_speaks_tls(database_url: URL, certificate: Certificate, tmp_path: Path) -> None:
    variables = {"TLS_CERT_FILE": str(certificate.certificate), "TLS_KEY_FILE": str(certificate.key)}
    log = tmp_path / "service.log"
    with served(database_url, log, WORKERS="2", **variables) as client:
        port = int(client.base_url.port or 0)
        eventually(lambda: log.read_text().count("Application startup complete") == 2)
        context = ssl.create_default_context(cafile=certificate.certificate)
        workers = set()
        for _ in range(50):  # the kernel deals connections out among the workers
            with httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=context) as secure:
                secure.headers["X-API-Key"] = API_KEY
                assert secure.get("/events/count").status_code == 200
                (stream,) = secure._transport._pool.connections  # type: ignore[attr-defined]
                workers.add(_process_behind(stream, port))
        assert len(workers) == 2
        with pytest.raises(httpx.RemoteProtocolError):
            client.get("/health")


def _process_behind(connection: object, port: int) -> int | None:
    """Which worker has the other end."""
    socket = connection._connection._network_stream.get_extra_info("socket")  # type: ignore[attr-defined]
    own = socket.getsockname()[1]
    return next(
        (
            each.pid
            for each in psutil.net_connections("tcp")
            if each.raddr and each.raddr.port == own and each.laddr.port == port
        ),
        None,
    )
