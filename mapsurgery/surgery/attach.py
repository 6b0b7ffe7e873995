"""The change of a layer's class, in place and back: `attach`, `detach`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from ..methods import Adapter
from .adapted import AdaptedLayer, Effective
from .layers import mixin_of
from .paths import child_name
from .quantised.kinds import kind_of
from .quantised.layer import quantised_class

_CLASSES: dict[tuple[type[nn.Module], tuple[str, ...]], type[AdaptedLayer]] = {}
"""Original class and adapted parameters -> class of its adapted objects; grows as classes are met."""


def adapted_class(original: type[nn.Module], parameters: tuple[str, ...] = ("weight",)) -> type[AdaptedLayer]:
    """The class that an object of class `original` has while these parameters of it are adapted."""
    key = (original, parameters)
    if key not in _CLASSES:
        _CLASSES[key] = _made_class(original, parameters)
    return _CLASSES[key]


def _made_class(original: type[nn.Module], parameters: tuple[str, ...]) -> type[AdaptedLayer]:
    body: dict[str, Any] = {"original_class": original, "adapted": parameters, "__module__": original.__module__}
    body["rebuild"] = staticmethod(_rebuild)
    body |= {name: Effective(name) for name in parameters}
    return type(f"Map{original.__name__}", (mixin_of(original, parameters), original), body)


def _rebuild(original: type[nn.Module], parameters: tuple[str, ...] = ("weight",)) -> nn.Module:
    cls = adapted_class(original, parameters)
    return cls.__new__(cls)


_ORDER = "_mapsurgery_order"
"""Plain attribute of an adapted layer: the names of its parameters in their order, which state_dict is to keep."""


def _class_for(layer: nn.Module, parameters: tuple[str, ...]) -> type[AdaptedLayer]:
    if parameters == ("weight",) and kind_of(layer) is not None:
        return quantised_class(type(layer))
    return adapted_class(type(layer), parameters)


def attach(layer: nn.Module, adapters: Mapping[str, Adapter]) -> AdaptedLayer:
    """Turn a layer into its adapted form, in place: the weights are in the adapters already, and leave the layer.

    Returns the same object. Nothing is changed if the class cannot be.
    """
    if parametrize.is_parametrized(layer):  # its class is its own, and must not be kept alive
        layer.__class__ = _made_class(type(layer), tuple(adapters))
    else:
        layer.__class__ = _class_for(layer, tuple(adapters))  # first: the only step that can fail
    assert isinstance(layer, AdaptedLayer)
    rebind_forward(layer, layer.original_class)
    # torch.fx keeps layers of torch whole, whom it knows by their module: then the adapted layer is in its graph.
    layer.__dict__["__module__"] = layer.original_class.__module__
    layer.__dict__[_ORDER] = tuple(layer._parameters)
    layer.__dict__.pop("_flat_weights", None)  # of a recurrent layer; `detach` makes the list again
    for name, adapter in adapters.items():
        if adapter.base_weight is not None:  # a quantised weight stays
            layer._parameters.pop(name, None)
        layer._modules[child_name(name)] = adapter
        adapter.train(layer.training)
    return layer


def rebind_forward(layer: nn.Module, before: type[nn.Module]) -> None:
    """A forward that the object itself keeps (accelerate's hooks keep the one they wrap) is that of its new class.

    Args: before: the class that the layer had until now.
    """
    for name in ("forward", "_old_forward"):
        kept = layer.__dict__.get(name)
        if isinstance(kept, MethodType) and kept.__self__ is layer and kept.__func__ is before.forward:
            layer.__dict__[name] = MethodType(type(layer).forward, layer)


def detach(layer: AdaptedLayer, weights: Mapping[str, nn.Parameter | None]) -> None:
    """Undo `attach`, with each weight in its old place (None: it is computed, and was no parameter)."""
    order = layer.__dict__.pop(_ORDER)
    layer.__dict__.pop("__module__", None)
    for name in layer.adapted:
        del layer._modules[child_name(name)]
    adapted = type(layer)
    layer.__class__ = layer.original_class  # type: ignore[assignment]
    rebind_forward(layer, adapted)
    entries = {**layer._parameters, **{name: weight for name, weight in weights.items() if weight is not None}}
    layer._parameters.clear()
    layer._parameters.update({name: entries.pop(name) for name in order if name in entries} | entries)
    if isinstance(layer, nn.RNNBase):
        layer._init_flat_weights()
