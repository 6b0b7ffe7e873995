"""Adapted layers: the class that a layer's object is given while it is adapted.

The object stays the same, and an instance of its original class. Its frozen weight stays the Parameter that it was,
under its own name, in ``named_parameters()`` and in every checkpoint. What is new is in a child module, ``adapter``
(``adapter_<parameter>`` for a parameter that is not called ``weight``). A reader of the attribute gets W'.

Annotations are no strings here: torch.fx takes those of a traced layer's ``forward`` into its graph, and torch 2.11
cannot pickle a graph that holds a string for a type.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from .. import ops
from ..methods import Adapter
from ..methods.sharded import is_shard
from .computed import computed_now
from .forwards import SLOTS, Unproved, described, forward_to_keep
from .paths import CHILD, child_name


class _Running(threading.local):
    """The `AdaptedRaw` layers whose forward runs in this thread, by id: what W' was when it was first read there.

    A thread has its own: two that trained on one W' would run backward through one graph twice.
    """

    def __init__(self) -> None:
        self.read: dict[int, dict[tuple[str, bool], Tensor]] = {}


_RUNNING = _Running()

_PLAIN = "_mapsurgery_plain"
"""Plain attribute of a layer while its state_dict is made or loaded: the thread in which its names read plainly."""

_READERS = {
    ("torch.nn.modules.module", "get_parameter"): "parameter",
    ("torch.fx.graph_module", "_copy_attr"): "parameter",
    ("torch.distributed.pipelining._IR", "_recursive_getattr_with_parent"): "parameter",
    ("torch.distributed.fsdp._fully_shard._fsdp_param", "reset_sharded_param"): "parameter",
    ("torch.nn.utils.parametrize", "register_parametrization"): "refuse",
    ("torch.nn.utils.parametrize", "remove_parametrizations"): "refuse",
    ("torch.nn.utils.weight_norm", "apply"): "refuse",
    ("torch.nn.utils.prune", "apply"): "refuse",
}
"""Functions, by module and name, that read an attribute not for its numbers: they get the Parameter of this name, or
are refused, as they would take W' for it."""

_MOVERS = (
    *("accelerate.utils.modeling", "accelerate.utils.fsdp_utils", "accelerate.hooks", "accelerate.big_modeling"),
    "torch.distributed.fsdp._flat_param",
)
"""Modules that only move parameters about."""

_MAY_ASSIGN = (
    *("torch.nn.modules.", "torch.nn.parallel.", "torch.distributed.", "torch.nn.utils.weight_norm"),
    *("torch.nn.utils.spectral_norm", "accelerate.", "transformers.", "diffusers.", "deepspeed."),
)
"""Beginnings of the names of modules that put another Parameter in the place of one: they load, shard, tie, offload."""


def _too_late(layer: "AdaptedLayer", parameter: str) -> RuntimeError:
    name = layer.adapter_of(parameter).layer_name or layer.original_class.__name__
    return RuntimeError(f"{name}: its {parameter} is adapted; parametrise or prune the layer first, and patch then")


def _effective(adapter: Adapter, weight: Tensor) -> Tensor:
    """W', with the attributes that were set on the Parameter."""
    effective = adapter("effective_weight", weight)
    if torch.compiler.is_compiling():
        for name in adapter.hanging:  # a compiler cannot list them
            setattr(effective, name, getattr(weight, name))
    elif type(effective) is Tensor and type(weight) is nn.Parameter:
        effective.__dict__.update(weight.__dict__)  # where it could not wait (`mapsurgery.ops.lazy`)
    return effective


