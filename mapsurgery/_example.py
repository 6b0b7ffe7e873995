"""What a person hands over as an example, as the arguments of a model's forward: `arguments`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from .surgery.paths import unwrapped

_STRUCTURE = re.compile(r"(typing\.|collections\.abc\.)?(optional\[)?[\w.]*(tuple|list|sequence|dict|mapping)\b", re.I)
"""How an annotation begins that says: one argument of several parts."""


def arguments(model: nn.Module, example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a model's forward that an example stands for.

    A mapping (a dictionary, transformers' BatchEncoding and BatchFeature) holds keyword arguments, and a tuple
    positional ones. Where the forward's signature cannot take them so, or where its first parameter is annotated as a
    structure (``batch: dict``) and would get none, the example is the one argument. So is everything else, named tuples
    (PackedSequence) included.
    """
    if isinstance(example, Mapping) and all(isinstance(key, str) for key in example):
        spread: tuple[tuple[Any, ...], dict[str, Any]] = (), dict(example)
    elif type(example) is tuple:
        spread = example, {}
    else:
        return (example,), {}
    return ((example,), {}) if _is_one_argument(_signature(model), *spread) else spread


def _signature(model: nn.Module) -> inspect.Signature | None:
    try:
        return inspect.signature(unwrapped(model).forward)
    except (TypeError, ValueError):  # no function of Python (TorchScript)
        return None


def _is_one_argument(signature: inspect.Signature | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    first = next(iter(signature.parameters.values()), None) if signature is not None else None
    if signature is None or first is None:
        return False
    try:
        given = signature.bind(*args, **kwargs).arguments.get(first.name)
    except TypeError:  # where it is annotated as anything else, the forward's own error says what is wrong
        return first.annotation is inspect.Parameter.empty or _is_structure(first.annotation)
    return _is_structure(first.annotation) and not isinstance(given, tuple | list | Mapping)


def _is_structure(annotation: Any) -> bool:
    """Whether a parameter with this annotation is a tuple, a list or a mapping."""
    if annotation is inspect.Parameter.empty:
        return False
    plain = isinstance(annotation, type) and not getattr(annotation, "__args__", ())  # str of list[int] says it itself
    return _STRUCTURE.match(annotation.__name__ if plain else str(annotation)) is not None
