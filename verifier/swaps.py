"""Rows whose leaves are not those that were stored: where each of them stood, if it stood elsewhere."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from verifier.differences import MISSING, ROW, Difference, at
from verifier.entries import leaf_of
from verifier.rows import parse_row

_MOST = 64  # rows compared with each other


def explain(rows: Sequence[bytes], stored: Mapping[int, bytes], known: Collection[int]) -> Iterator[Difference]:
    """What was done to the events that `stored` has the true leaves of; of `known` ones something is said already."""
    wrong = dict(sorted(stored.items())[:_MOST])
    # Of several rows with one id it is the first whose leaf was compared.
    events = {event["id"]: event for event in map(parse_row, reversed(rows)) if event["id"] in wrong}
    origins = {event_id: _origin(event, events, wrong) for event_id, event in events.items()}
    now_at = {origin: event_id for event_id, origin in origins.items() if origin is not None}
    for event_id, origin in origins.items():
        if origin is not None and origins.get(origin) == event_id:
            yield at(event_id, f"order swapped with event {origin}")
        elif _is_in_cycle(event_id, origins):  # of three or more: no first of which the rest could be said
            yield at(event_id, f"order changed: in its place stands what was recorded as event {origin}")
        elif origin is not None and event_id in now_at:
            continue  # moved along with others: it is said of the first
        elif origin is not None:
            yield at(event_id, f"{MISSING}: in its place stands what was recorded as event {origin}")
        elif event_id in now_at:
            yield at(event_id, f"added: what was recorded as event {event_id} is now event {now_at[event_id]}")
        elif event_id not in known:
            yield at(event_id, ROW)
    if len(stored) > _MOST:
        others = sorted(stored)[_MOST:]
        yield Difference(others[0], others[-1], f"{len(others)} of them changed or moved, too")


def _is_in_cycle(event_id: int, origins: Mapping[int, int | None]) -> bool:
    """Whether one comes back to this event, going from each place to where its row was recorded."""
    place = origins[event_id]
    for _ in origins:
        if place is None or place == event_id:
            break
        place = origins.get(place)
    return place == event_id


def _origin(event: Mapping[str, Any], events: Mapping[int, Any], stored: Mapping[int, bytes]) -> int | None:
    """Which event this was, going by the leaves that were stored: with its own moment, or with that of the place."""
    for event_id, leaf in stored.items():
        for recorded_at in {event["recorded_at"], events[event_id]["recorded_at"]}:
            if leaf_of({**event, "id": event_id, "recorded_at": recorded_at}) == leaf:
                return event_id
    return None
