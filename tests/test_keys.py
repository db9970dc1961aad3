"""Keys: made, shown once, used, rotated, revoked; and what is remembered of them."""

import asyncio
import hashlib
import json
import re
import string
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from conftest import API_KEY, eventually, execute, run_cli, running_app, settings_for
from sqlalchemy import Engine, event
from sqlalchemy.engine import URL
from verify import assert_ledger_consistent

import migrations
from auth import ROOT_KEY, Authenticator
from cluster import Cluster
from config import ROOT
from db import Database
from keys import memory as memory_module
from keys import store
from keys.memory import KeyMemory
from keys.tokens import PATTERN, make_token, parse_token
from problems import Unauthorized
from schemas import ApiKeyIn

LOGIN = {"event_type": "LOGIN", "actor": "alice"}
DIGITS = string.digits + string.ascii_uppercase + string.ascii_lowercase


def make(client: httpx.Client, *scopes: str, **members: Any) -> dict[str, Any]:
    response = client.post("/keys", json={"name": "shop", "scopes": scopes, **members})
    assert response.status_code == 201, response.text
    made: dict[str, Any] = response.json()
    return made


def headers(key: dict[str, Any] | str) -> dict[str, str]:
    return {"X-API-Key": key if isinstance(key, str) else key["key"]}


def recorded(client: httpx.Client) -> list[tuple[str, str, str, Any]]:
    events = client.get("/events", params={"event_type": "audit.key.*", "order": "asc"}).json()["events"]
    return [(each["event_type"], each["actor"], each["resource"], each["metadata"]) for each in events]


# What it looks like


def test_a_key_has_a_form_and_a_checksum_that_a_scanner_can_check() -> None:
    for _ in range(200):
        token = make_token()
        assert re.fullmatch(PATTERN, token)
        checksum = sum(DIGITS.index(digit) * 62**place for place, digit in enumerate(reversed(token[-6:])))
        assert checksum == zlib.crc32(token[:-6].encode())
        secret = sum(DIGITS.index(digit) * 62**place for place, digit in enumerate(reversed(token[19:-6])))
        assert secret < 2**256
    assert f"`{PATTERN}`" in (ROOT / "README.md").read_text()


def test_a_key_with_any_character_changed_is_no_key() -> None:
    token = make_token()
    assert parse_token(token) is not None
    for place, digit in enumerate(token):
        other = "x" if digit != "x" else "y"
        assert parse_token(token[:place] + other + token[place + 1 :]) is None
    for wrong in ("", token + "0", token[:-1], f" {token}", f"{token}\n", token.replace("_", "-")):
        assert parse_token(wrong) is None


# Making, listing, revoking


def test_a_key_is_shown_once_and_kept_as_the_digest_of_its_secret(client: httpx.Client, _shared_app: Any) -> None:
    made = make(client, "read", "write", tenant="acme", event_types=["order."], expires_at="2999-01-01T00:00:00Z")
    assert re.fullmatch(PATTERN, made["key"])
    key = made.pop("key")
    assert client.get("/keys").json() == {"keys": [made], "next_after": None}
    assert (made["id"], made["scopes"], made["created_by"]) == (key[6:18], ["write", "read"], "root")
    assert (made["tenant"], made["event_types"], made["expires_at"][:4]) == ("acme", ["order."], "2999")
    stored = execute(_shared_app[1], "SELECT to_jsonb(api_keys)::text FROM api_keys")
    assert hashlib.sha256(key[19:-6].encode()).hexdigest() in stored
    assert key[19:-6] not in stored


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("name", ""),
        ("scopes", []),
        ("scopes", ["root"]),
        ("tenant", ""),
        ("event_types", []),
        ("event_types", [""]),
        ("expires_at", "2020-01-01T00:00:00Z"),
        ("expires_at", "tomorrow"),
        ("scope", "read"),
    ],
)
def test_a_key_that_is_not_clear_is_refused(client: httpx.Client, member: str, value: Any) -> None:
    response = client.post("/keys", json={"name": "shop", "scopes": ["read"], member: value})
    assert response.status_code == 422
    assert response.json()["errors"][0]["location"].startswith(f"body.{member}")
    assert client.get("/keys").json()["keys"] == []


