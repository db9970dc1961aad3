"""Several tenants, keys and all calls in any order: what a key sees is what the table holds of its tenant, and no more.

The truth is read from the table by SQL. docs/security.md, Tenants.
"""

import json
from base64 import b64decode
from dataclasses import dataclass
from typing import Any, ClassVar

import httpx
import psycopg2
from conftest import API_KEY, SIGNER
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from sqlalchemy.engine import URL

from ledger import tree
from ledger.notes import open_checkpoint

TENANTS = ("acme", "globex", "initech")
ANY_TENANT = st.sampled_from((*TENANTS, None))
ACTORS = st.sampled_from(["alice", "bob"])
SCOPES = st.sampled_from([("read", "write"), ("read", "write", "admin")])


@dataclass(frozen=True)
class Holder:
    """Somebody with a key."""

    headers: dict[str, str]
    tenant: str | None
    scopes: tuple[str, ...]

    def may_say(self, tenant: str | None) -> bool:
        return self.tenant is None or tenant in (None, self.tenant)


EVERYBODY = Holder({}, None, ())


class Tenants(RuleBasedStateMachine):
    """The service, beside the table."""

    client: ClassVar[httpx.Client]
    url: ClassVar[URL]
    holders = Bundle("holders")

    def __init__(self) -> None:
        super().__init__()
        self.connection = psycopg2.connect(self.url.set(drivername="postgresql").render_as_string(hide_password=False))
        self.connection.autocommit = True
        self.cursors: list[tuple[Holder, str]] = []

    def teardown(self) -> None:
        self.connection.close()

    def call(self, holder: Holder, method: str, path: str, **options: Any) -> httpx.Response:
        answer = self.client.request(method, path, headers=holder.headers, **options)
        assert answer.status_code < 500, answer.text
        return answer

    def stored(self, holder: Holder) -> list[tuple[int, str, str | None]]:
        """Id, actor and tenant of what the holder may see, oldest first."""
        with self.connection.cursor() as cursor:
            cursor.execute(
                "SELECT id, actor, tenant FROM audit_events WHERE tenant = %s OR %s ORDER BY id",
                (holder.tenant, holder.tenant is None),
            )
            return cursor.fetchall()

    @initialize(target=holders)
    def begin(self) -> Holder:
        return Holder({"X-API-Key": API_KEY}, None, ("read", "write", "admin"))

    @rule(target=holders, maker=holders, tenant=ANY_TENANT, scopes=SCOPES)
    def make_key(self, maker: Holder, tenant: str | None, scopes: tuple[str, ...]) -> Holder:
        wanted = {"name": f"of {tenant}", "scopes": list(scopes), "tenant": tenant}
        answer = self.call(maker, "POST", "/keys", json=wanted)
        if "admin" not in maker.scopes or not maker.may_say(tenant):
            assert answer.status_code == 403
            return maker
        assert answer.status_code == 201
        assert answer.json()["tenant"] == (tenant or maker.tenant)
        return Holder({"X-API-Key": answer.json()["key"]}, answer.json()["tenant"], scopes)

    @rule(holder=holders, tenant=ANY_TENANT, actor=ACTORS)
    def append(self, holder: Holder, tenant: str | None, actor: str) -> None:
        answer = self.call(holder, "POST", "/events", json={"event_type": "E", "actor": actor, "tenant": tenant})
        assert answer.status_code == (201 if holder.may_say(tenant) else 403)
        if answer.status_code == 201:
            assert answer.json()["tenant"] == (tenant or holder.tenant)

    @rule(holder=holders, tenants=st.lists(ANY_TENANT, min_size=1, max_size=4))
    def append_batch(self, holder: Holder, tenants: list[str | None]) -> None:
        before = len(self.stored(holder))
        events = [{"event_type": "E", "actor": "alice", "tenant": tenant} for tenant in tenants]
        answer = self.call(holder, "POST", "/events/batch", json=events)
        assert answer.status_code == (201 if all(map(holder.may_say, tenants)) else 403)
        assert len(self.stored(holder)) - before == (len(tenants) if answer.status_code == 201 else 0)

    @rule(holder=holders, tenant=ANY_TENANT, key=st.sampled_from("xy"), actor=ACTORS)
    def append_keyed(self, holder: Holder, tenant: str | None, key: str, actor: str) -> None:
        """Under an idempotency key that every tenant uses: what comes back is the holder's own tenant's."""
        event = {"event_type": "E", "actor": actor, "tenant": tenant, "idempotency_key": key}
        answer = self.call(holder, "POST", "/events", json=event)
        if not holder.may_say(tenant):
            assert answer.status_code == 403
        elif answer.status_code != 409:
            assert answer.json()["tenant"] == (tenant or holder.tenant)

    @rule(holder=holders)
    def read(self, holder: Holder) -> None:
        stored = self.stored(holder)
        ids = [event_id for event_id, _, _ in stored]
        listed = self.call(holder, "GET", "/events", params={"limit": 1000}).json()["events"]
        assert sorted(event["id"] for event in listed) == ids
        assert self.call(holder, "GET", "/events/count").json()["count"] == len(ids)
        *exported, last = self.call(holder, "GET", "/events/export").text.splitlines()
        assert [json.loads(line)["id"] for line in exported] == ids and json.loads(last)["count"] == len(ids)
        buckets = self.call(holder, "GET", "/events/histogram", params={"interval": "month"}).json()["buckets"]
        assert sum(bucket["count"] for bucket in buckets) == len(ids)
        top = self.call(holder, "GET", "/events/top", params={"field": "tenant", "n": 100}).json()["values"]
        tenants = [tenant for _, _, tenant in stored if tenant is not None]
        assert {value["value"]: value["count"] for value in top} == {each: tenants.count(each) for each in set(tenants)}

    @rule(holder=holders, tenant=st.sampled_from(TENANTS), actor=ACTORS)
    def read_filtered(self, holder: Holder, tenant: str, actor: str) -> None:
        found = self.call(holder, "GET", "/events", params={"tenant": tenant, "actor": actor, "limit": 1000})
        assert found.status_code == (200 if holder.may_say(tenant) else 403)
        if found.status_code == 200:
            wanted = [event_id for event_id, *rest in self.stored(holder) if rest == [actor, tenant]]
            assert sorted(event["id"] for event in found.json()["events"]) == wanted

    @rule(holder=holders, number=st.integers(0, 10_000))
    def read_one(self, holder: Holder, number: int) -> None:
        everything = self.stored(EVERYBODY)
        if not everything:
            return
        event_id, _, tenant = everything[number % len(everything)]
        expected = 200 if holder.tenant in (None, tenant) else 404
        assert self.call(holder, "GET", f"/events/{event_id}").status_code == expected
        if expected == 404:  # of one's own it may wait a second for a checkpoint: look_at_the_ledger()
            assert self.call(holder, "GET", f"/events/{event_id}/proof").status_code == 404

    @rule(holder=holders)
    def keep_cursor(self, holder: Holder) -> None:
        cursor = self.call(holder, "GET", "/events", params={"limit": 1}).json()["next_cursor"]
        if cursor is not None:
            self.cursors.append((holder, cursor))

    @rule(holder=holders)
    def follow_anybodys_cursor(self, holder: Holder) -> None:
        """A cursor of another tenant's holder fits no query of this one; of one's own it goes on with one's own."""
        for owner, cursor in self.cursors:
            answer = self.call(holder, "GET", "/events", params={"limit": 1, "cursor": cursor})
            assert answer.status_code == (200 if owner.tenant == holder.tenant else 400)
            visible = {event_id for event_id, _, _ in self.stored(holder)}
            assert {event["id"] for event in answer.json().get("events", [])} <= visible

    @rule(holder=holders)
    def listen(self, holder: Holder) -> None:
        """From the beginning on: as many as there are, and each the holder's."""
        ids = [event_id for event_id, _, _ in self.stored(holder)]
        headers = {**holder.headers, "Last-Event-ID": "0"}
        if not ids:
            return
        with self.client.stream("GET", "/events/stream", headers=headers) as answer:
            told = (json.loads(line[6:])["id"] for line in answer.iter_lines() if line.startswith("data: "))
            assert [next(told) for _ in ids] == ids

    @rule(holder=holders, tenant=st.sampled_from(TENANTS))
    def place_and_look_at_holds(self, holder: Holder, tenant: str) -> None:
        placed = self.call(holder, "POST", "/legal-holds", json={"tenant": tenant, "reason": "Case 1"})
        may = "admin" in holder.scopes and holder.may_say(tenant)
        assert placed.status_code == (201 if may else 403)
        listed = self.call(holder, "GET", "/legal-holds", params={"limit": 1000})
        if "admin" in holder.scopes:
            assert holder.tenant is None or {hold["tenant"] for hold in listed.json()["legal_holds"]} <= {holder.tenant}
        with self.connection.cursor() as cursor:
            cursor.execute("SELECT id, tenant FROM legal_holds")
            for hold_id, of in cursor.fetchall():
                expected = 403 if "admin" not in holder.scopes else 200 if holder.tenant in (None, of) else 404
                assert self.call(holder, "GET", f"/legal-holds/{hold_id}").status_code == expected
                if expected == 404:
                    assert self.call(holder, "DELETE", f"/legal-holds/{hold_id}").status_code == 404

    @rule(holder=holders)
    def look_at_keys(self, holder: Holder) -> None:
        answer = self.call(holder, "GET", "/keys", params={"limit": 1000})
        if "admin" not in holder.scopes:
            assert answer.status_code == 403
        elif holder.tenant is not None:
            assert {key["tenant"] for key in answer.json()["keys"]} <= {holder.tenant}

    @rule(holder=holders, actor=ACTORS)
    def redact(self, holder: Holder, actor: str) -> None:
        wanted = {"actor": actor, "reason": "Request 1", "dry_run": False}
        answer = self.call(holder, "POST", "/redactions", json=wanted)
        assert answer.status_code == (200 if "admin" in holder.scopes and holder.tenant is None else 403)

    @rule(holder=holders, number=st.integers(0, 10_000))
    def look_at_the_ledger(self, holder: Holder, number: int) -> None:
        """Hashes are everybody's, entries those of the tenant. What a checkpoint has already is proved at once."""
        note = self.call(holder, "GET", "/ledger/checkpoint").text
        head, _ = open_checkpoint(note, SIGNER.verifier)
        if head.size == 0:
            return
        width = min(head.size, 255)
        tile = self.call(holder, "GET", f"/ledger/tile/0/000.p/{width}")
        assert (tile.status_code, len(tile.content)) == (200, 32 * width)
        bundle = self.call(holder, "GET", f"/ledger/tile/entries/000.p/{width}")
        assert bundle.status_code == (200 if holder.tenant is None else 403)
        event_id, _, tenant = self.stored(EVERYBODY)[number % head.size]
        answer = self.call(holder, "GET", f"/events/{event_id}/proof")
        assert answer.status_code == (200 if holder.tenant in (None, tenant) else 404)
        if answer.status_code == 200:
            proof = answer.json()
            assert json.loads(proof["entry"]).get("tenant") == tenant
            head, _ = open_checkpoint(proof["checkpoint"], SIGNER.verifier)
            path = [b64decode(node) for node in proof["inclusion_path"]]
            leaf = tree.hash_leaf(proof["entry"].encode())
            assert tree.root_from_inclusion(leaf, proof["leaf_index"], head.size, path) == head.root


def test_nothing_leaks_from_tenant_to_tenant(client: httpx.Client, _shared_app: tuple[httpx.Client, URL]) -> None:
    Tenants.client, Tenants.url = client, _shared_app[1]
    steps = settings(max_examples=16, stateful_step_count=40, derandomize=True, database=None)
    run_state_machine_as_test(Tenants, settings=steps)
