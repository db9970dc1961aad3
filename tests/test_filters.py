"""Every filter alone and together, against a plain Python model of what it means."""

import ipaddress
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from queries import listing

Event = dict[str, Any]
Filters = dict[str, Any]

# Few values, so that filters meet events; among them what LIKE and collations would trip over.
TEXTS = ["a", "a.b", "a.c", "a%", "a_b", "a\\", "A", "ä", "a*", "🦊"]
MOMENTS = [f"{year}-01-0{day}T00:00:00.000000Z" for year in ("0001", "2025", "2026") for day in (1, 2)]
ADDRESSES = ["10.0.0.1", "10.0.1.1", "10.1.0.1", "192.0.2.7", "2001:db8::1", "2001:db9::1"]
NETWORKS = [*ADDRESSES, "10.0.0.0/16", "10.0.1.0/24", "0.0.0.0/0", "2001:db8::/32", "::/0"]
SCALARS = [None, True, 1, 1.5, "x", "1"]
TRACES = ["0" * 32, "f" * 32]

metadata = st.dictionaries(
    st.sampled_from("ab"),
    st.recursive(
        st.sampled_from(SCALARS),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
        max_leaves=3,
    ),
    max_size=2,
)
events = st.fixed_dictionaries(
    {"event_type": st.sampled_from(TEXTS), "actor": st.sampled_from(TEXTS), "timestamp": st.sampled_from(MOMENTS)},
    optional={
        "tenant": st.sampled_from(TEXTS),
        "resource": st.sampled_from(TEXTS),
        "outcome": st.sampled_from(["success", "failure"]),
        "source": st.sampled_from(TEXTS),
        "source_ip": st.sampled_from(ADDRESSES),
        "trace_id": st.sampled_from(TRACES),
        "metadata": metadata,
    },
)
patterns = st.lists(st.sampled_from([*TEXTS, *(f"{text}*" for text in TEXTS)]), min_size=1, max_size=3)
filters = st.fixed_dictionaries(
    {},
    optional={
        "actor": patterns,
        "event_type": patterns,
        "start": st.sampled_from(MOMENTS[:3]),
        "end": st.sampled_from(MOMENTS[3:]),
        "tenant": st.sampled_from(TEXTS),
        "resource": st.sampled_from(TEXTS),
        "outcome": st.sampled_from(["success", "failure", "denied"]),
        "source": st.sampled_from(TEXTS),
        "source_ip": st.sampled_from(NETWORKS),
        "trace_id": st.sampled_from(TRACES),
        "metadata": metadata,
    },
)


def is_selected(event: Event, wanted: Filters) -> bool:
    checks: dict[str, Callable[[Any], bool]] = {
        "actor": lambda patterns: any(fits(event["actor"], pattern) for pattern in patterns),
        "event_type": lambda patterns: any(fits(event["event_type"], pattern) for pattern in patterns),
        "start": lambda start: event["timestamp"] >= start,
        "end": lambda end: event["timestamp"] < end,
        "source_ip": lambda network: event["source_ip"] is not None and lies_in(event["source_ip"], network),
        "metadata": lambda part: event["metadata"] is not None and contains(event["metadata"], part),
    }
    return all(checks[name](value) if name in checks else event[name] == value for name, value in wanted.items())


def fits(text: str, pattern: str) -> bool:
    return text.startswith(pattern[:-1]) if pattern.endswith("*") else text == pattern


def lies_in(address: str, network: str) -> bool:
    return ipaddress.ip_address(address) in ipaddress.ip_network(network)


