"""The operators: against the definition, their derivatives, and what torch's tools require of them."""

from __future__ import annotations

import itertools

import pytest
import torch
from definition import defined_weight
from mapsurgery.ops.schemas import SCHEMAS
from torch import Tensor
from torch.nn import functional as F

from mapsurgery import ops
from mapsurgery.ops import reference

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


def factors(dtype: torch.dtype = torch.float64, m: int = M, k: int = K, device: object = "cpu") -> dict[str, Tensor]:
    torch.manual_seed(1)
    made = {
        "weight": torch.randn(m, k, dtype=torch.float64),
        "A": torch.randn(R, k, dtype=torch.float64),
        "B": torch.randn(m, R, dtype=torch.float64),
        "alpha": torch.tensor([1.3], dtype=torch.float64),
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


def requiring(tensors: list[Tensor], but: tuple[int, ...] = (7,)) -> list[Tensor]:
    return [t.clone().requires_grad_(i not in but) for i, t in enumerate(tensors)]


# The definition ------------------------------------------------------------------------------------------------------


@settings
def test_linear_is_the_definition(tau: float, relative: bool, device: torch.device) -> None:
    x, weight, bias, A, B, alpha, beta, norm = linear_inputs(device=device)
    expected = F.linear(x, defined_weight(weight, A, B, alpha, beta, tau, relative), bias)
    found = ops.map_linear(x, weight, bias, A, B, alpha, beta, norm, tau, relative)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@settings
@convs
@spaces
def test_conv_is_the_definition_in_both_spaces(
    name: str, weight_space: bool, tau: float, relative: bool, device: torch.device
) -> None:
    (x, weight, bias, *rest), conv = conv_inputs(name, device=device)
    A, B, alpha, beta, _ = rest
    W = defined_weight(weight.flatten(1), A, B, alpha, beta, tau, relative).reshape(weight.shape)
    expected = [F.conv1d, F.conv2d, F.conv3d][x.dim() - 3](x, W, bias, *conv)
    found = torch.ops.mapsurgery.map_conv(x, weight, bias, *rest, tau, relative, *conv, weight_space)[0]
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@settings
def test_effective_weight_and_merge_are_the_definition_and_unmerge_undoes_it(
    tau: float, relative: bool, device: torch.device
) -> None:
    _, weight, _, *rest = linear_inputs(device=device)
    expected = defined_weight(weight, *rest[:4], tau, relative)
    torch.testing.assert_close(ops.effective_weight(weight, *rest, tau, relative), expected)
    merged = weight.clone()
    ops.merge_(merged, *rest, tau, relative)
    torch.testing.assert_close(merged, expected)
    ops.unmerge_(merged, *rest, tau, relative)
    torch.testing.assert_close(merged, weight)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_norm_of_the_product_is_that_of_the_product(scale: float, device: torch.device) -> None:
    f = factors(device=device)
    expected = (f["B"] @ f["A"]).norm().item() * scale
    assert ops.lowrank_norm(f["A"] * scale, f["B"]).item() == pytest.approx(expected, rel=1e-12)
    narrow = ops.lowrank_norm((f["A"] * scale).float(), f["B"].float())
    assert narrow.dtype == torch.float32 and narrow.item() == pytest.approx(expected, rel=1e-5)


def test_the_norm_of_half_precision_factors_does_not_overflow(device: torch.device) -> None:
    A = torch.full((2, 300), 100.0, dtype=torch.float16, device=device)
    B = torch.full((300, 2), 10.0, dtype=torch.float16, device=device)
    assert ops.lowrank_norm(A, B).item() == pytest.approx((B.double() @ A.double()).norm().item(), rel=1e-5)


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
        torch.testing.assert_close(y, F.linear(x, alpha * weight, bias))
        grads = torch.autograd.grad(y.pow(2).sum(), inputs[:7])
        assert all(g.isfinite().all() for g in grads)
        if a.any() or b.any():
            assert grads[4 if a.any() else 3].any()


def test_mixed_dtypes_are_refused_as_by_torch() -> None:
    x, *rest = linear_inputs()
    with pytest.raises(RuntimeError, match="float32"):
        ops.map_linear(x.float(), *rest)
    (x, *rest), conv = conv_inputs("2d")
    with pytest.raises(RuntimeError, match="float32"):
        ops.map_conv(x.float(), *rest, 0.0, True, *conv)


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, weight, bias, A, B, alpha, beta, norm = linear_inputs()
    for broken in ([x[..., :-1], weight, bias, A, B], [x, weight, bias, A[:, :-1], B], [x, weight, bias, A, B[:-1]]):
        with pytest.raises(RuntimeError):
            ops.map_linear(*broken, alpha, beta, norm)


# Derivatives ---------------------------------------------------------------------------------------------------------


@settings
def test_linear_gradcheck_and_gradgradcheck(tau: float, relative: bool) -> None:
    inputs = requiring(linear_inputs())

    def call(*t: Tensor) -> Tensor:
        return ops.map_linear(*t, tau, relative)

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@settings
@convs
@spaces
def test_conv_gradcheck_and_gradgradcheck(name: str, weight_space: bool, tau: float, relative: bool) -> None:
    from mapsurgery.ops.autograd import MapConvFunction

    tensors, conv = conv_inputs(name)
    inputs = requiring(tensors)

    def call(*t: Tensor) -> Tensor:
        return MapConvFunction.apply(*t, tau, relative, *conv, weight_space)

    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@settings
def test_linear_and_conv_with_given_scales_have_the_same_derivatives(tau: float, relative: bool) -> None:
    tensors, conv = conv_inputs("2d_grouped")

    def given(t: tuple[Tensor, ...]) -> ops.Given:
        return ops.map_scales_many([(*(u.detach() for u in t[3:]), tau, relative)])[0]

    def linear(*t: Tensor) -> Tensor:
        return ops.map_linear(*t, tau, relative, given(t))

    def convolution(*t: Tensor) -> Tensor:
        return ops.map_conv(*t, tau, relative, *conv, given(t))

    for call, inputs in ((linear, requiring(linear_inputs())), (convolution, requiring(tensors))):
        assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@settings
def test_effective_weight_gradcheck_and_gradgradcheck(tau: float, relative: bool) -> None:
    _, weight, _, *rest = linear_inputs()
    inputs = requiring([weight, *rest], but=(5,))

    def call(*t: Tensor) -> Tensor:
        return ops.effective_weight(*t, tau, relative)

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("absent", range(7))
def test_each_gradient_is_the_same_whatever_else_is_asked_for(absent: int) -> None:
    (tensors, conv) = conv_inputs("2d_grouped")
    calls = [
        (linear_inputs(), lambda *t: ops.map_linear(*t, 0.1)),
        *((tensors, lambda *t, s=s: torch.ops.mapsurgery.map_conv(*t, 0.1, True, *conv, s)[0]) for s in (False, True)),
    ]
    for base, call in calls:
        full = requiring(base)
        y = call(*full)
        direction = torch.randn_like(y)
        expected = torch.autograd.grad(y, full[:7], direction)
        some = requiring(base, but=(absent, 7))
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


def opcheck(op: object, args: tuple) -> None:
    torch.library.opcheck(op, args, test_utils=_UTILS, atol=1e-8, rtol=1e-8)


@pytest.mark.filterwarnings("ignore")
@settings
def test_opcheck_linear_and_effective_weight(tau: float, relative: bool) -> None:
    x, weight, bias, *rest = requiring(linear_inputs())
    opcheck(torch.ops.mapsurgery.map_linear.default, (x, weight, bias, *rest, tau, relative))
    opcheck(torch.ops.mapsurgery.map_linear.default, (x, weight, None, *rest, tau, relative))
    opcheck(torch.ops.mapsurgery.effective_weight.default, (weight, *rest, tau, relative, None))
    opcheck(torch.ops.mapsurgery.effective_weight.default, (weight.detach(), *rest, tau, relative, torch.float32))


@pytest.mark.filterwarnings("ignore")
@convs
@spaces
def test_opcheck_conv(name: str, weight_space: bool) -> None:
    tensors, conv = conv_inputs(name)
    opcheck(torch.ops.mapsurgery.map_conv.default, (*requiring(tensors), 0.1, True, *conv, weight_space))


@pytest.mark.filterwarnings("ignore")
def test_opcheck_with_given_scales() -> None:
    x, weight, bias, *rest = requiring(linear_inputs())
    given = ops.map_scales_many([(*rest, 0.1, True)])[0]
    opcheck(torch.ops.mapsurgery.map_linear_given.default, (x, weight, bias, *rest, 0.1, True, *given))
    opcheck(torch.ops.mapsurgery.map_linear_given.default, (x, weight, None, *rest, 0.1, True, *given))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["1d", "2d_grouped"])
