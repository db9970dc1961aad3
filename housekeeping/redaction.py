"""Redaction: personal data is erased from events, and their entries, tiles and proofs stay what they were.

An entry holds a salted hash of the personal part; with the nonce gone it cannot be guessed at. Each batch is one
transaction with the event that records it, so whatever was interrupted is done again by asking again. rewrite.py
then takes the old bytes out of the database's files.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import orjson
from sqlalchemy import Row, TextClause, text

from db import Database
from fields import names
from housekeeping import partitions
from ingest.records import SERVICE, own_event, record
from problems import DatabaseUnavailable, InvalidFields
from schemas import EventIn, RedactionIn

REDACTED = "[redacted]"
BATCH_EVENTS = 1_000  # some 50 ms; the head is locked for the last of them

# The events of an actor, and those of the service's own that name it, which were about it: a legal hold, a key,
# a recorded read. Indexes: audit_events_actor_timestamp_id, audit_events_metadata; by ids: audit_events_pkey.
_BY_ACTOR = "(event.actor = :actor AND (CAST(:tenant AS text) IS NULL OR event.tenant = :tenant))"
_ABOUT = "(event.source = :service AND event.metadata @> ANY (CAST(:about AS jsonb[])))"
_BY_IDS = "event.id = ANY (CAST(:ids AS bigint[]))"
# A hold in force keeps what it names, and the events that say of whom it is.
_IS_HELD = """
    EXISTS (
        SELECT FROM legal_holds AS hold WHERE hold.released_at IS NULL AND (
            (hold.tenant IS NULL OR hold.tenant = event.tenant) AND (hold.actor IS NULL OR hold.actor = event.actor)
            AND (hold.resource IS NULL OR hold.resource = event.resource)
            OR event.source = :service AND event.resource = 'legal-holds/' || hold.id
        )
    )
"""
_TO_BE_ERASED = f"""
    event.redacted_at IS NULL AND event.id <= :newest AND NOT {_IS_HELD}
    AND (event.timestamp, event.id) > (CAST(:after_timestamp AS timestamptz), :after_id)
"""


def _counting(subject: str) -> TextClause:
    return text(
        f"""
        SELECT count(*) AS total, count(*) FILTER (WHERE {_IS_HELD}) AS held FROM audit_events AS event
        WHERE ({subject}) AND event.redacted_at IS NULL
        """  # nosec B608  # noqa: S608 - put together from the constants above
    )


def _batch_of(found: str) -> TextClause:
    """Searched for first, sorted then: for the order's sake PostgreSQL might walk through the whole log."""
    return text(
        f"""
        WITH found AS MATERIALIZED ({found})
        SELECT timestamp::text AS after_timestamp, id AS after_id FROM found ORDER BY found.timestamp, id LIMIT :most
        """  # nosec B608  # noqa: S608 - put together from the constants above
    )


def _search(subject: str) -> str:
    return f"SELECT event.timestamp, event.id FROM audit_events AS event WHERE {subject} AND {_TO_BE_ERASED}"  # nosec B608  # noqa: S608 - as above


# An actor may have very many: a batch is read off the index that has its order (docs/queries.md: why not a plain `=`).
_WALK = f"""
    SELECT event.* FROM unnest(ARRAY[CAST(:actor AS text)]) AS given (actor) CROSS JOIN LATERAL (
        SELECT event.timestamp, event.id FROM audit_events AS event
        WHERE event.actor = ANY (ARRAY[given.actor]) AND (CAST(:tenant AS text) IS NULL OR event.tenant = :tenant)
        AND {_TO_BE_ERASED} ORDER BY event.actor DESC, event.timestamp, event.id LIMIT :most
    ) AS event
"""  # nosec B608  # noqa: S608 - as above
_COUNT_BY_ACTOR, _COUNT_BY_IDS = _counting(f"{_BY_ACTOR} OR {_ABOUT}"), _counting(_BY_IDS)
_BATCHES_BY_ACTOR = (_batch_of(_WALK), _batch_of(_search(_ABOUT)))
_BATCHES_BY_IDS = (_batch_of(_search(_BY_IDS)),)
_NEWEST = text("SELECT max(id) FROM audit_events")  # index: audit_events_pkey of each partition
# No statistics can then turn a walk into sorting all there is; what that costs on paper must not start the compiler.
_WALK_ONLY = "SET LOCAL enable_sort = off; SET LOCAL jit = off"
# By ids in their order. The request's hash goes too: from what a request says, few guesses would find it.
# Indexes: audit_events_pkey, idempotency_keys_recorded_at: a key has its event's moment.
_ERASE = text(
    f"""
    WITH erased AS (
        UPDATE audit_events AS event
        SET actor = :redacted, resource = NULL, source_ip = NULL, metadata = NULL, nonce = NULL, redacted_at = now()
        WHERE {_BY_IDS} AND event.redacted_at IS NULL AND NOT {_IS_HELD}
        RETURNING event.id, event.recorded_at, event.tableoid::regclass::text AS relation
    ), forgotten AS (
        UPDATE idempotency_keys AS key SET request_hash = NULL FROM erased
        WHERE key.recorded_at = erased.recorded_at AND key.event_id = erased.id AND key.request_hash IS NOT NULL
        RETURNING key.event_id
    ), due AS (
        INSERT INTO rewrites_due (relation, erased_by)
        SELECT relation, pg_current_xact_id()::text::bigint
        FROM (SELECT relation FROM erased UNION SELECT 'idempotency_keys' FROM forgotten) AS touched
        ON CONFLICT (relation) DO UPDATE SET erased_by = excluded.erased_by
    )
    SELECT count(*), min(id) AS first_id, max(id) AS last_id, now() AS redacted_at FROM erased
    """  # nosec B608  # noqa: S608 - put together from the constants above
)


