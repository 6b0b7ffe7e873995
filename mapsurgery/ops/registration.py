"""`operator`, the decorator by which one definition in plain torch becomes everything that torch knows of an operator.

The schema stands in `schemas.inc`, for C++ as well. The definition is the kernel of every device without a native
one, the fake kernel, the decomposition and the count of floating-point operations.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import Tensor
from torch._guards import CompileContext
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from .. import _native

Definition = TypeVar("Definition", bound=Callable[..., Any])

_AUTOCAST_DEVICES = ("cpu", "cuda")
_LIBRARY = torch.library.Library("mapsurgery", "FRAGMENT")  # registrations live as long as this object


def _schemas() -> dict[str, str]:
    """Each operator's schema, by its name."""
    text = re.sub("//.*", "", (Path(__file__).parent / "schemas.inc").read_text())
    schemas = ["".join(re.findall('"(.*?)"', part)) for part in text.split("SCHEMA(")[1:]]
    return {schema.partition("(")[0]: schema for schema in schemas}


SCHEMAS = _schemas()


@overload
def operator(definition: Definition) -> Definition: ...


@overload
def operator(*, decomposition: Callable[..., Any]) -> Callable[[Definition], Definition]: ...


def operator(definition: Any = None, *, decomposition: Callable[..., Any] | None = None) -> Any:
    """Register a definition as the operator of its name, and return it.

    Args: decomposition: what replaces the operator in an exported graph, where that is not the definition itself.

    Raises:
        ImportError: the native library does not know the operator: it is of another version.
    """
    if definition is None:
        return lambda definition: _registered(definition, decomposition or definition)
    return _registered(definition, definition)


def _registered(definition: Definition, decomposition: Callable[..., Any]) -> Definition:
    name = definition.__name__
    if not _native.load():
        _LIBRARY.define(SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
    elif not hasattr(torch.ops.mapsurgery, name):
        raise ImportError(
            f"the native library of mapsurgery has no operator {name!r}, it is of another version: rebuild it with "
            f"{_native.REBUILD}, or set MAPSURGERY_NATIVE=0 to run in pure torch"
        )
    _LIBRARY.impl(name, definition, "CompositeExplicitAutograd")
    # The definition is pure torch, so on fake tensors it gives the shapes, dtypes and strides.
    torch.library.register_fake(f"mapsurgery::{name}", definition)
    casts = next(iter(inspect.signature(definition).parameters)) == "x"
    for device in _AUTOCAST_DEVICES:
        _LIBRARY.impl(name, _autocast_kernel(name, device, casts), f"Autocast{device.upper()}")
    torch.library.register_torch_dispatch(f"mapsurgery::{name}", FunctionalTensorMode, _rule(decomposition))
    # A counter takes the formulas known when it is made. Its module imports triton, 0.1 to 0.3 s that the first
    # optimiser of a process would take as well; torch has no registry that is there without the module.
    register_flop_formula(getattr(torch.ops.mapsurgery, name), get_raw=True)(_flops(definition))
    return definition


# Autocast ------------------------------------------------------------------------------------------------------------


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


def _autocast_kernel(name: str, device: str, casts: bool) -> Callable[..., Any]:
    """Casts x, of operators that have one: they cast the rest themselves, and norms are those of the full precision."""
    key = torch._C.DispatchKey.AutocastCPU if device == "cpu" else torch._C.DispatchKey.AutocastCUDA
    keys = torch._C.DispatchKeySet(key)
    op = getattr(torch.ops.mapsurgery, name).default

    def kernel(first: Tensor, *args: Any) -> Any:
        first = autocast(first) if casts else first
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(first, *args)

    return kernel


# Exported graphs -----------------------------------------------------------------------------------------------------


def _compiling() -> bool:
    """Whether a compiler that calls the operators is tracing: torch.compile or AOTInductor."""
    from torch._inductor.virtualized import V

    return CompileContext.try_get() is not None or bool(V.aot_compilation)


def _rule(decomposition: Callable[..., Any]) -> Callable[..., Any]:
    """What an operator does under FunctionalTensorMode, in which AOTAutograd and torch.export trace.

    Where AOTAutograd traces on behalf of no compiler (``ExportedProgram.run_decompositions()`` with any table,
    ``torch.onnx.export``, joint graphs), the decomposition takes its place. torch.compile and AOTInductor keep the
    operators, and so does the graph that ``torch.export.export`` itself returns. A rule, since a decomposition table
    is the caller's: torch's default one holds no operator of another library, and a consumer passes its own.
    """

    def rule(mode: FunctionalTensorMode, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if mode.pre_dispatch or _compiling():  # pre_dispatch: torch.export.export, whose graph keeps operators
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode:
            return decomposition(*args, **(kwargs or {}))

    return rule


# Floating-point operations -------------------------------------------------------------------------------------------


def _flops(definition: Callable[..., Any]) -> Callable[..., int]:
    """What torch counts in the definition, on tensors without memory."""

    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        args, kwargs = tree_map_only(Tensor, _on_meta, (args, kwargs))
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            definition(*args, **kwargs)
        return counter.get_total_flops()

    return count


def _on_meta(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
