"""A figure is a comparison: two sides measured in turn, and the ratio of their medians held against a bar."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from config import ROOT

RESULTS = Path(__file__).parent / "results"


@dataclass
class Figure:
    """One line of the table. Without a side to compare with, the bar is for the value itself."""

    name: str
    what: str
    against: str
    unit: str
    bar: float
    at_most: bool = False
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)

    @property
    def value(self) -> float:
        """What the bar is for: the ratio of the medians, or where there is one side, its highest value."""
        return statistics.median(self.ours) / statistics.median(self.theirs) if self.theirs else max(self.ours)

    @property
    def is_reached(self) -> bool:
        return self.value <= self.bar if self.at_most else self.value >= self.bar

    def row(self) -> list[str]:
        bar = f"{self.bar:g}" + (" at most" if self.at_most else " at least")
        value = f"{self.value:.2f}" if self.theirs else f"{self.value:,.0f}"
        sides = [_summary(self.ours), _summary(self.theirs)]
        return [self.what, sides[0], self.against, sides[1], self.unit, value, bar, "yes" if self.is_reached else "NO"]


def _summary(values: Sequence[float]) -> str:
    """The median, and the lowest and highest."""
    if not values:
        return ""
    median, low, high = (f"{value:,.1f}" if value < 100 else f"{value:,.0f}" for value in
                         (statistics.median(values), min(values), max(values)))  # fmt: skip
    return f"{median} ({low} to {high})"


def print_table(figures: Sequence[Figure]) -> None:
    """A Markdown table: medians, ranges over the rounds, ratios."""
    header = ["what", "median (range)", "against", "median (range)", "unit", "ratio", "bar", "reached"]
    rows = [header, *(figure.row() for figure in figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    rows.insert(1, ["-" * width for width in widths])
    for row in rows:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")


def write_results(bench: str, figures: Sequence[Figure], conditions: Mapping[str, object]) -> Path:
    """Every round's raw figure, and the conditions, as JSON under bench/results/."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{bench}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)  # noqa: S607
    document = {
        "commit": commit.stdout.strip(),
        "python": sys.version.split()[0],
        "cpus": os.cpu_count(),
        **conditions,
        "figures": [asdict(figure) | {"value": figure.value, "reached": figure.is_reached} for figure in figures],
    }
    path.write_text(json.dumps(document, indent=2) + "\n")
    return path
