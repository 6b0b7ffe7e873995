"""Update families: what ΔW is. One file per family, no knowledge of layers, models or methods.

`REGISTRY` maps names to families; `patch(update=...)` takes a name or an instance with options, and `register_update`
adds a family of your own.
"""

from __future__ import annotations

from typing import Any

from ..named import parse, register
from .adalora import AdaLora
from .base import FactoredUpdate, Matrix, Update
from .dense import Dense
from .flora import Flora
from .loha import LoHa
from .lokr import LoKr
from .lora import LoraUpdate
from .principal import Olora, Pissa
from .vera import Vera

__all__ = [
    "REGISTRY",
    "AdaLora",
    "Dense",
    "FactoredUpdate",
    "Flora",
    "LoHa",
    "LoKr",
    "LoraUpdate",
    "Matrix",
    "Olora",
    "Pissa",
    "Update",
    "Vera",
    "find_update",
    "register_update",
]

REGISTRY: dict[str, type[Update]] = {
    family.name: family for family in (LoraUpdate, Pissa, Olora, AdaLora, Vera, LoHa, LoKr, Flora, Dense)
}


def register_update(family: type[Update]) -> type[Update]:
    """Add an update family under its `name`; usable as a decorator of the class.

    A file that uses a family of your own can be loaded once the family is registered.

    Raises:
        TypeError, ValueError: it is no frozen dataclass below `Update` with a default for each option, its name is
            missing or taken, or a role is unknown.
    """
    unknown = set(getattr(family, "roles", {}).values()) - {"down", "up", "magnitude"}
    if unknown:
        raise ValueError(
            f'update {family.__name__} has the role {unknown.pop()!r}; choose one of "down", "up", "magnitude"'
        )
    return register(REGISTRY, "update", Update, family)


def find_update(value: Any) -> Update:
    """The family that a name, a dictionary of a file's metadata, or an instance stands for."""
    return parse(REGISTRY, "update", value)
