"""The operators: against the definition, their derivatives, and what torch's tools require of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from definition import defined_weight
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mapsurgery import ops
from mapsurgery.ops import operators

_ops = torch.ops.mapsurgery
M, K, R = 5, 7, 3
SETTINGS = [(0.0, True), (0.0, False), (0.1, True), (0.1, False)]
settings = pytest.mark.parametrize(
    ("tau", "relative"), SETTINGS, ids=["hard_relative", "hard_absolute", "soft_relative", "soft_absolute"]
)
BACKWARD_NEEDS = [
    (True, True, True, True, True),
    (True, False, False, True, True),
    (False, False, False, True, False),
    (False, False, True, False, True),
    (False, False, False, False, False),
]
NORM = 7  # position of weight_norm, which has no gradient


def factors(dtype: torch.dtype = torch.float64, m: int = M, k: int = K, device: object = "cpu") -> dict[str, Tensor]:
    torch.manual_seed(1)
    made = {
        "weight": torch.randn(m, k, dtype=torch.float64),
        "A": torch.randn(R, k, dtype=torch.float64),
        "B": torch.randn(m, R, dtype=torch.float64),
        "alpha": torch.tensor([0.3], dtype=torch.float64),
        "beta": torch.tensor([0.7], dtype=torch.float64),
    }
    made["weight_norm"] = made["weight"].norm().reshape(1)
    return {name: t.to(dtype).to(device) for name, t in made.items()}


def linear_inputs(dtype: torch.dtype = torch.float64, device: object = "cpu") -> tuple[list[Tensor], Tensor]:
    """(x, weight, bias, A, B, alpha, beta, weight_norm)."""
    f = factors(dtype, device=device)
    x = torch.randn(2, 4, K, dtype=torch.float64).to(dtype).to(device)
    bias = torch.randn(M, dtype=torch.float64).to(dtype).to(device)
    return [x, f["weight"], bias, f["A"], f["B"], f["alpha"], f["beta"], f["weight_norm"]]


CONVS = {
    "1d": ((2, 4, 7), (6, 4, 3), ([2], [1], [1], 1)),
    "2d": ((2, 4, 5, 6), (6, 4, 3, 2), ([1, 2], [1, 0], [2, 1], 1)),
    "2d_grouped": ((2, 4, 5, 5), (6, 2, 3, 3), ([1, 1], [1, 1], [1, 1], 2)),
    "3d": ((1, 2, 3, 4, 4), (4, 2, 2, 2, 2), ([1, 1, 1], [0, 1, 0], [1, 1, 1], 1)),
}
convs = pytest.mark.parametrize("name", CONVS)
spaces = pytest.mark.parametrize("weight_space", [False, True], ids=["activation_space", "weight_space"])


def conv_inputs(name: str, dtype: torch.dtype = torch.float64, device: object = "cpu") -> tuple[list[Tensor], tuple]:
    shape, kernel, conv = CONVS[name]
    m = kernel[0]
    weight = torch.randn(kernel, dtype=torch.float64)
    k = weight[0].numel()
    f = factors(dtype, m, k, device)
    x = torch.randn(shape, dtype=torch.float64)
    bias = torch.randn(m, dtype=torch.float64)
    weight, x, bias = (t.to(dtype).to(device) for t in (weight, x, bias))
    norm = weight.double().norm().reshape(1).to(dtype)
    return [x, weight, bias, f["A"], f["B"], f["alpha"], f["beta"], norm], conv


def requiring(tensors: list[Tensor], but: tuple[int, ...] = (NORM,)) -> list[Tensor]:
    return [t.clone().requires_grad_(i not in but) for i, t in enumerate(tensors)]


def product(name: str, tau: float, relative: bool, dtype: torch.dtype = torch.float64, device: object = "cpu") -> Any:
    """MAP's product of a linear layer or of a convolution: the function, and its tensors (x, ..., weight_norm)."""
    if name == "linear":
        return lambda *t: ops.map_linear(*t, tau, relative), linear_inputs(dtype, device)
    tensors, conv = conv_inputs(name, dtype, device)
    return lambda *t: ops.map_conv(*t, tau, relative, *conv), tensors


