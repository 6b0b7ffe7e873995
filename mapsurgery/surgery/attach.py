"""The change of a layer's class, in place and back: `attach`, `detach`."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from ..interrupts import undone_by
from ..methods import Adapter
from .adapted import AdaptedLayer, Effective
from .forwards import Unproved, carried_forward, put_back, rebind_forward, slot_of
from .layers import mixin_of
from .paths import child_name
from .quantised.kinds import kind_of
from .quantised.layer import QuantisedLinear, quantised_class

_CLASSES: dict[tuple[type[nn.Module], tuple[str, ...]], type[AdaptedLayer]] = {}
"""Original class and adapted parameters -> class of its adapted objects; grows as classes are met."""


def adapted_class(original: type[nn.Module], parameters: tuple[str, ...] = ("weight",)) -> type[AdaptedLayer]:
    """The class that an object of class `original` has while these parameters of it are adapted."""
    key = (original, parameters)
    if key not in _CLASSES:
        _CLASSES[key] = _made_class(original, parameters)
    return _CLASSES[key]


def _copies_itself(original: type[nn.Module]) -> bool:
    """Whether a class has a `__deepcopy__` of its own; torch's parametrised ones copy whatever is there."""
    own = getattr(original, "__deepcopy__", None)
    return own is not None and not own.__module__.startswith("torch.nn.")


def _deepcopied(layer: AdaptedLayer, memo: dict[int, Any]) -> AdaptedLayer:
    """A copy that the class itself makes, which knows nothing of adapters, with copies of these."""
    adapters = {name: layer.adapter_of(name) for name in layer.adapted}
    shared = tuple(name for name in adapters if child_name(name) not in layer._modules)
    with undone_by(lambda: None if isinstance(layer, AdaptedLayer) else attach(layer, adapters, shared)):
        detach(layer)
        copied = copy.deepcopy(layer, memo)
        kept = {name: value for name, value in layer.__dict__.items() if name.startswith("_mapsurgery")}
    memo[id(layer)] = copied
    for name, parameter in copied._parameters.items():  # a fresh one requires a gradient
        own = layer._parameters.get(name)
        if parameter is not None and own is not None:
            parameter.requires_grad = own.requires_grad
    copied.__dict__.update(copy.deepcopy(kept, memo))
    return attach(copied, {name: copy.deepcopy(adapter, memo) for name, adapter in adapters.items()}, shared)


def _made_class(original: type[nn.Module], parameters: tuple[str, ...]) -> type[AdaptedLayer]:
    body: dict[str, Any] = {"original_class": original, "adapted": parameters, "__module__": original.__module__}
    body["rebuild"] = staticmethod(_rebuild)
    body |= {name: Effective(name) for name in parameters}
    if _copies_itself(original):
        body["__deepcopy__"] = _deepcopied
    return type(f"Map{original.__name__}", (mixin_of(original, parameters), original), body)


def _rebuild(original: type[nn.Module], parameters: tuple[str, ...] = ("weight",)) -> nn.Module:
    cls = adapted_class(original, parameters)
    return cls.__new__(cls)


def _class_for(layer: nn.Module, parameters: tuple[str, ...]) -> type[AdaptedLayer]:
    if parameters == ("weight",) and kind_of(layer) is not None:
        cls = quantised_class(type(layer))
        if _copies_itself(type(layer)):
            cls.__deepcopy__ = _deepcopied  # type: ignore[attr-defined]
        return cls
    return adapted_class(type(layer), parameters)


def attach(layer: nn.Module, adapters: Mapping[str, Adapter], shared: Collection[str] = ()) -> AdaptedLayer:
    """Turn a layer into its adapted form, in place; its parameters stay as they are.

    Returns the same object. Nothing is changed if the class cannot be.

    Args:
        adapters: of the layer's parameters, by name.
        shared: names of those whose adapter is a child of another layer: it is no child of this one, so that a
            state_dict holds it once.
    """
    own, slot = carried_forward(layer), slot_of(layer)
    if parametrize.is_parametrized(layer):  # its class is its own, and must not be kept alive
        layer.__class__ = _made_class(type(layer), tuple(adapters))
    else:
        layer.__class__ = _class_for(layer, tuple(adapters))  # first: the only step that can fail
    assert isinstance(layer, AdaptedLayer)
    rebind_forward(layer, layer.original_class)
    # torch.fx keeps layers of torch whole, whom it knows by their module: then the adapted layer is in its graph.
    layer.__dict__["__module__"] = layer.original_class.__module__
    layer.__dict__.pop("_flat_weights", None)  # of a recurrent layer; `detach` makes the list again
    for name, adapter in adapters.items():
        if name in shared:
            layer.__dict__[child_name(name)] = adapter
        else:
            layer._modules[child_name(name)] = adapter
            adapter.train(layer.training)
    if own is not None and isinstance(layer, QuantisedLinear):
        layer.take_over(slot, own)
    elif own is not None and layer.judges_forwards:
        layer.__dict__[slot] = Unproved(own, layer)
    return layer


def detach(layer: AdaptedLayer) -> None:
    """Undo `attach`."""
    layer.__dict__.pop("__module__", None)
    for name in layer.adapted:
        layer._modules.pop(child_name(name), None)
        layer.__dict__.pop(child_name(name), None)
    adapted = type(layer)
    layer.__class__ = layer.original_class  # type: ignore[assignment]
    rebind_forward(layer, adapted)
    put_back(layer)
    if isinstance(layer, nn.RNNBase):
        layer._init_flat_weights()
