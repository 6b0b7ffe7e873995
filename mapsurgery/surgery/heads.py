"""The layers of a model that make its outputs of its features: `targets="all-linear"` leaves them out.

The library that a model is of says which they are, or their names do, since PyTorch knows no heads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from .layers import is_linear
from .offloaded import identity
from .paths import unwrapped

_METHODS = ("get_output_embeddings", "get_classifier")
"""Of transformers' models and of timm's: the head."""

_NAMES = re.compile(r"(.+_)?(head|classifier)|.+_heads|head_dist|cls|qa_outputs")
"""Of heads, as children of a model: torchvision's, timm's, those of transformers that no method gives."""

_LAST = re.compile(r"heads|fc|score")
"""Of heads where no other linear layer comes after them, and of other layers: an MLP's, an attention's."""

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_LIBRARIES = ("transformers.", "timm.", "torchvision.")
"""Packages whose models have their heads as children."""


def heads(model: nn.Module) -> dict[nn.Module, str]:
    """Modules that are a head, or a part of one, and how that is known."""
    found: dict[nn.Module, str] = {}

    def add(head: nn.Module, reason: str) -> None:
        for module in head.modules():
            found.setdefault(module, reason)

    for module in model.modules():
        for method in _METHODS:
            for head in _asked(module, method):
                add(head, f"an output layer of {type(module).__name__} ({method})")
        for part in _beside_core(module):
            found.setdefault(part, f"a head of {type(module).__name__}: outside of its {module.base_model_prefix}")
    for network in _networks(model):
        for child in _named(network):
            add(child, f"a head of {type(network).__name__}, by its name")
    embeddings = {identity(m, "weight") for m in model.modules() if isinstance(m, nn.Embedding) and _has_weight(m)}
    for module in model.modules():
        if isinstance(module, nn.Linear) and _has_weight(module) and identity(module, "weight") in embeddings:
            add(module, "an output layer, tied with an embedding")
    return found


def _asked(module: nn.Module, method: str) -> Iterator[nn.Module]:
    """The head that a model gives, or its heads. A class with another method of this name gives none."""
    call: Any = getattr(type(module), method, None)
    if call is None:
        return
    try:
        answer = call(module)
    except Exception:  # another library's: it takes arguments, or raises where there is no head
        return
    for head in answer if isinstance(answer, tuple | list) else (answer,):
        if isinstance(head, nn.Module):
            yield head


def _beside_core(model: nn.Module) -> Iterator[nn.Module]:
    """What a model of transformers puts on its core (a BertModel in a BertForPreTraining), but for models in it."""
    prefix: Any = getattr(type(model), "base_model_prefix", None)
    core = model._modules.get(prefix) if isinstance(prefix, str) else None
    waiting = [] if core is None else [child for child in model.children() if child is not core]
    while waiting:
        part = waiting.pop()
        if not hasattr(type(part), "base_model_prefix"):
            yield part
            waiting += part.children()


def _networks(module: nn.Module, own: bool = True) -> Iterator[nn.Module]:
    """Models whose children may be known for heads by their names, wherever they are held: those of libraries, and the
    outermost modules with such a child. Blocks of a sequence are none.

    Args: own: modules of no library are looked for.
    """
    module = unwrapped(module)
    named = own and any(True for _ in _named(module))
    library = type(module).__module__.startswith(_LIBRARIES)
    if named or library:
        yield module
    if library or _is_layer(module):
        return
    held = [child for child in module.children() if any(True for _ in child.parameters())]
    blocks = isinstance(module, nn.Sequential | nn.ModuleList) and len(held) > 1
    for child in held:
        yield from _networks(child, own and not named and not blocks)


def _named(network: nn.Module) -> Iterator[nn.Module]:
    """Children that are heads by their names."""
    last = True
    for name, child in reversed(list(network.named_children())):
        if _NAMES.fullmatch(name) or (last and _LAST.fullmatch(name)):
            yield child
        elif last:
            last = not any(map(is_linear, child.modules()))


def _is_layer(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.modules") and not isinstance(module, _CONTAINERS)


def _has_weight(module: nn.Module) -> bool:
    return module._parameters.get("weight") is not None
