"""Holds the log against what the clients were told: nothing lost, nothing doubled, nothing else."""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import psycopg2
import psycopg2.extras
from load import Record
from sqlalchemy.engine import URL
from verify import Checked, assert_ledger_consistent, moment

# By id, which is the partitioned table's primary key.
_NEW_ROWS = (
    "SELECT id, event_type, actor, timestamp, recorded_at, tenant, resource, outcome, source, source_ip, trace_id,"
    " metadata FROM audit_events WHERE id > %s ORDER BY id"
)


@dataclass(frozen=True)
class Verdict:
    """What became of one round's events."""

    acknowledged: int
    unknown: int
    lost: list[str]
    doubled: list[str]
    wrong: list[str]

    @property
    def faults(self) -> list[str]:
        return [*self.lost, *self.doubled, *self.wrong]


@dataclass
class Books:
    """One database's log and what is known of it, from one round to the next."""

    url: URL
    _checked: Checked = field(default_factory=Checked)
    _ids: dict[str, int] = field(default_factory=dict)  # token → id of its row
    _sent: set[str] = field(default_factory=set)

    def close_round(self, record: Record) -> Verdict:
        """Check the log, and that it holds what was acknowledged, as it was acknowledged, once."""
        rows = self._read_new_rows()
        self._sent |= record.acknowledged.keys() | record.unknown
        doubled, wrong = [], list(record.complaints)
        for row in rows:
            token = row["metadata"]["token"]
            if token in self._ids:
                doubled.append(f"{token} is stored as {self._ids[token]} and as {row['id']}")
            if token not in self._sent:
                wrong.append(f"{token} was never sent, and is stored as {row['id']}")
            self._ids[token] = row["id"]
        lost = [
            f"{token} was acknowledged, as {id_}, and is gone"
            for token, (id_, _) in record.acknowledged.items()
            if token not in self._ids
        ]
        by_id = {row["id"]: row for row in rows}
        for token, (event_id, members) in record.acknowledged.items():
            if token in self._ids and not _is_as_told(by_id.get(event_id), members):
                wrong.append(f"{token} was acknowledged as {event_id} {members}, and is {by_id.get(event_id)}")
        try:
            assert_ledger_consistent(self.url, self._checked)
        except AssertionError as error:
            wrong.append(f"the ledger is not consistent: {error}")
        return Verdict(len(record.acknowledged), len(record.unknown), lost, doubled, wrong)

    def close(self) -> None:
        """Check the whole log once more, from its first row."""
        assert assert_ledger_consistent(self.url) == len(self._ids)

    def _read_new_rows(self) -> list[dict[str, Any]]:
        connection = psycopg2.connect(self.url.set(drivername="postgresql").render_as_string(hide_password=False))
        try:
            with connection.cursor(cursor_factory=psycopg2.extras.RealDictCursor) as cursor:
                cursor.execute(_NEW_ROWS, (max(self._ids.values(), default=0),))
                return [dict(row) for row in cursor.fetchall()]
        finally:
            connection.close()


def _is_as_told(row: dict[str, Any] | None, members: dict[str, Any]) -> bool:
    if row is None:
        return False
    stored = {name: moment(value) if isinstance(value, datetime) else value for name, value in row.items()}
    return all(stored[name] == value for name, value in members.items())
