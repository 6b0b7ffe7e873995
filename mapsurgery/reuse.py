"""One norm for many calls: `reuse_norms`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from . import ops
from .methods import Adapter
from .surgery import record
from .surgery.adapted import FusedConv, FusedLinear
from .updates.base import Parameters

Model = TypeVar("Model", bound=nn.Module)

_NOT_READ = ("base_weight", "form")
"""Tensors of an adapter on which no norm of the update depends."""


class KnownScales:
    """What the operator map_scales gave for an adapter, and the tensors that it depends on.

    Attributes: tensors: by name; marks: what changes with every write to them that torch counts.
    """

    def __init__(self, adapter: Adapter, values: ops.Scales) -> None:
        own = {**adapter._parameters, **adapter._buffers, "weight_norm": adapter.weight_norm}
        self.values = values
        self.layer = adapter.layer_name or "an adapted layer"
        self.tensors = {name: t for name, t in own.items() if t is not None and name not in _NOT_READ}
        self.marks = self._marks()

    def _marks(self) -> dict[str, Any]:
        return {name: (0 if t.is_inference() else t._version, t.data_ptr()) for name, t in self.tensors.items()}

    def of(self, adapter: Parameters, x: Tensor, norm: Tensor) -> ops.Scales | None:
        """The values; None where other tensors stand for the adapter's (functional_call, replicas), and in graphs.

        Args: x: the input of the layer, a proxy where torch.fx traces; norm: ||W||_F of this call.
        """
        if torch.compiler.is_compiling() or not isinstance(x, Tensor) or norm is not self.tensors["weight_norm"]:
            return None
        return None if self.replaced(adapter) else self.values

    def replaced(self, adapter: Parameters) -> str | None:
        """Name of a tensor that is no longer the adapter's."""
        return next((name for name, t in self.tensors.items() if getattr(adapter, name, None) is not t), None)

    def refuse_changed(self, adapter: Parameters) -> None:
        """Raises RuntimeError if a tensor is another one, was written to or got other memory."""
        marks = self._marks()
        changed = next((name for name, mark in self.marks.items() if marks[name] != mark), self.replaced(adapter))
        if changed is not None:
            raise self.error(changed, "was changed")

    def error(self, name: str, what: str) -> RuntimeError:
        """What to say of a tensor that is not as it was."""
        return RuntimeError(
            f"{self.layer}: {name} of its adapter {what} inside mapsurgery.reuse_norms, whose norms are those of the "
            "parameters at its start: leave the block before they change (optimizer.step, loading, rebalance), and "
            "enter it anew"
        )


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

    for adapter, known in held.items():
        adapter.scales = known
    try:
        with register_optimizer_step_pre_hook(refuse):
            yield model
    finally:
        for adapter in held:
            adapter.scales = None
    for adapter, known in held.items():
        known.refuse_changed(adapter)


def _known(model: nn.Module) -> dict[Adapter, KnownScales]:
    """The scales of the adapters whose layers' calls take them, but for those of a block that is open."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    adapters = {m.adapter_of("weight"): None for m in model.modules() if isinstance(m, FusedLinear | FusedConv)}
    if not adapters:
        record.all_sites(model)  # raises where nothing is adapted
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
