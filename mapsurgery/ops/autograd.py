"""Autograd of the operators: closed-form backward, for eager (`torch.autograd.Function`) and for tracing
(`torch.library.register_autograd`) from the same static functions.

Source: the derivatives of W' = alpha W/||W||_F + beta BA/||BA||_F (arXiv 2505.23094) by x, A, B, alpha and beta, as
written out in `reference`. Calling a `Function` directly is about twice as quick per eager call as going through
`register_autograd`, which is why both exist.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference

_ops = torch.ops.mapsurgery

# Positions of the operators' tensor inputs, the same in map_linear and map_conv.
_X, _WEIGHT, _BIAS, _A, _B, _ALPHA, _BETA, _NORM, _TAU, _RELATIVE = range(10)
_GIVEN = 3
"""How many of the last inputs of map_linear_given and map_conv_given are what `reference.map_scales` returns."""


def _grad_of_reference(
    forward: Callable[..., tuple[Tensor, ...]], inputs: list[Any], needs: tuple[bool, ...], grad: Tensor
) -> list[Tensor | None]:
    """Gradients with a graph of their own (create_graph=True): those of the reference, by autograd."""
    wanted = [i for i, need in enumerate(needs) if need and isinstance(inputs[i], Tensor)]
    with torch.enable_grad():
        out = forward(*inputs)[0]
        found = torch.autograd.grad(out, [inputs[i] for i in wanted], grad, create_graph=True, allow_unused=True)
    grads: list[Tensor | None] = [None] * len(inputs)
    for i, value in zip(wanted, found, strict=True):
        grads[i] = value
    return grads


def _flags(needs: tuple[bool, ...]) -> tuple[bool, bool, bool, bool, bool]:
    """need_x, need_weight, need_bias, need_factors, need_alpha."""
    return needs[_X], needs[_WEIGHT], needs[_BIAS], needs[_A] or needs[_B] or needs[_BETA], needs[_ALPHA]


def _select(needs: tuple[bool, ...], results: tuple[Tensor, ...], inputs: int) -> tuple[Tensor | None, ...]:
    """The operator's results as autograd wants them: one per forward input, None where nothing is needed."""
    dx, dweight, dbias, dA, dB, dalpha, dbeta = results
    grads = (dx, dweight, dbias, dA, dB, dalpha, dbeta)
    chosen = [grad if need else None for grad, need in zip(grads, needs, strict=False)]
    return (*chosen, *[None] * (inputs - len(chosen)))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep what plain LoRA keeps (x and h) plus r x r Gram matrices and scalars; nothing of the output's width."""
    y, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(*inputs[:_TAU], *kept)
    ctx.rest = inputs[_TAU:]
    ctx.inputs = len(inputs)


