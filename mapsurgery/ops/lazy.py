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

from .autograd import weight_gradients

_ops = torch.ops.mapsurgery


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

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares its default as a static function
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func._schema.is_mutable and args and isinstance(args[0], LazyWeight):
            raise RuntimeError(
                f"{func}: the weight of an adapted layer is computed (W'); writing to it changes nothing"
            )
        args, kwargs = tree_map_only(LazyWeight, LazyWeight.value, (args, kwargs or {}))
        return func(*args, **kwargs)

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


class _LazyFunction(torch.autograd.Function):
    """`autograd.EffectiveWeightFunction`, of which the forward waits."""

    @staticmethod
    def forward(ctx: Any, shape: torch.Size, transposed: bool, *inputs: Any) -> Tensor:
        saved: list[Tensor] = []  # filled by the computation; the context must not hold the result itself
        ctx.save_for_backward(*inputs[:_TENSORS])
        ctx.rest, ctx.saved, ctx.transposed = inputs[_TENSORS:], saved, transposed
        return _lazy(shape, transposed, inputs, saved)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.t() if ctx.transposed else grad.flatten(1)
        # Nothing is saved where nobody used the numbers of W'.
        scales, gram_a, gram_b = ctx.saved or _ops.map_scales.default(*ctx.saved_tensors[1:], *ctx.rest[:2])
        grads = weight_gradients(ctx.saved_tensors, ctx.rest, (scales, gram_a, gram_b), ctx.needs_input_grad[2:], grad)
        return (None, None, *grads)


_TENSORS = 6  # of the inputs of effective_weight: weight, A, B, alpha, beta, weight_norm


def _lazy(shape: torch.Size, transposed: bool, inputs: tuple[Any, ...], saved: list[Tensor]) -> LazyWeight:
    versions = _versions(inputs)

    def compute() -> Tensor:
        if _versions(inputs) != versions:
            raise RuntimeError(
                "the adapter or its base was changed in place after this `weight` was read and before it was used: "
                "read it again, or use it (.clone()) before the change"
            )
        value, *rest = _ops.effective_weight.default(*inputs)
        saved[:] = rest
        return value.t() if transposed else value.reshape(shape)

    like = inputs[0].t() if transposed else inputs[0].view(shape)
    return LazyWeight(like, compute)


def _versions(inputs: tuple[Any, ...]) -> list[int]:
    """How often each tensor was changed in place; inference tensors do not count that."""
    return [t._version for t in inputs[:_TENSORS] if not t.is_inference()]


def can_wait(weight: Tensor) -> bool:
    """Whether W' of this weight may be a `LazyWeight`: in plain eager mode, where subclasses of tensors are welcome."""
    return (
        weight.is_contiguous()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and _get_current_dispatch_mode() is None
        and type(weight) in (torch.nn.Parameter, Tensor)
    )


def lazy_effective_weight(shape: torch.Size, transposed: bool, matrix: Tensor, *factors: Any) -> Tensor:
    """`effective_weight` in the layer's own layout, computed when it is first read.

    Args: shape of the layer's weight; transposed: it is the transpose of `matrix` (m, K), whose view it is otherwise;
    factors: A, B, alpha, beta, weight_norm, tau, relative.
    """
    inputs = (matrix, *factors, None)
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs[:_TENSORS]):
        return _LazyFunction.apply(shape, transposed, *inputs)
    return _lazy(shape, transposed, tuple(t.detach() if isinstance(t, Tensor) else t for t in inputs), [])
