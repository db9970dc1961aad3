"""What differs, and of which events: a sentence each."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

PERSONAL = "personal part changed: actor, resource, source_ip, metadata or nonce"
ROW = "row changed: event_type, timestamp, recorded_at, tenant, outcome, source, trace_id or personal_hash"
ADOPTED = "personal part changed, from before the ledger: it is not the one that was adopted"
MISSING = "missing"
ADDED = "added: the ledger does not know it"
TWICE = "added: there are several events with this id"


@dataclass(frozen=True, order=True)
class Difference:
    """What is wrong with the events from the first id to the last."""

    first_id: int
    last_id: int
    what: str

    def __str__(self) -> str:
        if self.first_id == self.last_id:
            return f"Event {self.first_id}: {self.what}"
        return f"Events {self.first_id} to {self.last_id}: {self.what}"


def at(event_id: int, what: str) -> Difference:
    return Difference(event_id, event_id, what)


def named(differences: Iterable[Difference]) -> set[int]:
    """The events of each of which something is said by itself."""
    return {each.first_id for each in differences if each.first_id == each.last_id}


def in_order(differences: Iterable[Difference]) -> Iterator[Difference]:
    """By id; runs of ids of which the same is to be said as one."""
    last: Difference | None = None
    for difference in sorted(set(differences)):
        if last is not None and (last.what, last.last_id + 1) == (difference.what, difference.first_id):
            last = replace(last, last_id=difference.last_id)
            continue
        if last is not None:
            yield last
        last = difference
    if last is not None:
        yield last