def _save_given(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """The same tensors, in the same order, where scales and Gram matrices are the last inputs and not outputs."""
    y, h = output
    ctx.mark_non_differentiable(h)
    ctx.save_for_backward(*inputs[:_TAU], h, *inputs[-_GIVEN:])
    ctx.rest = inputs[_TAU:-_GIVEN]
    ctx.inputs = len(inputs)


def _backward(ctx: Any, grad: Tensor, forward: Callable[..., tuple[Tensor, ...]], op: Any) -> tuple[Tensor | None, ...]:
    x, weight, bias, A, B, alpha, beta, norm, h, scales, gram_a, gram_b = ctx.saved_tensors
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        inputs = [x, weight, bias, A, B, alpha, beta, norm, *ctx.rest]
        grads = _grad_of_reference(forward, inputs, ctx.needs_input_grad[: len(inputs)], grad)
        return (*grads, *[None] * (ctx.inputs - len(inputs)))
    settings = ctx.rest[_RELATIVE + 1 - _TAU :]
    results = op(grad, x, h, weight, A, B, scales, gram_a, gram_b, *settings, *_flags(ctx.needs_input_grad))
    return _select(ctx.needs_input_grad, results, ctx.inputs)


def linear_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return _backward(ctx, grad, reference.map_linear, _ops.map_linear_backward.default)


def conv_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return _backward(ctx, grad, reference.map_conv, _ops.map_conv_backward.default)


def weight_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """As `_save`, for effective_weight: its inputs and the scalars, never W'."""
    _, scales, gram_a, gram_b = output
    ctx.mark_non_differentiable(scales, gram_a, gram_b)
    weight, A, B, alpha, beta, norm, tau, relative, dtype = inputs
    ctx.save_for_backward(weight, A, B, alpha, beta, norm, scales, gram_a, gram_b)
    ctx.rest = (tau, relative, dtype)


def weight_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *tensors, scales, gram_a, gram_b = ctx.saved_tensors
    return weight_gradients(tensors, ctx.rest, (scales, gram_a, gram_b), ctx.needs_input_grad, grad)


def weight_gradients(
    tensors: Sequence[Tensor],
    rest: tuple[Any, ...],
    saved: tuple[Tensor, Tensor, Tensor],
    needs: tuple[bool, ...],
    grad: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of effective_weight's inputs (tensors: weight, A, B, alpha, beta, weight_norm; rest: the others)."""
    weight, A, B = tensors[:3]
    grad = grad.to_dense() if grad.is_sparse else grad  # of an embedding with sparse=True
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return tuple(_grad_of_reference(reference.effective_weight, [*tensors, *rest], needs, grad))
    results = _ops.effective_weight_backward.default(grad, weight, A, B, *saved, needs[0])
    return (*[g if need else None for g, need in zip(results, needs, strict=False)], *[None] * 4)


def plain(y: Tensor) -> Tensor:
    """y, not as a view: torch's 1d convolution is a squeezed 2d one; a caller could not change its result in place."""
    return y.data if y._is_view() else y


class MapLinearFunction(torch.autograd.Function):
    """Eager autograd of mapsurgery::map_linear; returns y alone."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            output = _ops.map_linear.default(*inputs)
        _save(ctx, inputs, output)
        return output[0]

    backward = staticmethod(linear_backward)


class MapConvFunction(torch.autograd.Function):
    """Eager autograd of mapsurgery::map_conv; returns y alone."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            output = _ops.map_conv.default(*inputs)
        _save(ctx, inputs, output)
        return plain(output[0])

    backward = staticmethod(conv_backward)


class MapLinearGivenFunction(torch.autograd.Function):
    """Eager autograd of mapsurgery::map_linear_given; returns y alone. The backward is that of map_linear."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            output = _ops.map_linear_given.default(*inputs)
        _save_given(ctx, inputs, output)
        return output[0]

    backward = staticmethod(linear_backward)


class MapConvGivenFunction(torch.autograd.Function):
    """Eager autograd of mapsurgery::map_conv_given; returns y alone. The backward is that of map_conv."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            output = _ops.map_conv_given.default(*inputs)
        _save_given(ctx, inputs, output)
        return plain(output[0])

    backward = staticmethod(conv_backward)


class EffectiveWeightFunction(torch.autograd.Function):
    """Eager autograd of mapsurgery::effective_weight; returns W' alone."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            output = _ops.effective_weight.default(*inputs)
        weight_save(ctx, inputs, output)
        return output[0]

    backward = staticmethod(weight_backward)


def register() -> None:
    """Give the dispatcher's operators the same backward, for torch.compile, torch.export and direct callers."""
    for name, backward, save in (
        ("map_linear", linear_backward, _save),
        ("map_linear_given", linear_backward, _save_given),
        ("map_conv", conv_backward, _save),
        ("map_conv_given", conv_backward, _save_given),
        ("effective_weight", weight_backward, weight_save),
    ):
        torch.library.register_autograd(f"mapsurgery::{name}", backward, setup_context=_setup(save))


def _setup(save: Callable[[Any, tuple[Any, ...], tuple[Tensor, ...]], None]) -> Callable[..., None]:
    """register_autograd passes `inputs` and `output` by keyword."""
    return lambda ctx, inputs, output: save(ctx, inputs, output)
