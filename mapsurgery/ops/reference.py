"""Pure-torch reference of every operator: the definition that the native kernels are tested against.

Source of every formula: "MAP: Revisiting Weight Decomposition for Low-Rank Adaptation" (arXiv 2505.23094), the
equation W' = alpha W/||W||_F + beta BA/||BA||_F, with the norm of BA taken through the two r x r Gram matrices.

Symbols, used as names below: W (m, K) frozen weight as a matrix, A (r, K), B (m, r), alpha, beta (1,), x (..., K).

The scalars of one layer travel together in ``scales``, a (7,) device tensor that the host never reads:

    [S_W]       s_w    = alpha * u_w              what multiplies W
    [S_D]       s_d    = beta * u_d / p           what multiplies BA
    [DS_W]      u_w    = d s_w / d alpha          1/w (absolute alpha) or 1 (alpha relative to w)
    [DS_D]      u_d/p  = d s_d / d beta
    [RADIAL]    s_d / p**2                        factor of the norm's own gradient, see `factor_grads`
    [NORM]      p      = sqrt(||BA||_F**2 + (tau w)**2)
    [ONE]       1                                 for matrix products whose factors have to lie on the device

with w = ||W||_F, or 1 where ||W||_F = 0 (the base term is then 0 by itself, and beta is absolute), u_d = w when beta is
relative and 1 when it is absolute. Where p would be 0 (BA = 0 and tau = 0) the update term is 0 and p is replaced by
sqrt(||A||_F**2 + ||B||_F**2), a number of the factors' own size: the forward is unchanged (BA is 0) and the gradient
is finite and not zero, so that the start B = 0 learns. Where that is 0 too, the update term and its gradients are 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

S_W, S_D, DS_W, DS_D, RADIAL, NORM, ONE = range(7)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of norms, Gram matrices and scalars: float64 for float64 factors, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def squared_norm(weight: Tensor) -> Tensor:
    """||W||_F^2 of a weight of any shape and strides, accumulated in float64; (1,), float64."""
    return torch.linalg.vector_norm(weight, dtype=torch.float64).square().reshape(1)


def lowrank_norm(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """||BA||_F without the product: ||BA||_F^2 = <B^T B, A A^T>, O((m + K) r^2) work and r^2 memory.

    Args: A (r, K), B (m, r), same floating dtype.
    Returns: norm (1,), gram_a = A A^T (r, r), gram_b = B^T B (r, r), in `accumulate_dtype`.
    """
    acc = accumulate_dtype(A.dtype)
    A, B = A.to(acc), B.to(acc)
    gram_a, gram_b = A @ A.t(), B.t() @ B
    # In float64 the r x r contraction cannot overflow where the Gram matrices did not; rounding may leave it below 0.
    square = (gram_a.double() * gram_b.double()).sum().clamp_min(0)
    return safe_sqrt(square).to(acc).reshape(1), gram_a, gram_b


def safe_sqrt(square: Tensor) -> Tensor:
    """sqrt with gradient 0 at 0, where its slope is infinite: 0 * inf would make a NaN gradient. NaN stays NaN."""
    return torch.where(square == 0, 0, torch.where(square == 0, 1, square).sqrt())


def map_scales(
    A: Tensor, B: Tensor, alpha: Tensor, beta: Tensor, weight_norm: Tensor, tau: float, relative: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The scalars of one layer (see the module's head) and the Gram matrices.

    Args: A (r, K), B (m, r), alpha, beta, weight_norm (1,), tau in units of ||W||_F, relative: alpha and beta are
    in units of ||W||_F.
    Returns: scales (7,), gram_a (r, r), gram_b (r, r), in `accumulate_dtype` of A.
    """
    norm, gram_a, gram_b = lowrank_norm(A, B)
    acc = norm.dtype
    trace = (gram_a.diagonal().double().sum() + gram_b.diagonal().double().sum()).detach()
    p, w = softened_norm(norm.double(), safe_sqrt(trace), weight_norm.double(), tau)
    inverse = torch.where(p == 0, 0, 1 / torch.where(p == 0, 1, p))
    u_w = torch.ones_like(w) if relative else 1 / w
    ds_d = (w if relative else 1) * inverse
    s_d = beta.double() * ds_d
    # A division, not a product with u_w: alpha = w then gives exactly 1, and the start is the base bit for bit.
    s_w = alpha.double() if relative else alpha.double() / w
    parts = [s_w, s_d, u_w, ds_d, s_d * inverse * inverse, p, torch.ones_like(p)]
    return torch.cat([part.reshape(1) for part in parts]).to(acc), gram_a, gram_b