@spaces
def test_opcheck_conv_with_given_scales(name: str, weight_space: bool) -> None:
    tensors, conv = conv_inputs(name)
    given = ops.map_scales_many([(*tensors[3:], 0.1, True)])[0]
    args = (*requiring(tensors), 0.1, True, *conv, weight_space, *given)
    opcheck(torch.ops.mapsurgery.map_conv_given.default, args)


def _linear_backward_args(needs: tuple[bool, ...]) -> tuple:
    x, weight, bias, *rest = linear_inputs()
    y, h, scales, ga, gb = torch.ops.mapsurgery.map_linear(x, weight, bias, *rest, 0.1, True)
    return (torch.randn_like(y), x, h, weight, rest[0], rest[1], scales, ga, gb, *needs)


@pytest.mark.parametrize("needs", BACKWARD_NEEDS, ids=str)
def test_opcheck_linear_backward(needs: tuple[bool, ...]) -> None:
    op = torch.ops.mapsurgery.map_linear_backward.default
    torch.library.opcheck(op, _linear_backward_args(needs), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("needs", BACKWARD_NEEDS, ids=str)
@spaces
def test_opcheck_conv_backward(needs: tuple[bool, ...], weight_space: bool) -> None:
    (x, weight, bias, *rest), conv = conv_inputs("2d_grouped")
    y, h, scales, ga, gb = torch.ops.mapsurgery.map_conv(x, weight, bias, *rest, 0.1, True, *conv, weight_space)
    args = (torch.randn_like(y), x, h, weight, *rest[:2], scales, ga, gb, *conv, weight_space, *needs)
    op = torch.ops.mapsurgery.map_conv_backward.default
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("need_weight", [True, False])
def test_opcheck_effective_weight_backward(need_weight: bool) -> None:
    _, weight, _, *rest = linear_inputs()
    W, scales, ga, gb = torch.ops.mapsurgery.effective_weight(weight, *rest, 0.1, True, None)
    args = (torch.randn_like(W), weight, *rest[:2], scales, ga, gb, need_weight)
    op = torch.ops.mapsurgery.effective_weight_backward.default
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_opcheck_the_rest() -> None:
    _, weight, _, A, B, *rest = linear_inputs()
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.mapsurgery.lowrank_norm.default, (A, B), test_utils=utils)
    torch.library.opcheck(torch.ops.mapsurgery.map_scales.default, (A, B, *rest, 0.1, True), test_utils=utils)
    many = ([A, A[:2]], [B, B[:, :2]], *([scalar] * 2 for scalar in rest), [0.1, 0.0], [True, False])
    torch.library.opcheck(torch.ops.mapsurgery.map_scales_many.default, many, test_utils=utils)
    for op in (torch.ops.mapsurgery.merge_.default, torch.ops.mapsurgery.unmerge_.default):
        torch.library.opcheck(op, (weight.clone(), A, B, *rest, 0.1, True), test_utils=utils)


