"""A layer as it was, for whoever changes it and may have to give it back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..methods import Adapter

MERGED = "_mapsurgery_merged"
"""Plain attribute of a merged layer that holds its `Snapshot`."""


@dataclass
class Snapshot:
    """An adapted layer before its adapters were merged: what `unmerge` gives back.

    Attributes:
        adapters: by the parameter's name; shared: names of those that are another layer's child.
        bases: the untouched base weights, where W' is in others.
        layer_class, attributes: of the layer without its adapters, where merging changes more than a weight (W was
            computed, or quantised); else None.
        quantised: it had a quantised weight.
    """

    adapters: dict[str, Adapter]
    shared: tuple[str, ...] = ()
    bases: dict[str, nn.Parameter] = field(default_factory=dict)
    layer_class: type[nn.Module] | None = None
    attributes: dict[str, Any] = field(default_factory=dict)
    quantised: bool = False

    def keep(self, layer: nn.Module) -> None:
        """Remember the layer as it is now, beside its adapters."""
        self.layer_class = type(layer)
        self.attributes = {name: _copied(value) for name, value in layer.__dict__.items()}

    def put_back(self, layer: nn.Module) -> None:
        """The layer as it was at `keep`, in the mode and on the device that it is in now."""
        assert self.layer_class is not None
        weight, training = layer._parameters[next(iter(self.adapters))], layer.training
        assert weight is not None
        layer.__class__ = self.layer_class
        layer.__dict__.clear()
        layer.__dict__.update(self.attributes)
        layer.train(training)
        layer.to(weight.device) if self.quantised else layer.to(weight)  # packed numbers have no other dtype


def _copied(value: Any) -> Any:
    """Containers of parameters, hooks and modules are copied, what they hold is not."""
    return value.copy() if isinstance(value, dict) else value