def _erasing(table: str, assignments: str, condition: str) -> TextClause:
    """Erase an actor in a table beside the log's, which is due for a rewrite then. Such tables are small: no index."""
    return text(
        f"""
        WITH erased AS (
            UPDATE {table} SET {assignments}
            WHERE {condition} AND (CAST(:tenant AS text) IS NULL OR tenant = :tenant)
            RETURNING id
        ), due AS (
            INSERT INTO rewrites_due (relation, erased_by)
            SELECT DISTINCT '{table}', pg_current_xact_id()::text::bigint FROM erased
            ON CONFLICT (relation) DO UPDATE SET erased_by = excluded.erased_by
        )
        SELECT count(*) FROM erased
        """  # nosec B608  # noqa: S608 - put together from the constants below
    )


# Released holds say of whom they were.
_ERASE_HOLDS = _erasing(
    "legal_holds",
    """
        actor = CASE WHEN actor = :actor THEN :redacted ELSE actor END,
        resource = CASE WHEN actor = :actor THEN NULL ELSE resource END,
        reason = CASE WHEN actor = :actor THEN :redacted ELSE reason END,
        created_by = CASE WHEN created_by = :actor THEN :redacted ELSE created_by END,
        released_by = CASE WHEN released_by = :actor THEN :redacted ELSE released_by END
    """,
    "released_at IS NOT NULL AND :actor IN (actor, created_by, released_by)",
)
# A key's name says who uses it, for as long as it works; who made and revoked it is history.
_WORKS_NO_MORE = "(revoked_at IS NOT NULL OR expires_at <= now())"
_ERASE_KEYS = _erasing(
    "api_keys",
    f"""
        name = CASE WHEN name = :actor AND {_WORKS_NO_MORE} THEN :redacted ELSE name END,
        created_by = CASE WHEN created_by = :actor THEN :redacted ELSE created_by END,
        revoked_by = CASE WHEN revoked_by = :actor THEN :redacted ELSE revoked_by END
    """,
    f"(:actor IN (created_by, revoked_by) OR name = :actor AND {_WORKS_NO_MORE})",
)
_ACTORS = text("SELECT id, actor, source FROM audit_events WHERE id = ANY (:ids)")  # index: audit_events_pkey
_RUNAWAY = "SET LOCAL statement_timeout = '5min'"  # an actor may have very many events


@dataclass(frozen=True)
class Extent:
    """The events that a redaction is about and that are not redacted yet."""

    count: int  # to be erased
    held: int  # kept by a legal hold


def measure(database: Database, wanted: RedactionIn, by: str) -> Extent:
    """What redact() would erase now; raises InvalidFields where it would."""
    _check_record(database, wanted, by)
    with database.transaction() as connection:
        connection.exec_driver_sql(_RUNAWAY)
        statement = _COUNT_BY_IDS if wanted.actor is None else _COUNT_BY_ACTOR
        total, held = connection.execute(statement, _values(wanted)).one()
    return Extent(total - held, held)


def redact(database: Database, wanted: RedactionIn, by: str, name: str, most: int | None = None) -> Iterator[int]:
    """Erase the personal data of the events, `most` of them in this call; yield each batch's count when it is done.

    `name` identifies it in the events `audit.redaction` that record it, one a batch; released legal holds and keys are
    a batch of 0 events. Where nothing is found, nothing is recorded and nothing yielded. Raises InvalidFields where the
    record would itself name the person; DatabaseUnavailable while another replica redacts or drops a partition.
    """
    _check_record(database, wanted, by)
    with database.exclusive_session(partitions.UPKEEP_LOCK, partitions.UPKEEP_WAIT_S) as session:
        if session is None:
            raise DatabaseUnavailable("Partitions are being looked after, or another redaction runs. Try again.")
        if any(not each.is_attached or each.is_detaching for each in partitions.list_partitions(session)):
            # Its events cannot be seen, and a legal hold may bring them back.
            raise DatabaseUnavailable("A partition is on its way out. Try again in a minute.")
        found = 0
        for batch in find_batches(database, wanted):
            ids = batch if most is None else batch[: most - found]
            if count := _erase(database, ids, wanted.reason, by, name):
                yield count
            found += len(ids)
            if found == most:
                return
        if wanted.actor is not None and _erase_holds_and_keys(database, wanted, by, name):
            yield 0


