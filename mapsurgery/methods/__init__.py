"""How W' is made: one file per method, with no knowledge of models.

`METHODS` maps names to methods; `patch(method=...)` takes a name or an instance with options, and `register_method`
adds one of your own. What ΔW is, is said by `mapsurgery.updates`.
"""

from __future__ import annotations

from typing import Any

from ..named import parse, register
from .adapter import Adapter
from .base import Coefficients, Method, Way
from .dora import Dora
from .init import Init
from .lora import Lora
from .map import Map

__all__ = [
    "METHODS",
    "Adapter",
    "Coefficients",
    "Dora",
    "Init",
    "Lora",
    "Map",
    "Method",
    "Way",
    "find_method",
    "register_method",
]

METHODS: dict[str, type[Method]] = {method.name: method for method in (Map, Lora, Dora)}


def register_method(method: type[Method]) -> type[Method]:
    """Add a method under its `name`; usable as a decorator of the class.

    Raises:
        TypeError, ValueError: it is no frozen dataclass below `Method` with a default for each option, its name is
            missing or taken, or a role is unknown.
    """
    unknown = set(getattr(method, "roles", {}).values()) - {"base", "magnitude"}
    if unknown:
        raise ValueError(f'method {method.__name__} has the role {unknown.pop()!r}; choose "base" or "magnitude"')
    return register(METHODS, "method", Method, method)


def find_method(value: Any) -> Method:
    """The method that a name, a dictionary of a file's metadata, or an instance stands for."""
    return parse(METHODS, "method", value)
