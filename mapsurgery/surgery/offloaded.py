"""Layers whose parameters accelerate keeps elsewhere (in the CPU's memory, on disk) between their forwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def at_hand(module: nn.Module) -> Iterator[None]:
    """A block in which the parameters of a module have their numbers; outside of it they are on meta."""
    if not _hooks(module):
        yield
        return
    from accelerate.utils import align_module_device  # it put the hook there

    with align_module_device(module):
        yield


def brought_in_whole(model: nn.Module) -> set[nn.Module]:
    """Modules that accelerate brings in with a parent as a whole: it would look for adapters among what it put away."""
    found: set[nn.Module] = set()
    for module in model.modules():
        if any(getattr(hook, "place_submodules", False) and hook.offload for hook in _hooks(module)):
            found |= set(module.modules())
    return found


def identity(module: nn.Module, name: str) -> int:
    """What parameters of two modules have in common that are one tensor, also while it is put away."""
    for hook in _hooks(module):
        away = getattr(hook, "weights_map", None)
        if getattr(hook, "offload", False) and away is not None and name in away and away[name] is away[name]:
            return away[name].data_ptr()  # in memory; from a disk, each look gives another tensor
    return id(module._parameters[name])


def _hooks(module: nn.Module) -> list[Any]:
    hook = module.__dict__.get("_hf_hook")
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))
