"""Counts, histograms and most frequent values."""

from collections import Counter
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from typing import Any
from zoneinfo import ZoneInfo

import httpx
import pytest
from conftest import running_app, settings_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.engine import URL
from test_filters import list_all, post_all, short_walks


def at(*moments: str, actor: str = "alice") -> list[dict[str, Any]]:
    return [{"event_type": "LOGIN", "actor": actor, "timestamp": moment} for moment in moments]


def histogram(client: httpx.Client, **query: Any) -> list[tuple[str, int]]:
    response = client.get("/events/histogram", params=query)
    assert response.status_code == 200, response.text
    return [(bucket["start"].removesuffix(":00.000000Z"), bucket["count"]) for bucket in response.json()["buckets"]]


def test_a_count_is_exact_up_to_the_limit_and_says_when_it_is_not(database_url: URL) -> None:
    with running_app(settings_for(database_url, count_limit=3)) as client:
        for expected in ((0, False), (1, False), (2, False), (3, False), (3, True), (3, True)):
            assert client.get("/events/count").json() == dict(zip(("count", "capped"), expected, strict=True))
            assert client.post("/events", json={"event_type": "LOGIN", "actor": "alice"}).status_code == 201
        assert client.get("/events/count", params={"actor": "bob"}).json() == {"count": 0, "capped": False}


def test_a_count_looks_at_no_more_events_than_the_limit(database_url: URL) -> None:
    with running_app(settings_for(database_url, count_limit=3)) as client:
        events = at(*["2026-01-01T00:00:00Z"] * 3) + at(*["2026-01-02T00:00:00Z"] * 3, actor="bob")
        post_all(client, [{**event, "outcome": "denied", "source_ip": "10.0.0.1"} for event in events])
        for query, count in (
            ({"outcome": "success"}, 0),
            ({"outcome": "denied"}, 3),
            ({"outcome": "denied", "source_ip": "10.0.0.0/8"}, 3),
        ):
            assert client.get("/events/count", params=query).json() == {"count": count, "capped": True}
            for part in ({"actor": "bob"}, {"end": "2026-01-02T00:00:00Z"}):
                assert client.get("/events/count", params={**query, **part}).json() == {"count": count, "capped": False}


def test_a_histogram_has_its_empty_buckets(client: httpx.Client) -> None:
    post_all(client, at("2026-01-01T10:00:00Z", "2026-01-01T11:59:59Z", "2026-01-03T00:00:00Z"))
    days = [("2026-01-01T00:00", 2), ("2026-01-02T00:00", 0), ("2026-01-03T00:00", 1)]
    assert histogram(client, interval="day") == days
    assert histogram(client, interval="day", actor="bob") == []
    assert histogram(client, interval="day", start="2026-01-01T11:00:00Z", end="2026-01-03T00:00:00Z") == [
        ("2026-01-01T00:00", 1),
        ("2026-01-02T00:00", 0),
    ]
    assert histogram(client, interval="month", start="2025-11-30T00:00:00Z", end="2026-02-01T00:00:00.000001Z") == [
        ("2025-11-01T00:00", 0),
        ("2025-12-01T00:00", 0),
        ("2026-01-01T00:00", 3),
        ("2026-02-01T00:00", 0),
    ]


def test_a_histogram_begins_and_ends_where_events_are_whatever_stands_before_them(client: httpx.Client) -> None:
    post_all(client, at("2026-01-02T00:00:00Z", "2026-01-04T00:00:00Z", actor="bob"))
    noise = [f"2026-01-{day:02}T00:00:00Z" for day in (1, 1, 1, 5, 5, 5)]
    post_all(client, [{**event, "event_type": "NOISE"} for event in at(*noise)])
    post_all(client, at("2026-01-01T01:00:00Z", "2026-01-04T01:00:00Z"))
    with short_walks():
        days = [day for day, _ in histogram(client, interval="day", actor=["alice", "bob"], event_type="LOGIN")]
    assert days == [f"2026-01-{day:02}T00:00" for day in (1, 2, 3, 4)]