@pytest.mark.parametrize("needs", BACKWARD_NEEDS, ids=str)
def test_no_two_results_of_a_backward_share_memory(needs: tuple[bool, ...]) -> None:
    results = reference.map_linear_backward(*_linear_backward_args(needs))
    assert not any(a is b for a, b in itertools.combinations(results, 2))


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_registered_schema_is_the_documented_one(name: str) -> None:
    found = getattr(torch.ops.mapsurgery, name).default._schema
    expected = torch._C.parse_schema(f"mapsurgery::{name}{SCHEMAS[name]}")
    assert str(found) == str(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_x_is_cast_and_the_norms_are_not(dtype: torch.dtype) -> None:
    x, weight, bias, *rest = linear_inputs(torch.float32)
    inputs = requiring([x, weight, bias, *rest])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        direct = torch.ops.mapsurgery.map_linear(x.to(dtype), weight, bias, *rest, 0.1, True)
        y = ops.map_linear(inputs[0].to(dtype), *inputs[1:], 0.1, True)
    assert y.dtype == direct[0].dtype == torch.bfloat16
    assert direct[2].dtype == torch.float32
    y.float().sum().backward()
    assert [t.grad.dtype for t in inputs[:7]] == [torch.float32] * 7
    expected = F.linear(x.double(), defined_weight(weight, *rest[:4], 0.1), bias.double())
    assert (y.double() - expected).norm() < 0.03 * expected.norm()


def test_with_given_scales_autocast_casts_as_without() -> None:
    x, weight, bias, *rest = linear_inputs(torch.float32)
    (image, *others), conv = conv_inputs("2d", torch.float32)
    given = [ops.map_scales_many([(*t, 0.1, True)])[0] for t in (rest, others[2:])]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = torch.ops.mapsurgery.map_linear_given(x, weight, bias, *rest, 0.1, True, *given[0])[0]
        z = torch.ops.mapsurgery.map_conv_given(image, *others, 0.1, True, *conv, False, *given[1])[0]
        assert torch.equal(y, ops.map_linear(x, weight, bias, *rest, 0.1, True))
        assert torch.equal(z, torch.ops.mapsurgery.map_conv(image, *others, 0.1, True, *conv, False)[0])
    assert y.dtype == z.dtype == torch.bfloat16


def test_functional_transforms_pass_given_scales_by() -> None:
    x, weight, bias, A, B, *rest = linear_inputs()
    given = ops.map_scales_many([(A, B, *rest, 0.1, True)])[0]

    def loss(A: Tensor, given: ops.Given | None) -> Tensor:
        return ops.map_linear(x, weight, bias, A, B, *rest, 0.1, True, given).pow(2).sum()

    torch.testing.assert_close(torch.func.grad(loss)(A, given), torch.func.grad(loss)(A, None))
    found, expected = (torch.func.jvp(lambda A, g=g: loss(A, g), (A,), (A,))[1] for g in (given, None))
    torch.testing.assert_close(found, expected)


def test_conv_under_autocast_is_cast(device: torch.device) -> None:
    (x, *rest), conv = conv_inputs("2d", torch.float32, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert ops.map_conv(x, *rest, 0.1, True, *conv).dtype == torch.bfloat16
        assert torch.ops.mapsurgery.map_conv(x, *rest, 0.1, True, *conv, True)[0].dtype == torch.bfloat16
    with torch.autocast(device.type, enabled=False):
        assert ops.map_conv(x, *rest, 0.1, True, *conv).dtype == torch.float32


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_operators_and_their_gradients_are_the_eager_ones(backend: str) -> None:
    tensors, conv = conv_inputs("2d")

    def call(linear: list[Tensor], convolution: list[Tensor]) -> Tensor:
        y = ops.map_linear(*linear, 0.1, True).sum() ** 2 + ops.map_conv(*convolution, 0.1, True, *conv).pow(2).sum()
        return y + ops.effective_weight(linear[1], *linear[3:], 0.1, True).pow(2).sum()

    results = []
    for run in (call, torch.compile(call, fullgraph=True, backend=backend)):
        linear, convolution = requiring(linear_inputs()), requiring(tensors)
        y = run(linear, convolution)
        results.append([y, *torch.autograd.grad(y, [*linear[:7], *convolution[:7]])])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_functional_transforms_follow_the_definition() -> None:
    x, weight, bias, A, B, alpha, beta, norm = linear_inputs()

    def loss(A: Tensor, x: Tensor) -> Tensor:
        return ops.map_linear(x, weight, bias, A, B, alpha, beta, norm, 0.1).pow(2).sum()

    def defined(A: Tensor, x: Tensor) -> Tensor:
        return F.linear(x, defined_weight_traceable(A), bias).pow(2).sum()

    def defined_weight_traceable(A: Tensor) -> Tensor:
        BA = B @ A
        return alpha * weight + weight.norm() * beta * BA / torch.sqrt((BA**2).sum() + (0.1 * weight.norm()) ** 2)

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(A, x)
    torch.testing.assert_close(per_sample, torch.func.vmap(torch.func.grad(defined), (None, 0))(A, x))
    tangent = torch.randn_like(A)
    found = torch.func.jvp(lambda A: loss(A, x), (A,), (tangent,))
    torch.testing.assert_close(found, torch.func.jvp(lambda A: defined(A, x), (A,), (tangent,)))
    hessian = torch.func.hessian(loss)(A, x)
    torch.testing.assert_close(hessian, torch.func.hessian(defined)(A, x))


def test_weight_space_is_chosen_exactly_where_it_is_cheaper() -> None:
    assert reference.conv_weight_space(6, 25, 3, 6)  # depthwise
    assert not reference.conv_weight_space(256, 256 * 9, 8, 1)
    assert reference.conv_weight_space(64, 64, 32, 1)  # rank half of the channels
    for m, k, r, groups in itertools.product((8, 64), (9, 576), (1, 4, 16), (1, 8)):
        assert reference.conv_weight_space(m, k, r, groups) == (3 * r * (groups * k + m) > m * k)