class Effective:
    """What an adapted parameter's name reads as: W', differentiable; the frozen W inside `mapsurgery.disabled`.

    W' is computed when an operation first uses it (`mapsurgery.ops.lazy`): its dtype, shape and device cost nothing.
    The Parameter itself is what a reader gets that asks for it, or while it is a shard of FSDP2 or put away.
    """

    def __init__(self, parameter: str) -> None:
        self.parameter = parameter

    def __get__(self, layer: "AdaptedLayer | None", owner: type | None = None) -> Any:
        if layer is None:
            return self
        weight = layer.base_of(self.parameter)
        own = layer._parameters.get(self.parameter)
        held = weight if own is None else own
        adapter = layer.adapter_of(self.parameter)
        if not adapter.enabled or (weight.is_meta and not adapter.is_meta):
            return held
        if not torch.compiler.is_compiling():
            reader = sys._getframe(1)
            module = reader.f_globals.get("__name__", "")
            wanted = _READERS.get((module, reader.f_code.co_name))
            if wanted == "refuse":
                raise _too_late(layer, self.parameter)
            if module in _MOVERS:
                adapter.forget()
            plain = wanted is not None or module in _MOVERS or layer.__dict__.get(_PLAIN) == threading.get_ident()
            if plain or is_shard(weight):
                return held
            read = _RUNNING.read.get(id(layer))
            if read is not None:
                key = (self.parameter, torch.is_grad_enabled())
                if key not in read:
                    read[key] = _effective(adapter, weight)
                return read[key]
        return _effective(adapter, weight)

    # nn.Module registers a Parameter past this. A plain tensor is what a hook computes anew, or a wrapper puts in the
    # Parameter's place for a while.
    def __set__(self, layer: "AdaptedLayer", value: Any) -> None:
        if parametrize.is_parametrized(layer, self.parameter):  # as torch's own property does
            layer.parametrizations[self.parameter].right_inverse(value)  # type: ignore[union-attr, index]
        else:
            layer.__dict__[self.parameter] = value

    def __delete__(self, layer: "AdaptedLayer") -> None:
        del layer.__dict__[self.parameter]


