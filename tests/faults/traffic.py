"""What the clients send: single events, batches and CloudEvents, with keys and without, each event with a token."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

Event = dict[str, Any]

_JSON = {"Content-Type": "application/json"}
_NDJSON = {"Content-Type": "application/x-ndjson"}
_CLOUDEVENT = {"Content-Type": "application/cloudevents+json"}
_CLOUDEVENTS = {"Content-Type": "application/cloudevents-batch+json"}
_LARGE_BATCH = 3_000  # more than one flush takes beside others


@dataclass(frozen=True)
class Submission:
    """One request, and what the log must hold once it is acknowledged."""

    path: str
    headers: dict[str, str]
    body: bytes
    stored: Sequence[Event]  # in the order sent; metadata.token tells events apart
    is_keyed: bool  # every event of it: only then is it safe to send again

    @property
    def tokens(self) -> list[str]:
        return [event["metadata"]["token"] for event in self.stored]


def make_submission(random: Random, name: str) -> Submission:
    """The next request; `name` is unique, and the tokens of its events begin with it."""
    makers: list[Callable[[Random, str], Submission]] = [_single, _batch, _cloudevent, _cloudevent_batch]
    return random.choices(makers, weights=[70, 12, 12, 6])[0](random, name)


def _make_event(random: Random, token: str) -> Event:
    event: Event = {
        "event_type": random.choice(["LOGIN", "order.create", "order.cancel", "配達"]),
        "actor": f"user-{random.randrange(500)}",
        "metadata": {"token": token, "amount": random.randrange(10**6) / 100, "note": 'tab\t, \\ and "quotes"'},
    }
    optional = {
        "timestamp": f"2026-0{random.randrange(1, 10)}-01T00:00:00.{random.randrange(10**6):06}Z",
        "tenant": random.choice(["acme", "umbrella"]),
        "resource": f"order/{random.randrange(10**6)}",
        "outcome": random.choice(["success", "failure", "denied", "unknown"]),
        "source": "shop",
        "source_ip": f"10.0.{random.randrange(256)}.{random.randrange(256)}",
        "trace_id": f"{random.getrandbits(128):032x}",
    }
    return event | {name: value for name, value in optional.items() if random.random() < 0.5}


def _single(random: Random, name: str) -> Submission:
    event = _make_event(random, name)
    way = random.choices(["header", "body", None], weights=[40, 40, 20])[0]
    headers = _JSON | ({"Idempotency-Key": name} if way == "header" else {})
    body = event | ({"idempotency_key": name} if way == "body" else {})
    return Submission("/events", headers, json.dumps(body).encode(), [event], way is not None)


def _batch(random: Random, name: str) -> Submission:
    length = _LARGE_BATCH if random.random() < 0.004 else random.randrange(1, 20)
    events = [_make_event(random, f"{name}.{number}") for number in range(length)]
    share_keyed = random.choice([0, 0.5, 1, 1, 1])
    keys = [event["metadata"]["token"] if random.random() < share_keyed else None for event in events]
    bodies = [event | ({"idempotency_key": key} if key else {}) for event, key in zip(events, keys, strict=True)]
    if random.random() < 0.5:
        return Submission("/events/batch", _JSON, json.dumps(bodies).encode(), events, all(keys))
    lines = "\n".join(map(json.dumps, bodies)).encode()
    return Submission("/events/batch", _NDJSON, lines, events, all(keys))


def _cloudevent(random: Random, name: str) -> Submission:
    event = _make_cloudevent(random, name)
    attributes = _attributes(event, name)
    if random.random() < 0.5:
        return Submission("/events", _CLOUDEVENT, json.dumps(attributes).encode(), [event], True)
    data = attributes.pop("data")
    headers = _JSON | {f"ce-{attribute}": value for attribute, value in attributes.items()}
    return Submission("/events", headers, json.dumps(data).encode(), [event], True)


def _cloudevent_batch(random: Random, name: str) -> Submission:
    events = [_make_cloudevent(random, f"{name}.{number}") for number in range(random.randrange(1, 10))]
    body = json.dumps([_attributes(event, event["metadata"]["token"]) for event in events]).encode()
    path = random.choice(["/events", "/events/batch"])
    return Submission(path, _CLOUDEVENTS, body, events, True)


def _make_cloudevent(random: Random, token: str) -> Event:
    return {
        "event_type": "org.example.order",
        "actor": f"user-{random.randrange(500)}",
        "source": f"/shops/{random.randrange(9)}",
        "metadata": {"token": token, "amount": random.randrange(10**6) / 100},
    }


def _attributes(event: Event, event_id: str) -> Event:
    return {
        "specversion": "1.0",
        "id": event_id,
        "type": event["event_type"],
        "source": event["source"],
        "actor": event["actor"],
        "data": event["metadata"],
    }
