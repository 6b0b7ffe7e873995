"""Scales that calls take instead of computing them, inside `mapsurgery.reuse_norms`."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from .. import ops
from ..updates.base import Parameters


@final
class KnownScales:
    """What the operator map_scales gave for an adapter, and the tensors that it depends on.

    Attributes: tensors: by name; marks: what changes with every write to them that torch counts.
    """

    def __init__(self, adapter: Parameters, values: ops.Scales) -> None:
        own = {**adapter._parameters, **adapter._buffers, "weight_norm": adapter.weight_norm}
        self.values = values
        self.layer = adapter.layer_name or "an adapted layer"
        self.tensors = {name: t for name, t in own.items() if t is not None}
        self.marks = self._marks()

    def _marks(self) -> dict[str, Any]:
        return {name: (0 if t.is_inference() else t._version, t.data_ptr()) for name, t in self.tensors.items()}

    def of(self, adapter: Parameters, x: Tensor, norm: Tensor) -> ops.Scales | None:
        """The values; None where other tensors stand for the adapter's (functional_call, replicas), and in graphs.

        Args: x: the input of the layer, a proxy where torch.fx traces; norm: ||W||_F of this call.
        """
        if torch.compiler.is_compiling() or not isinstance(x, Tensor) or norm is not self.tensors["weight_norm"]:
            return None
        return None if self.swapped(adapter) else self.values

    def swapped(self, adapter: Parameters) -> str | None:
        """Name of a tensor that is no longer the adapter's."""
        return next((name for name, t in self.tensors.items() if getattr(adapter, name, None) is not t), None)

    def refuse_changed(self, adapter: Parameters) -> None:
        """Raises RuntimeError if a tensor is another one, was written to or got other memory."""
        marks = self._marks()
        changed = next((name for name, mark in self.marks.items() if marks[name] != mark), self.swapped(adapter))
        if changed is not None:
            raise self.error(changed, "was changed")

    def error(self, name: str, what: str) -> RuntimeError:
        """What to say of a tensor that is not as it was."""
        return RuntimeError(
            f"{self.layer}: {name} of its adapter {what} inside mapsurgery.reuse_norms, whose norms are those of the "
            "parameters at its start: leave the block before they change (optimizer.step, loading, rebalance), and "
            "enter it anew"
        )