def contains(whole: Any, part: Any) -> bool:
    """Containment of jsonb (PostgreSQL 15, section 8.14.3)."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(key in whole and contains(whole[key], part[key]) for key in part)
    if isinstance(part, list):
        return isinstance(whole, list) and all(any(contains(member, one) for member in whole) for one in part)
    return type(whole) is type(part) and bool(whole == part)


def parameters(wanted: Filters) -> dict[str, Any]:
    return {**wanted, "metadata": json.dumps(wanted["metadata"])} if "metadata" in wanted else wanted


def post_all(client: httpx.Client, batch: list[Event]) -> list[Event]:
    """Append the events; return them as the service lists them, newest first."""
    for start in range(0, len(batch), 1000):
        assert client.post("/events/batch", json=batch[start : start + 1000]).status_code == 201
    return list_all(client, {"limit": 1000})


def list_all(client: httpx.Client, query: dict[str, Any]) -> list[Event]:
    """The events of all pages."""
    page = client.get("/events", params=query)
    assert page.status_code == 200, page.text
    found: list[Event] = page.json()["events"]
    while "next" in page.links:
        page = client.get(page.links["next"]["url"])
        found += page.json()["events"]
    assert page.json()["next_cursor"] is None
    return found


@contextmanager
def short_walks() -> Iterator[None]:
    """Walks give up at once and three events are many: so that a few events go every way there is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listing, "WALKED_EVENTS", 2)
        patch.setattr(listing, "DENSE_EVENTS", 3)
        yield


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=st.lists(events, min_size=1, max_size=40), asked=st.lists(filters, min_size=1, max_size=6), data=st.data())
def test_what_is_listed_is_what_the_filters_mean(
    client: httpx.Client, batch: list[Event], asked: list[Filters], data: st.DataObject
) -> None:
    known = post_all(client, batch)
    assert [(event["timestamp"], event["id"]) for event in known] == sorted(
        ((event["timestamp"], event["id"]) for event in known), reverse=True
    )
    for wanted in asked:
        expected = [event for event in known if is_selected(event, wanted)]
        limit = data.draw(st.integers(1, 20))
        query = {**parameters(wanted), "limit": limit}
        assert list_all(client, query) == expected
        assert list_all(client, {**query, "order": "asc"}) == expected[::-1]
        assert client.get("/events/count", params=parameters(wanted)).json() == {
            "count": len(expected),
            "capped": False,
        }
        with short_walks():
            assert list_all(client, query) == expected
            assert list_all(client, {**query, "order": "asc"}) == expected[::-1]


_any_of = st.lists(st.sampled_from("abc"), min_size=2, max_size=3, unique=True)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=10, max_size=40),
    asked=st.lists(st.tuples(_any_of, _any_of), min_size=1, max_size=2),
    limit=st.integers(2, 4),
    order=st.sampled_from(["desc", "asc"]),
)
def test_walks_of_several_values_that_are_cut_short_leave_nothing_out(
    client: httpx.Client, batch: list[tuple[str, str]], asked: list[tuple[list[str], list[str]]], limit: int, order: str
) -> None:
    known = post_all(client, [{"actor": actor, "event_type": event_type} for actor, event_type in batch])
    for actors, event_types in asked:
        wanted = {"actor": actors, "event_type": event_types}
        expected = [event["id"] for event in known if is_selected(event, wanted)]
        with short_walks():
            found = [event["id"] for event in list_all(client, {**wanted, "limit": limit, "order": order})]
        assert found == (expected if order == "desc" else expected[::-1])


@pytest.mark.parametrize(
    ("query", "location"),
    [
        ("actor=*", "query.actor.0"),
        ("actor=a&actor=", "query.actor.1"),
        ("actor=" + "a" * 255 + "**", "query.actor.0"),
        ("event_type=*", "query.event_type.0"),
        ("&".join(f"actor={number}" for number in range(101)), "query.actor"),
        ("tenant=a&tenant=b", "query.tenant"),
        ("limit=1&limit=1", "query.limit"),
        ("tenant=", "query.tenant"),
        ("resource=" + "r" * 1025, "query.resource"),
        ("outcome=maybe", "query.outcome"),
        ("source_ip=10.0.0.1/8", "query.source_ip"),
        ("source_ip=10.0.0", "query.source_ip"),
        ("source_ip=10.0.0.0/33", "query.source_ip"),
        ("source_ip=fe80::1%25eth0", "query.source_ip"),
        ("trace_id=F" + "f" * 31, "query.trace_id"),
        ("metadata=x", "query.metadata"),
        ("metadata=[1]", "query.metadata"),
        ("metadata={%22a%22:NaN}", "query.metadata"),
        ("metadata={%22a%22:%22\\u0000%22}", "query.metadata"),
        ("order=newest", "query.order"),
        ("start=2026-01-01T00:00:00Z&end=2026-01-01T00:00:00Z", "query"),
    ],
)
@pytest.mark.parametrize("path", ["/events", "/events/count"])
def test_a_wrong_filter_is_named(client: httpx.Client, path: str, query: str, location: str) -> None:
    response = client.get(f"{path}?{query}")
    assert response.status_code == 422
    assert [error["location"] for error in response.json()["errors"]] == [location]


def test_a_long_prefix_may_have_its_star(client: httpx.Client) -> None:
    (event,) = post_all(client, [{"actor": "a" * 255, "event_type": "LOGIN"}])
    assert list_all(client, {"actor": "a" * 255 + "*"}) == [event]