def scaled(name: str) -> Any:
    """The product with scalars given: the function, and its tensors (x, weight, bias, A, B, s_w, s_d)."""
    if name == "linear":
        return ops.lowrank_linear, linear_inputs()[:NORM]
    tensors, conv = conv_inputs(name)
    return lambda *t: ops.lowrank_conv(*t, *conv), tensors[:NORM]


products = pytest.mark.parametrize("name", ["linear", *CONVS])


def in_space(monkeypatch: pytest.MonkeyPatch, weight_space: bool) -> None:
    """Convolutions run in this space, whichever is cheaper."""
    monkeypatch.setattr(ops, "conv_weight_space", lambda *_: weight_space)


def stacks(E: int = 3) -> list[Tensor]:
    """(weight, A, B, alpha, beta, weight_norm) of a stack."""
    torch.manual_seed(2)
    weight, A, B = (torch.randn(E, *shape, dtype=torch.float64) for shape in ((M, K), (R, K), (M, R)))
    scalars = [torch.rand(E, dtype=torch.float64) + 0.5 for _ in range(2)]
    return [weight, A, B, *scalars, weight.flatten(1).norm(dim=1)]


# The definition ------------------------------------------------------------------------------------------------------


@settings
@products
@spaces
def test_products_are_the_definition_in_both_spaces(
    name: str, weight_space: bool, tau: float, relative: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_space(monkeypatch, weight_space)
    call, tensors = product(name, tau, relative, device=device)
    x, weight, bias, A, B, alpha, beta, _ = tensors
    W = defined_weight(weight.flatten(1), A, B, alpha, beta, tau, relative).reshape(weight.shape)
    plain = F.linear if name == "linear" else [F.conv1d, F.conv2d, F.conv3d][x.dim() - 3]
    expected = plain(x, W, bias, *(() if name == "linear" else CONVS[name][2]))
    for found in (call(*requiring(tensors)), call(*tensors)):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    if name != "linear":
        torch.testing.assert_close(call(x[0], *tensors[1:]), expected[0], rtol=1e-11, atol=1e-11)


@settings
def test_effective_weight_and_merge_are_the_definition_and_unmerge_undoes_it(
    tau: float, relative: bool, device: torch.device
) -> None:
    _, weight, _, A, B, *rest = linear_inputs(device=device)
    expected = defined_weight(weight, A, B, *rest[:2], tau, relative)
    inputs = (A, B, *ops.map_scales(A, B, *rest, tau, relative))
    torch.testing.assert_close(ops.effective_weight(weight, *inputs), expected)
    merged = weight.clone()
    ops.merge_(merged, *inputs)
    torch.testing.assert_close(merged, expected)
    ops.unmerge_(merged, *inputs)
    torch.testing.assert_close(merged, weight)


@settings
def test_a_stack_is_its_matrices_one_by_one(tau: float, relative: bool) -> None:
    tensors = requiring(stacks(), but=(0, 5))  # the definition would differentiate ||W||_F too
    weight, A, B, *rest = tensors
    W = ops.effective_weight(weight, A, B, *ops.map_scales(A, B, *rest, tau, relative))
    expected = torch.stack([defined_weight(*(t[e] for t in tensors[:5]), tau, relative) for e in range(len(weight))])
    torch.testing.assert_close(W, expected)
    direction = torch.randn_like(W)
    found = torch.autograd.grad(W, tensors[1:5], direction)
    for got, want in zip(found, torch.autograd.grad(expected, tensors[1:5], direction), strict=True):
        torch.testing.assert_close(got, want)


def test_numbers_stand_for_scalars_that_nothing_trains() -> None:
    for name in ("linear", "2d"):
        call, (x, weight, bias, A, B, *_) = scaled(name)
        one, half = torch.ones(1, dtype=torch.float64), torch.full((1,), 0.5, dtype=torch.float64)
        assert torch.equal(call(x, weight, bias, A, B, 1.0, 0.5), call(x, weight, bias, A, B, one, half))
    stack, A, B = stacks()[:3]
    torch.testing.assert_close(ops.effective_weight(stack, A, B, 1.0, 0.5), stack + 0.5 * B @ A)
    f = factors(torch.float32)
    with torch.inference_mode():  # the first to ask for this number
        ops.effective_weight(f["weight"], f["A"], f["B"], 1.0, 0.123)
    A = f["A"].requires_grad_()
    ops.effective_weight(f["weight"], A, f["B"], 1.0, 0.123).sum().backward()


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_norm_of_the_product_is_that_of_the_product(scale: float, device: torch.device) -> None:
    f = factors(device=device)
    expected = 1 / ((f["B"] @ f["A"]).norm().item() * scale)
    for dtype, rel in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        A, B, beta, norm = ((f[n] * (scale if n == "A" else 1)).to(dtype) for n in ("A", "B", "beta", "weight_norm"))
        s_d = ops.map_scales(A, B, beta, torch.ones_like(beta), norm, 0.0, False)[1]
        assert s_d.dtype == dtype and s_d.item() == pytest.approx(expected, rel=rel)


def test_the_norm_of_half_precision_factors_does_not_overflow(device: torch.device) -> None:
    A = torch.full((2, 300), 100.0, dtype=torch.float16, device=device)
    B = torch.full((300, 2), 10.0, dtype=torch.float16, device=device)
    one = torch.ones(1, device=device)
    s_d = ops.map_scales(A, B, one, one, one, 0.0, False)[1]
    assert s_d.item() == pytest.approx(1 / (B.double() @ A.double()).norm().item(), rel=1e-5)


def test_what_is_not_a_number_stays_so() -> None:
    """Training that diverged has to be seen."""
    inputs = linear_inputs()
    for i in range(3, 8):
        for tau in (0.0, 0.1):
            broken = [t.clone() for t in inputs]
            broken[i].view(-1)[0] = float("nan")
            assert ops.map_linear(*broken, tau, False).isnan().any(), (i, tau)


def test_a_zero_weight_has_no_base_term_and_an_absolute_beta() -> None:
    x, weight, bias, A, B, alpha, beta, norm = linear_inputs()
    for relative in (True, False):
        inputs = requiring([x, weight * 0, bias, A, B, alpha, beta, norm * 0])
        y = ops.map_linear(*inputs, 0.0, relative)
        torch.testing.assert_close(y, F.linear(x, beta * (B @ A) / (B @ A).norm(), bias))
        assert all(g.isfinite().all() for g in torch.autograd.grad(y.pow(2).sum(), inputs[:7]))


def test_frobenius_norm_reads_large_strided_and_half_weights_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_NORM_CHUNK", 64)
    big = torch.randn(50, 9)
    for weight in (big, big.t(), big[::2], torch.randn(33, 3, 3, 3).to(memory_format=torch.channels_last), big[:0]):
        assert ops.frobenius_norm(weight) == pytest.approx(weight.double().norm().item(), rel=1e-14)
    assert ops.frobenius_norm(torch.full((400, 400), 60000.0, dtype=torch.float16)) == pytest.approx(
        59999 * 400, rel=1e-3
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes_round_and_nothing_more(dtype: torch.dtype, device: torch.device) -> None:
    x, weight, bias, A, B, alpha, beta, norm = linear_inputs(torch.float32, device)
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    expected = F.linear(x.double(), defined_weight(weight, A, B, alpha, beta, 0.1), bias.double())
    found = ops.map_linear(x, weight, bias, A, B, alpha, beta, weight.double().norm().float().reshape(1), 0.1)
    assert found.dtype == dtype
    assert (found.double() - expected).norm() <= 4 * torch.finfo(dtype).eps * expected.norm()


def test_without_a_product_and_without_softening_the_update_is_zero_with_finite_gradients() -> None:
    x, weight, bias, A, B, alpha, beta, norm = linear_inputs()
    for a, b in ((A, B * 0), (A * 0, B), (A * 0, B * 0)):
        inputs = requiring([x, weight, bias, a, b, alpha, beta, norm])
        y = ops.map_linear(*inputs)
        torch.testing.assert_close(y, F.linear(x, (1 + alpha) * weight, bias))
        grads = torch.autograd.grad(y.pow(2).sum(), inputs[:7])
        assert all(g.isfinite().all() for g in grads)
        if a.any() or b.any():
            assert grads[4 if a.any() else 3].any()


def test_mixed_dtypes_are_refused_as_by_torch() -> None:
    for name in ("linear", "2d"):
        for call, (x, *others) in (product(name, 0.0, True), scaled(name)):
            with pytest.raises(RuntimeError, match="float32"):
                call(x.float(), *others)


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, weight, bias, A, B, alpha, beta, norm = linear_inputs()
    for broken in ([x[..., :-1], weight, bias, A, B], [x, weight, bias, A[:, :-1], B], [x, weight, bias, A, B[:-1]]):
        with pytest.raises(RuntimeError):
            ops.map_linear(*broken, alpha, beta, norm)


# Derivatives ---------------------------------------------------------------------------------------------------------


def check_gradients(call: Callable[..., Any], inputs: list[Tensor], fast: bool = True) -> None:
    assert torch.autograd.gradcheck(call, inputs, fast_mode=fast)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@settings
@products
@spaces
def test_gradcheck_and_gradgradcheck_of_maps_products(
    name: str, weight_space: bool, tau: float, relative: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_space(monkeypatch, weight_space)
    call, tensors = product(name, tau, relative)
    check_gradients(call, requiring(tensors), fast=name != "linear")


@products
@spaces
def test_gradcheck_and_gradgradcheck_of_products(
    name: str, weight_space: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_space(monkeypatch, weight_space)
    call, tensors = scaled(name)
    check_gradients(call, requiring(tensors))
    x, weight, bias, A, B, *_ = tensors
    check_gradients(lambda *t: call(t[0], weight, bias, *t[1:], 1.0, 0.5), requiring([x, A, B]))  # LoRA


@settings
def test_gradcheck_and_gradgradcheck_of_the_scales_and_the_weight(tau: float, relative: bool) -> None:
    _, weight, _, *rest = linear_inputs()
    check_gradients(lambda *t: ops.map_scales(*t, tau, relative), requiring(rest, but=(4,)))
    check_gradients(ops.effective_weight, requiring([weight, *rest[:4]]), fast=False)


def test_gradcheck_and_gradgradcheck_of_a_stack() -> None:
    check_gradients(ops.effective_weight, requiring(stacks()[:5]))
    check_gradients(lambda *t: ops.map_scales(*t, 0.1), requiring(stacks()[1:], but=(4,)))


@products
def test_scales_that_are_handed_in_change_no_derivative(name: str) -> None:
    _, tensors = product(name, 0.1, True)
    conv = () if name == "linear" else CONVS[name][2]
    call = ops.map_conv if conv else ops.map_linear

    def known(*t: Tensor) -> Tensor:
        scales = _ops.map_scales(*(u.detach() for u in t[3:]), 0.1, True)
        return call(*t, 0.1, True, *conv, scales)

    check_gradients(known, requiring(tensors))
    assert torch.equal(known(*tensors), call(*tensors, 0.1, True, *conv))


@pytest.mark.parametrize("absent", range(7))
@pytest.mark.parametrize("name", ["linear", "2d_grouped"])
@spaces
def test_each_gradient_is_the_same_whatever_else_is_asked_for(
    name: str, absent: int, weight_space: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_space(monkeypatch, weight_space)
    for call, base in (product(name, 0.1, True), scaled(name)):
        full, some = requiring(base), requiring(base, but=(absent, NORM))
        y = call(*full)
        direction = torch.randn_like(y)
        expected = torch.autograd.grad(y, full[:7], direction)
        kept = [i for i in range(7) if i != absent]
        found = torch.autograd.grad(call(*some), [some[i] for i in kept], direction)
        for i, got in zip(kept, found, strict=True):
            torch.testing.assert_close(got, expected[i])


def test_the_gradients_of_the_magnitudes_are_those_of_a_merged_weight() -> None:
    x, weight, bias, A, B, alpha, beta, norm = requiring(linear_inputs())
    ops.map_linear(x, weight, bias, A, B, alpha, beta, norm, 0.0, False).pow(2).sum().backward()
    W = defined_weight(weight, A, B, alpha, beta, 0.0, False).detach().requires_grad_()
    F.linear(x, W, bias).pow(2).sum().backward(inputs=[W])
    P = (B @ A).detach()
    torch.testing.assert_close(alpha.grad, ((W.grad * weight).sum() / weight.norm()).reshape(1))
    torch.testing.assert_close(beta.grad, ((W.grad * P).sum() / P.norm()).reshape(1))


# torch's tools -------------------------------------------------------------------------------------------------------

_UTILS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def opcheck(name: str, args: tuple, utils: tuple[str, ...] = _UTILS) -> None:
    torch.library.opcheck(getattr(_ops, name).default, args, test_utils=utils, atol=1e-8, rtol=1e-8)


@pytest.mark.filterwarnings("ignore")
def test_opcheck_scales_linear_and_effective_weight() -> None:
    x, weight, bias, *rest = requiring(linear_inputs())
    for tau, relative in SETTINGS:
        opcheck("map_scales", (*rest, tau, relative))
    opcheck("lowrank_linear", (x, weight, bias, *rest[:4]))
    opcheck("lowrank_linear", (x, weight, None, *rest[:4]))
    opcheck("effective_weight", (weight, *rest[:4], None))
    opcheck("effective_weight", (weight.detach(), *rest[:4], torch.float32))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "2d_grouped" else pytest.mark.long) for n in CONVS])
@pytest.mark.parametrize("weight_space", [False, pytest.param(True, marks=pytest.mark.long)])
def test_opcheck_conv(name: str, weight_space: bool) -> None:
    tensors, conv = conv_inputs(name)
    opcheck("lowrank_conv", (*requiring(tensors)[:7], *conv, weight_space))


def backward_calls(needs: tuple[bool, ...]) -> list[tuple[str, tuple]]:
    """Calls of the backward operators, with and without what belongs to the norm."""
    x, weight, bias, *rest = linear_inputs()
    (image, kernel, _, *others), conv = conv_inputs("2d_grouped")
    s_w, s_d, *norm = _ops.map_scales(*rest, 0.1, True)
    one, two, *other_norm = _ops.map_scales(*others, 0.1, True)
    y, h = _ops.lowrank_linear(x, weight, bias, *rest[:2], s_w, s_d)
    calls = []
    for n, other in ((norm, other_norm), ([], [])):
        args = (torch.randn_like(y), x, h, weight, *rest[:2], s_w, s_d, n, *needs)
        calls.append(("lowrank_linear_backward", args))
        for space in (False, True):
            z, g = _ops.lowrank_conv(image, kernel, None, *others[:2], one, two, *conv, space)
            args = (torch.randn_like(z), image, g, kernel, *others[:2], one, two, other, *conv, space, *needs)
            calls.append(("lowrank_conv_backward", args))
    W = torch.randn_like(weight)
    return [*calls, ("effective_weight_backward", (W, weight, *rest[:2], s_w, s_d, needs[1]))]


@pytest.mark.parametrize("needs", BACKWARD_NEEDS, ids=str)
def test_opcheck_backwards(needs: tuple[bool, ...]) -> None:
    for name, args in backward_calls(needs):
        opcheck(name, args, ("test_schema", "test_faketensor"))


def other_calls() -> list[tuple[str, tuple]]:
    _, weight, _, A, B, *rest = linear_inputs()
    s_w, s_d, *norm = _ops.map_scales(A, B, *rest, 0.1, True)
    merges = [(name, (weight.clone(), A, B, s_w, s_d)) for name in ("merge_", "unmerge_")]
    return [("squared_norm", (weight,)), ("map_scales_backward", (s_w, s_d, A, B, *norm)), *merges]


def test_opcheck_the_rest() -> None:
    for name, args in other_calls():
        opcheck(name, args, ("test_schema", "test_faketensor"))


def test_the_definitions_and_nothing_else_are_the_operators() -> None:
    from mapsurgery.ops.registration import SCHEMAS

    assert all(hasattr(operators, name) and hasattr(_ops, name) for name in SCHEMAS)
    for name, schema in SCHEMAS.items():  # of the text, whoever defined the operator
        assert str(getattr(_ops, name).default._schema) == str(torch._C.parse_schema(f"mapsurgery::{schema}"))


@pytest.mark.parametrize("needs", BACKWARD_NEEDS, ids=str)
def test_no_two_results_of_a_backward_share_memory(needs: tuple[bool, ...]) -> None:
    for name, args in backward_calls(needs):
        assert not any(a is b for a, b in itertools.combinations(getattr(operators, name)(*args), 2))


def test_no_operator_returns_its_argument() -> None:
    A, B, *rest = linear_inputs()[3:]
    results = operators.map_scales(A, B, *rest, 0.1, True)
    assert not any(result is argument for result in results for argument in (A, B, *rest))


def test_the_flop_counter_sees_the_products_of_the_definition() -> None:
    def flops(function: Callable[..., Any], args: tuple) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            function(*args)
        return counter.get_total_flops()

    for needs in BACKWARD_NEEDS:
        for name, args in [*backward_calls(needs), *other_calls()]:
            assert flops(getattr(_ops, name).default, args) == flops(getattr(operators, name), args), name
    x, weight, bias, A, B, *rest = linear_inputs()
    assert flops(_ops.map_scales.default, (A, B, *rest, 0.1, True)) == 2 * R * R * (M + K)
    assert flops(_ops.lowrank_linear.default, (x, weight, bias, A, B, *rest[:2])) == 2 * 8 * (M * K + R * (M + K))


# Autocast, compilers and transforms ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_x_is_cast_and_the_norms_are_not(dtype: torch.dtype) -> None:
    x, weight, bias, *rest = linear_inputs(torch.float32)
    inputs = requiring([x, weight, bias, *rest])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        s_w, s_d, *_ = scales = _ops.map_scales(*rest, 0.1, True)
        direct = _ops.lowrank_linear(x.to(dtype), weight, bias, *rest[:2], s_w, s_d)[0]
        y = ops.map_linear(inputs[0].to(dtype), *inputs[1:], 0.1, True)
        parts = ops.lowrank_linear(x.to(dtype), weight, bias, *rest[:2], *ops.map_scales(*rest, 0.1, True))
    assert y.dtype == direct.dtype == torch.bfloat16 and torch.equal(y, direct) and torch.equal(y, parts)
    assert all(torch.equal(a, b) for a, b in zip(scales, _ops.map_scales(*rest, 0.1, True), strict=True))
    y.float().sum().backward()
    assert [t.grad.dtype for t in inputs[:7]] == [torch.float32] * 7
    expected = F.linear(x.double(), defined_weight(weight, *rest[:4], 0.1), bias.double())
    assert (y.double() - expected).norm() < 0.03 * expected.norm()


def test_conv_under_autocast_is_cast(device: torch.device) -> None:
    (x, *rest), conv = conv_inputs("2d", torch.float32, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert ops.map_conv(x, *rest, 0.1, True, *conv).dtype == torch.bfloat16
        assert ops.lowrank_conv(x, *rest[:4], 1.0, 0.5, *conv).dtype == torch.bfloat16
        assert _ops.lowrank_conv(x, *rest[:-1], *conv, True)[0].dtype == torch.bfloat16
    with torch.autocast(device.type, enabled=False):
        assert ops.map_conv(x, *rest, 0.1, True, *conv).dtype == torch.float32


def test_weights_are_computed_in_full_precision_under_autocast() -> None:
    f, stack = factors(torch.float32), [t.float() for t in stacks()]
    for weight, A, B, *rest in ((f["weight"], f["A"], f["B"], f["alpha"], f["beta"], f["weight_norm"]), stack):
        expected = ops.effective_weight(weight, A, B, *ops.map_scales(A, B, *rest, 0.1))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(ops.effective_weight(weight, A, B, *ops.map_scales(A, B, *rest, 0.1)), expected)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.long])])
