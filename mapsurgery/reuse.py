"""One norm for many calls: `reuse_norms`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .interrupts import undone_by
from .methods import Adapter
from .methods.known_scales import KnownScales
from .surgery.adapted import FusedConv, FusedLinear
from .surgery.record import all_sites

Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def reuse_norms(model: Model) -> Iterator[Model]:
    """Within the block MAP computes ||BA||_F of each layer once, not in every call: parameters may not change there.

        for batch in loader:
            with mapsurgery.reuse_norms(model):  # one step of the optimiser: micro-batches, recomputed activations
                for micro in batch:
                    loss(model(micro)).backward()
            optimizer.step()

    Outputs and gradients are those outside of the block. It concerns eager calls of layers that run on the fused
    operators, Linear and Conv with method "map" and an update that has factors, without dropout; all others, compiled
    code and readers of ``layer.weight`` compute as ever. It is a switch of the model, not of the thread; an inner block
    reuses the outer one's norms. Nothing of it is copied, pickled or in a state_dict.

    A step of an optimiser is refused, and other writes are at the end of the block, as far as torch counts them: not
    those through ``parameter.data`` or by a replayed CUDA graph.

    Raises:
        RuntimeError: a parameter of an adapter was changed inside the block; it names the layer.
        ValueError: the model has no adapted layers.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "mapsurgery.reuse_norms inside of what torch.compile compiles: open the block around the call"
        )
    held = _known(model)
    owners = {t: (known, name) for known in held.values() for name, t in known.tensors.items()}

    def refuse(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Before the step of any optimiser: fused ones write past torch's counters."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter in owners:
                    known, name = owners[parameter]
                    raise known.error(name, f"is to be changed by {type(optimizer).__name__}.step")

    def take_back() -> None:
        for adapter in held:
            adapter.scales = None

    with undone_by(take_back), register_optimizer_step_pre_hook(refuse):
        for adapter, known in held.items():
            adapter.scales = known
        yield model
    for adapter, known in held.items():
        known.refuse_changed(adapter)


def _known(model: nn.Module) -> dict[Adapter, KnownScales]:
    """The scales of the adapters whose layers' calls take them, but for those of a block that is open."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    adapters = {m.adapter_of("weight"): None for m in model.modules() if isinstance(m, FusedLinear | FusedConv)}
    if not adapters:
        all_sites(model)  # raises where nothing is adapted
    held = {}
    # No inference tensors: calls with autograd may use the result.
    with torch.inference_mode(False), torch.no_grad():
        for adapter in adapters:
            plain = all(type(t) in (nn.Parameter, Tensor) and not t.is_meta for t in adapter.own_parameters().values())
            if not plain or adapter.pending or adapter.scales is not None:
                continue
            values = adapter.method.scales(adapter)
            if values is not None:
                held[adapter] = KnownScales(adapter, values)
    return held