def test_weeks_begin_on_monday(client: httpx.Client) -> None:
    post_all(client, at("2026-01-04T23:59:59Z", "2026-01-05T00:00:00Z"))
    assert histogram(client, interval="week") == [("2025-12-29T00:00", 1), ("2026-01-05T00:00", 1)]


@pytest.mark.parametrize(
    ("interval", "time_zone", "start", "end", "starts"),
    [
        ("day", "Europe/Berlin", "2026-03-28T23:00:00Z", "2026-03-30T22:00:00Z", ["28T23", "29T22"]),
        ("day", "Europe/Berlin", "2026-10-24T22:00:00Z", "2026-10-26T23:00:00Z", ["24T22", "25T23"]),
        ("hour", "Europe/Berlin", "2026-10-24T23:00:00Z", "2026-10-25T03:00:00Z", ["24T23", "25T00", "25T01", "25T02"]),
        ("day", "Pacific/Apia", "2011-12-29T10:00:00Z", "2011-12-31T10:00:00Z", ["29T10", "30T10"]),
        ("day", "Asia/Kathmandu", "2026-01-01T00:00:00Z", "2026-01-01T19:00:00Z", ["31T18", "01T18"]),
    ],
    ids=["23 hours", "25 hours", "an hour twice", "a day that never was", "a quarter of an hour"],
)
def test_buckets_follow_the_clocks_of_the_zone(
    client: httpx.Client, interval: str, time_zone: str, start: str, end: str, starts: list[str]
) -> None:
    found = histogram(client, interval=interval, time_zone=time_zone, start=start, end=end)
    assert [moment[8:13] for moment, _ in found] == starts


@pytest.mark.parametrize("interval", ["day", "week", "month"])
@pytest.mark.parametrize(
    ("time_zone", "midnight"),
    [
        ("Atlantic/Azores", "2026-10-25T00:00:00"),
        ("America/Havana", "2026-11-01T00:00:00"),
        ("Asia/Beirut", "2026-10-25T00:00:00"),
        ("Asia/Beirut", "2026-03-29T00:00:00"),
    ],
    ids=["back to midnight", "back to the month's first", "back from midnight", "forward from midnight"],
)
def test_a_bucket_begins_with_the_first_moment_of_its_date(
    client: httpx.Client, interval: str, time_zone: str, midnight: str
) -> None:
    def first_day(day: date) -> date:
        return {"day": day, "week": day - timedelta(days=day.weekday()), "month": day.replace(day=1)}[interval]

    zone = ZoneInfo(time_zone)
    around = datetime.fromisoformat(midnight).replace(tzinfo=zone).astimezone(UTC)
    moments = [around + timedelta(minutes=30 * number) for number in range(-60 * 24 * 2, 60 * 24 * 2)]
    date_of = {moment: first_day(moment.astimezone(zone).date()) for moment in moments}
    begins = {day: min(moment for moment in moments if date_of[moment] == day) for day in set(date_of.values())}
    counted = moments[len(moments) // 2 - 100 : len(moments) // 2 + 100]
    post_all(client, at(*(moment.isoformat() for moment in counted)))
    expected = Counter(begins[date_of[moment]].strftime("%Y-%m-%dT%H:%M") for moment in counted)
    assert dict(histogram(client, interval=interval, time_zone=time_zone)) == expected


def test_nothing_lies_before_the_year_1(client: httpx.Client) -> None:
    post_all(client, at("0001-01-01T00:00:00Z"))
    assert histogram(client, interval="day", end="0001-01-01T00:00:00Z") == []
    assert histogram(client, interval="day", end="0001-01-01T00:00:00.000001Z") == [("0001-01-01T00:00", 1)]


def test_a_bucket_begins_in_the_year_1_at_the_earliest(client: httpx.Client) -> None:
    post_all(client, at("0001-01-01T00:00:00Z", "0001-01-01T20:00:00Z"))
    days = [("0001-01-01T00:00", 1), ("0001-01-01T18:18:44.000000Z", 1)]  # local mean time, 5:41:16 ahead
    assert histogram(client, interval="day", time_zone="Asia/Kathmandu") == days


@pytest.mark.parametrize(("interval", "step"), [("minute", timedelta(minutes=1)), ("day", timedelta(days=1))])
def test_two_thousand_buckets_are_the_most(client: httpx.Client, interval: str, step: timedelta) -> None:
    start = datetime(2020, 1, 1, tzinfo=UTC)
    query = {"interval": interval, "start": start.isoformat()}
    assert len(histogram(client, **query, end=(start + 2000 * step).isoformat())) == 2000
    for end in (start + 2000 * step + timedelta(seconds=1), datetime(9999, 12, 31, tzinfo=UTC)):
        response = client.get("/events/histogram", params={**query, "end": end.isoformat()})
        assert response.status_code == 422
        assert response.json()["errors"][0]["location"] == "query.interval"


_moments = st.datetimes(datetime(1880, 1, 1), datetime(2026, 1, 1), timezones=st.just(UTC)).map(datetime.isoformat)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    moments=st.lists(_moments, min_size=1, max_size=20),
    zone=st.sampled_from(["UTC", "America/Sao_Paulo", "Australia/Lord_Howe", "Africa/Monrovia", "Pacific/Apia"]),
)
def test_every_event_is_counted_in_the_bucket_it_lies_in(client: httpx.Client, moments: list[str], zone: str) -> None:
    known = [event["timestamp"] for event in post_all(client, at(*moments))]
    response = client.get("/events/histogram", params={"interval": "month", "time_zone": zone})
    buckets = response.json()["buckets"]
    starts = [bucket["start"] for bucket in buckets] + ["9999"]
    assert starts == sorted(set(starts))
    assert [bucket["count"] for bucket in buckets] == [
        sum(start <= moment < following for moment in known) for start, following in pairwise(starts)
    ]
    assert buckets[0]["count"] > 0
    assert buckets[-1]["count"] > 0