def test_a_key_does_what_its_scopes_say_and_the_refusal_names_the_one_that_is_missing(client: httpx.Client) -> None:
    client.post("/events", json=LOGIN)
    calls = [("POST", "/events", "write"), ("POST", "/events/batch", "write")]
    calls += [("GET", f"/events{path}", "read") for path in ("", "/1", "/count", "/top?field=actor", "/export")]
    calls += [("GET", "/events/histogram?interval=day", "read"), ("GET", "/events/stream", "read")]
    calls += [("GET", "/keys", "admin"), ("POST", "/keys", "admin"), ("DELETE", "/keys/000000000000", "admin")]
    calls += [("GET", "/legal-holds", "admin"), ("POST", "/legal-holds", "admin"), ("GET", "/legal-holds/1", "admin")]
    calls += [("DELETE", "/legal-holds/1", "admin")]
    for scope in ("write", "read", "admin"):
        key = make(client, scope)
        for method, path, needed in calls:
            with client.stream(method, path, headers=headers(key)) as response:
                assert (response.status_code == 403) == (scope != needed), (scope, method, path)
                if scope != needed:
                    assert f"scope {needed}" in json.loads(response.read())["detail"]


def test_every_call_but_those_of_operators_needs_a_scope(client: httpx.Client) -> None:
    """A route that is added without one is found here."""
    for path, methods in client.get("/openapi.json").json()["paths"].items():
        for method, call in methods.items():
            is_open = path in ("/health", "/ready", "/metrics")
            assert ("403" in call["responses"]) != is_open, (method, path)
            assert bool(call.get("security")) != is_open, (method, path)


def test_a_revoked_key_stays_as_history(client: httpx.Client) -> None:
    made = make(client, "read")
    assert client.get("/events", headers=headers(made)).status_code == 200
    revoked = client.delete(f"/keys/{made['id']}")
    assert (revoked.status_code, revoked.json()["revoked_by"]) == (200, "root")
    assert client.delete(f"/keys/{made['id']}").json()["revoked_at"] == revoked.json()["revoked_at"]
    assert [key["id"] for key in client.get("/keys?active=false").json()["keys"]] == [made["id"]]
    assert client.get("/keys?active=true").json()["keys"] == []
    assert client.delete("/keys/000000000000").json()["type"] == "urn:audit:problem:key-not-found"


def test_keys_are_listed_in_pages(client: httpx.Client) -> None:
    ids = sorted(make(client, "read")["id"] for _ in range(5))
    first = client.get("/keys?limit=2").json()
    rest = client.get("/keys", params={"limit": 3, "after": first["next_after"]}).json()
    assert [key["id"] for key in first["keys"] + rest["keys"]] == ids
    assert rest["next_after"] is None


def test_an_expired_key_is_refused(client: httpx.Client, _shared_app: Any) -> None:
    made = make(client, "read", expires_at="2999-01-01T00:00:00Z")
    execute(_shared_app[1], "UPDATE api_keys SET expires_at = now()")
    response = client.get("/events", headers=headers(made))
    assert (response.status_code, response.json()["detail"]) == (401, "This API key has expired.")


def test_each_change_of_a_key_is_an_event_and_never_holds_the_key(client: httpx.Client) -> None:
    made = make(client, "write", tenant="acme")
    for _ in range(2):
        client.delete(f"/keys/{made['id']}")
    assert recorded(client) == [
        ("audit.key.create", "root", f"keys/{made['id']}", {"name": "shop", "scopes": ["write"], "tenant": "acme"}),
        ("audit.key.revoke", "root", f"keys/{made['id']}", None),
    ]


