"""Every operator, once: its definition in plain torch, from which `registration.operator` makes all that torch needs.

Native kernels are tested against these definitions. They know nothing of methods: whatever the method, the weight is

    W' = s_w W + s_d BA,    W (m, K) frozen, A (r, K), B (m, r), s_w and s_d (1,)

LoRA has s_w = 1 and s_d fixed. MAP's scalars come from `map_scales`. Scalars lie on the device of the factors, in
`accumulate_dtype` of A, and are never read by the host. Source of the formulas: "MAP: Revisiting Weight Decomposition
for Low-Rank Adaptation" (arXiv 2505.23094), W' = alpha W/||W||_F + beta BA/||BA||_F, with the norm of BA taken through
the two r x r Gram matrices. What is called alpha here is how far the paper's is from ||W||_F: 0 is the base.

`norm`, an argument of the backward operators, is empty, or [slopes, gram_a, gram_b] of `map_scales`. With it s_w and
s_d depend on alpha, beta, A and B: the gradients of A and B pass through ||BA||_F as well, and the last two results are
those of alpha and beta instead of s_w and s_d.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from .registration import operator


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of norms, Gram matrices and scalars: float64 for float64 factors, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t in a dtype; torch.export records an assertion of every ``.to()`` that does nothing."""
    return t if t.dtype == dtype else t.to(dtype)


def _or_one(t: Tensor) -> Tensor:
    """t with 1 in place of 0. Comparisons are with 0 alone, so that NaN stays NaN: diverged training has to be seen."""
    return t.masked_fill(t == 0, 1.0)


def safe_sqrt(square: Tensor) -> Tensor:
    """sqrt with gradient 0 at 0, where its slope is infinite: 0 * inf would make a NaN gradient. NaN stays NaN."""
    return _or_one(square).sqrt().masked_fill(square == 0, 0.0)


def _dot(a: Tensor, b: Tensor, acc: torch.dtype) -> Tensor:
    """<a, b> accumulated in `acc`, shape (1,)."""
    return (a.to(acc) * b.to(acc)).sum().reshape(1)


@operator
def squared_norm(weight: Tensor) -> Tensor:
    """||W||_F^2 of a weight of any shape and strides, accumulated in float64; (1,), float64."""
    return torch.linalg.vector_norm(weight, dtype=torch.float64).square().reshape(1)


_SKETCH = 8
_BLOCK = 1 << 22  # numbers widened at a time


def _weights(count: int, device: torch.device) -> Tensor:
    """(count,), float64, pseudo-random by place, uniform with variance 1: a hash of it (the finish of splitmix64)."""
    x = (torch.arange(count, device=device) + 1) * -0x61C8864680B583EB
    x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    x = x ^ (x >> 31 & 0x1FFFFFFFF)
    return ((x >> 11 & 0x1FFFFFFFFFFFFF).double() * 2**-52 - 1) * 3**0.5


