"""Which layers can be adapted. A new layer type is one new entry in `LAYER_TYPES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from .adapted import AdaptedLayer, FusedConv, FusedLinear

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LayerType:
    """One kind of adaptable layer.

    Attributes:
        qualified_name: of the class; a name, so that no optional package has to be imported.
        fused: mixin with the activation-space forward, for classes whose forward is the original one.
        methods: what a subclass must not override for `fused` to compute the same as it does.
        transposed: the weight is (in, out).
    """

    qualified_name: str
    fused: type[AdaptedLayer]
    methods: tuple[str, ...] = ("forward",)
    transposed: bool = False

    def find_in(self, cls: type) -> type | None:
        """This class among the ancestors of `cls`."""
        return next((c for c in cls.__mro__ if f"{c.__module__}.{c.__qualname__}" == self.qualified_name), None)

    def is_standard(self, cls: type) -> bool:
        """Whether `cls` computes exactly what this class computes."""
        own = self.find_in(cls)
        return own is not None and all(getattr(cls, name) is getattr(own, name) for name in self.methods)


_CONV_METHODS = ("forward", "_conv_forward")

LAYER_TYPES: tuple[LayerType, ...] = (
    LayerType("torch.nn.modules.linear.Linear", FusedLinear),
    LayerType("torch.nn.modules.conv.Conv1d", FusedConv, _CONV_METHODS),
    LayerType("torch.nn.modules.conv.Conv2d", FusedConv, _CONV_METHODS),
    LayerType("torch.nn.modules.conv.Conv3d", FusedConv, _CONV_METHODS),
    LayerType("transformers.pytorch_utils.Conv1D", FusedLinear, transposed=True),
)


def find_type(cls: type) -> LayerType | None:
    """The entry of the table that a class belongs to."""
    return next((entry for entry in LAYER_TYPES if entry.find_in(cls) is not None), None)


def _wrong_type(module: nn.Module) -> str | None:
    if isinstance(module, AdaptedLayer):
        return "already adapted"
    if find_type(type(module)) is None:
        return f"{type(module).__name__} is not an adaptable layer type"
    return None


def _uninitialised(module: nn.Module) -> str | None:
    lazy = isinstance(module._parameters.get("weight"), UninitializedParameter)
    return "lazy module without a shape yet: run one forward first" if lazy else None


def _computed_weight(module: nn.Module) -> str | None:
    if getattr(module, "parametrizations", None):
        return "its weight is parametrised: torch.nn.utils.parametrize.remove_parametrizations first"
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "its weight is not a Parameter (weight_norm, spectral_norm or a quantised layer)"
    return None


def _special_weight(module: nn.Module) -> str | None:
    weight = module._parameters["weight"]
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__} (quantised or sharded)"
    if weight.dtype not in DTYPES:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}, not a floating dtype that MAP computes in"
    if weight.layout != torch.strided:
        return f"its weight is {weight.layout}"
    if any(stride == 0 and size > 1 for stride, size in zip(weight.stride(), weight.shape, strict=True)):
        return "its weight is expanded: several of its elements share one place in memory"
    return "its weight is empty" if weight.numel() == 0 else None


def _name_taken(module: nn.Module) -> str | None:
    return "it has an attribute named `adapter` already" if hasattr(module, "adapter") else None


_CHECKS: tuple[Callable[[nn.Module], str | None], ...] = (
    _wrong_type,
    _uninitialised,
    _computed_weight,
    _special_weight,
    _name_taken,
)


def why_not(module: nn.Module) -> str | None:
    """Why this module cannot be adapted, or None if it can."""
    return next((reason for check in _CHECKS if (reason := check(module)) is not None), None)
