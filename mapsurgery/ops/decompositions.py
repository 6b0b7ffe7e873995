"""Core ATen forms of the operators, for whoever consumes an exported graph and knows no operator of this library.

Where AOTAutograd traces on behalf of no compiler (``ExportedProgram.run_decompositions()`` with any table,
``torch.onnx.export``, joint graphs), each operator is replaced by what stands here. torch.compile and AOTInductor keep
the operators, and so does the graph that ``torch.export.export`` itself returns. Scalars that no operator computes
(of embeddings, stacks, quantised layers) are computed as here in every exported graph.

What is computed is defined by `reference`. The forwards are written anew for two reasons: no float64 beside float32
factors (mobile runtimes have none), and no node in an inference graph that serves the backward alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._guards import CompileContext
from torch._subclasses.functional_tensor import FunctionalTensorMode

from . import reference


def lowrank_norm(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.lowrank_norm`."""
    square, gram_a, gram_b = _square(A, B)
    return _sqrt(square), gram_a, gram_b


def _square(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """||BA||_F^2 (1,), and the Gram matrices of which it is the product."""
    acc = reference.accumulate_dtype(A.dtype)
    A, B = _cast(A, acc), _cast(B, acc)
    gram_a, gram_b = A @ A.t(), B.t() @ B
    return (gram_a * gram_b).sum().clamp_min(0).reshape(1), gram_a, gram_b


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t in a dtype; torch.export records an assertion of every ``.to()`` that does nothing."""
    return t if t.dtype == dtype else t.to(dtype)


def _or_one(t: Tensor) -> Tensor:
    """t with 1 in place of 0. NaN stays NaN."""
    return t.masked_fill(t == 0, 1.0)


def _sqrt(square: Tensor) -> Tensor:
    """sqrt with gradient 0 at 0, as `reference` has it."""
    return _or_one(square).sqrt().masked_fill(square == 0, 0.0)


def _scales(
    A: Tensor, B: Tensor, alpha: Tensor, beta: Tensor, weight_norm: Tensor, tau: float, relative: bool
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The entries of `reference.map_scales`, (1,) each, so that unused ones leave the graph, and the Gram matrices."""
    square, gram_a, gram_b = _square(A, B)
    acc = square.dtype
    alpha, beta = _cast(alpha, acc), _cast(beta, acc)
    w = _or_one(_cast(weight_norm, acc))
    if tau > 0:  # then p is never 0, and the graph needs none of the cases below
        p = torch.sqrt(square + (tau * w) ** 2)
        inverse = p.reciprocal()
    else:
        p = _sqrt(square)
        trace = (gram_a.diagonal().sum() + gram_b.diagonal().sum()).detach().reshape(1)
        p = torch.where(p == 0, _sqrt(trace), p)
        inverse = _or_one(p).reciprocal().masked_fill(p == 0, 0.0)
    ds_d = w * inverse if relative else inverse
    s_w, u_w = (alpha, torch.ones_like(w)) if relative else (alpha / w, w.reciprocal())
    s_d = beta * ds_d
    return [s_w, s_d, u_w, ds_d, s_d * inverse * inverse, p, torch.ones_like(p)], gram_a, gram_b


def map_scales(*factors: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.map_scales`."""
    scales, gram_a, gram_b = _scales(*factors)
    return torch.cat(scales), gram_a, gram_b


def map_scales_many(*layers: Sequence[Any]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """`reference.map_scales_many`."""
    results = [map_scales(*layer) for layer in zip(*layers, strict=True)]
    return [layer[0] for layer in results], [layer[1] for layer in results], [layer[2] for layer in results]


def map_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, *numbers: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`reference.map_linear`."""
    scales, gram_a, gram_b = _scales(A, B, *numbers)
    y, h = _linear(x, weight, bias, A, B, scales)
    return y, h, torch.cat(scales), gram_a, gram_b


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scales: Sequence[Tensor] | Tensor
) -> tuple[Tensor, Tensor]:
    """y and h of `map_linear`, with the scalars of the layer."""
    dtype = x.dtype
    s_w, s_d = _cast(scales[reference.S_W], dtype), _cast(scales[reference.S_D], dtype)
    h = x @ _cast(A, dtype).t()
    y = s_w * (x @ _cast(weight, dtype).t()) + (s_d * h) @ _cast(B, dtype).t()
    return (y if bias is None else y + _cast(bias, dtype)), h


def map_linear_given(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, *others: Any
) -> tuple[Tensor, Tensor]:
    """`reference.map_linear_given`; its scales are the third last argument."""
    return _linear(x, weight, bias, A, B, others[-3])


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
    weight_space: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`reference.map_conv`."""
    scales, gram_a, gram_b = _scales(A, B, alpha, beta, weight_norm, tau, relative)
    y, h = _conv_with(x, weight, bias, A, B, scales, stride, padding, dilation, groups, weight_space)
    return y, h, torch.cat(scales), gram_a, gram_b


def map_conv_given(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, *others: Any
) -> tuple[Tensor, Tensor]:
    """`reference.map_conv_given`; `others` begin with alpha, beta, weight_norm, tau and relative."""
    *conv, scales, _, _ = others[5:]
    return _conv_with(x, weight, bias, A, B, scales, *conv)


def _conv_with(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scales: Sequence[Tensor] | Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    weight_space: bool,
) -> tuple[Tensor, Tensor]:
    """y and h of `map_conv`, with the scalars of the layer."""
    dtype, spatial = x.dtype, len(stride)

    def conv(x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.convolution(x, kernel, bias, stride, padding, dilation, False, [0] * spatial, groups)

    bias = None if bias is None else _cast(bias, dtype)
    if weight_space:
        W = _combine(weight.reshape(weight.shape[0], -1), A, B, scales, dtype)
        return conv(x, W.reshape(weight.shape), bias), x.new_empty(0)
    s_w, s_d = _cast(scales[reference.S_W], dtype), _cast(scales[reference.S_D], dtype)
    down = _cast(A, dtype).reshape(-1, *weight.shape[1:])
    h = conv(x, down if groups == 1 else down.repeat(groups, *[1] * (spatial + 1)))
    ones, zeros = [1] * spatial, [0] * spatial
    up = _cast(B, dtype).reshape(*B.shape, *ones)
    # The bias goes into the convolution that is not scaled.
    update = torch.convolution(s_d * h, up, bias, ones, zeros, ones, False, zeros, groups)
    return s_w * conv(x, _cast(weight, dtype)) + update, h


def _combine(weight: Tensor, A: Tensor, B: Tensor, scales: Sequence[Tensor] | Tensor, dtype: torch.dtype) -> Tensor:
    """s_w W + s_d BA in at least float32, rounded once. weight (m, K)."""
    acc = reference.accumulate_dtype(torch.promote_types(weight.dtype, A.dtype))
    s_w, s_d = _cast(scales[reference.S_W], acc), _cast(scales[reference.S_D], acc)
    return _cast(s_w * _cast(weight, acc) + s_d * (_cast(B, acc) @ _cast(A, acc)), dtype)


def effective_weight(
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    alpha: Tensor,
    beta: Tensor,
    weight_norm: Tensor,
    tau: float,
    relative: bool,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.effective_weight`."""
    scales, gram_a, gram_b = _scales(A, B, alpha, beta, weight_norm, tau, relative)
    W = _combine(weight, A, B, scales, weight.dtype if dtype is None else dtype)
    return W, torch.cat(scales), gram_a, gram_b


DECOMPOSITIONS: dict[str, Callable[..., Tensor | tuple[Any, ...]]] = {
    "squared_norm": reference.squared_norm,
    "lowrank_norm": lowrank_norm,
    "map_scales": map_scales,
    "map_scales_many": map_scales_many,
    "map_linear": map_linear,
    "map_linear_given": map_linear_given,
    "map_linear_backward": reference.map_linear_backward,
    "map_conv": map_conv,
    "map_conv_given": map_conv_given,
    "map_conv_backward": reference.map_conv_backward,
    "effective_weight": effective_weight,
    "effective_weight_backward": reference.effective_weight_backward,
}
"""Operator -> its form in ATen. merge_ and unmerge_ write in place and are in no graph."""


def _compiling() -> bool:
    """Whether a compiler that calls the operators is tracing: torch.compile or AOTInductor."""
    from torch._inductor.virtualized import V

    return CompileContext.try_get() is not None or bool(V.aot_compilation)


def _rule(decomposition: Callable[..., Tensor | tuple[Any, ...]]) -> Callable[..., Any]:
    """What an operator does under FunctionalTensorMode, in which AOTAutograd and torch.export trace."""

    def rule(mode: FunctionalTensorMode, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if mode.pre_dispatch or _compiling():  # pre_dispatch: torch.export.export, whose graph keeps operators
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode:
            return decomposition(*args, **(kwargs or {}))

    return rule


def register() -> None:
    """Called once, on import of `mapsurgery.ops`.

    A rule, since a decomposition table is the caller's: torch's default one holds no operator of another library, and
    a consumer (ExecuTorch, the ONNX exporter) passes its own.
    """
    for name, decomposition in DECOMPOSITIONS.items():
        torch.library.register_torch_dispatch(f"mapsurgery::{name}", FunctionalTensorMode, _rule(decomposition))
