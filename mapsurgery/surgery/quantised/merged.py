"""What takes the place of a quantised weight when its adapter is merged: a plain layer, or W' quantised again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..forwards import ASIDE, described, rebind_forward
from .kinds import Quantisation, dequantised, kind_of
from .layer import QuantisedLinear

CHOICES = ("refuse", "dequantise", "requantise")


@dataclass
class Replacement:
    """A merged weight, made but not put in yet.

    Attributes:
        weight: floating, for a layer that becomes an nn.Linear, or quantised.
        attributes: of the layer, that go with a quantised weight.
        plain: the layer becomes an nn.Linear.
    """

    weight: nn.Parameter
    attributes: dict[str, Any] = field(default_factory=dict)
    plain: bool = True


def replacement(layer: QuantisedLinear, path: str, choice: str, surroundings: torch.dtype) -> Replacement:
    """The merged weight of an adapted layer, which is not changed.

    Args: choice: "dequantise" or "requantise"; surroundings: dtype of a plain weight where the layer has none.

    Raises:
        ValueError: the layer cannot be quantised again, or carries a forward of its own.
    """
    kind = kind_of(layer)
    assert kind is not None
    if ASIDE in layer.__dict__:
        raise ValueError(
            f"{path} ({kind.name}): its object carries a forward of its own ({described(layer.__dict__[ASIDE])}), "
            "which would run on the weight that merging takes away; merge in a model without it (unpatch, take it off, "
            "patch and load the adapter again), or keep the adapter beside the weight"
        )
    if choice == "requantise" and kind.quantise is None:
        raise ValueError(_cannot(path, kind, "this library knows no way to pack its weight again"))
    merged = dequantised(layer)
    adapter = layer.adapter_of("weight")
    adapter.merge_into(merged, adapter.weight_norm)
    if choice == "dequantise" or kind.quantise is None:
        plain = merged.to(kind.dtype(layer) or surroundings)
        refuse_infinite(plain, path)
        return Replacement(nn.Parameter(plain, requires_grad=False))
    try:
        weight, attributes = kind.quantise(layer, merged)
    except ValueError as error:
        raise ValueError(_cannot(path, kind, str(error))) from error
    return Replacement(weight, attributes, plain=False)


def refuse_infinite(weight: Tensor, path: str) -> None:
    """Raises ValueError where the dtype of a weight cannot hold what was merged."""
    if not weight.isfinite().all():
        raise ValueError(
            f"{path}: what is merged is infinite in {weight.dtype}, as the weight is; cast the model to a wider dtype "
            "(float32, bfloat16) and merge then"
        )


def _cannot(path: str, kind: Quantisation, reason: str) -> str:
    return f'{path} ({kind.name}) cannot be quantised again: {reason}; merge with quantised="dequantise"'


_KEPT = ("training", "_hf_hook", "_old_forward", "forward")


def put_in(layer: nn.Module, new: Replacement) -> None:
    """Replace the weight of a layer, which is of its original class again."""
    if new.plain:
        _become_linear(layer, new.weight)
    else:
        layer._parameters["weight"] = new.weight
        layer.__dict__.update(new.attributes)


def _become_linear(layer: nn.Module, weight: nn.Parameter) -> None:
    """nn.Linear, with this weight and the layer's bias and hooks, and nothing else of what it held."""
    m, K = weight.shape
    bias = getattr(layer, "bias", None)
    fresh = nn.Linear(K, m, bias=False, device="meta").__dict__
    hooks = {name for name in fresh if name.startswith(("_forward", "_backward", "_is_full"))}
    own = {name: value for name, value in layer.__dict__.items() if name in hooks or name in _KEPT}
    layer.__dict__.clear()
    layer.__dict__.update(fresh | own)
    original = type(layer)
    layer.__class__ = nn.Linear
    rebind_forward(layer, original)
    layer._parameters["weight"] = weight
    if isinstance(bias, Tensor) and bias.numel():
        if not isinstance(bias, nn.Parameter) or bias.dtype != weight.dtype:
            bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
        layer.register_parameter("bias", bias)