def map_scales_many(
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    alpha: Sequence[Tensor],
    beta: Sequence[Tensor],
    weight_norm: Sequence[Tensor],
    tau: Sequence[float],
    relative: Sequence[bool],
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """`map_scales` of many layers, whose arguments are given as lists; all on one device, the factors of one dtype.

    Returns: scales, gram_a, gram_b, a list over the layers of each.
    """
    layers = [map_scales(*layer) for layer in zip(A, B, alpha, beta, weight_norm, tau, relative, strict=True)]
    return [layer[0] for layer in layers], [layer[1] for layer in layers], [layer[2] for layer in layers]


def softened_norm(norm: Tensor, size: Tensor, weight_norm: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """p, what the update is divided by, and w, the unit of magnitudes; see the module's head.

    Args: norm of the update, size: what stands for p where that would be 0, weight_norm; all of one shape and dtype.
    """
    # Comparisons are with 0 alone, so that NaN passes through: training that diverged has to be seen.
    w = torch.where(weight_norm == 0, 1, weight_norm)
    ratio = tau * w / torch.where(norm == 0, 1, norm)
    p = torch.where(norm == 0, tau * w, norm * torch.sqrt(1 + ratio**2))
    return torch.where(p == 0, size, p), w


def magnitudes(
    norm: Tensor, size: Tensor, alpha: Tensor, beta: Tensor, weight_norm: Tensor, tau: float, relative: bool
) -> tuple[Tensor, Tensor]:
    """s_w and s_d of updates of any family, by their norms; differentiable.

    Args: norm, size as in `softened_norm`, the rest as in `map_scales`; all (1,), or (E,) of a stack.
    """
    acc = norm.dtype
    wide = acc if torch.compiler.is_exporting() else torch.float64  # no float64 in an exported graph
    p, w = softened_norm(norm.to(wide), size.to(wide), weight_norm.to(wide), tau)
    inverse = torch.where(p == 0, 0, 1 / torch.where(p == 0, 1, p))
    s_w = alpha.to(wide) if relative else alpha.to(wide) / w
    s_d = beta.to(wide) * ((w if relative else 1) * inverse)
    return s_w.to(acc), s_d.to(acc)


def _dot(a: Tensor, b: Tensor, acc: torch.dtype) -> Tensor:
    """<a, b> accumulated in `acc`, shape (1,)."""
    return (a.to(acc) * b.to(acc)).sum().reshape(1)


def factor_grads(
    dA: Tensor, dB: Tensor, c: Tensor, A: Tensor, B: Tensor, scales: Tensor, gram_a: Tensor, gram_b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of A, B and beta from those of the product term.

    Args: dA (r, K) = B^T D and dB (m, r) = D A^T for D = dL/dW' (both still without s_d), c (1,) = <D, BA>.
    Returns: s_d dA - c RADIAL (B^T B) A, s_d dB - c RADIAL B (A A^T), c u_d/p, in the dtypes of A, B, `scales`.
    """
    acc = scales.dtype
    radial = c * scales[RADIAL]
    dA = scales[S_D] * dA.to(acc) - radial * (gram_b @ A.to(acc))
    dB = scales[S_D] * dB.to(acc) - radial * (B.to(acc) @ gram_a)
    return dA.to(A.dtype), dB.to(B.dtype), c * scales[DS_D]


def map_linear(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y = s_w x W^T + s_d (x A^T) B^T + bias, in activation space: W' is not built.

    Args: x (..., K), weight (m, K) of any strides, bias (m,) or None, the rest as in `map_scales`. Matrix products
    run in the dtype of x; weight, bias and factors are cast to it.
    Returns: y (..., m), h = x A^T (..., r), scales, gram_a, gram_b.
    """
    scales, gram_a, gram_b = map_scales(A, B, alpha, beta, weight_norm, tau, relative)
    y, h = _linear(x, weight, bias, A, B, scales)
    return y, h, scales, gram_a, gram_b


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """y and h of `map_linear`, with the scalars of the layer."""
    dtype = x.dtype
    s_w, s_d = scales[S_W].to(dtype), scales[S_D].to(dtype)
    h = x @ A.to(dtype).t()
    y = s_w * (x @ weight.to(dtype).t()) + (s_d * h) @ B.to(dtype).t()
    return (y if bias is None else y + bias.to(dtype)), h


def map_linear_given(
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
    scales: Tensor,
    gram_a: Tensor,
    gram_b: Tensor,
) -> tuple[Tensor, Tensor]:
    """`map_linear` where `map_scales` of the same A, B, alpha ... is known: it is not computed again.

    The gradients are those of `map_linear`, as if it had been; so alpha and the others are arguments all the same.

    Args: scales, gram_a, gram_b as `map_scales` returns them, the rest as in `map_linear`.
    Returns: y (..., m), h (..., r).
    """
    return _linear(x, weight, bias, A, B, scales)


def _nothing(x: Tensor, A: Tensor, B: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
    """Empty gradients of x, weight, bias, A, B, alpha, beta: an operator may not return one tensor twice."""
    return tuple(like.new_empty(0) for like in (x, x, x, A, B, scales, scales))


def map_linear_backward(
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scales: Tensor,
    gram_a: Tensor,
    gram_b: Tensor,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    need_factors: bool,
    need_alpha: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Closed-form backward of `map_linear`; G W serves both the gradient of x and that of alpha.

    Args: grad (..., m), x (..., K), h (..., r), the rest as saved by the forward.
    Returns: dx, dweight, dbias, dA, dB, dalpha, dbeta; what is not needed is an empty (0,) tensor. dbeta comes with
    the factors. dbias and dweight are in the dtype of grad and of weight.
    """
    dtype, acc = x.dtype, scales.dtype
    G, X, H = (t[None] if t.dim() == 1 else t.flatten(0, -2) for t in (grad, x, h))  # reshape(-1, 0) is ambiguous
    s_w, s_d = scales[S_W].to(dtype), scales[S_D].to(dtype)
    GB = G @ B.to(dtype)
    dx, dweight, dbias, dA, dB, dalpha, dbeta = _nothing(x, A, B, scales)
    if need_x or need_alpha:
        GW = G @ weight.to(dtype)
        if need_alpha:
            dalpha = _dot(X, GW, acc) * scales[DS_W]
        if need_x:
            dx = (s_w * GW + (s_d * GB) @ A.to(dtype)).reshape(x.shape)
    if need_weight:
        dweight = (s_w * (G.t() @ X)).to(weight.dtype)
    if need_bias:
        dbias = G.sum(0)
    if need_factors:
        dA, dB, dbeta = factor_grads(GB.t() @ X, G.t() @ H, _dot(GB, H, acc), A, B, scales, gram_a, gram_b)
    return dx, dweight, dbias, dA, dB, dalpha, dbeta


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


def _conv(x: Tensor, weight: Tensor, stride, padding, dilation, groups: int) -> Tensor:
    return torch.convolution(x, weight, None, stride, padding, dilation, False, [0] * len(stride), groups)


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
    return A.reshape(-1, *weight.shape[1:]).repeat(groups, *[1] * (weight.dim() - 1))


def _up(B: Tensor, spatial: int) -> Tensor:
    """B (m, r) as the kernel of a 1x1 convolution: (m, r, 1, ...)."""
    return B.reshape(*B.shape, *[1] * spatial)


def _channels(t: Tensor, spatial: int) -> Tensor:
    """(C,) made to broadcast over (N, C, *spatial)."""
    return t.reshape(-1, *[1] * spatial)


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
    """MAP convolution in 1, 2 or 3 dimensions: y = conv(x, W') + bias.

    Args: x (N, C, *spatial), weight (m, C/groups, *kernel), A (r, C/groups prod(kernel)), B (m, r), zero padding;
    weight_space: see `conv_weight_space`.
    Returns: y (N, m, *out), h (N, groups r, *out) or empty (0,) in weight space, scales, gram_a, gram_b.
    """
    scales, gram_a, gram_b = map_scales(A, B, alpha, beta, weight_norm, tau, relative)
    y, h = _conv_with(x, weight, bias, A, B, scales, (stride, padding, dilation, groups), weight_space)
    return y, h, scales, gram_a, gram_b


def _conv_with(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scales: Tensor, conv, weight_space: bool
) -> tuple[Tensor, Tensor]:
    """y and h of `map_conv`, with the scalars of the layer; conv: stride, padding, dilation, groups."""
    spatial, groups = x.dim() - 2, conv[-1]
    if weight_space:
        W = _combine(weight.reshape(weight.shape[0], -1), A, B, scales, x.dtype)
        y, h = _conv(x, W.reshape(weight.shape), *conv), x.new_empty(0)
    else:
        s_w, s_d = scales[S_W].to(x.dtype), scales[S_D].to(x.dtype)
        h = _ordered(_conv(x, _down(A.to(x.dtype), weight, groups), *conv), x, weight, conv)
        ones, zeros = [1] * spatial, [0] * spatial
        y = s_w * _conv(x, weight.to(x.dtype), *conv)
        y = y + _conv(s_d * h, _up(B.to(x.dtype), spatial), ones, zeros, ones, groups)
    return (y if bias is None else y + _channels(bias.to(x.dtype), spatial)), h


def _ordered(h: Tensor, x: Tensor, weight: Tensor, conv) -> Tensor:
    """h as the native kernels leave it in memory: a 1x1 convolution, a product for each sample, keeps the order of x.

    Traced graphs are planned for these strides, and torch.convolution chooses others for some inputs.
    """
    stride, padding, _, groups = conv
    if groups != 1 or any(size != 1 for size in weight.shape[2:]) or any(padding):
        return h
    read = x
    for i, step in enumerate(stride):
        read = read[(slice(None),) * (i + 2) + (slice(None, None, step),)]
    if not read.is_contiguous() and read.stride(1) == 1 and read.shape[1] > 1:
        return h.movedim(1, -1).contiguous().movedim(-1, 1)
    return h.contiguous()


def map_conv_given(
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
    scales: Tensor,
    gram_a: Tensor,
    gram_b: Tensor,
) -> tuple[Tensor, Tensor]:
    """`map_conv` where `map_scales` of the same A, B, alpha ... is known; see `map_linear_given`. Returns: y, h."""
    return _conv_with(x, weight, bias, A, B, scales, (stride, padding, dilation, groups), weight_space)


def map_conv_backward(
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scales: Tensor,
    gram_a: Tensor,
    gram_b: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    weight_space: bool,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    need_factors: bool,
    need_alpha: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Closed-form backward of `map_conv`. Args and results as in `map_linear_backward`."""
    conv = (stride, padding, dilation, groups)
    spatial, dtype, acc = len(stride), x.dtype, scales.dtype
    m, rank = B.shape
    s_w, s_d = scales[S_W].to(dtype), scales[S_D].to(dtype)
    dx, dweight, dbias, dA, dB, dalpha, dbeta = _nothing(x, A, B, scales)
    if need_bias:
        dbias = grad.sum([0, *range(2, 2 + spatial)])
    if weight_space:
        need_d = need_weight or need_factors or need_alpha
        W = _combine(weight.reshape(m, -1), A, B, scales, dtype) if need_x else weight.to(dtype)
        dx, D = _conv_grads(grad, x, W.reshape(weight.shape), *conv, need_x, need_d)
        dx = dx if need_x else x.new_empty(0)
        if need_d:
            dweight, dA, dB, dalpha, dbeta = effective_weight_backward(
                D.reshape(m, -1), weight.reshape(m, -1), A, B, scales, gram_a, gram_b, need_weight
            )
            dweight = dweight.reshape(weight.shape) if need_weight else x.new_empty(0)
        return dx, dweight, dbias, dA, dB, dalpha, dbeta

    ones, zeros = [1] * spatial, [0] * spatial
    GB, dB_ = _conv_grads(grad, h, _up(B.to(dtype), spatial), ones, zeros, ones, groups, True, need_factors)
    if need_x or need_alpha or need_weight:
        GW, D = _conv_grads(grad, x, weight.to(dtype), *conv, need_x or need_alpha, need_weight)
        if need_weight:
            dweight = (s_w * D).to(weight.dtype)
        if need_alpha:
            dalpha = _dot(x, GW, acc) * scales[DS_W]
        if need_x:
            dx = s_w * GW
    if need_x or need_factors:
        GBA, dA_ = _conv_grads(GB, x, _down(A.to(dtype), weight, groups), *conv, need_x, need_factors)
        if need_x:
            dx = dx + s_d * GBA
        if need_factors:
            dA_ = dA_.reshape(groups, rank, -1).to(acc).sum(0)
            dA, dB, dbeta = factor_grads(dA_, dB_.reshape(m, rank), _dot(GB, h, acc), A, B, scales, gram_a, gram_b)
    return dx, dweight, dbias, dA, dB, dalpha, dbeta


def _combine(weight: Tensor, A: Tensor, B: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """s_w W + s_d BA in at least float32, rounded once to `dtype`. weight (m, K)."""
    acc = accumulate_dtype(torch.promote_types(weight.dtype, A.dtype))
    s_w, s_d = scales[S_W].to(acc), scales[S_D].to(acc)
    return (s_w * weight.to(acc) + s_d * (B.to(acc) @ A.to(acc))).to(dtype)


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
    """W' = s_w W + s_d BA, computed in float32 (float64 for float64) and rounded once.

    Args: weight (m, K) of any strides, dtype of the result (None: that of weight), the rest as in `map_scales`.
    Returns: W' (m, K), scales, gram_a, gram_b.
    """
    scales, gram_a, gram_b = map_scales(A, B, alpha, beta, weight_norm, tau, relative)
    return _combine(weight, A, B, scales, weight.dtype if dtype is None else dtype), scales, gram_a, gram_b


def effective_weight_backward(
    grad: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scales: Tensor,
    gram_a: Tensor,
    gram_b: Tensor,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Closed-form backward of `effective_weight`.

    Args: grad (m, K) = dL/dW'. Returns: dweight (empty unless needed), dA, dB, dalpha, dbeta.
    """
    acc = accumulate_dtype(torch.promote_types(grad.dtype, A.dtype))
    D = grad.to(acc)
    BD = B.to(acc).t() @ D
    c = _dot(BD, A, scales.dtype)
    dA, dB, dbeta = factor_grads(BD, D @ A.to(acc).t(), c, A, B, scales, gram_a, gram_b)
    dalpha = _dot(D, weight, scales.dtype) * scales[DS_W]
    dweight = (scales[S_W].to(acc) * D).to(weight.dtype) if need_weight else weight.new_empty(0)
    return dweight, dA, dB, dalpha, dbeta


# Rows of the weight that are combined at a time by the in-place operators: bounds their temporary memory.
_MERGE_ELEMENTS = 1 << 22


def _row_blocks(weight: Tensor):
    step = max(1, _MERGE_ELEMENTS // max(1, weight.shape[1]))
    return ((i, min(i + step, weight.shape[0])) for i in range(0, weight.shape[0], step))


def merge_(
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    alpha: Tensor,
    beta: Tensor,
    weight_norm: Tensor,
    tau: float,
    relative: bool,
) -> None:
    """weight <- W', in place, block of rows by block of rows: one rounding and no second copy of the weight.

    Args: weight (m, K) of any strides (overwritten), the rest as in `map_scales`.
    """
    scales, _, _ = map_scales(A, B, alpha, beta, weight_norm, tau, relative)
    for start, stop in _row_blocks(weight):
        rows = weight[start:stop]
        rows.copy_(_combine(rows, A, B[start:stop], scales, weight.dtype))


def unmerge_(
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    alpha: Tensor,
    beta: Tensor,
    weight_norm: Tensor,
    tau: float,
    relative: bool,
) -> None:
    """weight <- (weight - s_d BA) / s_w, in place: the inverse of `merge_` up to the rounding that merging did.

    Args: as in `merge_`; s_w must not be 0 (the base is gone then; the caller checks).
    """
    scales, _, _ = map_scales(A, B, alpha, beta, weight_norm, tau, relative)
    acc = accumulate_dtype(torch.promote_types(weight.dtype, A.dtype))
    s_w, s_d = scales[S_W].to(acc), scales[S_D].to(acc)
    for start, stop in _row_blocks(weight):
        rows = weight[start:stop]
        rows.copy_(((rows.to(acc) - s_d * (B[start:stop].to(acc) @ A.to(acc))) / s_w).to(weight.dtype))
