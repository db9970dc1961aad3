"""What the benchmarks' log is made of: who does what, how often, and the event that every side of them writes.

Actors and event types follow Zipf's law, so there are common and rare ones. An actor belongs to one tenant.
"""

import itertools
import random
from datetime import UTC, datetime, timedelta
from typing import Any

ZIPF_EXPONENT = 1.1  # pgbench's random_zipfian takes no less than 1.001, and is slow near that
ACTOR_COUNT = 100_000
TENANT_COUNT = 20
SOURCE_COUNT = 12

KINDS = (
    "user session order invoice payment document file folder project task comment account role group api_key"
    " webhook report dashboard alert device contract ticket product cart refund"
).split()
VERBS = "create read update delete export approve share archive".split()

ACTORS = [f"user-{rank}" for rank in range(1, ACTOR_COUNT + 1)]
EVENT_TYPES = [f"{kind}.{verb}" for verb in VERBS for kind in KINDS]
TENANTS = [f"tenant-{number:02}" for number in range(TENANT_COUNT)]
SOURCES = [f"service-{number:02}" for number in range(SOURCE_COUNT)]
OUTCOMES = ["success"] * 17 + ["failure", "failure", "denied"]

# Nine bytes that the load generator replaces by a number of nine digits, so that no two events are alike.
NUMBER_MARK = "#########"


def zipf_weights(count: int) -> list[float]:
    """Cumulative weights of the ranks 1 to count, as random.choices takes them."""
    return list(itertools.accumulate(rank**-ZIPF_EXPONENT for rank in range(1, count + 1)))


def sample_events(count: int, seed: int, marked: bool = False) -> list[dict[str, Any]]:
    """Events of about 240 bytes of JSON, of the last hour; marked, they have NUMBER_MARK for a number of their own."""
    rng = random.Random(seed)  # noqa: S311 - a load, not a secret
    ranks = rng.choices(range(ACTOR_COUNT), cum_weights=zipf_weights(ACTOR_COUNT), k=count)
    types = rng.choices(range(len(EVENT_TYPES)), cum_weights=zipf_weights(len(EVENT_TYPES)), k=count)
    now = datetime.now(UTC)
    return [
        _event(rng, rank, event_type, now, NUMBER_MARK if marked else str(rng.randrange(10**8, 10**9)))
        for rank, event_type in zip(ranks, types, strict=True)
    ]


def _event(rng: random.Random, rank: int, event_type: int, now: datetime, number: str) -> dict[str, Any]:
    return {
        "event_type": EVENT_TYPES[event_type],
        "actor": ACTORS[rank],
        "timestamp": f"{now - timedelta(seconds=rng.random() * 3600):%Y-%m-%dT%H:%M:%S.%f}Z",
        "tenant": TENANTS[rank % TENANT_COUNT],
        "resource": f"{KINDS[event_type % len(KINDS)]}/{number}",
        "outcome": rng.choice(OUTCOMES),
        "source": SOURCES[event_type % SOURCE_COUNT],
        "metadata": {"request": f"r{number}", "region": "eu", "took_ms": rng.randrange(1000)},
    }
