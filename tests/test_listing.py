"""Pages: each event once, in order, whatever arrives meanwhile; and cursors that continue their own query only."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from conftest import execute, running_app, settings_for
from sqlalchemy.engine import URL
from test_filters import list_all, post_all, short_walks
from verify import assert_ledger_consistent

import migrations
from queries import listing

OLDEST = datetime(2026, 1, 1, tzinfo=UTC)
TYPES = ("login", "order.create", "order.delete")


def event(number: int, moment: datetime) -> dict[str, Any]:
    return {
        "event_type": TYPES[number % 3],
        "actor": f"user.{number % 4}",
        "timestamp": moment.isoformat(),
        "metadata": {"even": number % 2 == 0},
    }


def fill(client: httpx.Client, count: int = 60) -> list[dict[str, Any]]:
    """Three events an instant, so that pages end within one."""
    return post_all(client, [event(number, OLDEST + timedelta(hours=number // 3)) for number in range(count)])


@pytest.mark.parametrize("way", [nullcontext, short_walks], ids=["walks", "searches"])
@pytest.mark.parametrize("order", ["desc", "asc"])
@pytest.mark.parametrize(
    "filters",
    [{}, {"actor": ["user.1", "user.2"]}, {"event_type": "order.*"}, {"actor": "user.1", "event_type": "login"}],
    ids=["all", "any of", "prefix", "both"],
)
def test_events_that_arrive_between_pages_neither_repeat_nor_hide_any(
    client: httpx.Client, filters: dict[str, Any], order: str, way: Callable[[], AbstractContextManager[None]]
) -> None:
    fill(client)
    query = {**filters, "order": order, "limit": 4}
    there_before = [found["id"] for found in list_all(client, query)]
    with way():
        page = client.get("/events", params=query)
        seen = [found["id"] for found in page.json()["events"]]
        for hour in range(20):
            late, now = OLDEST + timedelta(hours=hour), OLDEST + timedelta(hours=20)
            arriving = [event(kind, moment) for kind in range(12) for moment in (late, now)]
            assert client.post("/events/batch", json=arriving).status_code == 201
            if "next" in page.links:
                page = client.get(page.links["next"]["url"])
                seen += [found["id"] for found in page.json()["events"]]
        while "next" in page.links:
            page = client.get(page.links["next"]["url"])
            seen += [found["id"] for found in page.json()["events"]]
    assert len(seen) == len(set(seen))
    assert [event_id for event_id in seen if event_id in there_before] == there_before


@pytest.mark.parametrize("order", ["desc", "asc"])
def test_no_page_ends_behind_events_of_another_actor_that_were_not_reached(client: httpx.Client, order: str) -> None:
    """What hides alice's only login from a walk of so many events does not hide it from the page."""
    events = [("bob", "login")] * 3 + [("alice", "noise")] * 20 + [("alice", "login")] + [("bob", "login")] * 9
    step = timedelta(hours=1 if order == "asc" else -1)
    post_all(
        client,
        [
            {"actor": actor, "event_type": event_type, "timestamp": (OLDEST + number * step).isoformat()}
            for number, (actor, event_type) in enumerate(events)
        ],
    )
    query = {"actor": ["alice", "bob"], "event_type": "login", "order": order, "limit": 4}
    with short_walks():
        actors = [found["actor"] for found in list_all(client, query)]
    assert actors == ["bob"] * 3 + ["alice"] + ["bob"] * 9


def test_the_last_page_has_no_next_even_where_it_is_full(client: httpx.Client) -> None:
    fill(client, 6)
    first = client.get("/events", params={"limit": 3})
    second = client.get(first.links["next"]["url"])
    assert (len(second.json()["events"]), second.json()["next_cursor"]) == (3, None)
    assert "next" not in second.links


@pytest.mark.parametrize("order", ["desc", "asc"])
def test_a_page_of_large_events_ends_early_and_the_next_goes_on(client: httpx.Client, order: str) -> None:
    large = [{**event(0, OLDEST), "metadata": {"padding": "x" * 60_000}}] * 200
    for _ in range(3):
        assert client.post("/events/batch", json=large).status_code == 201
    query: dict[str, Any] = {"order": order, "limit": 1000}
    pages = [client.get("/events", params=query)]
    while "next" in pages[-1].links:
        pages.append(client.get(pages[-1].links["next"]["url"]))
    assert all(len(page.content) < listing.PAGE_LENGTH + 61_000 for page in pages)
    ids = [found["id"] for page in pages for found in page.json()["events"]]
    assert ids == sorted(range(1, 601), reverse=order == "desc")


