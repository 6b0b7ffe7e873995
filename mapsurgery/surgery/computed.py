"""Plain weights in the place of computed ones (weight_norm, spectral_norm, torch.nn.utils.parametrize), and back."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_HOOKS = (WeightNorm, SpectralNorm)


@dataclass
class Unbaked:
    """A layer as it was: its class, its attributes, and what of the class had to go."""

    original_class: type[nn.Module]
    attributes: dict[str, Any]
    computed: tuple[str, ...]
    properties: dict[str, Any] = field(default_factory=dict)


def can_bake(layer: nn.Module, name: str) -> bool:
    """Whether what computes this weight is known, so that it can be put aside."""
    return parametrize.is_parametrized(layer, name) or find_hook(layer, name) is not None


def bake(layer: nn.Module, weights: Mapping[str, nn.Parameter]) -> Unbaked:
    """Replace computed weights by these Parameters. Returns what `unbake` needs."""
    before = Unbaked(type(layer), _copied(layer, weights), tuple(weights))
    for name, weight in weights.items():
        if parametrize.is_parametrized(layer, name):
            _remove_parametrization(layer, name, before)
        else:
            _remove_hook(layer, name)
        layer.register_parameter(name, weight)
    return before


def unbake(layer: nn.Module, before: Unbaked) -> None:
    """Undo `bake`; the layer stays on its device and in its dtype."""
    weight = layer._parameters[before.computed[0]]
    assert weight is not None
    layer.__class__ = before.original_class
    for name, value in before.properties.items():
        setattr(before.original_class, name, value)
    layer.__dict__.update(before.attributes)
    layer.to(weight)


_CHANGED = (
    "_parameters",
    "_buffers",
    "_modules",
    "_forward_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)
"""Attributes that baking changes, besides the weight that a hook leaves."""


def _copied(layer: nn.Module, computed: Iterable[str]) -> dict[str, Any]:
    own = layer.__dict__
    return {n: copy.copy(own[n]) for n in _CHANGED} | {n: own[n] for n in computed if n in own}


def _remove_parametrization(layer: nn.Module, name: str, before: Unbaked) -> None:
    parametrizations: nn.ModuleDict = layer.parametrizations  # type: ignore[assignment]
    if len(parametrizations) == 1:
        del layer._modules["parametrizations"]
        layer.__class__ = type(layer).__bases__[0]  # torch's own, made for this one layer, is left
        return
    layer._modules["parametrizations"] = nn.ModuleDict({k: v for k, v in parametrizations.items() if k != name})
    before.properties[name] = type(layer).__dict__[name]
    delattr(type(layer), name)


def find_hook(layer: nn.Module, name: str) -> Any:
    """torch's old weight_norm or spectral_norm hook that computes this weight, or None."""
    hooks = layer._forward_pre_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, _HOOKS) and hook.name == name), None)


def _remove_hook(layer: nn.Module, name: str) -> None:
    for hooks in (layer._forward_pre_hooks, layer._state_dict_hooks, layer._load_state_dict_pre_hooks):
        for key, hook in list(hooks.items()):
            owner = getattr(hook, "fn", getattr(hook, "hook", hook))  # state dict hooks wrap the hook itself
            owner = getattr(owner, "fn", owner)
            if isinstance(owner, _HOOKS) and owner.name == name:
                del hooks[key]
    for suffix in ("_g", "_v", "_orig", "_u"):
        layer._parameters.pop(name + suffix, None)
        layer._buffers.pop(name + suffix, None)
    layer.__dict__.pop(name, None)
