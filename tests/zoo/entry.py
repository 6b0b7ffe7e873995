"""What an entry of the zoo is: how to make a model, how to call it, and what to adapt in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a model's forward."""


@dataclass(frozen=True)
class Options:
    """What is special about an entry.

    Attributes:
        targets, exclude, parameters: as `mapsurgery.patch` takes them; stacks of experts are found without being named.
        dtypes: tried one after the other, until the plain model runs.
        tolerance: factor on the tolerance of comparisons, with the reason in a comment where it is not 1.
        rank: of the adapters.
        call: how the model is called, where it is not by `model(*args, **kwargs)`.
        as_trained: give parameters that are constant at the start (scales of 0, biases) some noise, as training would.
    """

    targets: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32)
    tolerance: float = 1.0
    rank: int = 2
    call: Callable[..., Any] | None = None
    as_trained: bool = True


@dataclass(frozen=True)
class Entry:
    """One model of the zoo. `make` builds it with random weights, from the seed that is set before."""

    name: str
    family: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    options: Options = field(default_factory=Options)

    def __str__(self) -> str:
        return self.name


def floats(*shape: int) -> Tensor:
    """An input of standard normal numbers."""
    return torch.randn(*shape)


def ids(*shape: int, below: int = 24) -> Tensor:
    """Token ids; the lowest are left to special tokens."""
    return torch.randint(min(6, below - 1), below, shape)


def args(*values: Any, **keywords: Any) -> Inputs:
    return values, keywords
