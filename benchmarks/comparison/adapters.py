"""How each method is put on a model, and the learning rates that are searched for it.

Names: ``peft-lora``, ``peft-dora``, ``peft-delora`` are peft's. Any other is this library's METHOD or METHOD+UPDATE:
``map``, ``map+pissa``, ``map+lokr``, ``dora``, ``lora+vera`` ... ``frozen`` trains nothing but the task's head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

import mapsurgery

RANK = 8
LORA_ALPHA = 2 * RANK
"""peft's lora_alpha: the usual scaling of 2."""
DELORA_BOUND = 15 / 4096**0.5
"""Largest ||dW||_F of DeLoRA, in units of ||W||_F (for columns of equal norm): what peft's default delora_lambda=15 is
on a layer of 4096 inputs. The 15 itself allows 0.77 ||W||_F at 384 inputs, and ends at chance on the vision task."""

FROZEN = "frozen"
REFERENCE = "peft-lora"
DEFAULT_METHODS = (FROZEN, REFERENCE, "peft-dora", "peft-delora", "map", "map+pissa", "map+lokr")

LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
"""Searched for every method, times the method's factor."""
FACTORS = {"peft-delora": 0.1, "vera": 10.0}
"""By method, or by update family: whose natural scale of the learning rate differs from LoRA's. The number of learning
rates and their distances are the same for all."""


def learning_rates(method: str, base: Sequence[float] = LEARNING_RATES) -> list[float]:
    """The grid of a method; 0 alone for the frozen model, which has no adapter."""
    if method == FROZEN:
        return [0.0]
    factor = FACTORS.get(method, FACTORS.get(_parts(method)[1], 1.0))
    return [float(f"{factor * lr:.6g}") for lr in base]


def check_method(model: nn.Module, method: str, targets: Sequence[str]) -> None:
    """Whether the method exists and can adapt the task's layers, without changing the model.

    Raises:
        ValueError: it does not; the message says which there are.
    """
    if method.startswith("peft-"):
        if method not in PEFT:
            raise ValueError(f"method {method!r}: of peft there are {', '.join(PEFT)}")
    elif method != FROZEN:
        name, update = _parts(method)
        mapsurgery.plan(model, targets, rank=RANK, method=name, update=update)


def adapt(model: nn.Module, method: str, targets: Sequence[str], head: Sequence[str]) -> nn.Module:
    """Adapt the model in place; what is left trainable is the adapter and the head.

    All methods adapt the same layers, those that this library's plan finds.
    """
    if method == FROZEN:
        return _train_head(model.requires_grad_(False), head)
    if method in PEFT:
        return _train_head(_inject(model, PEFT[method], targets), head)
    name, update = _parts(method)
    return mapsurgery.patch(model, targets, rank=RANK, method=name, update=update, train=head)


def param_groups(model: nn.Module, method: str, head: Sequence[str], lr: float, head_lr: float) -> list[dict[str, Any]]:
    """The trained parameters as groups of an optimiser: the head at its own learning rate, the rest as the method says.

    No weight decay, for any method.
    """
    of_head = [p for p in _parameters_below(model, head) if p.requires_grad]
    ours = method != FROZEN and method not in PEFT
    all_parameters: dict[str, Any] = {"params": list(model.parameters()), "lr": lr}
    groups = mapsurgery.param_groups(model, lr=lr) if ours else [all_parameters]
    excluded = set(of_head)
    for group in groups:
        group["params"] = [p for p in group["params"] if p.requires_grad and p not in excluded]
    groups.append({"params": of_head, "lr": head_lr})
    return [{**group, "weight_decay": 0.0} for group in groups if group["params"]]


def trained_parameters(model: nn.Module, head: Sequence[str]) -> int:
    """Number of trained parameters without the head's."""
    of_head = set(_parameters_below(model, head))
    return sum(p.numel() for p in model.parameters() if p.requires_grad and p not in of_head)


def _parts(method: str) -> tuple[str, str]:
    name, _, update = method.partition("+")
    return name, update or "lora"


def _parameters_below(model: nn.Module, paths: Sequence[str]) -> list[nn.Parameter]:
    return [p for path in paths for p in model.get_submodule(path).parameters()]


def _train_head(model: nn.Module, head: Sequence[str]) -> nn.Module:
    for parameter in _parameters_below(model, head):
        parameter.requires_grad_(True)
    return model


Layers = dict[str, Any]
"""The layers to adapt by their paths."""


def _inject(model: nn.Module, make_config: Callable[[Layers], Any], targets: Sequence[str]) -> nn.Module:
    from peft import inject_adapter_in_model

    layers = {layer.path: layer.module for layer in mapsurgery.plan(model, targets, rank=RANK).layers}
    return inject_adapter_in_model(make_config(layers), model.requires_grad_(False))


def _peft_lora(layers: Layers) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=LORA_ALPHA, target_modules=list(layers))


def _peft_dora(layers: Layers) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=LORA_ALPHA, target_modules=list(layers), use_dora=True)


def _peft_delora(layers: Layers) -> Any:
    """With `DELORA_BOUND` in place of peft's default bound, which depends on the layer's width."""
    from peft import DeloraConfig

    bounds = {path: DELORA_BOUND * layer.in_features**0.5 for path, layer in layers.items()}
    return DeloraConfig(r=RANK, target_modules=list(layers), lambda_pattern=bounds)


PEFT: dict[str, Callable[[Layers], Any]] = {
    "peft-lora": _peft_lora,
    "peft-dora": _peft_dora,
    "peft-delora": _peft_delora,
}