@operator
def fingerprint(weight: Tensor) -> Tensor:
    """What a weight is known by: ||W||_F^2, and 8 sums of its elements by fixed random numbers; (9,), float64.

    Of W as (m, K), the s-th sum is of u_i v_k W_ik over the columns k = s mod 8 (as a count sketch: Charikar, Chen,
    Farach-Colton 2002). The sums of two weights differ by about ||W - W'||_F, whatever the difference: rows in another
    order, signs, a rotation. They are linear: those of blocks of rows, each with its own u, add up.

    Args: weight: (m, ...), of any strides; (n,) and () are one row.
    """
    rows = weight.reshape(weight.shape[0], -1) if weight.dim() > 1 else weight.reshape(1, -1)
    m, K = rows.shape
    u, sums = _weights(m, weight.device), torch.zeros(K + 1, dtype=torch.float64, device=weight.device)
    step = max(1, _BLOCK // max(K, 1))
    for start in range(0, m, step):
        block = rows[start : start + step].double()
        sums += torch.cat([block.square().sum().reshape(1), u[start : start + step] @ block])
    signed = torch.nn.functional.pad(sums[1:] * _weights(K, weight.device), (0, -K % _SKETCH))
    return torch.cat([sums[:1], signed.reshape(-1, _SKETCH).sum(0)])


# Scalars of MAP ------------------------------------------------------------------------------------------------------


_FITS = (2.0**-40, 2.0**50)
"""Largest entries of a factor whose Gram matrix float32 holds with all of its digits."""


def unit_of(t: Tensor) -> Tensor:
    """What a matrix, or each of a stack, is divided by so that its squares are numbers: (1,) or (E,), without gradient.

    1 where they are as they stand, else the size of the largest entry.
    """
    if t.numel() == 0:
        return t.new_ones(t.shape[:-2]).reshape(-1)
    largest = t.detach().abs().amax((-2, -1)).reshape(-1)
    fits = (largest == 0) | ((largest >= _FITS[0]) & (largest <= _FITS[1]))
    return torch.where(fits, 1.0, largest.clamp_min(torch.finfo(t.dtype).tiny))


def magnitudes(
    square: Tensor,
    size: Tensor | None,
    alpha: Tensor,
    beta: Tensor,
    weight_norm: Tensor,
    tau: float,
    relative: bool,
    dtype: torch.dtype,
    units: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """s_w and s_d of an update of any family, of its squared norm; differentiable.

    With w = ||W||_F, or 1 where that is 0 (then the base term is 0 by itself, and beta absolute), and
    p = sqrt(square + (tau w)^2):  s_w = 1 + alpha, s_d = beta w/p if `relative`, else s_w = 1 + alpha/w, s_d = beta/p.

    Where p would be 0 (BA = 0 and tau = 0), `size` takes its place, a number of the factors' own size without a
    gradient: the forward is unchanged (BA is 0) and the gradient is finite and not zero, so that the start B = 0
    learns. Where that is 0 too, the update term and its gradients are 0. In units, s_d is NaN where d s_d / d beta is
    too small for `dtype`: at 0, W' would silently be the base.

    Args: square, size (read where tau is 0 alone), alpha, beta, weight_norm: (1,), or (E,) of a stack, of one dtype;
    dtype of the results; units: what the update was divided by, (1,) or (E,) each: square and size are those of the
    quotient.
    Returns: s_w, s_d, d s_w / d alpha, d s_d / d beta, and p in these units.
    """
    w = _or_one(weight_norm)
    unit_w, one = w, torch.ones_like(w)
    for unit in units:
        unit_w, one = unit_w / unit, one / unit
    if tau > 0:  # then p is never 0, and an exported graph needs none of the cases below
        p = torch.sqrt(square + (tau * unit_w) ** 2)
        inverse = p.reciprocal()
    else:
        assert size is not None
        p = torch.where(square == 0, size, safe_sqrt(square))
        inverse = _or_one(p).reciprocal().masked_fill(p == 0, 0.0)
    ds_d = (unit_w if relative else one) * inverse
    s_w, ds_w = (1 + alpha, torch.ones_like(w)) if relative else (1 + alpha / w, w.reciprocal())
    s_d = beta * ds_d
    if units:
        s_d = s_d.masked_fill((p != 0) & (ds_d < torch.finfo(dtype).tiny), float("nan"))
    return _cast(s_w, dtype), _cast(s_d, dtype), _cast(ds_w, dtype), _cast(ds_d, dtype), _cast(p, dtype)


def scales_in(
    wide: torch.dtype | None,
    A: Tensor,
    B: Tensor,
    alpha: Tensor,
    beta: Tensor,
    weight_norm: Tensor,
    tau: float,
    relative: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`map_scales`, with scalars computed in `wide`, or in the dtype of the result where it is None.

    Then units are left out as well, so that the graph is small: squares have to be numbers of that dtype.

    Also of stacks, A (E, r, K), B (E, m, r), with scalars (E,); slopes are (6E,) then.
    """
    acc = accumulate_dtype(A.dtype)
    A, B, exported, wide = _cast(A, acc), _cast(B, acc), wide is None, wide or acc
    own_units: tuple[Tensor, ...] = () if exported else (unit_of(A), unit_of(B))
    if own_units:
        A, B = (t / unit.reshape(-1, *[1] * (t.dim() - 1)) for t, unit in zip((A, B), own_units, strict=True))
    gram_a, gram_b = A @ A.mT, B.mT @ B
    # In float64 the r x r contraction cannot overflow where the Gram matrices did not; rounding may leave it below 0.
    square = (_cast(gram_a, wide) * _cast(gram_b, wide)).sum((-2, -1)).clamp_min(0).reshape(-1)
    alpha, beta, weight_norm, *units = (_cast(t, wide) for t in (alpha, beta, weight_norm, *own_units))
    size = None
    if tau == 0:
        traces = [_cast(gram, wide).diagonal(dim1=-2, dim2=-1).sum(-1) for gram in (gram_a, gram_b)]
        traces = [t / u / u for t, u in zip(traces, units[::-1], strict=True)] if units else traces
        size = safe_sqrt((traces[0] + traces[1]).detach().reshape(-1))
    s_w, s_d, ds_w, ds_d, p = magnitudes(square, size, alpha, beta, weight_norm, tau, relative, acc, units)
    slopes = torch.cat([ds_w, ds_d, s_d, p, *(own_units or (torch.ones_like(p), torch.ones_like(p)))])
    return s_w, s_d, slopes, gram_a, gram_b


@operator(decomposition=partial(scales_in, None))  # mobile runtimes have no float64
def map_scales(
    A: Tensor, B: Tensor, alpha: Tensor, beta: Tensor, weight_norm: Tensor, tau: float, relative: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """s_w and s_d of MAP, and what its gradient needs.

    Args: A (r, K), B (m, r), alpha, beta, weight_norm (1,), tau in units of ||W||_F, relative: alpha and beta are in
    units of ||W||_F, alpha counted from the base; see `magnitudes`.
    Returns: s_w (1,), s_d (1,), slopes (6,) = [d s_w/d alpha, d s_d/d beta, s_d, p, a, b], gram_a = A A^T and
    gram_b = B^T B (r, r), in `accumulate_dtype` of A. p and the Gram matrices are those of A/a and B/b, with a = b = 1
    unless the factors' own squares would overflow, or vanish.
    """
    return scales_in(torch.float64, A, B, alpha, beta, weight_norm, tau, relative)


@operator
def map_scales_backward(
    ds_w: Tensor, ds_d: Tensor, A: Tensor, B: Tensor, slopes: Tensor, gram_a: Tensor, gram_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Closed-form backward of `map_scales`, from the gradients of s_w and s_d.

    Returns: dA = -(ds_d s_d/p^2) (B^T B) A, dB = -(ds_d s_d/p^2) B (A A^T), dalpha, dbeta.
    """
    dA, dB = _through_norm(ds_d, A, B, (slopes, gram_a, gram_b))
    return (-dA).to(A.dtype), (-dB).to(B.dtype), ds_w * slopes[0], ds_d * slopes[1]


def _through_norm(ds_d: Tensor, A: Tensor, B: Tensor, norm: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(ds_d s_d/p^2) (B^T B) A and (ds_d s_d/p^2) B (A A^T), in an order in which nothing leaves the dtype's range."""
    slopes, gram_a, gram_b = norm
    s_d, p, a, b = slopes[2:].split(1)
    p = _or_one(p)  # where it is 0, s_d is
    radial = ds_d / p * s_d / p
    return radial / a * ((gram_b / a) @ A.to(slopes.dtype)), radial / b * (B.to(slopes.dtype) @ (gram_a / b))


def _factor_grads(
    dA: Tensor, dB: Tensor, ds_d: Tensor, A: Tensor, B: Tensor, s_d: Tensor, norm: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of A, B and of s_d or beta. Args: dA (r, K) = B^T D and dB (m, r) = D A^T with D = dL/dW'."""
    acc = s_d.dtype
    dA, dB = s_d * dA.to(acc), s_d * dB.to(acc)
    if norm:
        through_A, through_B = _through_norm(ds_d, A, B, norm)
        dA, dB, ds_d = dA - through_A, dB - through_B, ds_d * norm[0][1]
    return dA.to(A.dtype), dB.to(B.dtype), ds_d


def _base_grad(ds_w: Tensor, norm: Sequence[Tensor]) -> Tensor:
    """Gradient of s_w, or of alpha."""
    return ds_w * norm[0][0] if norm else ds_w


def _nothing(x: Tensor, A: Tensor, B: Tensor, s_d: Tensor) -> tuple[Tensor, ...]:
    """Empty gradients of x, weight, bias, A, B, s_w, s_d: an operator may not return one tensor twice."""
    return tuple(like.new_empty(0) for like in (x, x, x, A, B, s_d, s_d))


# Linear layers -------------------------------------------------------------------------------------------------------


@operator
def lowrank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, s_w: Tensor, s_d: Tensor
) -> tuple[Tensor, Tensor]:
    """y = s_w x W^T + s_d (x A^T) B^T + bias, in activation space: W' is not built.

    Args: x (..., K), weight (m, K) of any strides, bias (m,) or None, A (r, K), B (m, r), s_w, s_d (1,). Matrix
    products run in the dtype of x; weight, bias and factors are cast to it.
    Returns: y (..., m), h = x A^T (..., r).
    """
    dtype = x.dtype
    h = x @ _cast(A, dtype).t()
    y = _cast(s_w, dtype) * (x @ _cast(weight, dtype).t()) + (_cast(s_d, dtype) * h) @ _cast(B, dtype).t()
    return (y if bias is None else y + _cast(bias, dtype)), h


@operator
def lowrank_linear_backward(
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    s_w: Tensor,
    s_d: Tensor,
    norm: Sequence[Tensor],
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    need_factors: bool,
    need_s_w: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Closed-form backward of `lowrank_linear`; G W serves both the gradient of x and that of s_w.

    Args: grad (..., m), x (..., K), h (..., r), norm: see the module's head.
    Returns: dx, dweight, dbias, dA, dB, ds_w, ds_d; what is not needed is an empty (0,) tensor. ds_d comes with the
    factors. dbias is in the dtype of grad, dweight in that of weight.
    """
    dtype, acc = x.dtype, s_d.dtype
    G, X, H = (t[None] if t.dim() == 1 else t.flatten(0, -2) for t in (grad, x, h))  # reshape(-1, 0) is ambiguous
    GB = G @ B.to(dtype)
    dx, dweight, dbias, dA, dB, ds_w, ds_d = _nothing(x, A, B, s_d)
    if need_x or need_s_w:
        GW = G @ weight.to(dtype)
        if need_s_w:
            ds_w = _base_grad(_dot(X, GW, acc), norm)
        if need_x:
            dx = (s_w.to(dtype) * GW + (s_d.to(dtype) * GB) @ A.to(dtype)).reshape(x.shape)
    if need_weight:
        dweight = (s_w.to(dtype) * (G.t() @ X)).to(weight.dtype)
    if need_bias:
        dbias = G.sum(0)
    if need_factors:
        dA, dB, ds_d = _factor_grads(GB.t() @ X, G.t() @ H, _dot(GB, H, acc), A, B, s_d, norm)
    return dx, dweight, dbias, dA, dB, ds_w, ds_d


# Convolutions --------------------------------------------------------------------------------------------------------


def conv_weight_space(m: int, K: int, rank: int, groups: int) -> bool:
    """Whether a convolution is adapted in weight space (W' built for the call) or in activation space.

    Per output position a training step pays beyond the frozen convolution, in multiply-adds: activation space,
    rank (groups K + m) for the forward and twice that for the backward (A is shared by the groups, so each of them
    carries its own rank channels); weight space, the gradient of the dense weight, m K. (Building W' is m K rank once,
    whatever the number of positions.) So 3 rank (groups K + m) > m K means weight space: depthwise and strongly grouped
    convolutions always, ordinary ones when the rank approaches a third of the channels. The number of positions is
    left out on purpose: the choice must not depend on a dynamic shape.

    Args: m out_channels, K = in_channels/groups * prod(kernel_size).
    """
    return 3 * rank * (groups * K + m) > m * K


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation, groups: int) -> Tensor:
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)


def _conv_grads(
    grad: Tensor, x: Tensor, weight: Tensor, stride, padding, dilation, groups: int, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of a bias-free convolution by its input and its weight."""
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, False, [0] * len(stride), groups, [need_x, need_weight, False]
    )
    return dx, dweight


def _down(A: Tensor, weight: Tensor, groups: int) -> Tensor:
    """A (r, K) as the kernel of a convolution, once per group: (groups r, in/groups, *kernel)."""
    A = A.reshape(-1, *weight.shape[1:])
    return A if groups == 1 else A.repeat(groups, *[1] * (weight.dim() - 1))


def _up(B: Tensor, spatial: int) -> Tensor:
    """B (m, r) as the kernel of a 1x1 convolution: (m, r, 1, ...)."""
    return B.reshape(*B.shape, *[1] * spatial)


def _ordered(h: Tensor, x: Tensor, weight: Tensor, stride, padding, groups: int) -> Tensor:
    """h as the native kernels leave it in memory: a 1x1 convolution, a product for each sample, keeps the order of x.

    Traced graphs are planned for these strides, and torch.convolution chooses others for some inputs.
    """
    if groups != 1 or any(size != 1 for size in weight.shape[2:]) or any(padding):
        return h
    read = x
    for i, step in enumerate(stride):
        read = read[(slice(None),) * (i + 2) + (slice(None, None, step),)]
    if not read.is_contiguous() and read.stride(1) == 1 and read.shape[1] > 1:
        return h.movedim(1, -1).contiguous().movedim(-1, 1)
    return h.contiguous()


@operator
def lowrank_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    s_w: Tensor,
    s_d: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    weight_space: bool,
) -> tuple[Tensor, Tensor]:
    """Convolution in 1, 2 or 3 dimensions with W', W seen as (m, K): y = conv(x, s_w W + s_d BA) + bias.

    Args: x (N, C, *spatial), weight (m, C/groups, *kernel), A (r, C/groups prod(kernel)), B (m, r), zero padding;
    weight_space: see `conv_weight_space`; the rest as in `lowrank_linear`.
    Returns: y (N, m, *out), h (N, groups r, *out) or empty (0,) in weight space.
    """
    dtype, spatial, conv = x.dtype, len(stride), (stride, padding, dilation, groups)
    bias = None if bias is None else _cast(bias, dtype)
    if weight_space:
        W = _combine(weight.flatten(1), A, B, s_w, s_d, dtype)
        return _conv(x, W.reshape(weight.shape), bias, *conv), x.new_empty(0)
    down, ones, zeros = _down(_cast(A, dtype), weight, groups), [1] * spatial, [0] * spatial
    h = _ordered(_conv(x, down, None, *conv), x, weight, stride, padding, groups)
    # The bias goes into the convolution that is not scaled.
    update = _conv(_cast(s_d, dtype) * h, _up(_cast(B, dtype), spatial), bias, ones, zeros, ones, groups)
    return _cast(s_w, dtype) * _conv(x, _cast(weight, dtype), None, *conv) + update, h


@operator
def lowrank_conv_backward(
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    s_w: Tensor,
    s_d: Tensor,
    norm: Sequence[Tensor],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    weight_space: bool,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    need_factors: bool,
    need_s_w: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Closed-form backward of `lowrank_conv`. Args and results as in `lowrank_linear_backward`."""
    conv = (stride, padding, dilation, groups)
    spatial, dtype, acc = len(stride), x.dtype, s_d.dtype
    m, rank = B.shape
    dx, dweight, dbias, dA, dB, ds_w, ds_d = _nothing(x, A, B, s_d)
    if need_bias:
        dbias = grad.sum([0, *range(2, 2 + spatial)])
    if weight_space:
        need_d = need_weight or need_factors or need_s_w
        W = _combine(weight.flatten(1), A, B, s_w, s_d, dtype) if need_x else weight.to(dtype)
        into, D = _conv_grads(grad, x, W.reshape(weight.shape), *conv, need_x, need_d)
        dx = into if need_x else dx
        if need_d:
            grads = _weight_grads(D.flatten(1), weight.flatten(1), A, B, s_w, s_d, norm, need_weight)
            dweight = grads[0].reshape(weight.shape) if need_weight else dweight
            dA, dB, ds_d = (grads[1], grads[2], grads[4]) if need_factors else (dA, dB, ds_d)
            ds_w = grads[3] if need_s_w else ds_w
        return dx, dweight, dbias, dA, dB, ds_w, ds_d

    ones, zeros = [1] * spatial, [0] * spatial
    GB, dB_ = _conv_grads(grad, h, _up(B.to(dtype), spatial), ones, zeros, ones, groups, True, need_factors)
    if need_x or need_s_w or need_weight:
        GW, D = _conv_grads(grad, x, weight.to(dtype), *conv, need_x or need_s_w, need_weight)
        if need_weight:
            dweight = (s_w.to(dtype) * D).to(weight.dtype)
        if need_s_w:
            ds_w = _base_grad(_dot(x, GW, acc), norm)
        if need_x:
            dx = s_w.to(dtype) * GW
    if need_x or need_factors:
        GBA, dA_ = _conv_grads(GB, x, _down(A.to(dtype), weight, groups), *conv, need_x, need_factors)
        if need_x:
            dx = dx + s_d.to(dtype) * GBA
        if need_factors:
            dA_ = dA_.reshape(groups, rank, -1).to(acc).sum(0)
            dA, dB, ds_d = _factor_grads(dA_, dB_.reshape(m, rank), _dot(GB, h, acc), A, B, s_d, norm)
    return dx, dweight, dbias, dA, dB, ds_w, ds_d


# The weight itself ---------------------------------------------------------------------------------------------------


def _each(scalar: Tensor, matrices: Tensor) -> Tensor:
    """(1,), or (E,) so that it multiplies the matrices of a stack."""
    return scalar.reshape(-1, 1, 1) if matrices.dim() == 3 else scalar


def _combine(weight: Tensor, A: Tensor, B: Tensor, s_w: Tensor, s_d: Tensor, dtype: torch.dtype) -> Tensor:
    """s_w W + s_d BA in at least float32, rounded once to `dtype`."""
    acc = accumulate_dtype(torch.promote_types(weight.dtype, A.dtype))
    s_w, s_d = _each(_cast(s_w, acc), weight), _each(_cast(s_d, acc), weight)
    return _cast(s_w * _cast(weight, acc) + s_d * (_cast(B, acc) @ _cast(A, acc)), dtype)


@operator
def effective_weight(
    weight: Tensor, A: Tensor, B: Tensor, s_w: Tensor, s_d: Tensor, dtype: torch.dtype | None
) -> Tensor:
    """W' = s_w W + s_d BA, computed in float32 (float64 for float64) and rounded once.

    Args: weight (m, K) of any strides, dtype of the result (None: that of weight), the rest as in `lowrank_linear`.
    The definition takes stacks as well, with scalars (E,); native kernels do not.
    Returns: W' (m, K).
    """
    return _combine(weight, A, B, s_w, s_d, weight.dtype if dtype is None else dtype)


def _weight_grads(
    grad: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    s_w: Tensor,
    s_d: Tensor,
    norm: Sequence[Tensor],
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dweight, dA, dB, ds_w, ds_d of D = dL/dW' (m, K)."""
    acc = accumulate_dtype(torch.promote_types(grad.dtype, A.dtype))
    D = grad.to(acc)
    BD = B.to(acc).t() @ D
    dA, dB, ds_d = _factor_grads(BD, D @ A.to(acc).t(), _dot(BD, A, s_d.dtype), A, B, s_d, norm)
    ds_w = _base_grad(_dot(D, weight, s_d.dtype), norm)
    dweight = (s_w.to(acc) * D).to(weight.dtype) if need_weight else weight.new_empty(0)
    return dweight, dA, dB, ds_w, ds_d


@operator
def effective_weight_backward(
    grad: Tensor, weight: Tensor, A: Tensor, B: Tensor, s_w: Tensor, s_d: Tensor, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Closed-form backward of `effective_weight`.

    Args: grad (m, K) = dL/dW'. Returns: dweight (empty unless needed), dA, dB, ds_w, ds_d.
    """
    return _weight_grads(grad, weight, A, B, s_w, s_d, (), need_weight)


# Rows of the weight that are combined at a time by the in-place operators: bounds their temporary memory.
_MERGE_ELEMENTS = 1 << 22


def _row_blocks(weight: Tensor) -> Iterator[slice]:
    step = max(1, _MERGE_ELEMENTS // max(1, weight.shape[1]))
    return (slice(i, min(i + step, weight.shape[0])) for i in range(0, weight.shape[0], step))


@operator
def merge_(weight: Tensor, A: Tensor, B: Tensor, s_w: Tensor, s_d: Tensor) -> None:
    """weight <- W', in place, block of rows by block of rows: one rounding and no second copy of the weight.

    Args: weight (m, K) of any strides (overwritten), the rest as in `lowrank_linear`.
    """
    for block in _row_blocks(weight):
        rows = weight[block]
        rows.copy_(_combine(rows, A, B[block], s_w, s_d, weight.dtype))


@operator
def unmerge_(weight: Tensor, A: Tensor, B: Tensor, s_w: Tensor, s_d: Tensor) -> None:
    """weight <- (weight - s_d BA) / s_w, in place: the inverse of `merge_` up to the rounding that merging did.

    Args: as in `merge_`; s_w must not be 0 (the base is gone then; the caller checks).
    """
    acc = accumulate_dtype(torch.promote_types(weight.dtype, A.dtype))
    for block in _row_blocks(weight):
        rows = weight[block]
        rows.copy_((rows.to(acc) - s_d.to(acc) * (B[block].to(acc) @ A.to(acc))) / s_w.to(acc))
