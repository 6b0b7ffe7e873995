"""W' of a stack of matrices, each with magnitudes and factors of its own: the experts of a mixture.

The definition is `reference.effective_weight`, mapped over the first dimension by ``torch.func.vmap``; the backward is
its closed form, mapped alike, so that nothing of the stack's size is kept but what the caller holds already.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import reference


def _forward(inputs: tuple[Tensor, ...], tau: float, relative: bool) -> tuple[Tensor, ...]:
    weight, A, B, alpha, beta, norm = inputs
    one = partial(reference.effective_weight, tau=tau, relative=relative, dtype=None)
    return torch.func.vmap(one)(weight, A, B, alpha.unsqueeze(1), beta.unsqueeze(1), norm.unsqueeze(1))


class StackedWeightFunction(torch.autograd.Function):
    """W' (E, m, K) of weight (E, m, K), A (E, r, K), B (E, m, r), alpha, beta, norm (E,)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, tau, relative = inputs
        result, *saved = _forward(tuple(tensors), tau, relative)
        ctx.save_for_backward(*tensors, *saved)
        ctx.settings = (tau, relative)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need_weight = ctx.needs_input_grad[0]
        if torch.is_grad_enabled():  # create_graph: gradients with a graph of their own, by autograd
            return _differentiable_gradients(ctx, grad)
        one = partial(reference.effective_weight_backward, need_weight=need_weight)
        weight, A, B, _, _, _, *saved = ctx.saved_tensors
        dweight, dA, dB, dalpha, dbeta = torch.func.vmap(one)(grad, weight, A, B, *saved)
        return dweight if need_weight else None, dA, dB, dalpha.squeeze(1), dbeta.squeeze(1), None, None, None


def _differentiable_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors[:6]
    wanted = [i for i, need in enumerate(ctx.needs_input_grad[:6]) if need]
    with torch.enable_grad():
        result = _forward(tensors, *ctx.settings)[0]
        found = torch.autograd.grad(result, [tensors[i] for i in wanted], grad, create_graph=True)
    grads: list[Tensor | None] = [None] * 8
    for i, value in zip(wanted, found, strict=True):
        grads[i] = value
    return tuple(grads)


def stacked_weight(
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    alpha: Tensor,
    beta: Tensor,
    weight_norm: Tensor,
    tau: float = 0.0,
    relative: bool = True,
) -> Tensor:
    """W'_e = alpha_e W_e/||W_e||_F + beta_e B_e A_e/sqrt(||B_e A_e||_F^2 + tau^2) for every e (arXiv 2505.23094).

    Args: weight (E, m, K), A (E, r, K), B (E, m, r), alpha, beta, weight_norm (E,); the rest as in `map_linear`.
    Returns: (E, m, K) in the dtype of weight, computed in float32 (float64 for float64) and rounded once.
    """
    tensors = (weight, A, B, alpha, beta, weight_norm)
    tracing = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if tracing or forward_ad._current_level >= 0:
        return _forward(tensors, tau, relative)[0]
    return StackedWeightFunction.apply(*tensors, tau, relative)
