"""What a filter means in SQL, for every read that takes one."""

import json
from collections.abc import Mapping
from typing import Any

from sqlalchemy import ColumnElement, Text, bindparam, cast, func, or_
from sqlalchemy.dialects.postgresql import INET, JSONB

from models import audit_events
from schemas import EventFilter

PATTERN_FIELDS = ("actor", "event_type")
UNINDEXED_FIELDS = ("resource", "outcome", "source", "source_ip", "trace_id")
_EXACT_FIELDS = ("tenant", "resource", "outcome", "source", "trace_id")
_VALUE_FIELDS = (*_EXACT_FIELDS, "start", "end", "source_ip")

_columns = audit_events.c


def conditions(wanted: EventFilter, columns: Any = _columns) -> list[ColumnElement[bool]]:
    """What an event has to meet; all of them hold together. `columns`: of audit_events, or of a subquery of it.

    Each value is a parameter of the name that values_of() has for it, so filters of one shape make one statement.
    """
    values = values_of(wanted)
    found = [columns[name] == bindparam(name, values[name]) for name in _EXACT_FIELDS if name in values]
    found += [_matches(columns[name], name, values) for name in PATTERN_FIELDS if getattr(wanted, name)]
    found += time_conditions(wanted, columns)
    if "source_ip" in values:
        network = cast(bindparam("source_ip", values["source_ip"]), INET)
        found.append(columns.source_ip.op("<<=", is_comparison=True)(network))
    if "metadata" in values:
        found.append(columns.metadata.contains(cast(bindparam("metadata", values["metadata"], Text), JSONB)))
    return found


def time_conditions(wanted: EventFilter, columns: Any = _columns) -> list[ColumnElement[bool]]:
    """The filter's time range alone; start is in it, end is not."""
    found = [columns.timestamp >= bindparam("start", wanted.start)] if wanted.start is not None else []
    return found + ([columns.timestamp < bindparam("end", wanted.end)] if wanted.end is not None else [])


def values_of(wanted: EventFilter) -> dict[str, Any]:
    """The filter's values as the driver takes them, by the names of their parameters."""
    values = {name: value for name in _VALUE_FIELDS if (value := getattr(wanted, name)) is not None}
    if wanted.metadata is not None:
        values["metadata"] = json.dumps(wanted.metadata)
    for name in PATTERN_FIELDS:
        patterns = getattr(wanted, name)
        if exact := [pattern for pattern in patterns if not is_prefix(pattern)]:
            values[name] = exact
        prefixes = [pattern[:-1] for pattern in patterns if is_prefix(pattern)]
        values |= {f"{name}_prefix_{index}": prefix for index, prefix in enumerate(prefixes)}
    return values


def is_prefix(pattern: str) -> bool:
    """Whether the pattern of an actor or event type stands for all that begin like it."""
    return pattern.endswith("*")


def _matches(column: ColumnElement[str], field: str, values: Mapping[str, Any]) -> ColumnElement[bool]:
    """starts_with() takes its argument literally, where LIKE would need escapes."""
    any_of = [column == func.any(bindparam(field, values[field]))] if field in values else []
    prefixes: list[ColumnElement[str]] = [
        bindparam(name, values[name]) for name in values if name.startswith(f"{field}_prefix_")
    ]
    return or_(*any_of, *(func.starts_with(column, prefix) for prefix in prefixes))
