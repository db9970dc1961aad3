"""The rows from before the ledger: one event in the tree carries their count and the Merkle root over them.

Their leaves are those of RFC 6962 over entries like all others: RFC 8785 canonical JSON of what is not personal, with
personal_hash. For that, each row is given a nonce and the hash of its personal part; nothing else of it is touched. So
an adopted row can be redacted like any other, and the root stays. An adopted row that changes is told by the root.
"""

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Row, select, text

from db import Database
from housekeeping import partitions
from ingest.records import SERVICE, own_event, record
from ledger import entries
from ledger.tree import hash_leaf, hash_node, root_of
from models import audit_events, ledger_head
from problems import DatabaseUnavailable, LedgerInconsistent
from schemas import EventIn

EVENT_TYPE = "audit.ledger.adopt"
_PAGE_ROWS = 5_000
_ENTRY_TEXTS = ("event_type", "tenant", "outcome", "source", "trace_id")

_columns = audit_events.c

# The first one of the tree counts: whoever changed rows could append another, or put one below.
# Index: audit_events_event_type_timestamp_id.
_FIRST_ID = select(ledger_head.c.first_id).scalar_subquery()
_RECORD = (
    select(_columns.id, _columns.metadata)
    .where(_columns.event_type == EVENT_TYPE, _columns.source == SERVICE, _columns.id >= _FIRST_ID)
    .order_by(_columns.id)
    .limit(1)
)
# Index: audit_events_pkey.
_COUNT = text("SELECT count(*) FROM audit_events WHERE id < (SELECT first_id FROM ledger_head)")
_COMMIT = text(
    """
    UPDATE audit_events AS event SET nonce = made.nonce, personal_hash = made.personal_hash
    FROM unnest(CAST(:ids AS bigint[]), CAST(:nonces AS bytea[]), CAST(:hashes AS bytea[]))
        AS made (id, nonce, personal_hash)
    WHERE event.id = made.id AND event.recorded_at BETWEEN :first AND :last AND event.personal_hash IS NULL
    """
)
# Index: audit_events_event_type_timestamp_id.
_DROPPED = text(
    "SELECT EXISTS (SELECT FROM audit_events WHERE event_type = 'audit.retention.drop' AND source = :service"
    " AND id < (SELECT first_id + size FROM ledger_head))"
)


@dataclass(frozen=True)
class Adopted:
    """What one walk over the rows from before the ledger found."""

    count: int
    root: bytes  # RFC 6962 section 2.1, over the rows in the order of their ids
    first_bad_id: int | None = None  # whose personal part is not what its hash says


@dataclass(frozen=True)
class Adoption:
    """What the log says of them."""

    event_id: int
    count: int
    root: bytes


@dataclass
class _Tree:
    """The right edge of a growing tree: complete subtrees, the largest first."""

    size: int = 0
    edge: list[bytes] = field(default_factory=list)

    def append(self, leaf: bytes) -> None:
        node, size = leaf, self.size
        while size & 1:
            node = hash_node(self.edge.pop(), node)
            size >>= 1
        self.edge.append(node)
        self.size += 1

    def root(self) -> bytes:
        return root_of(self.edge)


def find_adoption(connection: Connection) -> Adoption | None:
    """What was recorded of the adoption, if it was. Raises LedgerInconsistent where the record was changed."""
    found = connection.execute(_RECORD).one_or_none()
    if found is None:
        return None
    try:
        return Adoption(found.id, int(found.metadata["count"]), bytes.fromhex(found.metadata["root"]))
    except (KeyError, TypeError, ValueError):
        detail = f"Event {found.id} is to vouch for the rows from before the ledger, and has no count and root of them."
        raise LedgerInconsistent(detail) from None


def count_rows(connection: Connection) -> int:
    """How many rows there are from before the ledger."""
    return connection.scalar(_COUNT) or 0


def recompute(connection: Connection, advance: Callable[[int], object] = lambda _: None) -> Adopted:
    """Walk the adopted rows, in constant memory, and hash them; `advance` is told of each page's number of rows."""
    tree = _Tree()
    first_bad_id = None
    for rows in _pages(connection):
        for row in rows:
            if first_bad_id is None and not _is_intact(row._mapping):
                first_bad_id = row.id
            tree.append(hash_row(row._mapping))
        advance(len(rows))
    return Adopted(tree.size, tree.root(), first_bad_id)