class AdaptedLayer(nn.Module):
    """Mixin before the original class. On its own it runs the original forward on W', read through its old name."""

    original_class: ClassVar[type[nn.Module]]
    adapted: ClassVar[tuple[str, ...]] = ("weight",)
    """Names of the adapted parameters."""
    rebuild: ClassVar[Callable[[type[nn.Module], tuple[str, ...]], nn.Module]]
    """Makes an empty object of the class again, from `original_class` and `adapted`; in each class of `attach`."""
    judges_forwards: ClassVar[bool] = True
    """Whether each forward reads an adapted parameter, so that one that does not has gone around the adapter."""
    drops: ClassVar[bool] = False
    """Whether a forward of ours applies the adapter's dropout."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """`type(layer)(...)` makes a layer of the original class, as PEFT does for the factors of a convolution."""
        self.__class__ = self.original_class  # type: ignore[assignment]
        self.__init__(*args, **kwargs)  # type: ignore[misc]

    def adapter_of(self, parameter: str) -> Adapter:
        """The adapter of one of the adapted parameters; a plain attribute where another layer's is shared."""
        name = child_name(parameter)
        if name in self._modules:
            return self._modules[name]  # type: ignore[return-value]
        shared: Adapter = self.__dict__[name]
        return shared.beside(self.base_of(parameter)) if "_is_replica" in self.__dict__ else shared

    def base_of(self, parameter: str) -> Tensor:
        """The frozen W: the layer's Parameter, or what its parametrisation or hook computes.

        One that diffusers stores in 8 bits between its forwards is a copy in float32.
        """
        held = self._parameters.get(parameter)
        if held is not None:
            return held if held.itemsize > 1 else held.float()
        if parameter in self.__dict__:
            return self.__dict__[parameter]  # torch.nn.utils.weight_norm and spectral_norm leave their result there
        return self.parametrizations[parameter]()  # type: ignore[operator, index]

    def base_now(self, parameter: str) -> Tensor:
        """`base_of` outside of a forward: a hook's result is as old as the last one, and is computed anew."""
        fresh = None if parameter in self._parameters else computed_now(self, parameter)
        return self.base_of(parameter) if fresh is None else fresh

    def base_learns(self, parameter: str) -> bool:
        """Whether the frozen W was unfrozen."""
        return self.base_of(parameter).requires_grad

    def reached_by(self, products: list[str]) -> bool:
        """Whether a forward acted as the adapted layer's. Args: products that it asked the adapters for."""
        return bool(products)

    def unreached(self, forward: Unproved, output: Any, args: Any, kwargs: Any) -> Any:
        """What becomes of the output of a forward, put on the object after `patch`, that did not reach the adapter."""
        raise RuntimeError(
            f"{self.adapter_of(self.adapted[0]).layer_name or type(self).__name__}: the forward that its object "
            f"carries ({described(forward.inner)}) does not read its {' or '.join(self.adapted)}, so that the adapter "
            "would do nothing; take it off, or let it read the attribute when it runs"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name in SLOTS:
            value = forward_to_keep(self, value)
        elif name in self.adapted:
            value = ops.stands_for(value)  # of another adapted layer: to tie
        new = name in self.adapted and isinstance(value, nn.Parameter) and value is not self._parameters.get(name)
        if new and not sys._getframe(1).f_globals.get("__name__", "").startswith(_MAY_ASSIGN):
            raise AttributeError(
                f"{self.adapter_of(name).layer_name or type(self).__name__}: `{name}` of an adapted layer reads as W'; "
                f"write into the frozen weight, `layer.get_parameter({name!r})`, or call mapsurgery.unpatch or "
                "mapsurgery.merge first"
            )
        if new:
            self.adapter_of(name).forget()
        if name == "padding_idx" and self.adapted == ("weight",):
            self.adapter_of("weight").padding_changed(self.__dict__.get(name), value)
        if isinstance(self, nn.RNNBase):  # whose own would write into the list of its weights, which is computed here
            nn.Module.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        # torch.nn.utils.spectral_norm moves the Parameter away; others take no notice of what reads as W'.
        if name in self.adapted and sys._getframe(1).f_globals.get("__name__") == "torch.nn.utils.spectral_norm":
            raise _too_late(self, name)
        super().__delattr__(name)

    def extra_repr(self) -> str:
        adapter = self.adapter_of(self.adapted[0])
        what = "" if self.adapted == ("weight",) else f"adapted={', '.join(self.adapted)}, "
        how = "" if adapter.method.name == "map" else f"method={adapter.method.name}, "
        how += "" if adapter.update.name == "lora" else f"update={adapter.update.name}, "
        start = f", init={adapter.init.kind}" if adapter.method.name == "map" else ""  # others have one start
        return f"{super().extra_repr()}, {what}{how}rank={adapter.rank}{start}".removeprefix(", ")

    @contextmanager
    def _read_plainly(self) -> Iterator[None]:
        """A block of this thread in which the adapted parameters read as what is saved and loaded."""
        outer = self.__dict__.get(_PLAIN)
        self.__dict__[_PLAIN] = threading.get_ident()
        try:
            yield
        finally:
            self.__dict__[_PLAIN] = outer
            if outer is None:
                del self.__dict__[_PLAIN]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Hooks, and classes that save themselves, read `weight` for what it holds."""
        with self._read_plainly():
            return super().state_dict(*args, **kwargs)

    def _save_to_state_dict(self, *args: Any) -> None:
        with self._read_plainly():
            super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A checkpoint brings another W, and another ||W||_F."""
        with self._read_plainly():
            super()._load_from_state_dict(state_dict, prefix, *args)
        for name in self.adapted:
            if prefix + name in state_dict:
                adapter = self.adapter_of(name)
                arrives = adapter.arrives_in(state_dict, f"{prefix}{child_name(name)}.")
                adapter.base_loaded(self.base_of(name), with_adapter=arrives)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Classes of adapted layers are made on demand: pickle rebuilds them from the original class."""
        default = super().__reduce_ex__(protocol)
        if parametrize.is_parametrized(self):
            return default  # torch refuses parametrised ones
        return type(self).rebuild, (self.original_class, self.adapted), default[2]


class FusedLinear(AdaptedLayer):
    """For layers that compute x W^T + bias: nn.Linear, and transformers' Conv1D (whose weight is W^T)."""

    drops = True
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(self, FusedLinear):  # a wrapper has kept this forward, and the layer is adapted no longer
            return type(self).forward(self, input)
        adapter = self._modules.get(CHILD) or self.adapter_of("weight")  # the former spares calls
        # The operator knows no nested tensors, F.linear on W' does. `is True`: torch.fx's proxies have no truth.
        if not adapter.enabled or input.is_nested is True:
            return super().forward(input)
        weight = self._parameters.get("weight")
        return adapter("linear", self.base_of("weight") if weight is None else weight, input, self.bias)


class FusedConv(AdaptedLayer):
    """For layers that compute what nn.Conv1d, nn.Conv2d and nn.Conv3d compute."""

    drops = True
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(self, FusedConv):
            return type(self).forward(self, input)
        adapter = self.adapter_of("weight")
        if not adapter.enabled:
            return super().forward(input)
        input, padding = self._padded(input)
        settings = (self.stride, padding, self.dilation, self.groups)
        return adapter("conv", self.base_of("weight"), input, self.bias, settings)

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


class FusedEmbedding(AdaptedLayer):
    """For layers that compute what nn.Embedding computes: the rows that are asked for, not the whole of W'."""

    padding_idx: int | None
    scale_grad_by_freq: bool

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(self, FusedEmbedding):
            return type(self).forward(self, input)
        adapter = self.adapter_of("weight")
        if not adapter.enabled or self.scale_grad_by_freq:  # which scales the gradient of W' itself
            return super().forward(input)
        return adapter("embedding", self.base_of("weight"), input, self.padding_idx)


class AdaptedRaw(AdaptedLayer):
    """For modules of any type with raw parameters: a mixture reads its stack for each expert, but W' is built once."""

    judges_forwards = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, AdaptedRaw):
            return type(self).forward(self, *args, **kwargs)
        if torch.compiler.is_compiling() or id(self) in _RUNNING.read:
            return super().forward(*args, **kwargs)
        _RUNNING.read[id(self)] = {}
        try:
            return super().forward(*args, **kwargs)
        finally:
            del _RUNNING.read[id(self)]


