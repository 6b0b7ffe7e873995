"""Whether a weight is a shard that FSDP2 holds between its gathers."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor


def is_shard(weight: Tensor) -> bool:
    """Whether this is a Parameter in the state in which FSDP2 keeps it outside of a forward.

    A DTensor that no state of FSDP2 manages (tensor parallelism) is none: it is the whole weight, spread out.
    """
    tensors: Any = sys.modules.get("torch.distributed.tensor")
    if tensors is None or not isinstance(weight, tensors.DTensor):
        return False
    states: Any = sys.modules.get("torch.distributed._composable_state")
    found = list(states._module_state_mapping.values()) if states is not None else []
    groups = [g for ref in found for g in _groups(ref() if callable(ref) else ref)]
    shards = (
        getattr(parameter, name, None)
        for group in groups
        for parameter in group.fsdp_params
        for name in ("sharded_param", "_sharded_post_forward_param")
    )
    return any(shard is weight for shard in shards)


def _groups(state: Any) -> list[Any]:
    """Parameter groups of a state of FSDP2; torch before 2.13 has one."""
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [getattr(state, "_fsdp_param_group", None)]
    return [group for group in groups if group is not None]