def test_a_key_whose_event_cannot_be_written_is_not_made(database_url: URL) -> None:
    execute(database_url, "ALTER TABLE audit_events ADD CONSTRAINT no_keys CHECK (event_type NOT LIKE 'audit.key.%')")
    with running_app(settings_for(database_url)) as client:
        assert client.post("/keys", json={"name": "shop", "scopes": ["read"]}).status_code == 500
        assert client.get("/keys").json()["keys"] == []
    assert_ledger_consistent(database_url)


def test_keys_from_the_command_line(database_url: URL) -> None:
    def keys(*arguments: str) -> tuple[int, list[dict[str, Any]], str]:
        status, lines, complaint = run_cli(database_url, "keys", *arguments)
        return status, [json.loads(line) for line in lines], complaint

    made = keys("create", "--name", "shop", "--scopes", "write", "read", "--tenant", "acme", "--by", "carol")[1][0]
    (replacing,) = keys("rotate", made["id"], "--grace", "24h", "--by", "dave")[1]
    assert {name: replacing[name] for name in ("name", "scopes", "tenant", "created_by")} == {
        "name": "shop",
        "scopes": ["write", "read"],
        "tenant": "acme",
        "created_by": "dave",
    }
    listed = {key["id"]: key for key in keys("list")[1]}
    assert listed.keys() == {made["id"], replacing["id"]}
    ends_in = datetime.fromisoformat(listed[made["id"]]["expires_at"]) - datetime.now(UTC)
    assert timedelta(hours=23) < ends_in <= timedelta(hours=24)
    with running_app(settings_for(database_url)) as client:
        for key in (made, replacing):
            assert client.get("/events", headers=headers(key)).status_code == 200
        assert keys("revoke", made["id"], "--by", "dave")[1][0]["revoked_by"] == "dave"
        assert [each[:3] for each in recorded(client)] == [
            ("audit.key.create", "carol", f"keys/{made['id']}"),
            ("audit.key.rotate", "dave", f"keys/{made['id']}"),
            ("audit.key.revoke", "dave", f"keys/{made['id']}"),
        ]
        assert recorded(client)[1][3]["replaced_by"] == replacing["id"]
    assert (len(keys("list")[1]), len(keys("list", "--all")[1])) == (1, 2)
    assert keys("rotate", made["id"], "--by", "dave")[0] == 1
    for wrong in (("--scopes", "read", "--expires-at", "2020-01-01T00:00:00Z"), ("--scopes", "root")):
        assert keys("create", "--name", "shop", "--by", "carol", *wrong)[0] != 0
    assert keys("rotate", replacing["id"], "--grace", "soon", "--by", "dave")[0] == 2
    assert_ledger_consistent(database_url)


# What a key may write


def test_a_key_writes_event_types_that_begin_like_its_own_and_no_other(client: httpx.Client) -> None:
    key = headers(make(client, "write", event_types=["order.", "LOGIN"]))
    for event_type in ("order.create", "LOGIN", "LOGIN_FAILED"):
        assert client.post("/events", headers=key, json={**LOGIN, "event_type": event_type}).status_code == 201
    refused = client.post("/events", headers=key, json={**LOGIN, "event_type": "order"})
    assert (refused.status_code, refused.json()["errors"][0]["location"]) == (403, "body.event_type")
    batch = [
        {**LOGIN, "event_type": event_type} for event_type in ("order.create", "audit.hold.place", "orde", "LOGIN")
    ]
    refused = client.post("/events/batch", headers=key, json=batch)
    assert [error["location"] for error in refused.json()["errors"]] == ["body.1.event_type", "body.2.event_type"]
    assert client.get("/events/count?actor=alice").json()["count"] == 3


