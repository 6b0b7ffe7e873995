"""Invariants of MAP that hold for every layer type, in activation space and in weight space."""

from __future__ import annotations

import copy

import pytest
import torch
from definition import CASES, STARTS, Case, Snapshot, defined_weight, patched_case, start_name, weight_of
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.nn import functional as F

import mapsurgery
from mapsurgery.ops import conv_weight_space

every_layer = pytest.mark.parametrize("case", CASES, ids=str)
# The start that is the default, and one of the others, in turn.
every_start = pytest.mark.parametrize(
    ("case", "init"),
    [
        pytest.param(case, init, id=f"{case}-{start_name(init)}")
        for i, case in enumerate(CASES)
        for init in (STARTS[0], STARTS[1 + i % (len(STARTS) - 1)])
    ],
)


def test_the_cases_cover_both_execution_spaces_of_each_convolution() -> None:
    spaces: dict[str, set[bool]] = {}
    for case in CASES:
        layer = case.make()
        if case.fused and isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            m, K = layer.weight.flatten(1).shape
            spaces.setdefault(type(layer).__name__, set()).add(
                conv_weight_space(m, K, min(case.rank, m, K), layer.groups)
            )
    assert spaces == {name: {True, False} for name in ("Conv1d", "Conv2d", "Conv3d")}


@every_layer
def test_plan_names_the_execution_path(case: Case) -> None:
    assert mapsurgery.plan(case.make(), "*").layers[0].way == ("fused" if case.fused else "effective")


@every_start
def test_the_start_is_the_base(case: Case, init: mapsurgery.Init) -> None:
    original, adapted, x = patched_case(case, generic=False, init=init)
    torch.testing.assert_close(adapted(x), original(x), rtol=2e-6, atol=2e-6)
    weight = original.weight.detach()
    assert torch.equal(adapted.weight, weight)  # s_w is exactly 1 and the update exactly 0


@pytest.mark.parametrize("case", [c for c in CASES if c.fused and c.name.startswith("linear")], ids=str)
def test_the_start_of_a_linear_without_bias_is_the_base_bitwise_in_float64_weight_space(case: Case) -> None:
    original, adapted, x = patched_case(case, generic=False, dtype=torch.float64)
    assert torch.equal(adapted.weight, original.weight)
    torch.testing.assert_close(adapted(x), original(x), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_layer
def test_the_start_is_the_base_in_half_precision(case: Case, dtype: torch.dtype) -> None:
    original, adapted, x = patched_case(case, generic=False, dtype=dtype)
    y = adapted(x)
    assert y.dtype == dtype and adapted.adapter.A.dtype == torch.float32
    assert torch.equal(adapted.weight, original.weight)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y, original(x), rtol=2 * eps, atol=4 * eps)


