"""Weights and factors of any size that float32 holds: nothing is NaN, and no adapter is silently the base."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import mapsurgery
from mapsurgery import ops
from mapsurgery.ops import operators

M, K = 12, 20
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 2e-4}


def defined(x: Tensor, W: Tensor, A: Tensor, B: Tensor, beta: Tensor, tau: float, grad: Tensor) -> tuple[Tensor, ...]:
    """y and the gradients of A, B and beta by the formula, in float64, which holds all of these squares."""
    x, W, grad = x.double(), W.double(), grad.double()
    A, B, beta = (t.detach().double().requires_grad_() for t in (A, B, beta))
    delta, norm = B @ A, W.norm()
    square = delta.square().sum() + (tau * norm) ** 2
    p = square.sqrt() if square > 0 else (A.square().sum() + B.square().sum()).sqrt().detach()
    y = x @ (W + beta * norm / p * delta).T
    return y.detach(), *torch.autograd.grad(y, (A, B, beta), grad)


def close(got: Tensor, want: Tensor, tolerance: float) -> bool:
    """Beside the largest number; below 1e-37 float32 has fewer digits."""
    return bool((got.double() - want).abs().max() <= tolerance * want.abs().max() + 1e-41)


@pytest.mark.parametrize("pure", [False, True], ids=["operators", "definitions"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "norm, a, b",
    [
        (1e-18, 1e-19, 0.0),  # ||W||_F^2 is no number of float32, as the start has it
        (1e-30, 1e-31, 0.0),
        (1e-37, 1e-38, 0.0),
        (1e-30, 1e-31, 1e-3),
        (1e20, 1e19, 1e-3),
        (1e35, 1e34, 1e-3),
        (1e37, 1e36, 0.0),
        (1.0, 1e-20, 1.0),
        (1.0, 1e20, 1e-3),
        (1.0, 1e-3, 1e20),
        (1.0, 1.0, 1e-20),
        (1e-6, 1e20, 1e-20),
        (1e20, 1.0, 1.0),
    ],
)
def test_a_product_and_its_gradients_at_any_size(pure, dtype, norm, a, b) -> None:
    torch.manual_seed(0)
    for rank, tau in ((3, 0.025), (12, 0.0)):
        check_product(pure, dtype, rank, tau, norm, a, b)


def check_product(pure, dtype, rank, tau, norm, a, b) -> None:
    wide = operators.accumulate_dtype(dtype)
    W, x, grad = torch.randn(M, K).double(), torch.randn(4, K).to(wide), torch.randn(4, M).to(wide)
    W, grad = (W * (norm / W.norm())).to(wide), grad / max(norm, 1.0)
    A, B = (torch.randn(rank, K).double() * a).to(dtype), (torch.randn(M, rank).double() * b).to(dtype)
    beta = torch.full((1,), 0.3, dtype=dtype)
    want = defined(x, W, A, B, beta, tau, grad)
    leaves = [t.requires_grad_() for t in (A, B, torch.zeros_like(beta), beta)]
    length = W.double().norm().to(wide).reshape(1)
    run = ops.map_linear
    if pure:

        def run(x, W, bias, *rest):  # by autograd of the definitions
            s_w, s_d = operators.map_scales(*rest)[:2]
            return operators.lowrank_linear(x, W, bias, *rest[:2], s_w, s_d)[0]

    y = run(x, W, None, *leaves, length, tau, True)
    dA, dB, _, dbeta = torch.autograd.grad(y, leaves, grad)
    rounded = 1e-2 if dtype == torch.bfloat16 else TOLERANCE[dtype]
    assert close(y, want[0], TOLERANCE[dtype])
    assert all(close(got, wanted, rounded) for got, wanted in zip((dA, dB, dbeta), want[1:], strict=True))


@pytest.mark.parametrize("a, b", [(1e-20, 1e-3), (1e20, 1e-3), (1.0, 1e-20), (1e-25, 1e20)])
def test_the_backward_of_the_scales_alone_and_stacks(a: float, b: float) -> None:
    torch.manual_seed(0)
    A, B, w = torch.randn(2, 3, K) * a, torch.randn(2, M, 3) * b, torch.tensor([1.0, 2.0])
    beta = torch.full((2,), 0.3)

    def both(A: Tensor, B: Tensor, beta: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        A, B = A.requires_grad_(), B.requires_grad_()
        s_d = ops.map_scales(A, B, torch.zeros_like(beta), beta, w, 0.025, True)[1]
        return s_d.detach(), *torch.autograd.grad(s_d.sum(), (A, B))

    stacked = both(A.clone(), B.clone(), beta, w)
    for e in range(2):
        one = both(A[e].clone(), B[e].clone(), beta[e : e + 1], w[e : e + 1])
        exact = both(A[e].double(), B[e].double(), beta[e : e + 1].double(), w[e : e + 1].double())
        for got, alone, want in zip(stacked, one, exact, strict=True):
            assert close(got[e], want.squeeze(0) if want.dim() == 1 else want, 1e-4) and close(alone, want, 1e-4)


def test_a_scale_that_no_dtype_holds_is_seen() -> None:
    """s_d below float32's numbers: at 0 the layer would compute with the base, without a word."""
    A, B, one = torch.full((2, K), 1e35), torch.full((M, 2), 1e35), torch.ones(1)
    for of in (ops.map_scales, operators.map_scales):
        s_d = of(A, B, one, one, one, 0.0, True)[1]
        assert s_d.isnan()


