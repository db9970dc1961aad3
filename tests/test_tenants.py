"""Tenants apart: a key bound to one neither sees nor writes another's events, by any call.

Two walls hold that, the condition in the query and PostgreSQL's policy; each is tried without the other.
"""

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from typing import Any

import httpx
import psycopg2
import pytest
from conftest import Server, execute, running_app, settings_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import func, select
from sqlalchemy.engine import URL
from verify import assert_ledger_consistent

import migrations
from db import Database
from models import audit_events
from queries.reader import Reader

TENANTS = ("acme", "globex", None)
LOG = [
    {
        "event_type": f"type.{number % 3}",
        "actor": f"actor-{number % 4}",
        "tenant": TENANTS[number % 3],
        "resource": f"doc/{number}",
        "source_ip": "203.0.113.7",
        "metadata": {"number": number % 2},
        "idempotency_key": f"key-{number}",
    }
    for number in range(30)
]
FILTERS: dict[str, st.SearchStrategy[Any]] = {
    "actor": st.lists(st.sampled_from(["actor-0", "actor-1", "actor-*", "nobody"]), min_size=1, max_size=2),
    "event_type": st.sampled_from(["type.0", "type.*"]),
    "resource": st.sampled_from(["doc/1", "doc/4"]),
    "source_ip": st.sampled_from(["203.0.113.0/24", "203.0.113.7"]),
    "metadata": st.sampled_from(['{"number": 1}', "{}"]),
    "start": st.just("2020-01-01T00:00:00Z"),
}


def key_for(client: httpx.Client, tenant: str | None, *scopes: str) -> dict[str, str]:
    wanted = {"name": f"of {tenant}", "scopes": scopes or ("read", "write"), **({"tenant": tenant} if tenant else {})}
    response = client.post("/keys", json=wanted)
    assert response.status_code == 201, response.text
    return {"X-API-Key": response.json()["key"]}


@pytest.fixture
def filled(client: httpx.Client) -> httpx.Client:
    assert client.post("/events/batch", json=LOG).status_code == 201
    return client


@pytest.fixture
def acme(filled: httpx.Client) -> dict[str, str]:
    """What a key that is bound to this tenant sends."""
    return key_for(filled, "acme")


def tenants_in(events: list[dict[str, Any]]) -> set[str | None]:
    return {event["tenant"] for event in events}


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.fixed_dictionaries({}, optional=FILTERS))
def test_whatever_is_asked_every_read_answers_for_the_keys_own_tenant(
    filled: httpx.Client, acme: dict[str, str], params: dict[str, Any]
) -> None:
    own = {**params, "tenant": "acme"}
    expected = filled.get("/events", params={**own, "limit": 1000}).json()["events"]
    assert tenants_in(expected) <= {"acme"}
    assert filled.get("/events", params={**params, "limit": 1000}, headers=acme).json()["events"] == expected
    assert filled.get("/events/count", params=params, headers=acme).json()["count"] == len(expected)
    for call, more in (
        ("/events/histogram", {"interval": "month"}),
        ("/events/top", {"field": "tenant"}),
        ("/events/top", {"field": "actor"}),
    ):
        answer = filled.get(call, params={**params, **more}, headers=acme)
        assert answer.status_code == 200, answer.text
        assert answer.json() == filled.get(call, params={**own, **more}).json()
    exported = filled.get("/events/export", params=params, headers=acme).text.splitlines()[:-1]
    assert [json.loads(line)["id"] for line in exported] == sorted(event["id"] for event in expected)


def test_pages_follow_a_cursor_within_the_tenant(filled: httpx.Client) -> None:
    mine, other = key_for(filled, "acme"), key_for(filled, "globex")
    seen, cursor = [], None
    while True:
        params = {"limit": 3, **({"cursor": cursor} if cursor else {})}
        page = filled.get("/events", params=params, headers=mine).json()
        seen += page["events"]
        cursor = page["next_cursor"] or cursor
        if page["next_cursor"] is None:
            break
    assert len(seen) == 11 and tenants_in(seen) == {"acme"}
    answer = filled.get("/events", params={"limit": 3, "cursor": cursor}, headers=other)
    assert answer.status_code == 400 and answer.json()["type"].endswith("invalid-cursor")