@pytest.mark.parametrize("way", [nullcontext, short_walks], ids=["walks", "searches"])
def test_a_page_of_many_events_is_the_same_however_it_is_fetched(
    client: httpx.Client, way: Callable[[], AbstractContextManager[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(client)
    query: dict[str, Any] = {"event_type": "order.*", "limit": 39}
    whole = client.get("/events", params=query).json()
    monkeypatch.setattr(listing, "FETCHED_EVENTS", 7)
    with way():
        assert client.get("/events", params=query).json() == whole
        assert len(client.get("/events", params={**query, "limit": 40}).json()["events"]) == 40
        assert client.get("/events", params={**query, "limit": 40}).json()["next_cursor"] is None


def test_the_link_keeps_filters_and_order(client: httpx.Client) -> None:
    fill(client)
    query: dict[str, Any] = {"actor": ["user.1", "user.2"], "order": "asc", "metadata": '{"even": true}', "limit": 2}
    url = httpx.URL(client.get("/events", params=query).links["next"]["url"])
    assert url.path == "/events"
    assert url.params.get_list("actor") == ["user.1", "user.2"]
    assert (url.params["order"], url.params["metadata"], url.params["limit"]) == ("asc", '{"even": true}', "2")


@pytest.mark.parametrize(
    "changes",
    [
        {"order": "asc"},
        {"actor": "user.2"},
        {"actor": ["user.1", "user.2"]},
        {"event_type": "login"},
        {"tenant": "acme"},
        {"metadata": "{}"},
        {"source_ip": "::/0"},
        {"end": "2027-01-01T00:00:00Z"},
    ],
)
def test_a_cursor_continues_its_own_query_only(client: httpx.Client, changes: dict[str, Any]) -> None:
    fill(client)
    query: dict[str, Any] = {"actor": "user.1", "limit": 2}
    cursor = client.get("/events", params=query).json()["next_cursor"]
    response = client.get("/events", params={**query, "cursor": cursor, **changes})
    assert response.status_code == 400
    assert response.json()["type"] == "urn:audit:problem:invalid-cursor"
    assert "other filters" in response.json()["detail"]


@pytest.fixture
def adopted(empty_database_url: URL) -> Iterator[httpx.Client]:
    """A service whose log has rows from before it, with ids and a timestamp as it gives none."""
    execute(
        empty_database_url,
        "CREATE TABLE audit_events (id serial PRIMARY KEY, event_type varchar NOT NULL, actor varchar NOT NULL,"
        " timestamp timestamp NOT NULL)",
    )
    execute(
        empty_database_url,
        "INSERT INTO audit_events VALUES (-2, 'LOGIN', 'alice', '2026-01-01'), (-1, 'LOGIN', 'alice', '2026-01-01'),"
        " (3, 'LOGIN', 'alice', '9999-12-31 23:59:59.999999'), (4, 'LOGIN', 'alice', '9999-12-31 23:59:59.999999')",
    )
    execute(
        empty_database_url,
        "INSERT INTO audit_events SELECT id, 'LOGIN', 'bob', '2027-01-01' FROM generate_series(5, 24) AS id",
    )
    migrations.upgrade(empty_database_url)
    with running_app(settings_for(empty_database_url)) as client:
        yield client
    assert_ledger_consistent(empty_database_url)


@pytest.mark.parametrize("order", ["desc", "asc"])
@pytest.mark.parametrize(
    "filters", [{"actor": "alice"}, {"actor": "al*"}, {"actor": "al*", "start": "2026-12-31T00:00:00Z"}], ids=str
)
def test_rows_from_before_the_service_are_listed_whatever_their_ids_and_timestamps(
    adopted: httpx.Client, filters: dict[str, Any], order: str
) -> None:
    ids = [3, 4] if "start" in filters else [-2, -1, 3, 4]
    expected = ids if order == "asc" else ids[::-1]
    for limit in (1, 2, 10):
        for way in (nullcontext, short_walks):
            with way():
                found = list_all(adopted, {**filters, "order": order, "limit": limit})
            assert [event["id"] for event in found] == expected


def test_a_cursor_fits_the_same_filters_said_otherwise_and_any_limit(client: httpx.Client) -> None:
    known = [found["id"] for found in fill(client) if found["actor"] in ("user.1", "user.2")]
    query: dict[str, Any] = {"actor": ["user.2", "user.1"], "source_ip": "10.0.0.0/8"}
    assert list_all(client, query) == []
    query = {"actor": ["user.2", "user.1"], "start": "2026-01-01T01:00:00+01:00", "limit": 2}
    cursor = client.get("/events", params=query).json()["next_cursor"]
    same = {"actor": ["user.1", "user.2", "user.1"], "start": "2026-01-01T00:00:00Z", "limit": 1000, "cursor": cursor}
    assert [found["id"] for found in client.get("/events", params=same).json()["events"]] == known[2:]


def test_a_cursor_fits_the_same_metadata_whatever_the_order_of_its_keys(client: httpx.Client) -> None:
    moved = {"from": {"a": 1, "b": [2]}, "to": "x"}
    events = [{"event_type": "MOVE", "actor": "alice", "metadata": moved} for _ in range(3)]
    known = [found["id"] for found in post_all(client, events)]
    query: dict[str, Any] = {"metadata": '{"from": {"a": 1, "b": [2]}, "to": "x"}', "limit": 1}
    cursor = client.get("/events", params=query).json()["next_cursor"]
    same = {"metadata": '{"to":"x","from":{"b":[2],"a":1}}', "cursor": cursor}
    assert [found["id"] for found in client.get("/events", params=same).json()["events"]] == known[1:]
