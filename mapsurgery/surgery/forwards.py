"""Forwards that an object carries itself, in the place of its class's: wrappers of hooks, kernels, compilers, a lambda.

torch finds the instance's attribute ``forward`` before the class's method. What is in there need not know that the
layer's class was changed. Where it reads ``weight`` by its name when it runs, it computes with W'. One that was bound
to the class of before is bound to the new one. Whether the adapter acts in one that came after `patch`, its first call
shows.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn

from ..interrupts import undone_by

Forward = Callable[..., Any]

ASIDE = "_mapsurgery_forward"
"""Plain attribute of an adapted quantised layer: the forward of its own that runs its base, moved out of the way."""

SLOTS = ("forward", "_old_forward")
"""Where a forward is kept: torch's place, and that of the forward inside accelerate's hooks."""


def slot_of(layer: nn.Module) -> str:
    """The attribute whose forward runs: accelerate's own reads another one at each call."""
    outer = layer.__dict__.get("forward")
    hooked = isinstance(outer, functools.partial) and getattr(outer.func, "__module__", "") == "accelerate.hooks"
    return "_old_forward" if hooked and "_old_forward" in layer.__dict__ else "forward"


def carried_forward(layer: nn.Module) -> Forward | None:
    """The forward that an object carries itself, None if it runs its class's."""
    kept = layer.__dict__.get(slot_of(layer))
    return None if kept is None or _is_bound(kept, layer, type(layer)) else kept


def _is_bound(forward: Any, layer: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether this is the forward of a class, bound to the layer."""
    return isinstance(forward, MethodType) and forward.__self__ is layer and forward.__func__ is cls.forward


def rebind_forward(layer: nn.Module, before: type[nn.Module]) -> None:
    """The bound forward of the class that the layer had until now becomes that of its new class."""
    for name in SLOTS:
        kept = layer.__dict__.get(name)
        if isinstance(kept, Unproved):
            kept = layer.__dict__[name] = kept.inner
        if _is_bound(kept, layer, before):
            layer.__dict__[name] = MethodType(type(layer).forward, layer)


def put_back(layer: nn.Module) -> None:
    """The forward that was moved aside goes back to the layer, which is of its own class again.

    Under a wrapper that came later it stays where it is: the wrapper's way leads there.
    """
    slot = slot_of(layer)
    if ASIDE in layer.__dict__ and carried_forward(layer) is None:
        layer.__dict__[slot] = layer.__dict__.pop(ASIDE)


def described(forward: Forward) -> str:
    """A forward in a message."""
    named = getattr(forward, "func", forward)
    return f"{type(forward).__name__} {getattr(named, '__module__', '')}.{getattr(named, '__qualname__', '')}".strip(
        "."
    )


@contextmanager
def asked_for(adapters: Iterable[nn.Module]) -> Iterator[list[str]]:
    """The products that adapters are asked for within the block."""
    products: list[str] = []
    watches: list[Any] = []
    with undone_by(lambda: [watch.remove() for watch in watches]):
        for adapter in adapters:
            watches.append(adapter.register_forward_pre_hook(lambda _, given: products.append(given[0])))
        yield products


class Unproved:
    """A forward in the slot of an adapted layer, until a call of it has called the adapter.

    What `layer.unreached` does where a call has not is the layer's matter: it raises, or applies the adapter itself.
    """

    def __init__(self, inner: Forward, layer: nn.Module) -> None:
        self.inner, self.layer, self.proved = inner, layer, False

    def __getattr__(self, name: str) -> Any:
        """What tools look for: __wrapped__, __func__."""
        if name in ("inner", "layer", "proved"):  # while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layer: Any = self.layer
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if self.proved or traced or not hasattr(type(layer), "original_class"):
            return self.inner(*args, **kwargs)
        adapters = [layer.adapter_of(name) for name in layer.adapted]
        if not all(adapter.enabled for adapter in adapters):
            return self.inner(*args, **kwargs)
        with asked_for(adapters) as products:
            output = self.inner(*args, **kwargs)
        if not layer.reached_by(products):
            return layer.unreached(self, output, args, kwargs)
        self.settle(self.inner)
        if layer.drops and adapters[0].dropout and "effective_weight" in products:
            warnings.warn(
                f"the dropout of {adapters[0].layer_name}'s adapter does not apply: the forward that its object "
                f"carries ({described(self.inner)}) computes with W' itself",
                stacklevel=2,
            )
        return output

    def settle(self, forward: Forward) -> None:
        """This forward is the one to call from now on."""
        for name in SLOTS:
            if self.layer.__dict__.get(name) is self:
                self.layer.__dict__[name] = forward
        self.inner, self.proved = forward, True


def forward_to_keep(layer: Any, value: Any) -> Any:
    """What an adapted layer keeps of a forward that is assigned to it."""
    if not callable(value):
        return value
    if _is_bound(value, layer, layer.original_class):  # a wrapper from before `patch` was taken off
        layer.__dict__.pop(ASIDE, None)
        return MethodType(type(layer).forward, layer)
    known = _is_bound(value, layer, type(layer)) or isinstance(value, Unproved)
    return value if known or not layer.judges_forwards else Unproved(value, layer)