@pytest.mark.parametrize("norm", [1e-37, 1e-25, 1e-19, 1e21, 1e30, 1e37])
@pytest.mark.parametrize("init", ["soft", "zero", "random"])
def test_a_patched_layer_of_any_size_learns_from_the_first_step(norm: float, init: str) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(K, M, bias=False))
    with torch.no_grad():
        layer[0].weight.mul_(norm / layer[0].weight.double().norm().item())
    x = torch.randn(4, K)
    before = layer(x)
    mapsurgery.patch(layer, ["0"], rank=2, init=init)
    y = layer(x)
    assert close(y, before.double(), 1e-5)
    (y / norm).square().sum().backward()
    gradients = [p.grad for p in layer.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in gradients) and any(g.any() for g in gradients)
    with torch.no_grad():
        layer[0].adapter.B.add_(0.01 * torch.randn_like(layer[0].adapter.B))
        layer[0].adapter.beta.add_(0.1)
    y = layer(x).double()
    assert not close(y, before.double(), 1e-3)
    assert close(nn.functional.linear(x, layer[0].weight), y, 1e-5)
    assert close(mapsurgery.merge(layer)(x), y, 1e-5)


@pytest.mark.parametrize(
    "value, dtype, options, said",
    [
        (1e-40, torch.float32, {}, r"the weight of 0 has \|\|W\|\|_F = 1\.55e-39"),
        (3e38, torch.float32, {}, r"the weight of 0 has \|\|W\|\|_F = 4\.65e\+39"),
        (1e200, torch.float64, {}, r"the weight of 0 has \|\|W\|\|_F = inf"),
        (1e-18, torch.float32, {"method": "dora"}, "1.55e-17; method 'dora'"),
        (1e18, torch.float32, {"update": "dense"}, "method 'map' with update 'dense' computes with 1e-15 to 1e\\+15"),
        (float("nan"), torch.float32, {}, "holds NaN or infinite values"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_changed(value, dtype, options, said) -> None:
    layer = nn.Sequential(nn.Linear(K, M, bias=False, dtype=dtype))
    with torch.no_grad():
        layer[0].weight.fill_(value)
    with pytest.raises(ValueError, match=said):
        mapsurgery.patch(layer, ["0"], rank=2, **options)
    assert type(layer[0]) is nn.Linear and layer[0].weight.requires_grad


def narrow(dtype: torch.dtype | None) -> nn.Module:
    torch.manual_seed(0)
    return mapsurgery.patch(nn.Sequential(nn.Linear(K, M)).half(), ["0"], rank=2, dtype=dtype)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(4, K, dtype=torch.float16)).float().square().mean().backward()
    optimizer.step()


def test_adapters_in_float16_are_warned_of_and_those_that_are_advised_train() -> None:
    with pytest.warns(UserWarning, match="float16 are NaN after a step of AdamW.*Leave out dtype.*bfloat16") as said:
        model = narrow(torch.float16)
    assert len(said) == 1
    optimizer = torch.optim.AdamW(mapsurgery.param_groups(model, lr=1e-3))
    with pytest.raises(mapsurgery.VerificationError, match="0: the optimiser's eps=1e-08 is 0 in float16"):
        mapsurgery.verify(model, torch.randn(4, K, dtype=torch.float16), optimizer=optimizer)
    step(model, optimizer)
    assert model[0].adapter.A.isnan().any()  # what the warning says


@pytest.mark.filterwarnings("ignore:adapters in float16")
def test_an_eps_that_float16_holds_is_fine() -> None:
    model = narrow(torch.float16)
    optimizer = torch.optim.AdamW(mapsurgery.param_groups(model, lr=1e-3), eps=1e-4)
    assert mapsurgery.verify(model, torch.randn(4, K, dtype=torch.float16), optimizer=optimizer)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_what_is_advised_instead_of_float16_trains(dtype: torch.dtype | None) -> None:
    model = narrow(dtype)
    optimizer = torch.optim.AdamW(mapsurgery.param_groups(model, lr=1e-3))
    assert mapsurgery.verify(model, torch.randn(4, K, dtype=torch.float16), optimizer=optimizer)
    before = model[0].adapter.B.clone()
    step(model, optimizer)
    assert all(p.isfinite().all() for p in model.parameters()) and not torch.equal(model[0].adapter.B, before)
