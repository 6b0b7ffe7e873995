"""Layers whose weight is quantised: they compute x W^T + bias with a kernel of their own, and W is in no Parameter.

An adapted one runs that kernel and corrects what comes out of it,

    y = base(x) + (s_w - 1) (base(x) - bias) + s_d (x A^T) B^T,

so that forward and backward are the base's own and the start, s_w = 1, is the base bit for bit. W is dequantised where
its numbers themselves are wanted: once at `patch` for ||W||_F, for a report, and for merging.

Annotations are no strings here, as in adapted.py.
"""

from functools import partial
from types import MethodType
from typing import Any

from torch import Tensor, nn

from ..adapted import AdaptedLayer
from ..forwards import ASIDE, SLOTS, Forward, Unproved, asked_for, forward_to_keep
from .kinds import dequantised, runs_on


class QuantisedLinear(AdaptedLayer):
    """Mixin for quantised layers that act like nn.Linear, whatever their class and storage.

    Reading ``weight`` gives the quantised weight of the base, not W': parents read its dtype and device, kernels its
    packed bytes. Nothing but calling the layer applies the adapter.
    """

    in_features: int
    out_features: int
    bias: Tensor | None

    def base_of(self, parameter: str) -> Tensor:
        """W, dequantised: (out_features, in_features), float32 (float64 for a float64 kernel)."""
        return dequantised(self)

    base_now = base_of

    def base_learns(self, parameter: str) -> bool:
        return any(p.requires_grad for name, p in self.named_parameters(recurse=False) if name != "bias")

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        own = self.__dict__.get(ASIDE)
        if own is None and not isinstance(self, QuantisedLinear):  # a wrapper kept this; the layer is adapted no longer
            return type(self).forward(self, *args, **kwargs)
        output = super().forward(*args, **kwargs) if own is None else own(*args, **kwargs)
        return self._corrected(output, args, kwargs) if isinstance(self, QuantisedLinear) else output

    def _corrected(self, output: Tensor, args: Any, kwargs: Any) -> Tensor:
        """The adapted layer's output, of the base's."""
        adapter = self.adapter_of("weight")
        if not adapter.enabled:
            return output
        x = args[0] if args else next(iter(kwargs.values()))
        return adapter("around", None, x, output, getattr(self, "bias", None), partial(dequantised, self))

    def take_over(self, slot: str, forward: Forward) -> None:
        """The forward that the object carries in `slot` is the base's: the class's runs it, and corrects its output.

        Unless it leads to the class's: a wrapper that was put around it when the layer was adapted before.
        """
        with asked_for([self.adapter_of("weight")]) as products:
            runs_on(self, forward)
        if not self.reached_by(products):
            self.__dict__[ASIDE] = forward
            self.__dict__[slot] = MethodType(type(self).forward, self)

    def reached_by(self, products: list[str]) -> bool:
        return "around" in products

    def unreached(self, forward: Unproved, output: Any, args: Any, kwargs: Any) -> Any:
        """It is another forward of the base."""
        self.__dict__[ASIDE] = forward.inner
        forward.settle(MethodType(type(self).forward, self))
        return self._corrected(output, args, kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in SLOTS:
            value = forward_to_keep(self, value)
        nn.Module.__setattr__(self, name, value)  # the base's own code may replace its weight

    def __delattr__(self, name: str) -> None:
        if name in SLOTS and isinstance(self.__dict__.get(name), MethodType):
            self.__dict__.pop(ASIDE, None)  # its own forward, which stood there, is taken off
        super().__delattr__(name)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A checkpoint of another base brings another ||W||_F."""
        super(AdaptedLayer, self)._load_from_state_dict(state_dict, prefix, *args)
        below = [name.removeprefix(prefix) for name in state_dict if name.startswith(prefix)]
        if any(name != "bias" and not name.startswith("adapter.") for name in below):
            with_adapter = any(name.startswith("adapter.") for name in below)
            self.adapter_of("weight").base_loaded(dequantised(self), with_adapter)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.original_class,), super(AdaptedLayer, self).__reduce_ex__(protocol)[2]


_CLASSES: dict[type[nn.Module], type[QuantisedLinear]] = {}
"""Original class -> class of its adapted quantised objects; grows as classes are met."""


def quantised_class(original: type[nn.Module]) -> type[QuantisedLinear]:
    """The class that a quantised object of class `original` has while it is adapted."""
    if original not in _CLASSES:
        body = {"original_class": original, "__module__": original.__module__}
        _CLASSES[original] = type(f"MapQuantised{original.__name__}", (QuantisedLinear, original), body)
    return _CLASSES[original]


def _rebuild(original: type[nn.Module]) -> nn.Module:
    cls = quantised_class(original)
    return cls.__new__(cls)
