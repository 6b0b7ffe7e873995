"""The training loop that the text examples share, its options, and the learning rate's course."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from adapting import positive
from runtime import Runtime, add_runtime_options
from torch import Tensor
from tqdm import tqdm

WARMUP = 0.1
"""Share of the steps in which the learning rate rises, before it falls along a cosine."""


def add_options(parser: argparse._ActionsContainer, *, epochs: int, batch_size: int, output: str) -> None:
    """Add the options of a training to a parser or to one of its groups; the learning rate's is in adapting.py."""
    parser.add_argument("--epochs", type=positive, default=epochs)
    parser.add_argument("--batch-size", type=positive, default=batch_size)
    parser.add_argument("--warmup", type=float, default=WARMUP, help="share of the steps in which the lr rises")
    parser.add_argument("--seed", type=int, default=0)
    add_runtime_options(parser)
    parser.add_argument("--output", type=Path, default=Path(output), help="file for the adapter")


class Training(NamedTuple):
    """What came out: the loss and the seconds of each step."""

    losses: list[float]
    seconds: list[float]


def learning_rate_schedule(step: int, total: int, warmup: float = WARMUP) -> float:
    """Factor of the learning rate: a linear rise over a share ``warmup`` of the steps, then half a cosine."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    return (1 + math.cos(math.pi * (step - rise) / max(1, total - rise))) / 2


def minibatches(samples: int, size: int, epochs: int, seed: int) -> Iterator[list[int]]:
    """Indices of each step's samples, shuffled anew in each epoch; the last batch of an epoch may be smaller."""
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(samples, generator=order).split(size):
            yield batch.tolist()


def fit(
    groups: Sequence[dict[str, Any]],
    batches: Sequence[list[int]],
    losses: Callable[[list[int]], Iterable[Tensor]],
    runtime: Runtime,
    *,
    warmup: float = WARMUP,
    max_grad_norm: float = 1.0,
) -> Training:
    """Train parameters in place with AdamW, one step for each batch.

    Args:
        groups: parameter groups, each with its highest "lr".
        batches: indices of samples, as `minibatches` gives them.
        losses: maps the indices of a batch to the parts of its mean loss, scalars with a gradient. Each is
            backpropagated before the next is computed.
        warmup: see `learning_rate_schedule`.
        max_grad_norm: a longer gradient is shortened to this length.

    Raises:
        FloatingPointError: the loss became NaN or infinite.
    """
    optimizer = torch.optim.AdamW(groups)
    parameters = [parameter for group in groups for parameter in group["params"]]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_schedule(step, len(batches), warmup)
    )
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.amp is torch.float16)
    values, seconds = [], []
    for number, batch in enumerate(tqdm(batches, "training", leave=False, disable=None), start=1):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        value = torch.zeros((), device=runtime.device)
        for part in losses(batch):
            scaler.scale(part).backward()
            value += part.detach().to(value)
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        values.append(value.item())  # waits for the device, so that the clock measures finished work
        seconds.append(time.perf_counter() - start)
        if not math.isfinite(values[-1]):
            raise FloatingPointError(f"the loss of step {number} is {values[-1]}: try a lower learning rate")
    return Training(values, seconds)
