"""DATABASE_READ_URL: reads go to a real streaming standby, and it is told how far that is behind."""

import os
import pwd
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from conftest import eventually, execute, running_app, settings_for
from test_db import assert_unavailable

import migrations
from cluster import Cluster
from queries import replica

LOGIN = {"event_type": "LOGIN", "actor": "alice"}


@contextmanager
def standby_of(primary: Cluster, folder: Path) -> Iterator[Cluster]:
    """A streaming standby, made by pg_basebackup."""
    folder.mkdir(mode=0o700)
    if os.geteuid() == 0:
        os.chown(folder, pwd.getpwnam("nobody").pw_uid, -1)
    host = str(primary.url().query["host"])
    primary._run("pg_basebackup", "-D", folder, "-R", "-X", "stream", "-c", "fast", "-h", host, "-U", "postgres")
    (folder / ".s.PGSQL.5432.lock").unlink(missing_ok=True)  # the primary's, whose sockets are in its data directory
    standby = Cluster(primary.binaries, folder, primary.options)
    standby.start()
    try:
        yield standby
    finally:
        if standby.is_running():
            standby.stop("immediate")


@pytest.fixture
def replicated(own_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[httpx.Client, Cluster]]:
    """A service that writes to a primary and reads from its standby."""
    monkeypatch.setattr(replica, "INTERVAL_S", 0.1)
    own_cluster.create_database("audit")
    url = own_cluster.url("audit")
    migrations.upgrade(url)
    with standby_of(own_cluster, own_cluster.data_dir.with_name("standby")) as standby:
        settings = settings_for(url, database_read_url=standby.url("audit"))
        with running_app(settings) as client:
            yield client, standby


def metric(client: httpx.Client, name: str) -> str:
    (line,) = [line for line in client.get("/metrics").text.splitlines() if line.startswith(f"audit_replica_{name} ")]
    return line.split()[1]


def test_reads_come_from_the_standby_and_its_lag_is_told(replicated: tuple[httpx.Client, Cluster]) -> None:
    client, standby = replicated
    assert client.post("/events", json=LOGIN).status_code == 201
    eventually(lambda: client.get("/events/1").status_code == 200)
    eventually(lambda: (metric(client, "up"), metric(client, "lag_events")) == ("1.0", "0.0"))
    execute(standby.url("audit"), "SELECT pg_wal_replay_pause()")
    headers = {"Idempotency-Key": "k"}
    assert client.post("/events", json=LOGIN, headers=headers).json()["id"] == 2
    for query in ("/events/2", "/events/export?snapshot=2"):
        assert client.get(query).status_code in (404, 503)
    assert len(client.get("/events").json()["events"]) == 1
    assert client.get("/events/count").json()["count"] == 1
    assert client.get("/events/export").text.count("\n") == 2
    replayed = client.post("/events", json=LOGIN, headers=headers)
    assert (replayed.status_code, replayed.json()["id"]) == (200, 2)  # from the primary: the standby lacks it
    eventually(lambda: metric(client, "lag_events") == "1.0")
    eventually(lambda: float(metric(client, "lag_seconds")) > 0)
    execute(standby.url("audit"), "SELECT pg_wal_replay_resume()")
    eventually(lambda: client.get("/events/2").status_code == 200)
    eventually(lambda: (metric(client, "lag_events"), metric(client, "lag_seconds")) == ("0.0", "0.0"))


def test_a_stream_follows_the_standby(replicated: tuple[httpx.Client, Cluster]) -> None:
    client, _ = replicated
    with client.stream("GET", "/events/stream") as response:
        pieces = response.iter_raw()
        next(pieces)
        client.post("/events", json=LOGIN)
        assert next(piece for piece in pieces if not piece.startswith(b":")).startswith(b"id: 1\n")


def test_a_stream_goes_on_behind_an_event_that_the_standby_has_not_reached(
    replicated: tuple[httpx.Client, Cluster],
) -> None:
    client, standby = replicated
    execute(standby.url("audit"), "SELECT pg_wal_replay_pause()")
    client.post("/events", json=LOGIN)
    with client.stream("GET", "/events/stream", headers={"Last-Event-ID": "2"}) as response:
        assert response.status_code == 422
    with client.stream("GET", "/events/stream", headers={"Last-Event-ID": "1"}) as response:
        pieces = response.iter_raw()
        next(pieces)
        execute(standby.url("audit"), "SELECT pg_wal_replay_resume()")
        client.post("/events", json=LOGIN)
        assert next(piece for piece in pieces if not piece.startswith(b":")).startswith(b"id: 2\n")


def test_without_the_standby_reads_are_a_503_and_writes_go_on(replicated: tuple[httpx.Client, Cluster]) -> None:
    client, standby = replicated
    assert client.post("/events", json=LOGIN).status_code == 201
    eventually(lambda: client.get("/events/1").status_code == 200)
    standby.stop("immediate")
    assert client.post("/events", json=LOGIN).status_code == 201
    for query in ("/events", "/events/1", "/events/count", "/events/export", "/events/stream"):
        assert_unavailable(client.get(query), "database-unavailable")
    assert client.get("/ready").status_code == 200
    eventually(lambda: (metric(client, "up"), metric(client, "lag_seconds")) == ("0.0", "NaN"))
    standby.start()
    eventually(lambda: client.get("/events/2").status_code == 200)
    eventually(lambda: (metric(client, "up"), metric(client, "lag_events")) == ("1.0", "0.0"))


def test_without_a_replica_there_are_no_metrics_of_one(client: httpx.Client) -> None:
    assert "audit_replica" not in client.get("/metrics").text
