"""Autograd of the operators in closed form, for eager (`torch.autograd.Function`) and for tracing
(`torch.library.register_autograd`) from the same functions.

Calling a `Function` directly is about twice as quick per eager call as going through `register_autograd`, which is why
both exist. In eager, MAP's product is one node of the graph: `map_scales` and the product in its forward, and one call
of the product's backward, which knows how the scalars came about. Traced graphs hold both operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import operators

_ops = torch.ops.mapsurgery
# The builtin functions below torch's Python wrappers: a forward calls no more Python than it has to.
_map_scales, _lowrank_linear, _lowrank_conv = (
    getattr(_ops, name).default._op for name in ("map_scales", "lowrank_linear", "lowrank_conv")
)
_linear_backward, _conv_backward = _ops.lowrank_linear_backward.default, _ops.lowrank_conv_backward.default

Numbers = tuple[Tensor, float, bool]
"""What `map_scales` takes beside A, B, alpha and beta: ||W||_F, tau, relative."""
Scales = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""What `map_scales` returns: s_w, s_d, slopes, gram_a, gram_b."""
Grads = tuple[Tensor | None, ...]


def below_autograd() -> Any:
    """A block in which operators run without autograd, and without autocast."""
    return torch._C._AutoDispatchBelowAutograd()


def _recording() -> bool:
    """Whether a backward has to leave a graph of its own (create_graph=True). A compiler sees to that itself."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _by_autograd(function: Callable[..., Any], inputs: Sequence[Any], needs: Sequence[bool], grads: Any) -> Grads:
    """Gradients of the inputs with a graph of their own: those of a definition, by torch's autograd."""
    wanted = [i for i, need in enumerate(needs) if need]
    with torch.enable_grad():
        found = torch.autograd.grad(
            function(*inputs), [inputs[i] for i in wanted], grads, create_graph=True, allow_unused=True
        )
    results: list[Tensor | None] = [None] * len(needs)
    for i, value in zip(wanted, found, strict=True):
        results[i] = value
    return tuple(results)


def _needed(results: Sequence[Tensor], needs: Sequence[bool]) -> Grads:
    """An operator's gradients as autograd wants them: one for each input, None where nothing is needed."""
    chosen = [grad if need else None for grad, need in zip(results, needs, strict=False)]
    return (*chosen, *[None] * (len(needs) - len(chosen)))


def plain(y: Tensor) -> Tensor:
    """y, not as a view: torch's 1d convolution is a squeezed 2d one; a caller could not change its result in place."""
    return y.data if y._is_view() else y


def in_torchs_type(error: RuntimeError) -> RuntimeError:
    """An error of a native kernel, whose words are torch's: through its C interface torch hands on no types."""
    is_memory = "CUDA out of memory" in str(error) and not isinstance(error, torch.OutOfMemoryError)
    return torch.OutOfMemoryError(str(error)) if is_memory else error


# The product with W' -------------------------------------------------------------------------------------------------


def defined_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    first: Tensor,
    second: Tensor,
    numbers: Numbers | None,
    settings: Sequence[Any],
) -> Tensor:
    """`Product` by the definitions, in plain torch."""
    s_w, s_d = (first, second) if numbers is None else operators.map_scales(A, B, first, second, *numbers)[:2]
    definition: Callable[..., Any] = operators.lowrank_conv if settings else operators.lowrank_linear
    return definition(x, weight, bias, A, B, s_w, s_d, *settings)[0]


def product(*inputs: Any) -> Tensor:
    """`Product` where nothing records a gradient; the same arguments."""
    x, weight, bias, A, B, first, second, numbers, scales, settings = inputs
    try:
        with torch._C._AutoDispatchBelowAutograd():
            if numbers is not None:
                first, second = (_map_scales(A, B, first, second, *numbers) if scales is None else scales)[:2]
            if settings:
                return plain(_lowrank_conv(x, weight, bias, A, B, first, second, *settings)[0])
            return _lowrank_linear(x, weight, bias, A, B, first, second)[0]
    except RuntimeError as error:
        raise in_torchs_type(error) from None


class Product(torch.autograd.Function):
    """x W'^T + bias or a convolution with W', in eager; returns y alone.

    Args (of `record`): x, weight, bias, A, B; first, second: s_w and s_d, or with `numbers` alpha and beta; scales:
    what `map_scales` gives for them where that is known; settings: what `lowrank_conv` takes after s_d, () of a
    Linear. It keeps what plain LoRA keeps, x and h, and r x r Gram matrices and scalars; nothing of the output's width.
    """

    record: Callable[..., Tensor]  # `apply` without what torch.func needs, who gets the definitions

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, bias, A, B, first, second, numbers, scales, settings = inputs
        try:
            with torch._C._AutoDispatchBelowAutograd():
                s_w, s_d = first, second
                if numbers is not None:
                    if scales is None:
                        scales = _map_scales(A, B, first, second, *numbers)
                    s_w, s_d = scales[:2]
                if settings:
                    y, h = _lowrank_conv(x, weight, bias, A, B, s_w, s_d, *settings)
                    y = plain(y)
                else:
                    y, h = _lowrank_linear(x, weight, bias, A, B, s_w, s_d)
        except RuntimeError as error:
            raise in_torchs_type(error) from None
        ctx.save_for_backward(x, weight, bias, A, B, first, second, h, *(scales or ()))
        ctx.numbers, ctx.settings, ctx.dtype = numbers, settings, weight.dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:
        x, weight, bias, A, B, first, second, h, *scales = ctx.saved_tensors
        weight = weight.to(ctx.dtype)  # a Parameter's data may be stored in another dtype between forwards
        needs = ctx.needs_input_grad[:7]
        if _recording():
            inputs = (x, weight, bias, A, B, first, second, ctx.numbers, ctx.settings)
            return *_by_autograd(defined_product, inputs, needs, grad), None, None, None
        s_w, s_d, *norm = scales or (first, second)
        return *_product_grads(grad, x, h, weight, A, B, s_w, s_d, norm, ctx.settings, needs), None, None, None


