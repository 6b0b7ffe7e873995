"""What a block that reuses norms (`mapsurgery.reuse_norms`) leaves with each adapter, and whether it still holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import ops

if TYPE_CHECKING:
    from .adapter import Adapter

_NOT_READ = ("base_weight", "form")
"""Tensors of an adapter on which no norm of the update depends: W itself is there by its norm alone."""


class GivenScales:
    """What `ops.map_scales_many` computed for one adapter, to be used until its parameters change.

    Attributes:
        values: scales and Gram matrices.
        tensors: all that they depend on, by name.
        users: blocks that are open.
    """

    def __init__(self, adapter: Adapter, values: ops.Given) -> None:
        self.values = values
        self.tensors = tensors_of(adapter)
        self.users = 0
        self._layer = adapter.layer_name or "an adapted layer"
        self._marks = [_mark(t) for t in self.tensors.values()]

    def for_call(self, adapter: Adapter, weight_norm: Tensor) -> ops.Given | None:
        """The values; None where other tensors stand for the adapter's (`torch.func.functional_call`, replicas).

        Raises:
            RuntimeError: a tensor was changed in place. Compiled code leaves that to the end of the block.
        """
        if weight_norm is not self.tensors["weight_norm"] or self.replaced(adapter):
            return None
        if not torch.compiler.is_compiling():
            self.refuse_changed()
        return self.values

    def replaced(self, adapter: Adapter) -> str | None:
        """Name of the first tensor that is no longer the adapter's."""
        parameters, buffers = adapter._parameters, adapter._buffers
        for name, tensor in self.tensors.items():
            if parameters.get(name) is not tensor and buffers.get(name) is not tensor:
                return name
        return None

    def refuse_changed(self) -> None:
        """Raises RuntimeError if a tensor was written to, or got other memory, as far as torch counts that."""
        for (name, tensor), mark in zip(self.tensors.items(), self._marks, strict=True):
            if _mark(tensor) != mark:
                raise self.error(name, "was changed")

    def error(self, name: str, what: str) -> RuntimeError:
        """What to say of a tensor that is not as it was."""
        return RuntimeError(
            f"{self._layer}: {name} of its adapter {what} inside mapsurgery.reuse_norms, whose norms are those of the "
            "parameters at its start: leave the block before they change (optimizer.step, loading, rebalance), and "
            "enter it anew"
        )


def tensors_of(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors of an adapter on which ||BA||_F and the scales depend."""
    own = {**adapter._parameters, **adapter._buffers}
    return {name: t for name, t in own.items() if t is not None and name not in _NOT_READ}


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor lies in memory as it is: no shard, no quantised or fake tensor, none on meta."""
    return type(tensor) in (nn.Parameter, Tensor) and not tensor.is_meta


def _mark(tensor: Tensor) -> tuple[int, int]:
    """Changes with every write that torch counts (inference tensors count none), and with ``tensor.data = other``."""
    return (0 if tensor.is_inference() else tensor._version), tensor.data_ptr()
