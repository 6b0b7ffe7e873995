"""The weight W' = s_w W + s_d BA and products with it, as differentiable Python functions.

Each runs the native kernel of its device where one is loaded and the definition in pure torch
(`mapsurgery.ops.operators`) where none is; both are registered under ``torch.ops.mapsurgery``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch.autograd import forward_ad

from . import autograd, operators, registration
from .autograd import Product, Scales
from .lazy import can_wait, stands_for, when_read
from .operators import accumulate_dtype, conv_weight_space, magnitudes, safe_sqrt
from .registration import full_precision

__all__ = [
    "Scales",
    "accumulate_dtype",
    "can_wait",
    "conv_weight_space",
    "effective_weight",
    "frobenius_norm",
    "full_precision",
    "stands_for",
    "when_read",
    "lowrank_conv",
    "lowrank_linear",
    "magnitudes",
    "map_conv",
    "map_linear",
    "map_scales",
    "merge_",
    "safe_sqrt",
    "unmerge_",
]

for _name in ("effective_weight", "lowrank_conv", "lowrank_linear", "map_conv", "map_linear", "map_scales"):
    torch.fx.wrap(_name)  # one node of a symbolic trace each: what they do depends on dtypes that a trace cannot see

_ops = torch.ops.mapsurgery
_NORM_CHUNK = 1 << 22  # elements cast to float64 at a time: bounds the temporary memory of `frobenius_norm`


def _tracing() -> bool:
    """Whether a graph is made that holds operators, not Python functions."""
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def _transforming() -> bool:
    """Whether torch.func or forward-mode AD is at work: vmap, jvp and nested grad follow from plain torch."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _product(*inputs: Any) -> Tensor:
    """`autograd.Product`, by the quickest way that the running mode allows; it is on the way of every call of a layer.

    Where numbers (of `map_scales`) is None, first and second are s_w and s_d, tensors or Python's numbers.
    """
    x, weight, bias, A, B, first, second, numbers, scales, settings = inputs
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        if numbers is None:
            s_w, s_d = _scalar(first, A), _scalar(second, A)
        else:
            s_w, s_d, *_ = _ops.map_scales.default(A, B, first, second, *numbers)
        operator = _ops.lowrank_conv.default if settings else _ops.lowrank_linear.default
        return operator(_as_product_takes(x, weight), weight, bias, A, B, s_w, s_d, *settings)[0]
    if x.dtype != weight.dtype or torch._C._is_any_autocast_enabled():
        x = _as_product_takes(x, weight)
    if numbers is None:
        first, second = _constant(first, A), _constant(second, A)
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return autograd.defined_product(x, weight, bias, A, B, first, second, numbers, settings)
    run = Product.record if torch.is_grad_enabled() else autograd.product
    return run(x, weight, bias, A, B, first, second, numbers, scales, settings)


def _as_product_takes(x: Tensor, weight: Tensor) -> Tensor:
    """x as autocast casts it. Outside, nn.Linear refuses mixed dtypes; so does its adapted form."""
    if x.dtype != weight.dtype and not registration.autocasting(x.device.type):
        raise RuntimeError(f"input is {x.dtype} and the weight {weight.dtype}: cast one of them, or use torch.autocast")
    return registration.autocast(x)


_constants: dict[tuple[float, torch.device, torch.dtype], Tensor] = {}


def _scalar(value: Tensor | float, A: Tensor) -> Tensor:
    """A scalar as operators take it. Numbers are those that nothing trains: 1, or LoRA's scaling."""
    if _tracing() and not isinstance(value, Tensor):
        return A.new_full((1,), value, dtype=accumulate_dtype(A.dtype))
    return _constant(value, A)


def _constant(value: Tensor | float, A: Tensor) -> Tensor:
    """`_scalar` in eager, where a number is put on a device once."""
    if isinstance(value, Tensor):
        return value
    # What a mode, a transform or a subclass of tensors makes is its own.
    if _transforming() or torch._C._len_torch_dispatch_stack() or type(A) not in (Tensor, torch.nn.Parameter):
        return A.new_full((1,), value, dtype=accumulate_dtype(A.dtype))
    key = (value, A.device, A.dtype)
    if key not in _constants:
        with torch.inference_mode(False):
            made = torch.full((1,), value, dtype=accumulate_dtype(A.dtype), device=A.device)
        if A.is_cuda and torch.cuda.is_current_stream_capturing():
            return made  # a graph fills it when it is replayed
        _constants[key] = made
    return _constants[key]


