"""GLUE's metrics, of predictions (n,) and targets (n,), in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def accuracy(predicted: Tensor, targets: Tensor) -> float:
    """Share of right predictions."""
    return (predicted == targets).double().mean().item()


def f1(predicted: Tensor, targets: Tensor) -> float:
    """Harmonic mean of precision and recall of class 1; 0 where nothing was found."""
    found = ((predicted == 1) & (targets == 1)).sum().item()
    total = (predicted == 1).sum().item() + (targets == 1).sum().item()
    return 2 * found / total if total else 0.0


def matthews(predicted: Tensor, targets: Tensor) -> float:
    """Matthews' correlation of two classes; 0 where either is constant, by convention."""
    return _correlation_or_zero(predicted.double(), targets.double())


def pearson(predicted: Tensor, targets: Tensor) -> float:
    """Pearson's correlation; 0 where either is constant (it is not defined there)."""
    return _correlation_or_zero(predicted.double(), targets.double())


def spearman(predicted: Tensor, targets: Tensor) -> float:
    """Spearman's correlation: Pearson's of the ranks, equal values at their mean rank."""
    return pearson(_ranks(predicted), _ranks(targets))


def _correlation_or_zero(x: Tensor, y: Tensor) -> float:
    x, y = x - x.mean(), y - y.mean()
    size = (x.square().sum() * y.square().sum()).sqrt()
    return ((x * y).sum() / size).item() if size > 0 else 0.0


def _ranks(values: Tensor) -> Tensor:
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


METRICS: Mapping[str, Callable[[Tensor, Tensor], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}