def test_nobody_gives_away_more_than_he_has(client: httpx.Client) -> None:
    key = headers(make(client, "admin", tenant="acme", event_types=["order."]))
    for members in ({"tenant": "other"}, {"event_types": ["o"]}, {"event_types": ["order.x", "LOGIN"]}):
        response = client.post("/keys", headers=key, json={"name": "x", "scopes": ["read"], **members})
        assert (response.status_code, response.json()["errors"][0]["location"]) == (403, f"body.{next(iter(members))}")
    made = client.post("/keys", headers=key, json={"name": "x", "scopes": ["read"]}).json()
    assert (made["tenant"], made["event_types"]) == ("acme", ["order."])


# What is remembered


@contextmanager
def counted(statement: str) -> Iterator[list[str]]:
    """The statements that SQLAlchemy runs and that begin so."""
    seen: list[str] = []

    def note(_connection: Any, _cursor: Any, sql: str, *_: Any) -> None:
        if sql.startswith(statement):
            seen.append(sql)

    event.listen(Engine, "before_cursor_execute", note)
    yield seen
    event.remove(Engine, "before_cursor_execute", note)


LOOK_UP = "SELECT api_keys.id, api_keys.secret_hash"


def test_a_revoked_key_is_refused_by_every_replica_within_5_s(database_url: URL) -> None:
    with running_app(settings_for(database_url)) as one, running_app(settings_for(database_url)) as other:
        made = make(one, "read", "write")
        for client in (one, other):
            assert client.post("/events", json=LOGIN, headers=headers(made)).status_code == 201
        one.delete(f"/keys/{made['id']}")
        revoked_at = datetime.now(UTC)
        for client, method in ((one, "GET"), (other, "POST")):

            def is_refused(client: httpx.Client = client, method: str = method) -> bool:
                return client.request(method, "/events", json=LOGIN, headers=headers(made)).status_code == 401

            eventually(is_refused, seconds=20)
        assert datetime.now(UTC) - revoked_at < timedelta(seconds=memory_module.MAX_AGE_S + 1)
    assert_ledger_consistent(database_url)


def test_a_stream_ends_when_its_key_is_revoked(client: httpx.Client) -> None:
    made = make(client, "read")
    with client.stream("GET", "/events/stream", headers=headers(made)) as response:
        assert response.status_code == 200
        client.delete(f"/keys/{made['id']}")
        with pytest.raises(httpx.RemoteProtocolError):
            response.read()


def test_a_key_in_use_is_asked_for_in_the_background(database_url: URL) -> None:
    now_s = 1000.0

    async def use(database: Database, token: str) -> None:
        nonlocal now_s
        memory = KeyMemory(database, clock=lambda: now_s)
        authenticator = Authenticator(API_KEY, memory)
        with counted(LOOK_UP) as asked:
            assert (await authenticator.identify(API_KEY), asked) == (ROOT_KEY, [])
            assert memory.recall(token[6:18]) is None
            key = await authenticator.identify(token)
            assert (key.name, len(asked)) == ("shop", 1)
        with counted(LOOK_UP) as asked:
            now_s += 1
            assert memory.recall(token[6:18]) is not None
            assert (await authenticator.identify(token), asked) == (key, [])
            store.revoke_key(database, token[6:18], "root")
            now_s += 2
            assert await authenticator.identify(token) == key, "known for 3 s, and asked for in the background"
            with pytest.raises(Unauthorized, match="revoked"):
                await memory.look_up(token[6:18])
                await authenticator.identify(token)
            assert len(asked) == 1
        now_s += 5
        assert memory.recall(token[6:18]) is None, "what is older than 5 s is asked for before it counts"
        with pytest.raises(Unauthorized, match="revoked"):
            await authenticator.identify(token)
        await memory.stop()

    database = Database(database_url)
    token = store.create_key(database, ApiKeyIn(name="shop", scopes=["read"]), "root")["key"]
    asyncio.run(use(database, token))
    database.close()