def test_the_most_frequent_values_come_first(client: httpx.Client) -> None:
    post_all(client, at("2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z") + at("2026-01-03T00:00:00Z", actor="bob"))
    post_all(client, [{"event_type": "LOGIN", "actor": "Zoë", "resource": "door/1"}])

    def top(**query: Any) -> list[tuple[str, int]]:
        found = client.get("/events/top", params=query).json()
        assert found["field"] == query["field"]
        return [(value["value"], value["count"]) for value in found["values"]]

    assert top(field="actor") == [("alice", 2), ("Zoë", 1), ("bob", 1)]
    assert top(field="actor", n=1) == [("alice", 2)]
    assert top(field="actor", start="2026-01-02T00:00:00Z", end="2026-01-04T00:00:00Z") == [("alice", 1), ("bob", 1)]
    assert top(field="event_type") == [("LOGIN", 4)]
    assert top(field="resource") == [("door/1", 1)]
    assert top(field="tenant") == []
    assert len(list_all(client, {})) == 4


@pytest.mark.parametrize(
    ("query", "location"),
    [
        ("histogram", "query.interval"),
        ("histogram?interval=year", "query.interval"),
        ("histogram?interval=day&time_zone=UTC%2B3", "query.time_zone"),
        ("histogram?interval=day&time_zone=CEST", "query.time_zone"),
        ("histogram?interval=day&time_zone=../UTC", "query.time_zone"),
        ("histogram?interval=day&time_zone=Europe", "query.time_zone"),
        ("histogram?interval=day&limit=5", "query.limit"),
        ("top", "query.field"),
        ("top?field=metadata", "query.field"),
        ("top?field=actor&n=0", "query.n"),
        ("top?field=actor&n=101", "query.n"),
        ("top?field=actor&field=tenant", "query.field"),
        ("count?cursor=x", "query.cursor"),
    ],
)
def test_a_wrong_parameter_is_named(client: httpx.Client, query: str, location: str) -> None:
    response = client.get(f"/events/{query}")
    assert response.status_code == 422
    assert [error["location"] for error in response.json()["errors"]] == [location]
