"""Layers whose parameters accelerate keeps elsewhere (in the CPU's memory, on disk) between their forwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def at_hand(module: nn.Module) -> Iterator[None]:
    """A block in which the parameters of a module have their numbers; outside of it they are on meta."""
    if "_hf_hook" not in module.__dict__:
        yield
        return
    from accelerate.utils import align_module_device  # it put the hook there

    with align_module_device(module):
        yield
