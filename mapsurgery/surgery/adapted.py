"""Adapted layers: the class that a layer's object is given while it is adapted.

The object stays the same, and an instance of its original class. Its frozen weight lives in a child module,
``adapter``, under a name of its own, and ``weight`` is a property that computes W': whoever reads it gets the adapted
weight, and every name of ``named_parameters()`` still leads by attribute access to that very Parameter.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..methods import Adapter, Init, MapLora
from ..methods.base import check_dropout, check_rank

CHILD = "adapter"


class AdaptedLayer(nn.Module):
    """Mixin before the original class. On its own it runs the original forward on W', read through ``weight``."""

    original_class: ClassVar[type[nn.Module]]
    adapter: Adapter

    @property
    def weight(self) -> Tensor:
        """W', differentiable, computed on each read; the frozen W inside `mapsurgery.disabled`."""
        adapter = self.adapter
        return adapter.effective_weight() if adapter.enabled else adapter.base_weight

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(
                f"{self.adapter.layer_name or type(self).__name__}: `weight` of an adapted layer is computed (W'); "
                f"set `{CHILD}.base_weight`, or call mapsurgery.unpatch or mapsurgery.merge first"
            )
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.adapter.rank}, init={self.adapter.init.kind}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A checkpoint of the original model calls the frozen weight by its original name."""
        original, moved = f"{prefix}weight", f"{prefix}{CHILD}.base_weight"
        if original in state_dict and moved not in state_dict:
            state_dict[moved] = state_dict.pop(original)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Classes of adapted layers are made on demand: pickle rebuilds them from the original class."""
        if type(self) is not adapted_class(self.original_class):
            return super().__reduce_ex__(protocol)  # a user's own subclass of a public class can be imported
        return _rebuild, (self.original_class,), self.__dict__


class FusedLinear(AdaptedLayer):
    """For layers that compute x W^T + bias: nn.Linear, and transformers' Conv1D (whose weight is W^T)."""

    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        adapter = self.adapter
        return adapter.linear(input, self.bias) if adapter.enabled else super().forward(input)


class FusedConv(AdaptedLayer):
    """For layers that compute what nn.Conv1d, nn.Conv2d and nn.Conv3d compute."""

    bias: Tensor | None
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]

    def forward(self, input: Tensor) -> Tensor:
        adapter = self.adapter
        if not adapter.enabled:
            return super().forward(input)
        input, padding = self._padded(input)
        return adapter.conv(input, self.bias, self.stride, padding, self.dilation, self.groups)

    def _padded(self, input: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """The input padded where the operator cannot (other modes, uneven 'same'), and the zero padding left to it."""
        before_after = self._reversed_padding_repeated_twice
        if self.padding_mode != "zeros":
            return F.pad(input, before_after, mode=self.padding_mode), (0,) * len(self.stride)
        if not isinstance(self.padding, str):
            return input, self.padding
        if before_after[::2] == before_after[1::2]:  # 'valid', or 'same' with as much before as after
            return input, tuple(before_after[-2::-2])
        return F.pad(input, before_after), (0,) * len(self.stride)


class _Constructed:
    """Constructor of the public classes: that of the original layer, and the adapter's options by keyword."""

    original_class: ClassVar[type[nn.Module]]

    def __init__(
        self,
        *args: Any,
        rank: int = 8,
        init: str | Init = "soft",
        dropout: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        check_dropout(dropout)
        layer = self.original_class(*args, **kwargs)
        weight: nn.Parameter = layer._parameters["weight"]  # type: ignore[assignment]
        check_rank(rank, limit=min(weight.shape[0], weight.numel() // weight.shape[0]))
        dtype = adapter_dtype or default_dtype(weight.dtype)
        adapter = MapLora(weight, rank=rank, init=Init.parse(init), dropout=dropout, dtype=dtype)
        weight.requires_grad_(False)
        self.__dict__.update(attach(layer, adapter).__dict__)


# `weight` is read-only here and a Parameter in the original classes, on purpose: assigning it would lose the adapter.
class MapLinear(_Constructed, FusedLinear, nn.Linear):  # type: ignore[misc, override]
    """nn.Linear adapted with MAP: (..., in_features) -> (..., out_features).

    ``MapLinear(in_features, out_features, bias=True, ..., rank=8)`` makes a new one; `patch` turns a layer into one.
    """

    original_class = nn.Linear


class MapConv1d(_Constructed, FusedConv, nn.Conv1d):  # type: ignore[misc, override]
    """nn.Conv1d adapted with MAP; takes nn.Conv1d's arguments and the adapter's options of `MapLinear`."""

    original_class = nn.Conv1d


class MapConv2d(_Constructed, FusedConv, nn.Conv2d):  # type: ignore[misc, override]
    """nn.Conv2d adapted with MAP; takes nn.Conv2d's arguments and the adapter's options of `MapLinear`."""

    original_class = nn.Conv2d


class MapConv3d(_Constructed, FusedConv, nn.Conv3d):  # type: ignore[misc, override]
    """nn.Conv3d adapted with MAP; takes nn.Conv3d's arguments and the adapter's options of `MapLinear`."""

    original_class = nn.Conv3d


_CLASSES: dict[type[nn.Module], type[AdaptedLayer]] = {
    cls.original_class: cls for cls in (MapLinear, MapConv1d, MapConv2d, MapConv3d)
}
"""Original class -> class of its adapted objects; grows as classes are met."""


def default_dtype(weight: torch.dtype) -> torch.dtype:
    """dtype of an adapter's parameters: float32, or float64 on a float64 weight."""
    return torch.float64 if weight == torch.float64 else torch.float32


def adapted_class(original: type[nn.Module]) -> type[AdaptedLayer]:
    """The class that an adapted object of class `original` has."""
    if original not in _CLASSES:
        _CLASSES[original] = _made_class(original)
    return _CLASSES[original]


def _made_class(original: type[nn.Module]) -> type[AdaptedLayer]:
    from .layers import find_type  # layers.py names the mixins of this module

    layer_type = find_type(original)
    fused = layer_type is not None and layer_type.is_standard(original)
    mixin = layer_type.fused if layer_type is not None and fused else AdaptedLayer
    body = {"original_class": original, "__module__": original.__module__}
    return type(f"Map{original.__name__}", (mixin, original), body)


def _rebuild(original: type[nn.Module]) -> nn.Module:
    cls = adapted_class(original)
    return cls.__new__(cls)


def attach(layer: nn.Module, adapter: Adapter) -> AdaptedLayer:
    """Turn a layer into its adapted form, in place: the weight is in the adapter already, and leaves the layer.

    Returns the same object. Nothing is changed if the class cannot be.
    """
    layer.__class__ = adapted_class(type(layer))  # first: the only step that can fail
    assert isinstance(layer, AdaptedLayer)
    adapter.place = list(layer._parameters).index("weight")
    layer._parameters.pop("weight")
    layer._modules[CHILD] = adapter
    adapter.train(layer.training)
    return layer


def detach(layer: AdaptedLayer, weight: nn.Parameter) -> None:
    """Undo `attach`, with `weight` in its old place, so that state_dict keeps its order."""
    place = layer.adapter.place
    del layer._modules[CHILD]
    layer.__class__ = layer.original_class  # type: ignore[assignment]
    entries = list(layer._parameters.items())
    entries.insert(place, ("weight", weight))
    layer._parameters.clear()
    layer._parameters.update(entries)
