"""The baseline of every fine-tuning: logistic regression on the features of the frozen model."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Strengths of the L2 penalty to choose from; the best on a held-out fifth of the training samples is taken."""


class LinearProbe(NamedTuple):
    """``scores = (features - mean) / scale @ weight + bias``; shapes (d,), (d,), (d, classes), (classes,)."""

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        return self.weight.numel() + self.bias.numel()

    def scores(self, features: Tensor) -> Tensor:
        """Scores (n, classes) of ``features`` (n, d)."""
        return (features - self.mean) / self.scale @ self.weight + self.bias

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Share of right answers; ``features`` (n, d), ``labels`` (n,)."""
        return (self.scores(features).argmax(dim=1) == labels).float().mean().item()


def fit_linear_probe(features: Tensor, labels: Tensor, classes: int) -> LinearProbe:
    """Fit on ``features`` (n, d) and ``labels`` (n,), with the penalty that does best on held-out samples."""
    n = max(1, len(labels) // 5)  # image_data draws the samples in random order: the first fifth is as good as any

    def held_out_accuracy(penalty: float) -> float:
        return _fit(features[n:], labels[n:], classes, penalty).accuracy(features[:n], labels[:n])

    return _fit(features, labels, classes, max(PENALTIES, key=held_out_accuracy))


def _fit(features: Tensor, labels: Tensor, classes: int, penalty: float) -> LinearProbe:
    mean, scale = features.mean(dim=0), features.std(dim=0, correction=0).clamp_min(1e-6)
    inputs = (features - mean) / scale
    weight = inputs.new_zeros(inputs.shape[1], classes, requires_grad=True)
    bias = inputs.new_zeros(classes, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(inputs @ weight + bias, labels) + penalty * weight.square().sum() / 2
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)
    return LinearProbe(mean, scale, weight.detach(), bias.detach())
