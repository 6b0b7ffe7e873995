"""W' whose numbers are computed when something first reads them.

Models often read ``layer.weight.dtype`` or ``.shape`` and no more: that must not cost a product of the size of the
weight. A `LazyWeight` has the metadata and the place in the autograd graph from the start; the dispatcher hands every
operation on it to ``__torch_dispatch__``, which puts W' itself in its place. Because autograd stands above that, no
reader (a custom Function, a fused kernel of torch) can get W' without its gradient.

W' is computed: what is written into it would be lost. So a write into it, or into a view of it, raises. What hangs on
the Parameter that it stands for is found on it, and it passes for a Parameter with whoever asks for one.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_map_only

_LOST = (
    "the weight of an adapted layer is computed (W'), what is written to it is lost. Write into the frozen weight, "
    "`model.get_parameter(name)`, or call mapsurgery.merge or mapsurgery.unpatch first; to change a copy, .clone() it"
)

_TAKERS = {
    "is_leaf": ("torch.optim.optimizer", "add_param_group"),
    "grad_fn": ("torch.nn.modules.module", "register_parameter"),
}
"""Attribute -> module and function that ask for it before they keep a tensor as a Parameter."""


def _refused(*_: Any, **__: Any) -> Any:
    raise RuntimeError(_LOST)


def _refuse_taker(attribute: str) -> None:
    caller = sys._getframe(2)
    if (caller.f_globals.get("__name__"), caller.f_code.co_name) == _TAKERS[attribute]:
        raise RuntimeError(
            "the weight of an adapted layer is computed (W'), and is no Parameter to keep, tie or optimise: take the "
            "Parameter itself, `layer.get_parameter(name)`, or call mapsurgery.merge or mapsurgery.unpatch first"
        )


def _no_hook(*_: Any, **__: Any) -> Any:
    raise RuntimeError(
        "the weight of an adapted layer is computed (W') anew for each reader, so that a hook on it would be lost; the "
        "frozen weight, `model.get_parameter(name)`, gets no gradient: hook the adapter's parameters"
    )


class LazyWeight(Tensor):
    """A tensor like `like` whose value `compute()` gives, at most once; `parameter` is the one that it stands for."""

    _compute: Callable[[], Tensor]
    _value: Tensor | None
    _itself: weakref.ref[LazyWeight]
    _parameter: torch.nn.Parameter | None

    # Readers that skip operations on Python subclasses (the fast path of nn.TransformerEncoderLayer) may take it.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, like: Tensor, compute: Callable[[], Tensor], parameter: torch.nn.Parameter | None = None
    ) -> LazyWeight:
        lazy = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device, layout=like.layout
        )
        lazy._compute, lazy._value = compute, None
        lazy._itself = weakref.ref(lazy)  # torch.utils.swap_tensors, whose effect would be lost, refuses these
        lazy._parameter = parameter
        return lazy

    def value(self) -> Tensor:
        """W' itself, without a gradient."""
        if self._value is None:
            # Kept for readers in any mode, so not an inference tensor.
            with torch.inference_mode(False), torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
                self._value = self._compute()
        return self._value

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares its default as a static function
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            return _written(func, args, kwargs)
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "meta":
            args, kwargs = tree_map_only(LazyWeight, _on_meta, (args, kwargs))  # takes no numbers
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(LazyWeight, LazyWeight.value, (args, kwargs))
        result = func(*args, **kwargs)
        return tree_map_only(Tensor, _guarded, result) if _is_view(func) else result

    # What it has of the Parameter -------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        parameter = self.__dict__.get("_parameter")
        if parameter is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(parameter, name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = name in LazyWeight.__annotations__ or hasattr(type(self), name)
        parameter = None if own else self.__dict__.get("_parameter")
        Tensor.__setattr__(self if parameter is None else parameter, name, value)

    def __delattr__(self, name: str) -> None:
        parameter = self.__dict__.get("_parameter")
        Tensor.__delattr__(self if parameter is None else parameter, name)

    @property
    def _is_param(self) -> bool:
        """By this `isinstance(weight, nn.Parameter)` knows it."""
        return self._parameter is not None

    @_is_param.setter
    def _is_param(self, value: Any) -> None:
        raise RuntimeError(f"`nn.Parameter(weight)`: {_LOST}")

    @property
    def is_leaf(self) -> bool:  # type: ignore[override]
        _refuse_taker("is_leaf")
        parameter = self._parameter
        return Tensor.is_leaf.__get__(self) if parameter is None else parameter.is_leaf  # type: ignore[attr-defined]

    @property
    def grad_fn(self) -> Any:  # type: ignore[override]
        _refuse_taker("grad_fn")
        return Tensor.grad_fn.__get__(self)  # type: ignore[union-attr]

    # What would change this tensor, past the dispatcher ---------------------------------------------------------------

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Any) -> None:
        raise RuntimeError(f"`weight.data = ...`: {_LOST}")

    @property
    def grad(self) -> Tensor | None:
        return Tensor.grad.__get__(self)  # type: ignore[union-attr]

    @grad.setter
    def grad(self, value: Any) -> None:
        raise RuntimeError(f"`weight.grad = ...`: {_LOST}")

    @property
    def requires_grad(self) -> bool:
        return Tensor.requires_grad.__get__(self)  # type: ignore[attr-defined]

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> LazyWeight:
        if requires_grad:  # False is what the frozen weight has already
            raise RuntimeError(f"`weight.requires_grad = True`: {_LOST}")
        return self

    apply_ = map_ = map2_ = share_memory_ = _refused
    register_hook = register_post_accumulate_grad_hook = _no_hook

    # What reads memory without an operation: kernels that take a pointer, other libraries.
    def data_ptr(self) -> int:
        return self.value().data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        raise RuntimeError(f"untyped_storage() hands out memory: {_LOST}")

    def numpy(self, *, force: bool = False) -> Any:
        array = self.value().numpy(force=force)
        array.flags.writeable = False
        return array

    def tolist(self) -> Any:
        return self.value().tolist()

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        raise BufferError(f"__dlpack__ hands out memory: {_LOST}")

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.value().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        copied = self.value().clone()
        return copied if self._parameter is None else torch.nn.Parameter(copied, self._parameter.requires_grad)

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return ("" if self._parameter is None else "Parameter containing:\n") + repr(self.value())


