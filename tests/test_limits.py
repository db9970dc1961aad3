"""How much a key may ask for, and how often an address may be wrong."""

from pathlib import Path

import pytest
from conftest import API_KEY, served
from sqlalchemy.engine import URL

from config import Rate
from edge.limits import FAILURES, MAX_ADDRESSES, Limits
from problems import RateLimited, TooManyFailures

LOGIN = {"event_type": "LOGIN", "actor": "alice"}


def test_a_bucket_fills_evenly_and_never_beyond_its_size() -> None:
    now = 0.0
    limits = Limits(Rate(10, 60), lambda: now)
    for left in range(9, -1, -1):
        assert b'"default";r=%d;' % left in dict(limits.spend("a"))[b"ratelimit"]
    with pytest.raises(RateLimited) as refused:
        limits.spend("a")
    assert refused.value.headers["Retry-After"] == "6"
    limits.spend("b")  # another key has its own
    now = 6.0
    limits.spend("a")
    now = 1e6
    assert dict(limits.spend("a"))[b"ratelimit"] == b'"default";r=9;t=6'


def test_addresses_that_fail_are_remembered_in_bounded_memory() -> None:
    now = 0.0
    limits = Limits(None, lambda: now)
    for _ in range(FAILURES.count):
        limits.record_failure("2001:db8::1")
    with pytest.raises(TooManyFailures):
        limits.refuse_after_failures("2001:db8::2")  # the same /64
    limits.refuse_after_failures("192.0.2.1")
    now = 1.0
    limits.refuse_after_failures("2001:db8::1")
    for number in range(2 * MAX_ADDRESSES):
        limits.record_failure(str(number))
    assert len(limits._addresses) == MAX_ADDRESSES


def test_an_ipv4_client_of_a_listener_for_both_families_is_itself_alone() -> None:
    limits = Limits(None)
    for _ in range(FAILURES.count + 1):
        limits.record_failure("::ffff:10.0.0.1")
        limits.record_failure("fe80::1%eth0")
    for address in ("::ffff:10.0.0.1", "::ffff:a00:1%eth0", "10.0.0.1", "fe80::2%eth1"):
        with pytest.raises(TooManyFailures):
            limits.refuse_after_failures(address)
    for address in ("::ffff:192.0.2.9", "::ffff:10.0.0.2", "::"):
        limits.refuse_after_failures(address)


@pytest.mark.parametrize("address", ["a:b:c", "1::2::3", "[", "192.0.2.1:80:80", "%:", ":", "\ud800:"])
def test_what_a_proxy_says_may_be_no_address(address: str) -> None:
    limits = Limits(None)
    for _ in range(FAILURES.count + 1):
        limits.record_failure(address)
    with pytest.raises(TooManyFailures):
        limits.refuse_after_failures(address)


@pytest.mark.parametrize("path", ["/events", "/events/count"])
def test_beyond_the_rate_a_key_is_told_to_wait(database_url: URL, tmp_path: Path, path: str) -> None:
    with served(database_url, tmp_path / "log", RATE_LIMIT="3/h") as client:
        assert client.post("/events", json=LOGIN).headers["RateLimit-Policy"] == '"default";q=3;w=3600'
        for _ in range(2):
            assert client.get(path).headers["RateLimit"].startswith('"default";r=')
        for answer in (client.get(path), client.post("/events", json=LOGIN)):
            assert answer.status_code == 429
            assert answer.json()["type"] == "urn:audit:problem:rate-limited"
            assert 0 < int(answer.headers["Retry-After"]) <= 1200
            assert answer.headers.get_list("RateLimit")[0].startswith('"default";r=0;')
        assert client.get("/health").status_code == 200


def test_failures_are_counted_by_the_address_that_a_trusted_proxy_names(database_url: URL, tmp_path: Path) -> None:
    with served(database_url, tmp_path / "log", TRUSTED_PROXIES="127.0.0.0/8") as client:

        def statuses(key: str, address: str, count: int) -> list[int]:
            headers = {"X-API-Key": key, "X-Forwarded-For": address}
            return [client.get("/events", headers=headers).status_code for _ in range(count)]

        assert statuses("wrong", "192.0.2.1", 100)[-1] == 429
        assert statuses("wrong", "192.0.2.2", 1) == [401]
        assert statuses(API_KEY, "192.0.2.2", 1) == [200]


def test_without_a_trusted_proxy_nobody_names_another_address(database_url: URL, tmp_path: Path) -> None:
    with served(database_url, tmp_path / "log") as client:
        statuses = [
            client.get("/events", headers={"X-API-Key": "wrong", "X-Forwarded-For": f"192.0.2.{n}"}).status_code
            for n in range(100)
        ]
    assert statuses[0] == 401
    assert statuses[-1] == 429
