"""Dispatcher registrations that live in Python: schemas where no native library defines them, the reference as the
kernel of every device without a native one, fake kernels, autograd and autocast.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import _native
from . import reference
from .schemas import SCHEMAS

_AUTOCAST_DEVICES = ("cpu", "cuda")
_libraries: list[torch.library.Library] = []  # registrations live as long as these objects


def autocasting(device: str) -> bool:
    """Whether autocast is on for this type of device; meta does not know it."""
    return device != "meta" and torch.is_autocast_enabled(device)


def full_precision(device: str) -> AbstractContextManager[Any]:
    """A block without autocast, which would round the products that norms and weights are made of."""
    return torch.autocast(device, enabled=False) if autocasting(device) else nullcontext()


def autocast(x: Tensor) -> Tensor:
    """x as autocast would hand it to a matrix product: in the autocast dtype, float64 left alone."""
    device = x.device.type
    if autocasting(device) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def _autocast_kernel(name: str, device: str) -> Callable[..., Any]:
    """Casts x alone: norms are taken of the full-precision factors, and the operator casts the rest itself."""
    key = torch._C.DispatchKey.AutocastCPU if device == "cpu" else torch._C.DispatchKey.AutocastCUDA
    op = getattr(torch.ops.mapsurgery, name).default

    def kernel(x: Tensor, *args: Any) -> Any:
        x = autocast(x)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return op(x, *args)

    return kernel


def register() -> None:
    """Called once, on import of `mapsurgery.ops`."""
    if not _native.load():
        definitions = torch.library.Library("mapsurgery", "DEF")
        _libraries.append(definitions)
        for name, schema in SCHEMAS.items():
            definitions.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    kernels = torch.library.Library("mapsurgery", "IMPL")
    _libraries.append(kernels)
    for name in SCHEMAS:
        definition = getattr(reference, name)
        kernels.impl(name, definition, "CompositeExplicitAutograd")
        # The reference is pure torch, so on fake tensors it gives the shapes, dtypes and strides.
        torch.library.register_fake(f"mapsurgery::{name}", definition)
    for name in ("map_linear", "map_linear_given", "map_conv", "map_conv_given"):
        for device in _AUTOCAST_DEVICES:
            kernels.impl(name, _autocast_kernel(name, device), f"Autocast{device.upper()}")