def map_scales(
    A: Tensor, B: Tensor, alpha: Tensor, beta: Tensor, weight_norm: Tensor, tau: float = 0.0, relative: bool = True
) -> tuple[Tensor, Tensor]:
    """s_w and s_d of W' = (1 + alpha) W + beta ||W||_F BA/sqrt(||BA||_F^2 + tau^2) (arXiv 2505.23094), differentiable.

    Args:
        A, B: (r, K) and (m, r) low-rank factors, one floating dtype, or stacks (E, r, K) and (E, m, r).
        alpha, beta: (1,), or (E,) of a stack: how far the base's magnitude is from ||W||_F (0: W as it is), and the
            update's magnitude; in units of ||W||_F if `relative`, else absolute: (||W||_F + alpha) W/||W||_F.
        weight_norm: (1,) or (E,) ||W||_F; 0 means a zero weight: the base term is 0 and beta absolute.
        tau: softening of ||BA||_F in units of ||W||_F; 0 is the paper's formula.

    Returns:
        s_w, s_d: (1,) or (E,), in float32 (float64 for float64 factors).
    """
    inputs = (A, B, alpha, beta, weight_norm, tau, relative)
    if A.dim() == 3:  # no native kernel: r x r matrices, by autograd of the definition
        with full_precision(A.device.type):
            return operators.scales_in(None if torch.compiler.is_exporting() else torch.float64, *inputs)[:2]
    if _tracing():
        return _ops.map_scales.default(*inputs)[:2]
    if _transforming():
        with full_precision(A.device.type):
            return operators.map_scales(*inputs)[:2]
    return autograd.MapScales.apply(*inputs)[:2]


def lowrank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    s_w: Tensor | float,
    s_d: Tensor | float,
) -> Tensor:
    """y = x W'^T + bias with W' = s_w W + s_d BA, fused.

    Neither W' nor anything else of size (m, K) is built, and backward keeps only x and h = x A^T.

    Args:
        x: (..., K), floating; under autocast it is cast as for ``F.linear``.
        weight: (m, K) frozen weight, any strides.
        bias: (m,) or None.
        A, B: (r, K) and (m, r) low-rank factors, one floating dtype.
        s_w, s_d: (1,) tensors on the device and in `accumulate_dtype` of A, or numbers that nothing trains.

    Returns:
        (..., m) in the dtype of x. Differentiable in x, weight, bias, A, B, s_w and s_d.

    Raises:
        RuntimeError: x and weight differ in dtype outside autocast, or shapes do not fit.
    """
    return _product(x, weight, bias, A, B, s_w, s_d, None, None, ())


def map_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    alpha: Tensor,
    beta: Tensor,
    weight_norm: Tensor,
    tau: float = 0.0,
    relative: bool = True,
    scales: Scales | None = None,
) -> Tensor:
    """`map_scales`, then `lowrank_linear`, as one node of autograd; backward keeps r x r Gram matrices besides.

    Args: as in these two; scales: what the operator map_scales gives for them, to save computing it: gradients are the
    same. Where a graph is traced, or under torch.func, it is computed all the same.
    """
    return _product(x, weight, bias, A, B, alpha, beta, (weight_norm, tau, relative), scales, ())


def lowrank_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    s_w: Tensor | float,
    s_d: Tensor | float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """`lowrank_linear` for 1d, 2d and 3d convolutions, W seen as (m, K) with K = in_channels/groups * prod(kernel).

    Runs in activation space or in weight space, whichever `conv_weight_space` finds cheaper.

    Args:
        x: (N, C, *spatial) or, unbatched, (C, *spatial).
        weight: (m, C/groups, *kernel); A: (r, K); B: (m, r); the rest as in `lowrank_linear`.
        stride, padding, dilation: one int per spatial dimension; padding is with zeros.

    Returns:
        (N, m, *out) or (m, *out).
    """
    return _conv(x, weight, bias, A, B, s_w, s_d, None, None, (stride, padding, dilation, groups))