def _is_view(func: Any) -> bool:
    """Whether what an operation returns is in the memory of its input."""
    return any(result.alias_info is not None for result in func._schema.returns)


def _guarded(view: Tensor) -> LazyWeight:
    """A view of W', into which nothing can be written either."""
    return LazyWeight(view, lambda: view)


def _on_meta(lazy: LazyWeight) -> Tensor:
    return torch.empty_strided(lazy.shape, lazy.stride(), dtype=lazy.dtype, device="meta")


def _written(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation that writes into its arguments; into W' only if it changes no number (as RWKV's x / 1)."""
    copies: list[tuple[LazyWeight, Tensor]] = []

    def copied(lazy: LazyWeight) -> Tensor:
        copies.append((lazy, lazy.value().clone()))
        return copies[-1][1]

    def plain(argument: Any, value: Any) -> Any:
        written = argument.alias_info is not None and argument.alias_info.is_write
        return tree_map_only(LazyWeight, copied if written else LazyWeight.value, value)

    schema = func._schema.arguments
    by_name = {argument.name: argument for argument in schema}
    positional = [plain(argument, value) for argument, value in zip(schema, args, strict=False)]
    result = func(*positional, **{name: plain(by_name[name], value) for name, value in kwargs.items()})
    if not all(torch.equal(copy, lazy.value()) for lazy, copy in copies):
        raise RuntimeError(f"{func}: {_LOST}")
    originals = {id(copy): lazy for lazy, copy in copies}
    return tree_map_only(Tensor, lambda t: originals.get(id(t), t), result)


class _Waiting(torch.autograd.Function):
    """What a differentiable function of tensors computes, of which the forward waits; backward computes it anew."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], like: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.function, ctx.dtypes = function, [t.dtype for t in tensors]
        return _lazy(function, like, tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.to_dense() if grad.is_sparse else grad  # of an embedding with sparse=True
        create_graph, needs = torch.is_grad_enabled(), ctx.needs_input_grad[2:]
        with torch.enable_grad():
            inputs = [
                t if create_graph else t.detach().requires_grad_(need)
                for t, need in zip(map(Tensor.to, ctx.saved_tensors, ctx.dtypes), needs, strict=True)
            ]
            wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
            value = ctx.function(*inputs)
            found = iter(torch.autograd.grad(value, wanted, grad, create_graph=create_graph, allow_unused=True))
        return (None, None, *(next(found) if need else None for need in needs))


def _lazy(function: Callable[..., Tensor], like: Tensor, tensors: tuple[Tensor, ...]) -> LazyWeight:
    versions = _versions(tensors)

    def compute() -> Tensor:
        if _versions(tensors) != versions:
            raise RuntimeError(
                "the adapter or its base was changed in place after this `weight` was read and before it was used: "
                "read it again, or use it (.clone()) before the change"
            )
        value = function(*(t.detach() for t in tensors))
        return value if value.stride() == like.stride() else torch.empty_like(like).copy_(value)

    return LazyWeight(like.detach(), compute, like if isinstance(like, torch.nn.Parameter) else None)


def when_read(like: Tensor, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """function(*tensors), computed when it is first read; differentiable by the function's own autograd.

    Args: like has the shape, strides, dtype and device of the result.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _Waiting.apply(function, like, *tensors)
    return _lazy(function, like, tensors)


def _versions(tensors: tuple[Tensor, ...]) -> list[int]:
    """How often each tensor was changed in place; inference tensors do not count that."""
    return [t._version for t in tensors if not t.is_inference()]


def stands_for(value: Any) -> Any:
    """The Parameter whose W' this is; any other value itself."""
    parameter = value._parameter if isinstance(value, LazyWeight) else None
    return value if parameter is None else parameter


def can_wait(weight: Tensor) -> bool:
    """Whether W' of this weight may be a `LazyWeight`: in plain eager mode, where subclasses of tensors are welcome."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and _get_current_dispatch_mode() is None
        and type(weight) in (torch.nn.Parameter, Tensor)
    )