@every_start
def test_forward_is_that_of_the_materialised_weight(case: Case, init: mapsurgery.Init, device: torch.device) -> None:
    original, adapted, x = patched_case(case, dtype=torch.float64, init=init, device=device)
    W = weight_of(adapted)
    expected = functional_call(original, {"weight": W}, (x,))
    torch.testing.assert_close(adapted(x), expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(adapted.weight, W, rtol=1e-12, atol=1e-12)
    assert (adapted(x) - original(x)).abs().max() > 1e-3  # the adapter acts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_layer
def test_forward_has_the_rounding_of_its_dtype(case: Case, dtype: torch.dtype) -> None:
    original, adapted, x = patched_case(case, dtype=dtype)
    expected = functional_call(copy.deepcopy(original).double(), {"weight": weight_of(adapted)}, (x.double(),))
    y = adapted(x)
    assert y.dtype == dtype
    assert (y.double() - expected).norm() <= 8 * torch.finfo(dtype).eps * expected.norm()


@every_layer
def test_gradients_are_those_of_the_materialised_weight(case: Case) -> None:
    original, adapted, x = patched_case(case, dtype=torch.float64)
    names = ["A", "B", "alpha", "beta"]
    a = adapted.adapter
    leaves = [getattr(a, name).detach().clone().requires_grad_() for name in names]
    x.requires_grad_()
    W = adapted.get_parameter("weight").detach()
    transposed = case.name == "transformers_conv1d"
    matrix = W.t() if transposed else W.flatten(1)
    W_ = defined_weight(matrix, *leaves, tau=a.init.beta / a.init.gain)
    W_ = W_.t() if transposed else W_.reshape(W.shape)
    y = functional_call(original, {"weight": W_}, (x,))
    direction = torch.randn_like(y)
    expected = torch.autograd.grad(y, [x, *leaves], direction)
    found = torch.autograd.grad(adapted(x), [x, *(getattr(a, name) for name in names)], direction)
    for name, want, got in zip(["x", *names], expected, found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@every_layer
def test_gradcheck(case: Case) -> None:
    _, adapted, x = patched_case(case, dtype=torch.float64)
    own = adapted.adapter.own_parameters()

    def forward(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        for name, value in zip(own, values, strict=True):
            del adapted.adapter._parameters[name]
            setattr(adapted.adapter, name, value)
        try:
            return adapted(x)
        finally:
            for name, parameter in own.items():
                delattr(adapted.adapter, name)
                adapted.adapter.register_parameter(name, parameter)

    inputs = [x.requires_grad_(), *(p.detach().clone().requires_grad_() for p in own.values())]
    assert torch.autograd.gradcheck(forward, inputs, fast_mode=True)


@every_layer
def test_a_trained_bias_gets_its_gradient(case: Case) -> None:
    original, adapted, x = patched_case(case, dtype=torch.float64)
    if original.bias is None:
        pytest.skip("no bias")
    adapted.bias.requires_grad_()
    bias = original.bias.detach().clone().requires_grad_()
    y = functional_call(original, {"weight": weight_of(adapted), "bias": bias}, (x,))
    direction = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, bias, direction)
    (found,) = torch.autograd.grad(adapted(x), adapted.bias, direction)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["zero", "random"])
@every_layer
def test_the_direction_has_no_radial_gradient(case: Case, kind: str) -> None:
    _, adapted, x = patched_case(case, dtype=torch.float64, init=kind)
    adapted(x).pow(3).sum().backward()
    a = adapted.adapter
    for factor in (a.A, a.B):
        assert factor.grad.abs().max() > 1e-6
        assert abs((factor.grad * factor).sum()) <= 1e-12 * factor.grad.norm() * factor.norm() * 100


@pytest.mark.parametrize("scale", [1e-6, 1e-2, 3.0, 1e6])
@every_layer
def test_scaling_a_factor_changes_nothing(case: Case, scale: float) -> None:
    _, adapted, x = patched_case(case, dtype=torch.float64, init="zero")
    before, y = adapted.weight.detach().clone(), adapted(x).detach()
    with torch.no_grad():
        adapted.adapter.A.mul_(scale)
    torch.testing.assert_close(adapted.weight, before, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(adapted(x), y, rtol=1e-8, atol=1e-8)


@every_layer
def test_the_first_step_does_not_jump(case: Case) -> None:
    _, adapted, x = patched_case(case, generic=False)
    W, lr = adapted.weight.detach().clone(), 1e-3
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    adapted(x).pow(3).sum().backward()
    optimizer.step()
    change = (weight_of(adapted) - W).norm() / W.norm()
    assert 0 < change < 20 * lr


@every_start
def test_every_adapter_parameter_gets_a_finite_gradient(case: Case, init: mapsurgery.Init) -> None:
    _, adapted, x = patched_case(case, generic=False, init=init)
    adapted(x).pow(2).sum().backward()
    grads = {name: p.grad for name, p in adapted.adapter.own_parameters().items()}
    assert all(g is not None and g.isfinite().all() for g in grads.values())
    assert any(grads[name].any() for name in ("A", "B", "beta"))
    assert adapted.get_parameter("weight").grad is None


@every_layer
def test_merge_is_the_adapted_forward_and_leaves_the_original_class(case: Case) -> None:
    original, adapted, x = patched_case(case, dtype=torch.float64)
    expected = adapted(x).detach()
    mapsurgery.merge(adapted)
    assert type(adapted) is type(original) and list(adapted.state_dict()) == list(original.state_dict())
    torch.testing.assert_close(adapted(x), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_layer
def test_merge_rounds_once(case: Case, dtype: torch.dtype) -> None:
    _, adapted, _ = patched_case(case, dtype=dtype)
    W = weight_of(adapted)
    mapsurgery.merge(adapted)
    assert adapted.weight.dtype == dtype
    # One rounding to the dtype; where that is float32 the products and sums of W' round as well.
    slack = 0.501 if dtype != torch.float32 else 8
    torch.testing.assert_close(adapted.weight.double(), W, rtol=slack * torch.finfo(dtype).eps, atol=1e-6)


@every_layer
def test_unpatch_gives_back_the_original_bitwise(case: Case) -> None:
    torch.manual_seed(3)
    layer = case.make()
    if layer.bias is not None:
        layer.bias.requires_grad_(False)
    snapshot = Snapshot(layer)
    mapsurgery.patch(layer, "*", rank=case.rank)
    assert isinstance(layer, type(case.make())) and isinstance(layer, mapsurgery.AdaptedLayer)
    layer(torch.randn(case.shape)).sum().backward()
    mapsurgery.unpatch(layer)
    snapshot.assert_holds(layer)


@every_layer
def test_disabled_is_the_base_bitwise(case: Case) -> None:
    original, adapted, x = patched_case(case)
    with mapsurgery.disabled(adapted):
        assert torch.equal(adapted(x), original(x))
        assert torch.equal(adapted.weight, original.weight)
    assert not torch.equal(adapted(x), original(x))


@every_layer
def test_every_parameter_name_leads_to_its_parameter(case: Case) -> None:
    _, adapted, _ = patched_case(case)
    for name, parameter in adapted.named_parameters():
        assert adapted.get_parameter(name) is parameter


@every_layer
def test_save_and_load_give_the_same_output_bitwise(case: Case, tmp_path) -> None:
    original, adapted, x = patched_case(case)
    mapsurgery.save(adapted, tmp_path / "a.safetensors")
    loaded = mapsurgery.load(copy.deepcopy(original), tmp_path / "a.safetensors")
    assert torch.equal(loaded(x), adapted(x))


@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_gives_the_dtype_that_the_base_gives(case: Case, dtype: torch.dtype) -> None:
    original, adapted, x = patched_case(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = x.to(dtype)
        expected, y = original(x), adapted(x)
        assert y.dtype == expected.dtype
        y.float().sum().backward()
    reference = functional_call(copy.deepcopy(original).double(), {"weight": weight_of(adapted)}, (x.double(),))
    assert (y.double() - reference).norm() <= 10 * torch.finfo(torch.bfloat16).eps * reference.norm()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapted.adapter.own_parameters().values())


@every_layer
def test_mixed_dtypes_are_refused_outside_autocast(case: Case) -> None:
    _, adapted, x = patched_case(case)
    with pytest.raises(RuntimeError):
        adapted(x.double())


@every_layer
def test_verify_passes(case: Case) -> None:
    _, adapted, x = patched_case(case, generic=False)
    assert not mapsurgery.verify(adapted, x).failures


# What backward keeps -------------------------------------------------------------------------------------------------


def _saved(module: nn.Module, x: torch.Tensor) -> dict[int, torch.Tensor]:
    """Tensors kept for backward, by storage, without the module's own parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers()]}
    found: dict[int, torch.Tensor] = {}
    keep = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        keep.append(t)
        if t.untyped_storage().data_ptr() not in own:
            found[t.untyped_storage().data_ptr()] = t
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        y = module(x)
    assert y.requires_grad
    return found


class _PlainLora(nn.Module):
    """y = x W^T + b + g (x A^T) B^T: what MAP's memory is compared with."""

    def __init__(self, layer: nn.Module, rank: int) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        conv = isinstance(layer, nn.Conv2d)
        m, K = layer.weight.flatten(1).shape
        self.A = nn.Parameter(torch.randn(rank, *layer.weight.shape[1:]))
        self.B = nn.Parameter(torch.randn(m, rank, *([1, 1] if conv else [])))
        self.conv = conv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.conv:
            return self.layer(x) + F.conv2d(F.conv2d(x, self.A, None, self.layer.stride, self.layer.padding), self.B)
        return self.layer(x) + F.linear(F.linear(x, self.A), self.B)


@pytest.mark.parametrize(
    ("make", "shape"),
    [(lambda: nn.Linear(40, 48), (64, 40)), (lambda: nn.Conv2d(24, 40, 3, padding=1), (2, 24, 10, 10))],
    ids=["linear", "conv2d"],
)
def test_backward_keeps_what_plain_lora_keeps_and_rank_by_rank_matrices(make, shape) -> None:
    rank = 4
    x = torch.randn(shape, requires_grad=True)
    lora = sum(t.untyped_storage().nbytes() for t in _saved(_PlainLora(make(), rank), x).values())
    kept = _saved(mapsurgery.patch(make(), "*", rank=rank), x)
    extra = (2 * rank * rank + 8) * 4  # two Gram matrices and the scalars
    assert sum(t.untyped_storage().nbytes() for t in kept.values()) <= lora + extra


@every_layer
def test_backward_of_a_fused_layer_keeps_nothing_of_the_weights_or_the_outputs_size(case: Case) -> None:
    if not case.fused:
        pytest.skip("its own forward keeps what it keeps")
    _, adapted, x = patched_case(case)
    x = x.requires_grad_()
    y = adapted(x)
    m, K = adapted.adapter.matrix.view(adapted.get_parameter("weight")).shape
    rank = adapted.adapter.rank
    allowed = {x.shape, (rank, rank), (1,), (6,)}  # the last are slopes of the scales
    for t in _saved(adapted, x).values():
        is_h = rank * (adapted.groups if hasattr(adapted, "groups") else 1) in t.shape
        padded = (
            x.dim() == t.dim() and t.shape[-len(adapted.stride) - 1 :][:1] == x.shape[-len(adapted.stride) - 1 :][:1]
            if hasattr(adapted, "stride")
            else False
        )
        unbatched = t.shape == (1, *x.shape)
        assert tuple(t.shape) in allowed or is_h or padded or unbatched or t.numel() == 0, t.shape
        assert t.shape != (m, K) and t.shape != adapted.get_parameter("weight").shape
        assert t.shape != y.shape or t.shape == x.shape


# What a layer is besides its forward ---------------------------------------------------------------------------------


def test_dropout_acts_on_the_update_alone_and_only_in_training() -> None:
    for case in [c for c in CASES if c.fused]:
        original, adapted, x = patched_case(case, dropout=0.5)
        adapted.eval()
        assert torch.equal(adapted(x), adapted(x)), case.name
        adapted.train()
        assert not torch.equal(adapted(x), adapted(x)), case.name
        with torch.no_grad():
            adapted.adapter.B.zero_()
            adapted.adapter.alpha.zero_()
        torch.testing.assert_close(adapted(x), original(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", {type(c.make()): c for c in CASES if c.fused}.values(), ids=str)
def test_dropout_gives_the_adapted_output_on_average_and_trains_all(case: Case) -> None:
    _, adapted, x = patched_case(case, dropout=0.25, dtype=torch.float64)
    expected = adapted.eval()(x).detach()
    adapted.train()
    mean = torch.stack([adapted(x).detach() for _ in range(400)]).mean(0)
    assert (mean - expected).norm() < 0.1 * expected.norm() + 0.1
    adapted(x).pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapted.adapter.own_parameters().values())


@every_layer
def test_the_weight_of_an_adapted_layer_is_not_assigned_but_written(case: Case) -> None:
    _, adapted, _ = patched_case(case, dtype=torch.float64)
    with pytest.raises(AttributeError, match="get_parameter"):
        adapted.weight = nn.Parameter(torch.zeros(1))
    base = adapted.get_parameter("weight")
    with torch.no_grad():
        base.mul_(3)
    read = adapted.weight.detach() + 0
    torch.testing.assert_close(adapted.adapter.weight_norm, base.norm().reshape(1))
    torch.testing.assert_close(read, weight_of(adapted))


@pytest.mark.parametrize("case", [CASES[0], CASES[7]], ids=str)
def test_an_empty_batch_gives_an_empty_output_and_zero_gradients(case: Case) -> None:
    original, adapted, x = patched_case(case)
    y = adapted(x[:0])
    assert y.shape == original(x[:0]).shape
    y.sum().backward()
    assert all(not p.grad.any() for p in adapted.adapter.own_parameters().values())


@every_layer
def test_a_strided_input_gives_what_its_contiguous_copy_gives(case: Case) -> None:
    _, adapted, x = patched_case(case, dtype=torch.float64)
    strided = torch.stack([x, torch.full_like(x, float("nan"))], -1)[..., 0]
    assert not strided.is_contiguous()
    torch.testing.assert_close(adapted(strided), adapted(x), rtol=1e-12, atol=1e-12)


def test_channels_last_convolutions_compute_the_same() -> None:
    case = next(c for c in CASES if c.name == "conv2d")
    _, adapted, x = patched_case(case, dtype=torch.float64)
    expected = adapted(x).detach()
    adapted = adapted.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    torch.testing.assert_close(adapted(x), expected, rtol=1e-11, atol=1e-11)
    adapted(x).sum().backward()
    assert x.grad.shape == x.shape


def test_a_patched_layer_is_still_of_its_class_and_named_after_it() -> None:
    layer = mapsurgery.patch(nn.Linear(4, 4), "*", rank=2)
    assert type(layer).__name__ == "MapLinear" and isinstance(layer, nn.Linear)
    case = next(c for c in CASES if c.name == "timm_std_conv")
    _, adapted, _ = patched_case(case)
    assert type(adapted).__name__ == "MapStdConv2d" and isinstance(adapted, type(case.make()))
    assert "rank=3" in repr(adapted)


def test_a_zero_weight_has_no_base_term_and_an_absolute_update() -> None:
    for init in STARTS:
        layer = nn.Linear(6, 5).double()
        nn.init.zeros_(layer.weight)
        original = copy.deepcopy(layer)
        x = torch.randn(3, 6, dtype=torch.float64)
        mapsurgery.patch(layer, "*", rank=2, init=init)
        assert torch.equal(layer(x), original(x))
        layer(x).pow(2).sum().backward()
        assert all(p.grad.isfinite().all() for p in layer.adapter.own_parameters().values())
        with torch.no_grad():
            layer.adapter.B.normal_()
            layer.adapter.beta.fill_(0.3)
        torch.testing.assert_close(layer.weight, weight_of(layer))
        if init.kind != "soft":
            assert layer.weight.norm().item() == pytest.approx(0.3)
        torch.testing.assert_close(layer(x), F.linear(x, weight_of(layer), original.bias))
