"""Layers that hold the random numbers of their start in a model that was trained: a new head, most often.

What `patch` freezes stays as it is, so that such a layer has to be named in `train`; a plan says so where it shows.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .heads import heads

_FEWEST, _MOST = 64, 1 << 16
"""Numbers of a weight from which on their distribution says something, and about as many as are looked at."""

Paths = Mapping[nn.Module, tuple[str, ...]]


def advice(paths: Paths, model: nn.Module, learning: Collection[nn.Parameter]) -> tuple[str | None, bool]:
    """What to say of layers that are new and will not learn, and whether it is certain and concerns a head.

    Args: learning: parameters that are trained or adapted.
    """
    of_heads = heads(model)
    new = _names(paths, unloaded(paths), learning)
    if new:
        certain = any(paths_of[0] in new for module, paths_of in paths.items() if module in of_heads)
        return _said(new, "from_pretrained found no values for it in the checkpoint"), certain
    made, reason = _remade(paths, of_heads)
    return (_said(names, reason) if (names := _names(paths, made, learning)) else None), False


def _names(paths: Paths, modules: Collection[nn.Module], learning: Collection[nn.Parameter]) -> list[str]:
    idle = [m for m in modules if not any(p in learning for p in m._parameters.values() if p is not None)]
    return [paths[module][0] for module in idle]


def _said(names: list[str], reason: str) -> str:
    listed = ", ".join(f'"{name}"' for name in names)
    what = f"{names[0]} is" if len(names) == 1 else f"{' and '.join([', '.join(names[:-1]), names[-1]])} are"
    them = "it" if len(names) == 1 else "them"
    reason = reason if len(names) == 1 else reason.replace(" for it ", " for them ")
    return f"{what} freshly initialised ({reason}) and would stay frozen; train=[{listed}] trains {them}"


def unloaded(paths: Paths) -> list[nn.Module]:
    """Modules of transformers' models with parameters that from_pretrained did not load and that hold a start.

    It marks each parameter that it loads; a model that was not loaded has no marks, and neither has a copy.
    """
    if not any(_loaded(p) for module in paths for p in module._parameters.values() if p is not None):
        return []
    spreads: dict[nn.Module, float] = {}
    for module in paths:
        spread = getattr(getattr(module, "config", None), "initializer_range", None)
        if isinstance(spread, float):
            spreads.update(dict.fromkeys(module.modules(), spread))
    return [
        m
        for m in paths
        if any(_is_plain(p) and not _loaded(p) and _untouched(m, p) for p in _own(m))
        and all(map(_is_plain, _own(m)))
        and _starts(m, spreads.get(m))
    ]


def _loaded(parameter: nn.Parameter) -> bool:
    return bool(getattr(parameter, "_is_hf_initialized", False))


def _untouched(module: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether torch has counted no write but that of its start: one, or two with a bias of zeros.

    It does not count those of fused optimisers and through `.data`: the numbers say more.
    """
    return parameter._version <= 1 or (parameter._version == 2 and _has_zero_bias(module))


@torch.no_grad()
def _starts(module: nn.Module, spread: float | None) -> bool:
    """Whether a module's numbers can be those of its start: zeros in the bias, and a weight of one number, or drawn.

    Args: spread: the standard deviation that weights are drawn with, if it is known.
    """
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if _starts_uniform(module):
        return True
    if bias is not None and bias.any():
        return False
    if weight is None or spread is None:
        return True
    numbers = _some(weight)
    found, tolerance = numbers.square().mean().sqrt().item(), 4 / math.sqrt(2 * numbers.numel())
    return bool((numbers == numbers.flatten()[0]).all()) or abs(found / spread - 1) <= tolerance


def _remade(paths: Paths, of_heads: Mapping[nn.Module, str]) -> tuple[list[nn.Module], str]:
    """Linear layers of heads that hold the numbers of a start, and by what that is seen."""
    layers = [m for m in paths if m in of_heads and isinstance(m, nn.Linear) and all(map(_is_plain, _own(m)))]
    reset = [(m, n, own) for m in paths for n, own in _classes(m) if n != own]
    inside = {part: (n, own) for m, n, own in reset for part in m.modules()}
    made: list[nn.Module] = [m for m in layers if m in inside and (_starts_uniform(m) or _has_zero_bias(m))]
    if made:
        n, own = inside[made[0]]
        return made, f"its weights come with {own} classes, and it has {n}"
    made = [m for m in layers if _starts_uniform(m)]
    others = (m for m in paths if isinstance(m, nn.Linear | nn.modules.conv._ConvNd) and m not in of_heads)
    trained = made and any(all(map(_is_plain, _own(m))) and _starts_uniform(m) is False for m in others)
    return (made if trained else []), "it holds numbers such as nn.Linear starts with"


def _classes(module: nn.Module) -> Iterator[tuple[int, int]]:
    """Of timm's models: the number of classes, and that of the weights that they are loaded with."""
    cfg: Any = getattr(module, "pretrained_cfg", None)
    own, n = (cfg.get("num_classes") if isinstance(cfg, Mapping) else None), getattr(module, "num_classes", None)
    if isinstance(own, int) and isinstance(n, int):
        yield n, own


def _own(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module._parameters.values() if parameter is not None]


def _is_plain(p: nn.Parameter) -> bool:
    """Whether a parameter has numbers that can be looked at."""
    return (
        type(p) is nn.Parameter
        and p.is_floating_point()
        and p.numel() > 0
        and not (p.is_meta or p.is_inference() or isinstance(p.data, FakeTensor))
    )


def _has_zero_bias(layer: nn.Module) -> bool:
    bias = layer._parameters.get("bias")
    return bias is not None and not bias.any()


def _some(weight: Tensor) -> Tensor:
    """Rows of a weight, about `_MOST` numbers."""
    return weight.detach()[:: math.ceil(weight.numel() / _MOST)].float()


@torch.no_grad()
def _starts_uniform(layer: nn.Module) -> bool | None:
    """Whether weight and bias look drawn as `reset_parameters` draws them, evenly up to 1/sqrt(fan_in); None if few.

    Training widens them within a step or two.
    """
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    if weight is None or weight.numel() < _FEWEST:  # computed, by weight_norm say; or a few numbers
        return None
    bound, most = 1 / math.sqrt(weight[0].numel()), 1 + 2 * torch.finfo(weight.dtype).eps  # half types round up
    numbers = _some(weight) / bound
    if bias is not None and bias.float().abs().max().item() > most * bound:
        return False
    spread = numbers.square().mean().sqrt().item() * math.sqrt(3)
    return 0.9 <= numbers.abs().max().item() <= most and abs(spread - 1) <= 3 / math.sqrt(numbers.numel())
