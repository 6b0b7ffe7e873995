"""The layers of a model that make its outputs of its features: `targets="all-linear"` leaves them out.

The library that a model is of says which they are, or their names do, since PyTorch knows no heads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from .offloaded import identity
from .paths import unwrapped

_METHODS = ("get_output_embeddings", "get_classifier")
"""Of transformers' models and of timm's: the head."""

_NAMES = re.compile(r"(.+_)?(head|heads|classifier)|head_dist|fc|score|qa_outputs")
"""Of heads, as children of a model: torchvision's, timm's, those of transformers that no method gives."""


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
    core = _core(model)
    for name, child in core.named_children():
        if _NAMES.fullmatch(name):
            add(child, f"a head of {type(core).__name__}, by its name")
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


def _core(model: nn.Module) -> nn.Module:
    """The model inside of what holds it and nothing else that has parameters (Lightning's module, a wrapper)."""
    while True:
        model = unwrapped(model)
        held = [child for child in model.children() if any(True for _ in child.parameters())]
        if len(held) != 1 or any(True for _ in model.parameters(recurse=False)) or _is_layer(model):
            return model
        model = held[0]


def _is_layer(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.modules")


def _has_weight(module: nn.Module) -> bool:
    return module._parameters.get("weight") is not None
