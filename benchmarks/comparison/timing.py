"""Time and memory of a training step of each method, in turns: what slows one round slows all methods in it."""

from __future__ import annotations

import torch
from common import iqr, median, paired_ratio
from train_step import MIB, Candidate, check, saved_bytes, state_bytes

from . import adapters
from .task import Task
from .training import batches

STEPS = 2
"""Steps in a row of one method within a round."""


def time_methods(task: Task, methods: list[str], rounds: int) -> list[dict[str, object]]:
    """A row per method, `adapters.REFERENCE` added where it is missing; the frozen model takes no step and has none.

    Raises:
        RuntimeError: after three steps a trained parameter of a method has no gradient, or a loss is not finite.
    """
    names = list(dict.fromkeys([adapters.REFERENCE, *(name for name in methods if name != adapters.FROZEN)]))
    candidates = [_candidate(task, name) for name in names]
    for candidate in candidates:
        candidate.step()  # a head that starts at 0 hides all that is below it from the first one
        check(candidate)
        candidate.row["saved_mib"] = saved_bytes(candidate) / MIB
        candidate.row["state_mib"] = state_bytes(candidate) / MIB
    for _ in range(rounds):
        for candidate in candidates:
            candidate.measure(STEPS)
    reference = candidates[0]
    return [_row(task, candidate, reference) for candidate in candidates]


def _candidate(task: Task, method: str) -> Candidate:
    torch.manual_seed(0)
    model = adapters.adapt(task.model(), method, task.targets, task.head).train()
    lr = adapters.learning_rates(method)[0]
    groups = adapters.param_groups(model, method, task.head, lr, task.head_lr)
    # fused: else it is Python's loop over the parameters that is timed on the CPU.
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    indices = next(batches(task, 0))

    def loss() -> torch.Tensor:
        return task.loss(model, indices, torch.Generator().manual_seed(0))

    return Candidate(method, model, loss, optimizer, next(model.parameters()).device)


def _row(task: Task, candidate: Candidate, reference: Candidate) -> dict[str, object]:
    return {
        "task": task.name,
        "method": candidate.name,
        "setting": task.setting,
        "trained": adapters.trained_parameters(candidate.model, task.head),
        "step_ms": f"{median(candidate.times):.2f}",
        "iqr_ms": f"{iqr(candidate.times):.2f}",
        "to_lora": f"{paired_ratio(candidate.times, reference.times):.3f}",
        "saved_mib": f"{candidate.row['saved_mib']:.4g}",
        "state_mib": f"{candidate.row['state_mib']:.4g}",
        "rounds": len(candidate.times),
    }
