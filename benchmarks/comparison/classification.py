"""Loss, score and splits of tasks that put samples into classes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .task import Loss, Score

Samples = tuple[Tensor, Tensor]
"""Inputs (n, ...) and classes (n,)."""


def classification(train: Samples, held_out: Mapping[str, Samples]) -> tuple[Loss, Score]:
    """Cross-entropy and accuracy of a model that maps inputs to logits."""

    def loss(model: nn.Module, indices: Tensor, _random: torch.Generator) -> Tensor:
        return F.cross_entropy(model(train[0][indices]), train[1][indices])

    def score(model: nn.Module, split: str) -> float:
        inputs, labels = held_out[split]
        predicted = torch.cat([model(part).argmax(1) for part in inputs.split(EVALUATION_BATCH)])
        return (predicted == labels).float().mean().item()

    return loss, score


EVALUATION_BATCH = 200


def zero_head(model: nn.Module, head: str) -> nn.Module:
    """Start the head at zero: all methods then start from the same uniform answer."""
    for parameter in model.get_submodule(head).parameters():
        nn.init.zeros_(parameter)
    return model


def split_samples(inputs: Tensor, labels: Tensor, sizes: Mapping[str, int]) -> dict[str, Samples]:
    """Disjoint sets of the given sizes, drawn at random and the same every time."""
    if sum(sizes.values()) > len(labels):
        raise ValueError(f"{sum(sizes.values())} samples are wanted ({dict(sizes)}), there are {len(labels)}")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = order[: sum(sizes.values())].split(list(sizes.values()))
    return {name: (inputs[part], labels[part]) for name, part in zip(sizes, parts, strict=True)}