def test_an_event_of_another_tenant_does_not_exist(filled: httpx.Client) -> None:
    mine = key_for(filled, "acme")
    events = filled.get("/events", params={"limit": 1000}).json()["events"]
    for event in events:
        answer = filled.get(f"/events/{event['id']}", headers=mine)
        assert answer.status_code == (200 if event["tenant"] == "acme" else 404)
    absent = filled.get("/events/999999", headers=mine).json()
    foreign = next(event["id"] for event in events if event["tenant"] == "globex")
    hidden = filled.get(f"/events/{foreign}", headers=mine).json()
    assert hidden["detail"].replace(str(foreign), "999999") == absent["detail"]


def test_to_ask_for_another_tenant_is_refused_and_names_the_filter(filled: httpx.Client) -> None:
    mine = key_for(filled, "acme")
    for call in ("", "/count", "/export", "/stream", "/top?field=actor", "/histogram?interval=day"):
        address = f"/events{call}{'&' if '?' in call else '?'}tenant=globex"
        answer = filled.get(address, headers=mine)
        assert answer.status_code == 403, call
        assert answer.json()["errors"][0]["location"] == "query.tenant"


def test_what_a_bound_key_writes_is_its_tenants(filled: httpx.Client) -> None:
    mine = key_for(filled, "acme")
    event = {"event_type": "LOGIN", "actor": "alice"}
    assert filled.post("/events", json=event, headers=mine).json()["tenant"] == "acme"
    assert filled.post("/events", json={**event, "tenant": "globex"}, headers=mine).status_code == 403
    answer = filled.post("/events/batch", json=[event, {**event, "tenant": "globex"}], headers=mine)
    assert [error["location"] for error in answer.json()["errors"]] == ["body.1.tenant"]
    # The other tenant's keys are its own.
    answer = filled.post("/events", json={**event, "idempotency_key": "key-1"}, headers=mine)
    assert answer.status_code == 201
    assert filled.get("/events/count").json()["count"] == len(LOG) + 3  # one is the record of the key


def test_a_stream_tells_of_the_tenants_events_alone(filled: httpx.Client) -> None:
    mine = key_for(filled, "acme")
    with filled.stream("GET", "/events/stream", headers={**mine, "Last-Event-ID": "0"}) as caught_up:
        told = (json.loads(line[6:]) for line in caught_up.iter_lines() if line.startswith("data: "))
        assert tenants_in([next(told) for _ in range(11)]) == {"acme"}
        for tenant in ("globex", "acme"):
            filled.post("/events", json={"event_type": "new", "actor": "a", "tenant": tenant})
        new = next(told)
        assert (new["event_type"], new["tenant"]) == ("new", "acme")


def test_a_bound_admin_redacts_nothing(filled: httpx.Client) -> None:
    mine = key_for(filled, "acme", "admin")
    answer = filled.post("/redactions", json={"actor": "actor-1", "reason": "Request 1"}, headers=mine)
    assert answer.status_code == 403


# Row-level security, by itself: what a query that forgot its condition would see.


@pytest.fixture
def reader(database_url: URL) -> Iterator[Reader]:
    with running_app(settings_for(database_url)) as client:
        assert client.post("/events/batch", json=LOG).status_code == 201
    database = Database(database_url)
    reader = Reader(database, database_url, timedelta(seconds=10))
    yield reader
    reader.close()
    database.close()


