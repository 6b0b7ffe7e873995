"""W' of a stack of matrices, each with magnitudes and factors of its own: the experts of a mixture.

Each matrix goes through `effective_weight` and its backward, so that nothing of the stack's size is kept but what the
caller holds already. Where a compiler or a transform looks on, the definition is mapped over the stack instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import decompositions, reference

_ops = torch.ops.mapsurgery


def forward(
    weight: Tensor, A: Tensor, B: Tensor, alpha: Tensor, beta: Tensor, norm: Tensor, tau: float, relative: bool
) -> tuple[Tensor, ...]:
    """W' (E, m, K), and the scales and Gram matrices that its gradients need; arguments of `stacked_weight`."""
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    saved = []
    for e, matrix in enumerate(weight):
        numbers = (alpha[e : e + 1], beta[e : e + 1], norm[e : e + 1])
        value, *rest = _ops.effective_weight.default(matrix, A[e], B[e], *numbers, tau, relative, None)
        result[e].copy_(value)
        saved.append(rest)
    return result, *(torch.stack(parts) for parts in zip(*saved, strict=True))


def _mapped(
    weight: Tensor, A: Tensor, B: Tensor, alpha: Tensor, beta: Tensor, norm: Tensor, tau: float, relative: bool
) -> Tensor:
    """W' by the definition, in plain torch."""
    definition = decompositions if torch.compiler.is_exporting() else reference
    one = partial(definition.effective_weight, tau=tau, relative=relative, dtype=None)
    return torch.func.vmap(one)(weight, A, B, alpha.unsqueeze(1), beta.unsqueeze(1), norm.unsqueeze(1))[0]


def gradients(
    tensors: Sequence[Tensor], rest: tuple[Any, ...], saved: Sequence[Tensor], needs: tuple[bool, ...], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of `forward`'s inputs: tensors and rest; saved: what it gave beside W'."""
    if torch.is_grad_enabled():  # create_graph: gradients with a graph of their own, by autograd
        return _differentiable_gradients(tensors, rest, needs, grad)
    parts = [
        _ops.effective_weight_backward.default(*one, needs[0]) for one in zip(grad, *tensors[:3], *saved, strict=True)
    ]
    dweight, dA, dB, dalpha, dbeta = (list(each) for each in zip(*parts, strict=True))
    magnitudes = torch.cat(dalpha), torch.cat(dbeta)
    return torch.stack(dweight) if needs[0] else None, torch.stack(dA), torch.stack(dB), *magnitudes, None, None, None


def _differentiable_gradients(
    tensors: Sequence[Tensor], rest: tuple[Any, ...], needs: tuple[bool, ...], grad: Tensor
) -> tuple[Tensor | None, ...]:
    wanted = [i for i, need in enumerate(needs[: len(tensors)]) if need]
    with torch.enable_grad():
        result = _mapped(*tensors, *rest)  # type: ignore[arg-type]
        found = torch.autograd.grad(result, [tensors[i] for i in wanted], grad, create_graph=True)
    grads: list[Tensor | None] = [None] * (len(tensors) + len(rest))
    for i, value in zip(wanted, found, strict=True):
        grads[i] = value
    return tuple(grads)


class StackedWeightFunction(torch.autograd.Function):
    """`forward` with its closed-form backward; returns W' alone."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            result, *saved = forward(*inputs)
        ctx.save_for_backward(*inputs[:6], *saved)
        ctx.rest = inputs[6:]
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        return gradients(saved[:6], ctx.rest, saved[6:], ctx.needs_input_grad, grad)


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
    inputs = (weight, A, B, alpha, beta, weight_norm, tau, relative)
    tracing = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if tracing or torch.jit.is_tracing() or forward_ad._current_level >= 0:
        return _mapped(*inputs)
    return StackedWeightFunction.apply(*inputs)