def test_made_up_ids_cost_one_small_statement_at_a_time(database_url: URL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_module, "MAX_REMEMBERED", 100)

    async def attack(database: Database) -> None:
        memory = KeyMemory(database)
        authenticator = Authenticator(API_KEY, memory)
        tokens = [make_token() for _ in range(400)]
        with counted(LOOK_UP) as asked:
            for wrong in ("x", "audit_", tokens[0][:-1] + "!", tokens[0].swapcase()):
                with pytest.raises(Unauthorized):
                    await authenticator.identify(wrong)
            assert asked == [], "a wrong form or checksum is refused without the database"
            answers = await asyncio.gather(*map(authenticator.identify, tokens), return_exceptions=True)
            assert {type(answer) for answer in answers} == {Unauthorized}
            assert len(asked) <= 2
            with pytest.raises(Unauthorized):
                await authenticator.identify(tokens[-1])
            assert len(asked) <= 2, "that there is no such key is remembered"
        assert len(memory._unknown) == 100
        await memory.stop()

    database = Database(database_url)
    asyncio.run(attack(database))
    database.close()


def test_a_wrong_secret_is_refused_whether_or_not_the_id_is_known(client: httpx.Client) -> None:
    made = make(client, "read")
    other = make(client, "read")
    unchecked = made["key"][:19] + other["key"][19:-6]
    number, digits = zlib.crc32(unchecked.encode()), ""
    for _ in range(6):
        number, digit = divmod(number, 62)
        digits = DIGITS[digit] + digits
    mixed = unchecked + digits
    assert parse_token(mixed) is not None
    for wrong in (mixed, make_token()):
        response = client.get("/events", headers=headers(wrong))
        assert (response.status_code, response.json()["detail"]) == (401, "This API key is not valid.")


def test_digests_are_compared_in_constant_time(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append((len(left), len(right)))
        return False

    made = make(client, "read")
    monkeypatch.setattr("hmac.compare_digest", compare)
    for wrong in ("", "x", "x" * 1000, made["key"], make_token()):
        assert client.get("/events", headers=headers(wrong)).status_code == 401
    assert set(compared) == {(32, 32)}
    assert len(compared) == 5 + 2


def test_without_the_database_the_root_key_is_known_and_another_is_a_503(own_cluster: Cluster) -> None:
    own_cluster.create_database("audit")
    url = own_cluster.url("audit")
    migrations.upgrade(url)
    with running_app(settings_for(url)) as client:
        made = make(client, "read", "write")
        own_cluster.stop("immediate")
        for key, headed in (("root", {}), ("another", headers(made))):
            response = client.post("/events", json=LOGIN, headers=headed)
            assert response.status_code == 503, key
            assert response.headers["Retry-After"]
        assert client.get("/events", headers=headers("audit_no")).status_code == 401
        own_cluster.start()
        eventually(lambda: client.post("/events", json=LOGIN, headers=headers(made)).status_code == 201)
    assert_ledger_consistent(url)


def test_when_a_key_was_used_last_is_written_to_the_minute(database_url: URL) -> None:
    with running_app(settings_for(database_url)) as client:
        made = make(client, "read", "write")
        assert made["last_used_at"] is None
        with counted("UPDATE api_keys SET last_used_at") as written:
            for _ in range(5):
                client.post("/events", json=LOGIN, headers=headers(made))
        assert written == [], "not on the request's path"
    used_at = execute(database_url, "SELECT last_used_at FROM api_keys")
    assert (used_at.second, used_at.microsecond) == (0, 0)
    assert timedelta(0) <= datetime.now(UTC) - used_at < timedelta(minutes=2)
    assert_ledger_consistent(database_url)


@pytest.mark.parametrize(
    "key_id", ["4fJ0sZq81Kx", "4fJ0sZq81KxWx", "4fJ0sZq81KxW%0A", "%0A4fJ0sZq81KxW", "4fJ0sZq81Kx_"]
)
def test_an_id_of_another_form_is_named(client: httpx.Client, key_id: str) -> None:
    answer = client.delete(f"/keys/{key_id}")
    assert (answer.status_code, answer.json()["errors"][0]["location"]) == (422, "path.key_id")