def test_a_query_without_a_condition_sees_the_readers_tenant_alone(reader: Reader) -> None:
    everything = select(func.count()).select_from(audit_events)
    walk = "SELECT count(*), count(DISTINCT tenant) FROM audit_events"
    for _ in range(3):  # connections are shared by the tenants, one after the other
        for tenant in ("acme", "globex"):
            bound = reader.seen_by(tenant)
            assert bound.search(everything)[0][0] == 10
            assert tuple(bound.walk(walk, {})[0]) == (10, 1)
        assert reader.seen_by("acme", "globex").search(everything)[0][0] == 20
        assert reader.seen_by("nobody").search(everything)[0][0] == 0
        assert reader.search(everything)[0][0] == 30


def test_under_the_role_nothing_is_seen_until_a_tenant_is_named(database_url: URL, reader: Reader) -> None:
    del reader
    with closing(psycopg2.connect(database_url.set(drivername="postgresql").render_as_string(False))) as connection:
        cursor = connection.cursor()
        cursor.execute("SET ROLE audit_tenant_reader")
        cursor.execute("SELECT count(*) FROM audit_events")
        assert cursor.fetchone() == (0,)
        for statement in (
            "DELETE FROM audit_events",
            "UPDATE audit_events SET actor = ''",
            "SELECT FROM api_keys",
            "SELECT FROM idempotency_keys",
        ):
            cursor.execute("SAVEPOINT before")
            with pytest.raises(psycopg2.errors.InsufficientPrivilege):
                cursor.execute(statement)
            cursor.execute("ROLLBACK TO before")


def test_it_holds_under_the_services_own_role(server: Server, database_url: URL) -> None:
    role, password = f"audit_test_tenants_{os.getpid()}", secrets.token_hex(16)
    execute(server.admin_url, f"CREATE ROLE {role} LOGIN PASSWORD '{password}'")
    try:
        migrations.upgrade(database_url, role)
        service_url = database_url.set(username=role, password=password)
        with running_app(settings_for(service_url, database_owner_url=database_url)) as client:
            assert client.post("/events/batch", json=LOG).status_code == 201
            mine = key_for(client, "acme")
            assert client.get("/events/count").json()["count"] == 31  # the key's own record too
            assert client.get("/events/count", headers=mine).json()["count"] == 11
            assert client.get("/events/export", headers=mine).text.count("\n") == 12
        assert assert_ledger_consistent(database_url) == 31
    finally:
        execute(database_url, f"DROP OWNED BY {role}")
        execute(server.admin_url, f"REVOKE audit_tenant_reader FROM {role}")
        execute(server.admin_url, f"DROP ROLE {role}")


def test_the_filter_holds_without_it(database_url: URL) -> None:
    with running_app(settings_for(database_url)) as client:
        assert client.post("/events/batch", json=LOG).status_code == 201
        mine = key_for(client, "acme")
        execute(database_url, "ALTER POLICY audit_events_of_tenants ON audit_events USING (true)")
        assert tenants_in(client.get("/events", headers=mine).json()["events"]) == {"acme"}
        assert client.get("/events/count", headers=mine).json()["count"] == 11
        top = client.get("/events/top", params={"field": "tenant"}, headers=mine).json()
        assert top["values"] == [{"value": "acme", "count": 11}]
        histogram = client.get("/events/histogram", params={"interval": "month"}, headers=mine).json()
        assert sum(bucket["count"] for bucket in histogram["buckets"]) == 11
        assert client.get("/events/export", headers=mine).text.count("\n") == 12
        assert client.get("/events/2", headers=mine).status_code == 404
        with client.stream("GET", "/events/stream", headers={**mine, "Last-Event-ID": "0"}) as stream:
            told = (json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: "))
            assert tenants_in([next(told) for _ in range(11)]) == {"acme"}
            for tenant in ("globex", "acme"):
                client.post("/events", json={"event_type": "new", "actor": "a", "tenant": tenant})
            assert next(told)["tenant"] == "acme"
    assert assert_ledger_consistent(database_url) == 33
