"""Shared by the hazards: an entry from a model's class and input, in float64 and in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..entry import Entry, Inputs, Options, floats

Make = Callable[[], nn.Module]


def hazard(name: str, make: Make, inputs: Callable[[], Inputs], **options: Any) -> list[Entry]:
    """One entry in float64, where differences show, and one in float32, whose fast kernels differ."""
    found = []
    for dtype, ending in ((torch.float64, ""), (torch.float32, "_float32")):
        chosen = Options(**{"dtypes": (dtype,), **options})
        found.append(Entry(f"hazard/{name}{ending}", "hazard", make, inputs, chosen))
    return found


def rows(*shape: int) -> Callable[[], Inputs]:
    """One floating input."""
    return lambda: ((floats(*shape),), {})


class Holder(nn.Module):
    """A layer among ordinary ones: what is wrong with it shows in the output and cuts the gradient of `before`."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.before = nn.Linear(width, width)
        self.after = nn.Linear(width, 3)
