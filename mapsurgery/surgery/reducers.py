"""What reduces the gradients of a model over several processes: it knows the parameters that there were when it began.

Adapters that come later are reduced by nothing, and so every process would train its own. They come first, or not at
all.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import nn

_CLASSES = {
    "DistributedDataParallel",
    "FullyShardedDataParallel",
    "ShardedDataParallel",
    "DeepSpeedEngine",
    "FSDPModule",
    "ReplicateModule",
    "torch.distributed._composable.replicate.DDP",
}
"""Names of classes of torch, deepspeed, apex, fairscale and megatron; the last three are given to a model itself."""


def refuse_reduced(model: nn.Module) -> None:
    """Raises ValueError where the gradients of parts of a model are reduced already, by what is in it or around it."""
    if not isinstance(model, nn.Module):
        return  # the caller says so
    found = next((module for module in model.modules() if _reduces(type(module))), None)
    if found is None and torch.distributed.is_available() and torch.distributed.is_initialized():
        found = _around(model)
        if found is not None:
            del found  # one that nobody holds any more may still lie about
            gc.collect()
            found = _around(model)
    if found is not None:
        raise ValueError(
            f"{_said(type(found))} reduces the gradients of the parameters that it found in the model; adapters that "
            "come later would differ from process to process. Call mapsurgery.patch or load first, and wrap or shard "
            "the model then (delete a wrapper that is no longer used)"
        )


def _around(model: nn.Module) -> nn.Module | None:
    """What reduces, and holds the model or a part of it."""
    known: dict[type, bool] = {}
    own: set[Any] = {*model.modules(), *model.parameters()}
    for held in gc.get_objects():
        cls = type(held)
        if cls not in known:
            known[cls] = issubclass(cls, nn.Module) and _reduces(cls)
        if not known[cls] or "_modules" not in held.__dict__:  # one whose constructor failed has none
            continue
        if not (own.isdisjoint(held.modules()) and own.isdisjoint(held.parameters())):
            return held
    return None


def _reduces(cls: type) -> bool:
    return any(c.__name__ in _CLASSES or f"{c.__module__}.{c.__name__}" in _CLASSES for c in cls.__mro__)


def _said(cls: type) -> str:
    """The class that reduces, and that of the model where it was given to it."""
    name = next(c.__name__ for c in cls.__mro__ if c.__name__ in _CLASSES or c.__name__ == "DDP")
    return {"FSDPModule": "fully_shard", "ReplicateModule": "replicate", "DDP": "replicate"}.get(name, name)