Product.record = super(torch.autograd.Function, Product).apply


def _product_grads(
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    s_w: Tensor,
    s_d: Tensor,
    norm: Sequence[Tensor],
    settings: Sequence[Any],
    needs: Sequence[bool],
) -> Grads:
    """Gradients of x, weight, bias, A, B and both scalars, as far as `needs` asks for them."""
    operator = _conv_backward if settings else _linear_backward
    flags = (*needs[:3], needs[3] or needs[4] or needs[6], needs[5])
    try:
        return _needed(operator(grad, x, h, weight, A, B, s_w, s_d, list(norm), *settings, *flags), needs)
    except RuntimeError as error:
        raise in_torchs_type(error) from None


def _save_product(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor]) -> None:
    h = output[1]
    ctx.mark_non_differentiable(h)
    ctx.save_for_backward(*inputs[:7], h)
    ctx.settings = inputs[7:]


def _product_backward(ctx: Any, grad: Tensor, _: Any) -> Grads:
    x, weight, bias, A, B, s_w, s_d, h = ctx.saved_tensors
    needs, settings = ctx.needs_input_grad[:7], ctx.settings
    if _recording():
        inputs = (x, weight, bias, A, B, s_w, s_d, None, settings)
        grads = _by_autograd(defined_product, inputs, needs, grad)
    else:
        grads = _product_grads(grad, x, h, weight, A, B, s_w, s_d, (), settings, needs)
    return *grads, *[None] * len(settings)


# Scalars of MAP ------------------------------------------------------------------------------------------------------


def _save_scales(ctx: Any, inputs: Sequence[Any], output: Scales) -> None:
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*inputs[:5], *output[2:])
    ctx.numbers = inputs[5:]


def _scales_backward(ctx: Any, ds_w: Tensor, ds_d: Tensor, *_: Any) -> Grads:
    A, B, alpha, beta, weight_norm, *kept = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if _recording():
        inputs = (A, B, alpha, beta, weight_norm, *ctx.numbers)
        return _by_autograd(lambda *inputs: operators.map_scales(*inputs)[:2], inputs, needs, (ds_w, ds_d))
    return _needed(_ops.map_scales_backward.default(ds_w, ds_d, A, B, *kept), needs)


class MapScales(torch.autograd.Function):
    """mapsurgery::map_scales in eager."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Scales:
        with below_autograd():
            output = _map_scales(*inputs)
        _save_scales(ctx, inputs, output)
        return output

    backward = staticmethod(_scales_backward)


# The weight itself ---------------------------------------------------------------------------------------------------


def weight_of(weight: Tensor, A: Tensor, B: Tensor, s_w: Tensor, s_d: Tensor, dtype: torch.dtype | None) -> Tensor:
    """mapsurgery::effective_weight, matrix by matrix of a stack."""
    operator = _ops.effective_weight.default
    if weight.dim() == 2:
        return operator(weight, A, B, s_w, s_d, dtype)
    result = torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
    for one, *inputs in zip(result, weight, A, B, s_w.split(1), s_d.split(1), strict=True):
        one.copy_(operator(*inputs, dtype))
    return result


def _weight_grads(grad: Tensor, *inputs: Any) -> Sequence[Tensor]:
    """mapsurgery::effective_weight_backward, matrix by matrix of a stack."""
    operator = _ops.effective_weight_backward.default
    if grad.dim() == 2:
        return operator(grad, *inputs)
    weight, A, B, s_w, s_d, need_weight = inputs
    stacks = (grad, weight, A, B, s_w.split(1), s_d.split(1))
    parts = zip(*(operator(*one, need_weight) for one in zip(*stacks, strict=True)), strict=True)
    dweight, dA, dB, ds_w, ds_d = (torch.stack(part) for part in parts)
    return dweight, dA, dB, ds_w.flatten(), ds_d.flatten()


def _save_weight(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    """The inputs, never W'."""
    ctx.save_for_backward(*inputs[:5])
    ctx.dtype = inputs[5]


def _weight_backward(ctx: Any, grad: Tensor) -> Grads:
    inputs, needs = ctx.saved_tensors, ctx.needs_input_grad
    grad = grad.to_dense() if grad.is_sparse else grad  # of an embedding with sparse=True
    if _recording():
        return _by_autograd(operators.effective_weight, (*inputs, ctx.dtype), needs, grad)
    return _needed(_weight_grads(grad, *inputs, needs[0]), needs)


class EffectiveWeight(torch.autograd.Function):
    """mapsurgery::effective_weight in eager, of stacks as well."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        with below_autograd():
            output = weight_of(*inputs)
        _save_weight(ctx, inputs, output)
        return output

    backward = staticmethod(_weight_backward)


def register() -> None:
    """Give the dispatcher's operators the same backward, for torch.compile, torch.export and direct callers."""
    for name, backward, save in (
        ("map_scales", _scales_backward, _save_scales),
        ("lowrank_linear", _product_backward, _save_product),
        ("lowrank_conv", _product_backward, _save_product),
        ("effective_weight", _weight_backward, _save_weight),
    ):
        # Passed by keyword: ctx, inputs, output.
        torch.library.register_autograd(f"mapsurgery::{name}", backward, setup_context=save)


register()