def test_compiled_operators_and_their_gradients_are_the_eager_ones(backend: str) -> None:
    tensors, conv = conv_inputs("2d")

    def call(linear: list[Tensor], convolution: list[Tensor], stack: list[Tensor]) -> Tensor:
        y = ops.map_linear(*linear, 0.1, True).sum() ** 2 + ops.map_conv(*convolution, 0.1, True, *conv).pow(2).sum()
        y = y + ops.lowrank_linear(*linear[:5], 1.0, 0.5).pow(2).sum()
        for weight, A, B, *rest in ([linear[1], *linear[3:]], stack):
            y = y + ops.effective_weight(weight, A, B, *ops.map_scales(A, B, *rest, 0.1, True)).pow(2).sum()
        return y

    results = []
    for run in (call, torch.compile(call, fullgraph=True, backend=backend)):
        inputs = requiring(linear_inputs()), requiring(tensors), requiring(stacks(), but=(5,))
        y = run(*inputs)
        results.append([y, *torch.autograd.grad(y, [t for t in tree_leaves(inputs) if t.requires_grad])])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_functional_transforms_follow_the_definition() -> None:
    x, weight, bias, A, B, alpha, beta, norm = linear_inputs()

    def loss(A: Tensor, x: Tensor) -> Tensor:
        known = _ops.map_scales(A.detach() * 2, B, alpha, beta, norm, 0.1, True)  # not used: it has no derivative
        return ops.map_linear(x, weight, bias, A, B, alpha, beta, norm, 0.1, True, known).pow(2).sum()

    def defined(A: Tensor, x: Tensor) -> Tensor:
        return F.linear(x, defined_weight_traceable(A), bias).pow(2).sum()

    def defined_weight_traceable(A: Tensor) -> Tensor:
        BA = B @ A
        return (1 + alpha) * weight + weight.norm() * beta * BA / torch.sqrt((BA**2).sum() + (0.1 * weight.norm()) ** 2)

    def apart(A: Tensor, x: Tensor) -> Tensor:
        s_w, s_d = ops.map_scales(A, B, alpha, beta, norm, 0.1)
        W = ops.effective_weight(weight, A, B, s_w, s_d)
        return (ops.lowrank_linear(x, weight, bias, A, B, s_w, s_d) * F.linear(x, W, bias)).sum()

    torch.testing.assert_close(
        torch.func.vmap(torch.func.grad(apart), (None, 0))(A, x),
        torch.func.vmap(torch.func.grad(defined), (None, 0))(A, x),
    )
    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(A, x)
    torch.testing.assert_close(per_sample, torch.func.vmap(torch.func.grad(defined), (None, 0))(A, x))
    tangent = torch.randn_like(A)
    found = torch.func.jvp(lambda A: loss(A, x), (A,), (tangent,))
    torch.testing.assert_close(found, torch.func.jvp(lambda A: defined(A, x), (A,), (tangent,)))
    hessian = torch.func.hessian(loss)(A, x)
    torch.testing.assert_close(hessian, torch.func.hessian(defined)(A, x))


def test_weight_space_is_chosen_exactly_where_it_is_cheaper() -> None:
    assert ops.conv_weight_space(6, 25, 3, 6)  # depthwise
    assert not ops.conv_weight_space(256, 256 * 9, 8, 1)
    assert ops.conv_weight_space(64, 64, 32, 1)  # rank half of the channels
    for m, k, r, groups in itertools.product((8, 64), (9, 576), (1, 4, 16), (1, 8)):
        assert ops.conv_weight_space(m, k, r, groups) == (3 * r * (groups * k + m) > m * k)