def find_batches(database: Database, wanted: RedactionIn) -> Iterator[Sequence[int]]:
    """The ids of what is to be erased, a batch at a time; what lands meanwhile is not among them.

    A batch costs what it has, and what legal holds keep on the way to it, however many events the actor has.
    """
    with database.transaction() as connection:
        values = {**_values(wanted), "newest": connection.scalar(_NEWEST), "most": BATCH_EVENTS}
    for statement in _BATCHES_BY_IDS if wanted.actor is None else _BATCHES_BY_ACTOR:
        position = {"after_timestamp": "-infinity", "after_id": 0}
        while rows := _read(database, statement, {**values, **position}):
            yield [row.after_id for row in rows]
            position = rows[-1]._asdict()


def _read(database: Database, statement: TextClause, values: dict[str, object]) -> Sequence[Row[Any]]:
    with database.transaction() as connection:
        connection.exec_driver_sql(f"{_RUNAWAY}; {_WALK_ONLY}")
        return connection.execute(statement, values).all()


def new_name() -> str:
    """What identifies a redaction in its records: random, for anything made of the person could be guessed at."""
    return f"redactions/{uuid4()}"


def _check_record(database: Database, wanted: RedactionIn, by: str) -> None:
    if wanted.actor in (SERVICE, REDACTED):
        raise _refusal("actor", f"{wanted.actor} is nobody")
    if wanted.actor == by:
        raise _refusal("actor", "asks for it: somebody else must, for the record names who did")
    if wanted.ids is None:
        return
    with database.transaction() as connection:
        events = connection.execute(_ACTORS, {"ids": wanted.ids}).all()
    for event in events:
        if event.actor == event.source == SERVICE:
            raise _refusal("ids", f"event {event.id} says what the service did by itself, and names nobody")
    if any(names(wanted.reason, event.actor) for event in events):
        raise _refusal("reason", "must not name the person: it is kept for ever")


def _refusal(field: str, message: str) -> InvalidFields:
    return InvalidFields(errors=[{"location": f"body.{field}", "message": message}])


def _values(wanted: RedactionIn) -> dict[str, object]:
    subject = {"ids": wanted.ids, "actor": wanted.actor, "tenant": wanted.tenant}
    return {**subject, "service": SERVICE, "about": _about(wanted)}


def _about(wanted: RedactionIn) -> list[str]:
    """What the metadata of the service's own events contains that are about this actor."""
    if wanted.actor is None:
        return []
    tenant = {} if wanted.tenant is None else {"tenant": wanted.tenant}
    hold = {"actor": wanted.actor, **tenant}
    read = {"filters": {"actor": [wanted.actor], **tenant}}
    key = {"name": wanted.actor, **tenant}
    return [orjson.dumps(members).decode() for members in (hold, read, key)]


def _erase(database: Database, ids: Sequence[int], reason: str, by: str, name: str) -> int:
    values = {"ids": list(ids), "redacted": REDACTED, "service": SERVICE}
    with database.transaction() as connection:
        # Whoever places a hold writes to this table: before us, and then we see it, or after the commit.
        connection.exec_driver_sql("LOCK TABLE legal_holds IN SHARE MODE")
        erased = connection.execute(_ERASE, values).mappings().one()
        if erased["count"]:
            content = {member: erased[member] for member in ("count", "first_id", "last_id")}
            record(connection, _event(name, by, erased["redacted_at"], {**content, "reason": reason}))
    return int(erased["count"])


def _erase_holds_and_keys(database: Database, wanted: RedactionIn, by: str, name: str) -> bool:
    """Whether there was anything to erase."""
    values = {"actor": wanted.actor, "tenant": wanted.tenant, "redacted": REDACTED}
    with database.transaction() as connection:
        moment = connection.scalar(text("SELECT now()"))
        statements = {"legal_holds": _ERASE_HOLDS, "api_keys": _ERASE_KEYS}
        counts = {table: connection.scalar(statement, values) for table, statement in statements.items()}
        if found := {table: count for table, count in counts.items() if count}:
            record(connection, _event(name, by, moment, {**found, "reason": wanted.reason}))
    return bool(found)


def _event(name: str, by: str, moment: object, metadata: dict[str, object]) -> EventIn:
    """Its timestamp is the redacted_at of the events it tells of: that much stays when it is itself redacted."""
    return own_event("audit.redaction", by, timestamp=moment, resource=name, metadata=metadata)
