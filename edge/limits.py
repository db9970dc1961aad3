"""How much one key may ask for, and how often one address may be wrong about its key. In the memory of this process.

So RATE_LIMIT holds in each worker of each replica: where there are several, a key may have so many times the rate.
"""

import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from config import Rate
from problems import RateLimited, TooManyFailures

MAX_ADDRESSES = 10_000  # remembered; the one that failed longest ago is forgotten first
FAILURES = Rate(60, 60)

Fields = tuple[tuple[bytes, bytes], ...]


@dataclass
class _Bucket:
    tokens: float
    filled_at: float

    def fill(self, rate: Rate, now: float) -> float:
        """The tokens that there are now, up to `count`, which flow in evenly."""
        self.tokens = min(rate.count, self.tokens + (now - self.filled_at) * rate.count / rate.seconds)
        self.filled_at = now
        return self.tokens


class Limits:
    """Token buckets: one for each key that called, where RATE_LIMIT is set, and one for each address that failed."""

    def __init__(self, rate: Rate | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._keys: dict[str, _Bucket] = {}
        self._addresses: OrderedDict[str, _Bucket] = OrderedDict()

    def spend(self, key_id: str) -> Fields:
        """Take one request from the key's quota; the fields that say what is left, if it has one. Raises RateLimited.

        The fields are those of draft-ietf-httpapi-ratelimit-headers-11, sections 3 and 4.
        """
        rate = self._rate
        if rate is None:
            return ()
        now = self._clock()
        bucket = self._keys.setdefault(key_id, _Bucket(rate.count, now))
        if bucket.fill(rate, now) < 1:
            wait_s = math.ceil((1 - bucket.tokens) * rate.seconds / rate.count)
            raise RateLimited(retry_after_s=wait_s, fields=_fields(rate, bucket))
        bucket.tokens -= 1
        return _fields(rate, bucket)

    def refuse_after_failures(self, address: str | None) -> None:
        """Raise TooManyFailures for an address that was wrong too often, whatever key it presents now."""
        if not self._addresses or address is None:
            return
        bucket = self._addresses.get(_network(address))
        if bucket is not None and bucket.fill(FAILURES, self._clock()) < 1:
            raise TooManyFailures()

    def has_failures(self) -> bool:
        """Whether any address was wrong of late."""
        latest = self._clock() - FAILURES.seconds
        while self._addresses and next(iter(self._addresses.values())).filled_at < latest:  # full again
            self._addresses.popitem(last=False)
        return bool(self._addresses)

    def record_failure(self, address: str | None) -> None:
        """The address presented a key that is not valid."""
        if address is None:
            return
        network = _network(address)
        now = self._clock()
        bucket = self._addresses.setdefault(network, _Bucket(FAILURES.count, now))
        self._addresses.move_to_end(network)
        bucket.tokens = max(0.0, bucket.fill(FAILURES, now) - 1)
        if len(self._addresses) > MAX_ADDRESSES:
            self._addresses.popitem(last=False)


def _fields(rate: Rate, bucket: _Bucket) -> Fields:
    refilled_in_s = max(1, math.ceil((rate.count - bucket.tokens) * rate.seconds / rate.count))
    return (
        (b"ratelimit-policy", b'"default";q=%d;w=%d' % (rate.count, rate.seconds)),
        (b"ratelimit", b'"default";r=%d;t=%d' % (bucket.tokens, refilled_in_s)),
    )


def _network(address: str) -> str:
    """The address; of IPv6 its /64, which one customer has to itself. A proxy may name what is no address.

    A listener for both families sees an IPv4 client as ::ffff:192.0.2.1, and all of those are in one /64.
    """
    if ":" not in address:
        return address
    try:
        parsed = ipaddress.IPv6Address(address.partition("%")[0])
    except ValueError:
        return address
    return str(parsed.ipv4_mapped or ipaddress.ip_network((parsed, 64), strict=False))
