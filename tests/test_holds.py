"""Legal holds over HTTP: placed, listed, released, and each change in the log."""

import json
from typing import Any

import httpx
import pytest
from conftest import execute, run_cli, running_app, settings_for
from sqlalchemy.engine import URL
from verify import assert_ledger_consistent

HOLD = {"actor": "alice", "reason": "Case 2026-117"}


def place(client: httpx.Client, **members: Any) -> dict[str, Any]:
    response = client.post("/legal-holds", json={**HOLD, **members})
    assert response.status_code == 201, response.text
    hold: dict[str, Any] = response.json()
    assert response.headers["Location"] == f"/legal-holds/{hold['id']}"
    return hold


def recorded(client: httpx.Client) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = client.get("/events").json()["events"]
    return events[::-1]


def test_a_hold_is_placed_and_found_again(client: httpx.Client) -> None:
    hold = place(client, tenant="acme")
    assert hold == client.get(f"/legal-holds/{hold['id']}").json()
    assert {name: hold[name] for name in ("tenant", "actor", "resource", "reason", "created_by", "keeps")} == {
        "tenant": "acme",
        "actor": "alice",
        "resource": None,
        "reason": "Case 2026-117",
        "created_by": "root",
        "keeps": None,
    }
    assert hold["created_at"].endswith("Z")
    assert (hold["released_at"], hold["released_by"]) == (None, None)


def test_a_hold_is_released_once_and_stays_as_history(client: httpx.Client) -> None:
    hold = place(client)
    released = client.delete(f"/legal-holds/{hold['id']}")
    assert released.status_code == 200
    assert released.json()["released_by"] == "root"
    assert released.json()["released_at"] >= hold["created_at"]
    assert client.delete(f"/legal-holds/{hold['id']}").json() == released.json()
    assert client.get(f"/legal-holds/{hold['id']}").json() == released.json()


def test_each_change_is_an_event(client: httpx.Client) -> None:
    hold = place(client, tenant="acme")
    for _ in range(2):
        client.delete(f"/legal-holds/{hold['id']}")
    members = ("event_type", "actor", "resource", "tenant")
    assert [tuple(event[name] for name in members) for event in recorded(client)] == [
        ("audit.hold.place", "root", f"legal-holds/{hold['id']}", "acme"),
        ("audit.hold.release", "root", f"legal-holds/{hold['id']}", "acme"),
    ]
    assert recorded(client)[0]["metadata"] == {**HOLD, "tenant": "acme"}


def test_a_hold_whose_event_cannot_be_written_is_not_placed(database_url: URL) -> None:
    execute(database_url, "ALTER TABLE audit_events ADD CONSTRAINT no_holds CHECK (event_type <> 'audit.hold.place')")
    with running_app(settings_for(database_url)) as client:
        assert client.post("/legal-holds", json=HOLD).status_code == 500
        assert client.get("/legal-holds").json()["legal_holds"] == []
    assert_ledger_consistent(database_url)


def test_holds_are_listed_in_pages(client: httpx.Client) -> None:
    ids = [place(client, actor=f"user-{n}")["id"] for n in range(5)]
    client.delete(f"/legal-holds/{ids[1]}")

    def listed(**parameters: Any) -> tuple[list[int], int | None]:
        page = client.get("/legal-holds", params=parameters).json()
        return [hold["id"] for hold in page["legal_holds"]], page["next_after"]

    assert listed() == (ids, None)
    assert listed(limit=2) == (ids[:2], ids[1])
    assert listed(limit=2, after=ids[3]) == (ids[4:], None)
    assert listed(active=True) == ([ids[0], *ids[2:]], None)
    assert listed(active=False) == (ids[1:2], None)


@pytest.mark.parametrize(
    "body",
    [
        {"reason": "no subject"},
        {"actor": "alice"},
        {"actor": "alice", "reason": ""},
        {"actor": "", "reason": "x"},
        {"actor": "ali\0ce", "reason": "x"},
        {"actor": "alice", "reason": "x", "until": "2030"},
        {"resource": "x" * 1025, "reason": "x"},
    ],
)
def test_a_hold_that_is_not_clear_is_refused(client: httpx.Client, body: dict[str, Any]) -> None:
    assert client.post("/legal-holds", json=body).status_code == 422
    assert client.get("/legal-holds").json()["legal_holds"] == []


def test_there_is_no_hold_with_another_id(client: httpx.Client) -> None:
    for response in (client.get("/legal-holds/999999"), client.delete("/legal-holds/999999")):
        assert response.status_code == 404
        assert response.json()["type"] == "urn:audit:problem:hold-not-found"


def test_holds_need_a_key_and_the_scope_admin(client: httpx.Client) -> None:
    for method, path in (("POST", ""), ("GET", ""), ("GET", "/1"), ("DELETE", "/1")):
        response = client.request(method, f"/legal-holds{path}", headers={"X-API-Key": "wrong"})
        assert response.status_code == 401
        key = client.post("/keys", json={"name": "all but admin", "scopes": ["write", "read"]}).json()["key"]
        response = client.request(method, f"/legal-holds{path}", headers={"X-API-Key": key})
        assert response.status_code == 403
        assert "scope admin" in response.json()["detail"]


def test_holds_from_the_command_line(database_url: URL) -> None:
    def holds(*arguments: str) -> tuple[int, list[dict[str, Any]], str]:
        status, lines, complaint = run_cli(database_url, "holds", *arguments)
        return status, [json.loads(line) for line in lines], complaint

    status, (placed,), _ = holds("place", "--actor", "alice", "--reason", "Case 1", "--by", "carol")
    assert (status, placed["actor"], placed["reason"], placed["created_by"]) == (0, "alice", "Case 1", "carol")
    assert holds("list")[1] == [placed]
    assert holds("release", "1", "--by", "dave")[1][0]["released_by"] == "dave"
    assert (holds("list")[1], len(holds("list", "--all")[1])) == ([], 1)
    assert holds("release", "2", "--by", "dave") == (1, [], "audit-service: There is no legal hold with the id 2.\n")
    status, _, complaint = holds("place", "--reason", "Case 1", "--by", "carol")
    assert (status, complaint.count("\n")) == (2, 1)
    assert "at least one of tenant, actor and resource" in complaint
    assert assert_ledger_consistent(database_url) == 2
