"""Parameters that FSDP2 manages: shards between its gathers, whole ones within."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor


def is_shard(weight: Tensor) -> bool:
    """Whether this is a Parameter in the state in which FSDP2 keeps it outside of a forward.

    A DTensor that no state of FSDP2 manages (tensor parallelism) is none: it is the whole weight, spread out.
    """
    if not is_sharded(weight):
        return False
    names = ("sharded_param", "_sharded_post_forward_param")
    return any(getattr(parameter, name, None) is weight for parameter in _managed() for name in names)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of whatever kind of parallelism."""
    tensors: Any = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(tensor, tensors.DTensor)


def shard_of(weight: Tensor) -> Tensor | None:
    """The shard of a whole Parameter that FSDP2 gathers for a forward; None of any other."""
    return next((p.sharded_param for p in _managed() if getattr(p, "_unsharded_param", None) is weight), None)


def _managed() -> Iterator[Any]:
    """What FSDP2 keeps of each of its parameters in this process."""
    states: Any = sys.modules.get("torch.distributed._composable_state")
    for reference in list(states._module_state_mapping.values()) if states is not None else []:
        state = reference() if callable(reference) else reference
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # torch before 2.13 has one
            groups = [getattr(state, "_fsdp_param_group", None)]
        for group in groups:
            yield from group.fsdp_params if group is not None else ()