class FusedConv1D(FusedLinear):
    """For transformers' Conv1D, whose argument has another name."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if isinstance(self, FusedConv1D) else type(self).forward(self, x)


class AdaptedRecurrent(AdaptedLayer):
    """For nn.RNN, nn.LSTM and nn.GRU, which read their weights from a list of their own."""

    _flat_weights_names: list[str]

    @property
    def _flat_weights(self) -> list[Any]:
        # + 0: cuDNN takes the memory of each weight, which W' has only after an operation.
        return [
            getattr(self, name) + 0 if name in self.adapted else getattr(self, name, None)
            for name in self._flat_weights_names
        ]

    @_flat_weights.setter
    def _flat_weights(self, value: list[Any]) -> None:
        """nn.RNNBase fills its list when it is built, moved or unpickled; here it is made for each call."""

    def _init_flat_weights(self) -> None:
        """Likewise, after the layer was moved."""

    def _update_flat_weights(self) -> None:
        """Likewise, before a forward. torch compares with what it kept of a list that is not there."""

    def _replicate_for_data_parallel(self) -> nn.Module:
        """torch's own copies the list of a replica, which has no weights yet."""
        replica = nn.Module._replicate_for_data_parallel(self)
        replica._flat_weights_names = self._flat_weights_names[:]
        return replica

    def flatten_parameters(self) -> None:
        """W' is made anew for each call: there is no memory to lay out."""
