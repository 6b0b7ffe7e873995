"""Plain weights in the place of computed ones (weight_norm, spectral_norm, torch.nn.utils.parametrize)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..interrupts import undone_by

_HOOKS = (WeightNorm, SpectralNorm)


@torch.no_grad()
def computed_now(layer: nn.Module, name: str) -> Tensor | None:
    """A weight that torch's parametrisation, pruning or old hook computes, of what there is now; None of any other.

    The attribute that a hook leaves is as old as the last forward. Nothing is done on the side (spectral norm's power
    iteration).
    """
    if parametrize.is_parametrized(layer, name):
        parametrizations: nn.Module = layer.parametrizations[name]  # type: ignore[index, assignment]
        modes = {part: part.training for part in parametrizations.modules()}

        def put_back() -> None:
            for part, mode in modes.items():
                part.training = mode

        with undone_by(put_back):
            return parametrizations.eval()().detach()
    hooks = layer._forward_pre_hooks.values()
    pruned = next((h for h in hooks if isinstance(h, BasePruningMethod) and h._tensor_name == name), None)
    hook = find_hook(layer, name)
    if hook is None:
        return None if pruned is None else pruned.apply_mask(layer).detach()
    quietly = {"do_power_iteration": False} if isinstance(hook, SpectralNorm) else {}
    return hook.compute_weight(layer, **quietly).detach()


def can_bake(layer: nn.Module, name: str) -> bool:
    """Whether what computes this weight is known, so that it can be put aside."""
    return parametrize.is_parametrized(layer, name) or find_hook(layer, name) is not None


def bake(layer: nn.Module, name: str, weight: nn.Parameter) -> None:
    """Replace a computed weight by this Parameter."""
    if parametrize.is_parametrized(layer, name):
        _remove_parametrization(layer, name)
    else:
        _remove_hook(layer, name)
    layer.register_parameter(name, weight)


def _remove_parametrization(layer: nn.Module, name: str) -> None:
    parametrizations: nn.ModuleDict = layer.parametrizations  # type: ignore[assignment]
    if len(parametrizations) == 1:
        del layer._modules["parametrizations"]
        layer.__class__ = type(layer).__bases__[0]  # torch's own, made for this one layer, is left
        return
    layer._modules["parametrizations"] = nn.ModuleDict({k: v for k, v in parametrizations.items() if k != name})
    # A class without the property; the layer's own is left to whoever wants the layer back.
    own = type(layer)
    body = {key: value for key, value in vars(own).items() if key not in (name, "__dict__", "__weakref__")}
    layer.__class__ = type(own.__name__, own.__bases__, body)


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
