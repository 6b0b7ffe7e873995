"""Operators of MAP as differentiable Python functions.

Each runs the native kernel of its device where one is loaded and the pure-torch reference (`mapsurgery.ops.reference`,
the definition) where none is; both are registered under ``torch.ops.mapsurgery``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch.autograd import forward_ad

from . import reference, registration

registration.register()

from . import autograd, decompositions  # noqa: E402  (their operators exist only now)

autograd.register()
decompositions.register()

from . import flops  # noqa: E402

flops.register()

from .lazy import can_wait, lazy  # noqa: E402
from .reference import accumulate_dtype, magnitudes, safe_sqrt  # noqa: E402
from .registration import full_precision  # noqa: E402
from .stacked import stacked_weight  # noqa: E402

__all__ = [
    "accumulate_dtype",
    "can_wait",
    "effective_weight",
    "frobenius_norm",
    "full_precision",
    "lazy",
    "lowrank_norm",
    "magnitudes",
    "map_conv",
    "map_linear",
    "map_scales",
    "map_scales_many",
    "merge_",
    "safe_sqrt",
    "stacked_weight",
    "unmerge_",
]

for _name in ("map_linear", "map_conv", "map_scales", "effective_weight", "stacked_weight"):
    torch.fx.wrap(_name)  # one node of a symbolic trace each: what they do depends on dtypes that a trace cannot see

_ops = torch.ops.mapsurgery
_NORM_CHUNK = 1 << 22  # elements cast to float64 at a time: bounds the temporary memory of `frobenius_norm`


def _call(function: type[torch.autograd.Function], name: str, args: tuple[Any, ...]) -> Tensor:
    """The first result of an operator, by the quickest way that the running mode allows."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # graphs hold operators, not Python functions
        return getattr(_ops, name).default(*args)[0]
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return getattr(reference, name)(*args)[0]  # vmap, jvp and nested grad follow from plain torch
    if torch.is_grad_enabled():
        return function.apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return autograd.plain(getattr(_ops, name).default(*args)[0])


Given = tuple[Tensor, Tensor, Tensor]
"""What `map_scales` returns, without a gradient: scales (7,), A A^T and B^T B (r, r)."""


def _takes_given() -> bool:
    """Whether given scalars may be used: a trace would hold them for ever, torch.func's derivatives pass them by."""
    if torch.compiler.is_compiling():  # their tensors are inputs of the graph
        return not torch.compiler._is_exporting_flag  # is_exporting() is always true where torch 2.11 compiles
    return (
        not torch.jit.is_tracing() and not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0
    )


def _same_dtype(x: Tensor, weight: Tensor) -> None:
    """nn.Linear refuses mixed dtypes outside autocast; so does its adapted form, instead of casting in silence."""
    if x.dtype != weight.dtype and not registration.autocasting(x.device.type):
        raise RuntimeError(f"input is {x.dtype} and the weight {weight.dtype}: cast one of them, or use torch.autocast")


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
    given: Given | None = None,
) -> Tensor:
    """y = x W'^T + bias with W' = alpha W/||W||_F + beta BA/sqrt(||BA||_F^2 + tau^2) (arXiv 2505.23094), fused.

    Neither W' nor anything else of size (m, K) is built, and backward keeps only x, h = x A^T and r x r matrices.

    Args:
        x: (..., K), floating; under autocast it is cast as for ``F.linear``.
        weight: (m, K) frozen weight, any strides.
        bias: (m,) or None.
        A, B: (r, K) and (m, r) low-rank factors, one floating dtype (norms accumulate in float32, or float64).
        alpha, beta: (1,) magnitudes, in units of ||W||_F if `relative`, else absolute.
        weight_norm: (1,) ||W||_F; 0 means a zero weight: the base term is 0 and beta absolute.
        tau: softening of ||BA||_F in units of ||W||_F; 0 is the paper's formula.
        given: what `map_scales_many` returned for these A, B, alpha ..., to save computing it; gradients are the same.
            Where a graph is traced for export, or under torch.func, it is computed all the same.

    Returns:
        (..., m) in the dtype of x. Differentiable in x, weight, bias, A, B, alpha and beta.

    Raises:
        RuntimeError: x and weight differ in dtype outside autocast, or shapes do not fit.
    """
    _same_dtype(x, weight)
    x = registration.autocast(x)
    args = (x, weight, bias, A, B, alpha, beta, weight_norm, tau, relative)
    if given is not None and _takes_given():
        return _call(autograd.MapLinearGivenFunction, "map_linear_given", (*args, *given))
    return _call(autograd.MapLinearFunction, "map_linear", args)


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
    given: Given | None = None,
) -> Tensor:
    """`map_linear` for 1d, 2d and 3d convolutions, W seen as (m, K) with K = in_channels/groups * prod(kernel).

    Runs in activation space or in weight space, whichever `reference.conv_weight_space` finds cheaper.

    Args:
        x: (N, C, *spatial) or, unbatched, (C, *spatial).
        weight: (m, C/groups, *kernel); A: (r, K); B: (m, r); the rest as in `map_linear`.
        stride, padding, dilation: one int per spatial dimension; padding is with zeros.

    Returns:
        (N, m, *out) or (m, *out).
    """
    _same_dtype(x, weight)
    if x.dim() == len(stride) + 1:
        batched = map_conv(
            x.unsqueeze(0),
            weight,
            bias,
            A,
            B,
            alpha,
            beta,
            weight_norm,
            tau,
            relative,
            stride,
            padding,
            dilation,
            groups,
            given,
        )
        return batched.squeeze(0)
    x = registration.autocast(x)
    weight_space = reference.conv_weight_space(weight.shape[0], A.shape[1], A.shape[0], groups)
    settings = (list(stride), list(padding), list(dilation), groups, weight_space)
    args = (x, weight, bias, A, B, alpha, beta, weight_norm, tau, relative, *settings)
    if given is not None and _takes_given():
        return _call(autograd.MapConvGivenFunction, "map_conv_given", (*args, *given))
    return _call(autograd.MapConvFunction, "map_conv", args)


