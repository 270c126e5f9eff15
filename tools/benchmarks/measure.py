"""Measures rows: contenders take turns at the same work, and their figures are compared."""

import statistics
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from benchmarks.lab import Lab
from benchmarks.processes import drop_caches

LAZYFS = "lazyfs"

Contenders = Mapping[str, Callable[[], float]]
"""By name: a function that does the work once, with nothing cached, and returns its figure."""


@dataclass(frozen=True, slots=True)
class Target:
    """Says what lazyfs should reach.

    It is a multiple of a peer's figure or, without a peer, the figure itself.
    """

    peer: str
    at_most: float | None = None
    at_least: float | None = None

    def reached(self, value: float) -> bool:
        return (self.at_most is None or value <= self.at_most) and (
            self.at_least is None or value >= self.at_least
        )

    def __str__(self) -> str:
        sign, limit = ("<=", self.at_most) if self.at_most is not None else (">=", self.at_least)
        return f"{sign} {limit:g}{' x' if self.peer else ''}"


@dataclass(frozen=True, slots=True)
class Row:
    """Describes one line of the table."""

    name: str
    title: str
    unit: str
    make: Callable[[Lab, "Notes"], AbstractContextManager[Contenders]]
    targets: Sequence[Target] = ()
    rounds: int | None = None
    """How many rounds there are. It is less than for other rows if one round takes minutes."""
    slow: bool = False
    """True if the row is left out with --quick."""


@dataclass
class Notes:
    """Holds what a row reports beside its figures."""

    lines: list[str] = field(default_factory=list)
    series: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """Pairs (seconds, value) for --plot."""


@dataclass
class Outcome:
    """Holds the outcome of one row."""

    row: Row
    samples: dict[str, list[float]]
    notes: Notes
    error: str = ""

    def median(self, name: str) -> float:
        return statistics.median(self.samples[name])

    def ratios(self, peer: str, of: str = LAZYFS) -> list[float]:
        """The ratios of each round.

        What is compared was measured at about the same time, so a slow minute of the machine slows
        both.
        """
        return [a / b for a, b in zip(self.samples[of], self.samples[peer], strict=True)]

    def against(self, target: Target) -> float:
        return statistics.median(self.ratios(target.peer)) if target.peer else self.median(LAZYFS)

    def as_json(self) -> dict[str, Any]:
        return {
            "row": self.row.name,
            "title": self.row.title,
            "unit": self.row.unit,
            "samples": self.samples,
            "targets": [
                {
                    "peer": t.peer,
                    "target": str(t),
                    "value": self.against(t),
                    "reached": t.reached(self.against(t)),
                }
                for t in self.row.targets
                if not self.error
            ],
            "notes": self.notes.lines,
            "series": self.notes.series,
            "error": self.error,
        }


def measure(row: Row, lab: Lab, rounds: int, progress: Callable[[str], None]) -> Outcome:
    """Let the contenders take turns. Their order changes from round to round."""
    rounds = min(rounds, row.rounds or rounds)
    notes = Notes()
    outcome = Outcome(row, {}, notes)
    try:
        with row.make(lab, notes) as contenders:
            names = list(contenders)
            outcome.samples = {name: [] for name in names}
            for number in range(rounds):
                for name in names[number % len(names) :] + names[: number % len(names)]:
                    progress(f"{row.name} {number + 1}/{rounds} {name}")
                    drop_caches()
                    outcome.samples[name].append(contenders[name]())
    except Exception as error:  # one row that fails must not take the others along
        traceback.print_exc(file=sys.stderr)
        outcome.error = f"{type(error).__name__}: {error}"
    notes.lines += lab.troubles
    return outcome
