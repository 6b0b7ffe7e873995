"""The one training loop of all methods: same batches, noise, schedule and optimiser; only the adapter differs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import adapters
from .task import SPLITS, Task

WARMUP = 0.1
"""Share of the steps in which the learning rates rise, before they fall along a cosine."""
MAX_GRAD_NORM = 1.0
"""Longer gradients are shortened to it, as in the examples."""


@dataclass(frozen=True)
class Outcome:
    """What one training gave.

    Attributes:
        validation, test: scores after the last step.
        trained: number of the adapter's parameters.
        loss: mean over the last tenth of the steps; NaN where there was no step.
        diverged: a loss or a parameter was not finite; the training ended there, and the scores are those of a useless
            model.
    """

    validation: float
    test: float
    trained: int
    loss: float
    diverged: bool


def train_once(task: Task, method: str, lr: float, seed: int) -> Outcome:
    """Train one method at one learning rate. The seed decides batches, noise and the adapter's random start."""
    torch.manual_seed(seed)
    model = adapters.adapt(task.model(), method, task.targets, task.head)
    trained = adapters.trained_parameters(model, task.head)
    groups = adapters.param_groups(model, method, task.head, lr, task.head_lr)
    losses = _train(task, model, groups, seed) if groups else []
    tail = losses[-max(1, len(losses) // 10) :]
    loss = sum(tail) / len(tail) if tail else math.nan
    if not all(map(math.isfinite, losses)) or not all(p.isfinite().all() for p in model.parameters()):
        return Outcome(task.useless, task.useless, trained, loss, diverged=True)
    model.eval()
    with torch.no_grad():
        validation, test = (task.score(model, split) for split in SPLITS)
    return Outcome(validation, test, trained, loss, diverged=False)


def _train(task: Task, model: nn.Module, groups: list[dict], seed: int) -> list[float]:
    """All steps, or those up to the first loss that is not finite; returns their losses."""
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    parameters = [parameter for group in groups for parameter in group["params"]]
    highest = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, highest, task.steps, pct_start=WARMUP, cycle_momentum=False
    )
    random = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # the model's own dropout, whatever the adapter's start has drawn before
    model.train()
    losses = []
    for indices in batches(task, seed):
        loss = task.loss(model, indices, random)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
    return losses


def batches(task: Task, seed: int) -> Iterator[Tensor]:
    """Indices of the training samples of each step (batch,), a new order for every epoch; the seed alone decides."""
    random = torch.Generator().manual_seed(seed)
    whole = task.samples - task.samples % task.batch
    for _ in range(task.epochs):
        yield from torch.randperm(task.samples, generator=random)[:whole].split(task.batch)