def effective_weight(
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    alpha: Tensor,
    beta: Tensor,
    weight_norm: Tensor,
    tau: float = 0.0,
    relative: bool = True,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """W' itself (arXiv 2505.23094), differentiable, computed in float32 (float64 for float64) and rounded once.

    Args: weight (m, K) of any strides; dtype of the result, that of weight when None; the rest as in `map_linear`.
    Returns: (m, K).
    """
    args = (weight, A, B, alpha, beta, weight_norm, tau, relative, dtype)
    return _call(autograd.EffectiveWeightFunction, "effective_weight", args)


def map_scales(
    A: Tensor, B: Tensor, alpha: Tensor, beta: Tensor, weight_norm: Tensor, tau: float, relative: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.map_scales`, differentiable by plain torch, for layers that no operator computes."""
    definition = decompositions if torch.compiler.is_exporting() else reference  # no float64 in an exported graph
    with full_precision(A.device.type):
        return definition.map_scales(A, B, alpha, beta, weight_norm, tau, relative)


def map_scales_many(layers: Sequence[tuple[Any, ...]]) -> list[Given]:
    """`reference.map_scales` of many layers by the operator, one call for all of a device and dtype. No gradient.

    Args: layers: (A, B, alpha, beta, weight_norm, tau, relative) of each.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, (A, *_) in enumerate(layers):
        groups.setdefault((A.device, A.dtype), []).append(i)
    results: dict[int, Given] = {}
    # No inference tensors: calls with autograd may use the result.
    with torch.inference_mode(False), torch.no_grad():
        for (device, _), members in groups.items():
            with full_precision(device.type):
                found = _ops.map_scales_many.default(*map(list, zip(*(layers[i] for i in members), strict=True)))
            results.update(zip(members, zip(*found, strict=True), strict=True))
    return [results[i] for i in range(len(layers))]


def lowrank_norm(A: Tensor, B: Tensor) -> Tensor:
    """||BA||_F, shape (1,), from the r x r Gram matrices; see `reference.lowrank_norm`. Not differentiable."""
    return _ops.lowrank_norm.default(A.detach(), B.detach())[0]


@torch.no_grad()
def merge_(weight: Tensor, *adapter: Any) -> None:
    """weight <- W' in place; arguments as in `effective_weight` without dtype."""
    _ops.merge_.default(weight, *adapter)


@torch.no_grad()
def unmerge_(weight: Tensor, *adapter: Any) -> None:
    """weight <- (weight - s_d BA)/s_w in place, the inverse of `merge_` up to its rounding."""
    _ops.unmerge_.default(weight, *adapter)


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
