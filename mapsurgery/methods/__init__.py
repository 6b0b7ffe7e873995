"""What W' is: one file per method and update family, with no knowledge of models.

`REGISTRY` maps (method, update) to the adapter class; `patch(method=..., update=...)` looks here.
"""

from __future__ import annotations

from .base import Adapter
from .init import Init
from .map_lora import MapLora

__all__ = ["REGISTRY", "Adapter", "Init", "MapLora", "find"]

REGISTRY: dict[tuple[str, str], type[Adapter]] = {("map", "lora"): MapLora}


def find(method: str, update: str) -> type[Adapter]:
    """The adapter class of a method and an update family.

    Raises:
        ValueError: there is none; the message lists what there is.
    """
    try:
        return REGISTRY[method, update]
    except KeyError:
        known = ", ".join(f"method={m!r} update={u!r}" for m, u in sorted(REGISTRY))
        raise ValueError(f"no method={method!r} with update={update!r}; this version has: {known}") from None