def map_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    alpha: Tensor,
    beta: Tensor,
    weight_norm: Tensor,
    tau: float,
    relative: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    scales: Scales | None = None,
) -> Tensor:
    """`map_scales`, then `lowrank_conv`, as one node of autograd; see `map_linear`."""
    settings = (stride, padding, dilation, groups)
    return _conv(x, weight, bias, A, B, alpha, beta, (weight_norm, tau, relative), scales, settings)


def _conv(x: Tensor, weight: Tensor, bias: Any, A: Tensor, *rest: Any) -> Tensor:
    """`_product` of a batched or unbatched convolution; the last argument: stride, padding, dilation and groups."""
    *others, (stride, padding, dilation, groups) = rest
    weight_space = conv_weight_space(weight.shape[0], A.shape[1], A.shape[0], groups)
    settings = (list(stride), list(padding), list(dilation), groups, weight_space)
    if x.dim() == weight.dim() - 1:
        return _product(x.unsqueeze(0), weight, bias, A, *others, settings).squeeze(0)
    return _product(x, weight, bias, A, *others, settings)


def effective_weight(
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    s_w: Tensor | float,
    s_d: Tensor | float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """W' = s_w W + s_d BA itself, differentiable, computed in float32 (float64 for float64) and rounded once.

    Args: weight (m, K) of any strides, or a stack (E, m, K) with A (E, r, K), B (E, m, r) and scalars (E,), or (1,)
        for all; dtype of the result, that of weight when None; the rest as in `lowrank_linear`.
    Returns: (m, K), or (E, m, K).
    """
    s_w, s_d = _scalar(s_w, A), _scalar(s_d, A)
    if weight.dim() == 3:
        s_w, s_d = s_w.expand(len(weight)), s_d.expand(len(weight))
    if _transforming() or (weight.dim() == 3 and _tracing()):
        with full_precision(weight.device.type):
            return operators.effective_weight(weight, A, B, s_w, s_d, dtype)
    if _tracing():
        return _ops.effective_weight.default(weight, A, B, s_w, s_d, dtype)
    return autograd.EffectiveWeight.apply(weight, A, B, s_w, s_d, dtype)


@torch.no_grad()
def merge_(weight: Tensor, A: Tensor, B: Tensor, s_w: Tensor | float, s_d: Tensor | float) -> None:
    """weight (m, K) <- W' in place; arguments as in `effective_weight`."""
    _ops.merge_.default(weight, A, B, _scalar(s_w, A), _scalar(s_d, A))


@torch.no_grad()
def unmerge_(weight: Tensor, A: Tensor, B: Tensor, s_w: Tensor | float, s_d: Tensor | float) -> None:
    """weight <- (weight - s_d BA)/s_w in place, the inverse of `merge_` up to its rounding."""
    _ops.unmerge_.default(weight, A, B, _scalar(s_w, A), _scalar(s_d, A))


@torch.no_grad()
def fingerprint(weight: Tensor) -> Tensor:
    """||W||_F^2 and 8 sums of W's elements by fixed random numbers, (9,), float64: what a weight is known by.

    Args: weight of any shape, strides and floating dtype, on any device but meta.
    """
    plain = type(weight) in (Tensor, torch.nn.Parameter) and weight.is_floating_point() and weight.itemsize > 1
    return _ops.fingerprint.default(weight) if plain else operators.fingerprint(weight)


@torch.no_grad()
def frobenius_norm(weight: Tensor) -> float:
    """||W||_F as a Python float, accumulated in float64: sums of squares overflow float16 and lose digits in float32.

    Args: weight of any shape and strides, on any device but meta.
    """
    if weight.is_cpu and type(weight) in (Tensor, torch.nn.Parameter) and weight.is_floating_point():
        square = _ops.squared_norm.default(weight).item()  # one read of the weight, no copy
        if 0 < square < float("inf"):
            return square**0.5
    if weight.dim() == 0 or weight.numel() <= _NORM_CHUNK:
        return torch.linalg.vector_norm(weight, dtype=torch.float64).item()
    rows = max(1, _NORM_CHUNK * weight.shape[0] // weight.numel())
    parts = [torch.linalg.vector_norm(block, dtype=torch.float64) for block in weight.split(rows)]
    return torch.linalg.vector_norm(torch.stack(parts)).item()