def check(database: Database, recorded: Adoption, advance: Callable[[int], object]) -> str | None:
    """What differs from the record, in a sentence; None where the rows are as they were adopted."""
    with database.transaction() as connection:
        connection.exec_driver_sql("SET LOCAL statement_timeout = '10min'")
        found = recompute(connection, advance)
        if found.count == 0 and connection.scalar(_DROPPED, {"service": SERVICE}):
            return "Retention has dropped the adopted rows: nothing is left to compare."
    if found.first_bad_id is not None:
        return f"Row {found.first_bad_id} was changed: its personal part is not the one that was adopted."
    if found.count != recorded.count:
        return f"{recorded.count} rows were adopted, and there are {found.count}."
    if found.root != recorded.root:
        return f"Rows were changed: their root is {found.root.hex()}."
    return None


def hash_row(row: Mapping[Any, Any]) -> bytes:
    """The leaf of a row (RFC 6962 section 2.1); of one that is not committed to yet, it stands for nothing."""
    entry = {name: row[name] for name in _ENTRY_TEXTS if row[name] is not None}
    moments = {name: entries.format_timestamp(row[name]) for name in ("timestamp", "recorded_at")}
    personal = {"personal_hash": bytes(row["personal_hash"] or b"").hex()}
    return hash_leaf(entries.canonical_json({"id": row["id"], **entry, **moments, **personal}))


def adopt(database: Database, advance: Callable[[int], object]) -> Adoption | None:
    """Commit to every row, then record their count and root; return the record, None where there are no such rows.

    Interrupted, it goes on when called again. To be called where find_adoption() finds nothing. Raises
    DatabaseUnavailable while partitions are being looked after.
    """
    with database.exclusive_session(partitions.UPKEEP_LOCK, partitions.UPKEEP_WAIT_S) as session:
        if session is None:
            raise DatabaseUnavailable("Partitions are being looked after. Try again.")
        tree = _Tree()
        for rows in _pages(session):
            for leaf in _commit_to(session, rows):
                tree.append(leaf)
            advance(len(rows))
        if tree.size == 0:
            return None
        with database.transaction() as connection:
            # What was retried after a lost answer must not be recorded twice.
            if find_adoption(connection) is None:
                record(connection, _event(tree))
    with database.transaction() as connection:
        return find_adoption(connection)


def _pages(connection: Connection) -> Iterator[Sequence[Row[Any]]]:
    """The rows from before the ledger by id. Index: audit_events_pkey."""
    statement = select(audit_events).where(_columns.id < _FIRST_ID).order_by(_columns.id).limit(_PAGE_ROWS)
    rows = connection.execute(statement).all()
    while rows:
        yield rows
        rows = connection.execute(statement.where(_columns.id > rows[-1].id)).all()


def _commit_to(session: Connection, rows: Sequence[Row[Any]]) -> list[bytes]:
    """Give those rows a nonce and a hash that have none; return the leaves of all."""
    made: list[tuple[int, bytes | None, bytes]] = []
    leaves = []
    for row in rows:
        values = dict(row._mapping)
        if row.personal_hash is None:
            nonce = secrets.token_bytes(entries.NONCE_BYTES)
            values["personal_hash"] = entries.hash_personal_part(nonce, entries.personal_part(values))
            # Redacted before: its nonce is gone, as that of every redacted event.
            made.append((row.id, None if row.redacted_at is not None else nonce, values["personal_hash"]))
        leaves.append(hash_row(values))
    if made:
        ids, nonces, hashes = map(list, zip(*made, strict=True))
        moments = [row.recorded_at for row in rows]
        values = {"ids": ids, "nonces": nonces, "hashes": hashes, "first": min(moments), "last": max(moments)}
        session.execute(_COMMIT, values)
    return leaves


def _is_intact(row: Mapping[Any, Any]) -> bool:
    if row["personal_hash"] is None:
        return False
    if row["redacted_at"] is not None:
        return True
    if row["nonce"] is None:
        return False
    computed = entries.hash_personal_part(bytes(row["nonce"]), entries.personal_part(row))
    return computed == bytes(row["personal_hash"])


def _event(tree: _Tree) -> EventIn:
    """It says nothing of a person, so that nobody has cause to redact it: the root would go with it."""
    return own_event(EVENT_TYPE, timestamp=datetime.now(UTC), metadata={"count": tree.size, "root": tree.root().hex()})
