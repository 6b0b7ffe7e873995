"""A schedule for MAP's magnitude of the update, in place of training it: `BetaSchedule`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..methods import Map
from ..surgery.record import find_patched, intact_sites


class BetaSchedule:
    """Sets every beta of method "map" to function(step) · ||W||_F (of a zero weight, to function(step)).

    Beta is set when the schedule is made, for step 0, and by each `step()`, which belongs after the optimiser's step::

        mapsurgery.patch(model, targets, method=mapsurgery.Map(train_beta=False))
        schedule = BetaSchedule(model, linear_warmup(0.1, steps=200))

    The softening tau of the start "soft" stays what `Init` made it, whatever beta becomes.

    Args:
        model: patched with a frozen beta.
        function: step (int, from 0) -> beta in units of ||W||_F, a finite number; 0 switches the update off, and its
            gradient.

    Raises:
        ValueError: the model is not patched or its weights are not loaded, the method is another, a beta is trained, or
            the function returns no finite number (beta is then as it was).
    """

    def __init__(self, model: nn.Module, function: Callable[[int], float]) -> None:
        root, record = find_patched(model)
        sites = intact_sites(root, record)
        for site in sites:
            adapter = site.adapter
            if not isinstance(adapter.method, Map):
                raise ValueError(f'{site.path}: method {adapter.method.name!r} has no beta to schedule; use "map"')
            if adapter.pending:
                raise ValueError(f"{site.path}: its weight is not loaded yet (meta device); load the weights first")
            if adapter.get_parameter("beta").requires_grad:
                raise ValueError(
                    f"{site.path}: beta is trained, a schedule would undo each step of the optimiser: patch with "
                    "method=mapsurgery.Map(train_beta=False)"
                )
        self._adapters = [site.adapter for site in sites]
        self.function = function
        self.current = 0
        self._go_to(0)

    def step(self) -> None:
        """Go on to the next step."""
        self._go_to(self.current + 1)

    @torch.no_grad()
    def _go_to(self, step: int) -> None:
        value = self.function(step)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"the schedule's function gave {value!r} for step {step}, not a finite number")
        for adapter in self._adapters:
            norm = adapter.weight_norm
            unit = 1.0 if adapter.init.relative else torch.where(norm > 0, norm, 1)
            adapter.get_parameter("beta").fill_(value).mul_(unit)
        self.current = step

    def state_dict(self) -> dict[str, Any]:
        """The step; the function is not in it."""
        return {"step": self.current}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the step of a `state_dict` and set every beta."""
        self._go_to(int(state["step"]))


def linear_warmup(beta: float, steps: int) -> Callable[[int], float]:
    """beta/steps at step 0, from which the update learns, beta from step `steps` - 1 on.

    Raises:
        ValueError: steps is below 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return lambda step: beta * min(1.0, (step + 1) / steps)
