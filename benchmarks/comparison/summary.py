"""From trainings to what is compared: the chosen learning rate, its test score, the curve over learning rates."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .adapters import FROZEN


@dataclass(frozen=True)
class Trial:
    """One training: a line of the results file."""

    task: str
    method: str
    lr: float
    seed: int
    validation: float
    test: float
    trained: int
    diverged: bool

    @classmethod
    def read(cls, row: Mapping[str, str]) -> Trial:
        """From the file's strings."""
        return cls(
            row["task"],
            row["method"],
            float(row["lr"]),
            int(row["seed"]),
            float(row["validation"]),
            float(row["test"]),
            int(row["trained"]),
            row["diverged"] == "1",
        )


@dataclass(frozen=True)
class Point:
    """A method at one learning rate, over its seeds."""

    lr: float
    validation: tuple[float, ...]
    test: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean test score."""
        return statistics.mean(self.test)

    @property
    def spread(self) -> float:
        """Standard deviation of the test score over the seeds; NaN of one."""
        return statistics.stdev(self.test) if len(self.test) > 1 else math.nan


@dataclass(frozen=True)
class Summary:
    """A method on a task.

    Attributes:
        points: by rising learning rate.
        best: the point with the highest mean validation score (the lowest learning rate of equals): test plays no part.
        trained: number of the adapter's parameters.
        diverged: how many of the trainings did.
    """

    method: str
    points: tuple[Point, ...]
    best: Point
    trained: int
    diverged: int

    @property
    def at_edge(self) -> bool:
        """Whether a learning rate beyond the grid might have been better."""
        return len(self.points) > 1 and self.best in (self.points[0], self.points[-1])

    @property
    def worst(self) -> float:
        """Lowest mean test score over the learning rates."""
        return min(point.mean for point in self.points)

    @property
    def decades(self) -> float:
        """Width of the grid."""
        return math.log10(self.points[-1].lr / self.points[0].lr) if len(self.points) > 1 else 0.0

    @property
    def area(self) -> float:
        """Mean height of the curve of test score over log lr: its area by trapezoids, over the grid's width."""
        if len(self.points) < 2:
            return self.points[0].mean
        pairs = zip(self.points, self.points[1:], strict=False)
        area = sum(math.log10(b.lr / a.lr) * (a.mean + b.mean) / 2 for a, b in pairs)
        return area / self.decades

    @property
    def search(self) -> tuple[int, int, float]:
        """The budget: learning rates, fewest seeds at one of them, width of the grid in decades."""
        return len(self.points), min(len(point.test) for point in self.points), round(self.decades, 3)


def summarise(trials: Iterable[Trial]) -> list[Summary]:
    """A summary per method of the trials of one task, in the order in which the methods come up first."""
    by_method: dict[str, list[Trial]] = {}
    for trial in trials:
        by_method.setdefault(trial.method, []).append(trial)
    return [_summary(method, own) for method, own in by_method.items()]


def _summary(method: str, trials: list[Trial]) -> Summary:
    by_lr: dict[float, list[Trial]] = {}
    for trial in sorted(trials, key=lambda trial: (trial.lr, trial.seed)):
        by_lr.setdefault(trial.lr, []).append(trial)
    points = tuple(
        Point(lr, tuple(trial.validation for trial in own), tuple(trial.test for trial in own))
        for lr, own in by_lr.items()
    )
    best = max(points, key=lambda point: statistics.mean(point.validation))
    return Summary(method, points, best, trials[0].trained, sum(trial.diverged for trial in trials))


def kept(summary: Summary, base: float) -> float:
    """How flat the curve is: its mean gain over the frozen model as a share of its gain at the best point; 1 is flat.

    NaN where there was no gain.
    """
    gain = summary.best.mean - base
    return (summary.area - base) / gain if gain > 0 else math.nan


def unequal_search(summaries: Iterable[Summary]) -> str:
    """A sentence that names the budgets if the methods were not searched alike, and is empty if they were."""
    budgets: dict[tuple[int, int, float], list[str]] = {}
    for summary in summaries:
        if summary.method != FROZEN:
            budgets.setdefault(summary.search, []).append(summary.method)
    if len(budgets) < 2:
        return ""
    texts = [f"{n} rates x {seeds} seeds, {w:g} decades: {', '.join(own)}" for (n, seeds, w), own in budgets.items()]
    return f"NOT the same search for all methods ({'; '.join(texts)})."
