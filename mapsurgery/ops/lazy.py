"""W' whose numbers are computed when something first reads them.

Models often read ``layer.weight.dtype`` or ``.shape`` and no more: that must not cost a product of the size of the
weight. A `LazyWeight` has the metadata and the place in the autograd graph from the start; the dispatcher hands every
operation on it to ``__torch_dispatch__``, which puts W' itself in its place. Because autograd stands above that, no
reader (a custom Function, a fused kernel of torch) can get W' without its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_map_only


class LazyWeight(Tensor):
    """A tensor like `like` whose value `compute()` gives, at most once."""

    _compute: Callable[[], Tensor]
    _value: Tensor | None

    # Readers that skip operations on Python subclasses (the fast path of nn.TransformerEncoderLayer) may take it.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, like: Tensor, compute: Callable[[], Tensor]) -> LazyWeight:
        lazy = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device, layout=like.layout
        )
        lazy._compute, lazy._value = compute, None
        return lazy

    def value(self) -> Tensor:
        """W' itself, without a gradient."""
        if self._value is None:
            # Kept for readers in any mode, so not an inference tensor.
            with torch.inference_mode(False), torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
                self._value = self._compute()
        return self._value

    def _written(self, func: Any, args: Any, kwargs: Any) -> LazyWeight:
        """An operation that writes into W', which is lost: right only if it changes no number (as RWKV's x / 1)."""
        after = self.value().clone()
        func(after, *args[1:], **kwargs)
        if not torch.equal(after, self.value()):
            raise RuntimeError(
                f"{func}: the weight of an adapted layer is computed (W'), what is written to it is lost"
            )
        return self

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares its default as a static function
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        lazy = args[0] if func._schema.is_mutable and args and isinstance(args[0], LazyWeight) else None
        args, kwargs = tree_map_only(LazyWeight, LazyWeight.value, (args, kwargs or {}))
        return func(*args, **kwargs) if lazy is None else lazy._written(func, args, kwargs)

    # What reads memory without an operation: kernels that take a pointer, other libraries.
    def data_ptr(self) -> int:
        return self.value().data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.value().untyped_storage()

    def numpy(self, *, force: bool = False) -> Any:
        return self.value().numpy(force=force)

    def tolist(self) -> Any:
        return self.value().tolist()

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return self.value().__dlpack__(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.value().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.value().clone()

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return repr(self.value())


class _LazyResult(torch.autograd.Function):
    """What a differentiable function of tensors computes, of which the forward waits; backward computes it anew."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], like: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.function = function
        return _waiting(function, like, tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.to_dense() if grad.is_sparse else grad  # of an embedding with sparse=True
        create_graph = torch.is_grad_enabled()
        needs = ctx.needs_input_grad[2:]
        with torch.enable_grad():
            inputs = [
                t if create_graph else t.detach().requires_grad_(need)
                for t, need in zip(ctx.saved_tensors, needs, strict=True)
            ]
            result = ctx.function(*inputs)
            wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
            found = iter(torch.autograd.grad(result, wanted, grad, create_graph=create_graph, allow_unused=True))
        return (None, None, *(next(found) if need else None for need in needs))


def _waiting(function: Callable[..., Tensor], like: Tensor, tensors: tuple[Tensor, ...]) -> LazyWeight:
    versions = _versions(tensors)

    def compute() -> Tensor:
        _refuse_changed(tensors, versions)
        value = function(*(t.detach() for t in tensors))
        return value if value.stride() == like.stride() else torch.empty_like(like).copy_(value)

    return LazyWeight(like.detach(), compute)


def lazy_result(like: Tensor, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """function(*tensors), computed when it is first read; differentiable by autograd of the function.

    Args: like has the shape, strides, dtype and device of the result.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _LazyResult.apply(function, like, *tensors)
    return _waiting(function, like, tensors)


def _refuse_changed(tensors: tuple[Any, ...], versions: list[int]) -> None:
    if _versions(tensors) != versions:
        raise RuntimeError(
            "the adapter or its base was changed in place after this `weight` was read and before it was used: "
            "read it again, or use it (.clone()) before the change"
        )


def _versions(inputs: tuple[Any, ...]) -> list[int]:
    """How often each tensor was changed in place; inference tensors do not count that."""
    return [t._version for t in inputs if isinstance(t, Tensor) and not t.is_inference()]


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
