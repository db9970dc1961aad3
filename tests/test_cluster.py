"""The server of our own: shared by processes, stopped by the last, private, and sane as root and as a user."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from conftest import BINARIES, execute

from cluster import Cluster, ClusterError, shared_cluster
from config import ROOT, ConfigurationError, Settings
from db import database_url

HOLD_SERVER = """
import sys
from pathlib import Path
from cluster import Cluster, shared_cluster
with shared_cluster(Cluster(Path(sys.argv[1]), Path(sys.argv[2]))) as cluster:
    print(cluster.pid(), flush=True)
    sys.stdin.read()
"""


@pytest.fixture(params=list(BINARIES))
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Cluster:
    """Not running, and without a data directory yet."""
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(0o711)  # pytest keeps these to itself; the server may run as another user
    return Cluster(BINARIES[request.param], tmp_path / "postgres", {"fsync": "off"})


def hold(cluster: Cluster) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", HOLD_SERVER, cluster.binaries, cluster.data_dir],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_data_survives_a_restart(cluster: Cluster) -> None:
    with shared_cluster(cluster):
        cluster.create_database("audit")
        cluster.create_database("audit")
        execute(cluster.url("audit"), "CREATE TABLE kept AS SELECT 7 AS number")
    assert not cluster.is_running()
    with shared_cluster(cluster):
        assert execute(cluster.url("audit"), "SELECT number FROM kept") == 7


def test_the_last_of_several_processes_stops_the_server(cluster: Cluster) -> None:
    with hold(cluster) as first, hold(cluster) as second:
        assert first.stdout and second.stdout
        assert first.stdout.readline() == second.stdout.readline() != ""
        first.communicate()
        assert cluster.is_running()
        second.communicate()
        assert not cluster.is_running()


def test_a_server_left_behind_by_a_killed_process_is_taken_over_and_stopped(cluster: Cluster) -> None:
    with hold(cluster) as killed:
        assert killed.stdout and killed.stdout.readline()
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
    assert cluster.is_running()
    with shared_cluster(cluster):
        pass
    assert not cluster.is_running()


def test_a_crashed_server_is_started_again(cluster: Cluster) -> None:
    with shared_cluster(cluster):
        sessions = psutil.Process(cluster.pid()).children()
        os.kill(cluster.pid(), signal.SIGKILL)
        psutil.wait_procs(sessions)  # they notice by themselves, and PostgreSQL does not start before
    with shared_cluster(cluster):
        assert execute(cluster.url(), "SELECT 1") == 1


def test_only_its_owner_can_enter_the_folder_of_data_and_socket(cluster: Cluster) -> None:
    with shared_cluster(cluster):
        assert stat.S_IMODE(cluster.data_dir.stat().st_mode) == 0o700
        assert cluster.url().query["host"] == str(cluster.data_dir)
        assert execute(cluster.url(), "SHOW listen_addresses") == ""


def test_a_long_path_gets_a_socket_elsewhere_as_private(cluster: Cluster) -> None:
    cluster.data_dir = cluster.data_dir.with_name("p" * 100)
    with shared_cluster(cluster):
        socket_dir = Path(str(cluster.url().query["host"]))
        assert stat.S_IMODE(socket_dir.stat().st_mode) == 0o700
        assert execute(cluster.url(), "SELECT 1") == 1
    assert not socket_dir.exists()


def test_data_of_another_release_is_refused_with_advice(cluster: Cluster) -> None:
    cluster.data_dir.mkdir()
    (cluster.data_dir / "PG_VERSION").write_text("9\n")
    with pytest.raises(ClusterError, match=r"made by PostgreSQL 9 .* pg_dump"):
        cluster.start()


def test_a_server_that_cannot_start_says_why(cluster: Cluster) -> None:
    cluster.options["shared_buffers"] = "lots"
    with pytest.raises(ClusterError, match="shared_buffers"):
        cluster.start()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else; others run every test as a user")
def test_works_as_an_ordinary_user_and_not_on_anothers_data(cluster: Cluster, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    pid = os.fork()
    if pid == 0:  # the interpreter of this machine may be out of the user's reach, so no new one is started
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            with shared_cluster(Cluster(cluster.binaries, cluster.data_dir)) as own:
                own.create_database("audit")
            os._exit(0)
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert cluster.data_dir.stat().st_uid == 65534


def test_without_the_wheel_and_without_a_url_the_start_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ConfigurationError, match=r"^DATABASE_URL: not set"), database_url(Settings()):
        pass
