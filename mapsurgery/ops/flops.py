"""Floating-point operations of the operators, for `torch.utils.flop_counter.FlopCounterMode`.

Counted as torch counts: two for each multiply-add of a matrix product or convolution, nothing for elementwise work.
Each formula is that of the products in `reference`; arguments are shapes in the place of tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

_Shape = list[int]


def _grams(A: _Shape, B: _Shape, *_: Any, **__: Any) -> int:
    """A A^T and B^T B; also what the gradient of ||BA||_F takes, (B^T B) A and B (A A^T)."""
    return 2 * A[0] ** 2 * (A[1] + B[0])


def _squared_norm(weight: _Shape, **_: Any) -> int:
    """No product: elementwise work is not counted."""
    return 0


def _product(A: _Shape, B: _Shape) -> int:
    """BA, of A (r, K) and B (m, r)."""
    return 2 * B[0] * B[1] * A[1]


def _linear(x: _Shape, weight: _Shape, bias: _Shape | None, A: _Shape, B: _Shape, *_: Any, **__: Any) -> int:
    """x W^T, x A^T and h B^T."""
    rows = prod(x[:-1])
    return 2 * rows * (prod(weight) + prod(A) + prod(B)) + _grams(A, B)


def _grams_of_many(A: list[_Shape], B: list[_Shape], *_: Any, **__: Any) -> int:
    return sum(map(_grams, A, B))


def _linear_given(x: _Shape, weight: _Shape, bias: _Shape | None, A: _Shape, B: _Shape, *_: Any, **__: Any) -> int:
    """`_linear` without the Gram matrices."""
    return _linear(x, weight, bias, A, B) - _grams(A, B)


def _linear_backward(
    grad: _Shape,
    x: _Shape,
    h: _Shape,
    weight: _Shape,
    A: _Shape,
    B: _Shape,
    scales: _Shape,
    gram_a: _Shape,
    gram_b: _Shape,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    need_factors: bool,
    need_alpha: bool,
    **_: Any,
) -> int:
    """G B always, G W for x or alpha, (G B) A for x, G^T X for W, (G B)^T X and G^T H for the factors."""
    dense = (need_x or need_alpha) + need_weight
    per_row = dense * prod(weight) + (1 + need_factors) * prod(B) + (need_x + need_factors) * prod(A)
    return 2 * prod(x[:-1]) * per_row + need_factors * _grams(A, B)


def _kernels(A: _Shape, B: _Shape, weight: _Shape, groups: int) -> tuple[list[int], list[int]]:
    """Shapes of A and B as kernels of convolutions: (groups r, in/groups, *kernel) and (m, r, 1, ...)."""
    return [groups * A[0], *weight[1:]], [*B, *[1] * (len(weight) - 2)]


def _conv(
    x: _Shape,
    weight: _Shape,
    bias: _Shape | None,
    A: _Shape,
    B: _Shape,
    alpha: _Shape,
    beta: _Shape,
    weight_norm: _Shape,
    tau: float,
    relative: bool,
    stride: _Shape,
    padding: _Shape,
    dilation: _Shape,
    groups: int,
    weight_space: bool,
    out_shape: Any,
) -> int:
    return _grams(A, B) + _conv_products(x, weight, A, B, groups, weight_space, *out_shape[:2])


def _conv_given(
    x: _Shape, weight: _Shape, bias: _Shape | None, A: _Shape, B: _Shape, *others: Any, out_shape: Any, **_: Any
) -> int:
    """`_conv` without the Gram matrices; groups and weight_space stand before the three that are given."""
    groups, weight_space = others[-5:-3]
    return _conv_products(x, weight, A, B, groups, weight_space, *out_shape)


def _conv_products(
    x: _Shape, weight: _Shape, A: _Shape, B: _Shape, groups: int, weight_space: bool, y: _Shape, h: _Shape
) -> int:
    dense = conv_flop_count(x, weight, y)
    if weight_space:
        return dense + _product(A, B)
    down, up = _kernels(A, B, weight, groups)
    return dense + conv_flop_count(x, down, h) + conv_flop_count(h, up, y)


def _conv_backward(
    grad: _Shape,
    x: _Shape,
    h: _Shape,
    weight: _Shape,
    A: _Shape,
    B: _Shape,
    scales: _Shape,
    gram_a: _Shape,
    gram_b: _Shape,
    stride: _Shape,
    padding: _Shape,
    dilation: _Shape,
    groups: int,
    weight_space: bool,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    need_factors: bool,
    need_alpha: bool,
    **_: Any,
) -> int:
    if weight_space:
        need_d = need_weight or need_factors or need_alpha
        dense = need_x * _product(A, B) + _conv_grads(grad, x, weight, need_x, need_d)
        return dense + need_d * _weight_backward(weight, weight, A, B)
    down, up = _kernels(A, B, weight, groups)
    middle = [h[0], groups * A[0], *h[2:]]
    total = _conv_grads(grad, middle, up, True, need_factors) + need_factors * _grams(A, B)
    total += _conv_grads(grad, x, weight, need_x or need_alpha, need_weight)
    return total + _conv_grads(middle, x, down, need_x, need_factors)


def _conv_grads(grad: _Shape, x: _Shape, weight: _Shape, need_x: bool, need_weight: bool) -> int:
    """What torch counts for aten::convolution_backward."""
    total = conv_flop_count(grad, weight, x, transposed=True) if need_x else 0
    if need_weight:
        total += conv_flop_count(_swapped(x), _swapped(grad), _swapped(weight))
    return total


def _swapped(shape: _Shape) -> list[int]:
    """Batch and channels exchanged."""
    return [shape[1], shape[0], *shape[2:]]


def _weight(weight: _Shape, A: _Shape, B: _Shape, *_: Any, **__: Any) -> int:
    return _product(A, B) + _grams(A, B)


def _weight_backward(grad: _Shape, weight: _Shape, A: _Shape, B: _Shape, *_: Any, **__: Any) -> int:
    """B^T D and D A^T."""
    return 2 * _product(A, B) + _grams(A, B)


_FORMULAS: dict[str, Callable[..., int]] = {
    "squared_norm": _squared_norm,
    "lowrank_norm": _grams,
    "map_scales": _grams,
    "map_scales_many": _grams_of_many,
    "map_linear": _linear,
    "map_linear_given": _linear_given,
    "map_linear_backward": _linear_backward,
    "map_conv": _conv,
    "map_conv_given": _conv_given,
    "map_conv_backward": _conv_backward,
    "effective_weight": _weight,
    "effective_weight_backward": _weight_backward,
    "merge_": _weight,
    "unmerge_": _weight,
}


def register() -> None:
    """Called once, on import of `mapsurgery.ops`: a counter takes the formulas known when it is made.

    The counter's module imports triton, 0.1 to 0.3 s that the first optimiser of a process would take as well. Later
    would need a hook in Python's imports: torch has no registry that is there without the module.
    """
    for name, formula in _FORMULAS.items():
        register_flop_formula(getattr(torch.ops.mapsurgery, name))(formula)
