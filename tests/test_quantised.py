"""Layers with a quantised weight: they run on their own kernel, and everything else is measured with W dequantised."""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from definition import STARTS, Snapshot, start_name, to_generic_point, weight_by
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import mapsurgery
from mapsurgery import ops
from mapsurgery.methods import Adapter
from mapsurgery.surgery.quantised import kinds
from mapsurgery.surgery.quantised.layer import QuantisedLinear

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*matmul_4bit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*register_constant.*"),
]

K, M = 64, 96


class Packed4(nn.Module):
    """Two 4-bit codes in a byte and a scale for each group of inputs, as AutoGPTQ's QuantLinear holds them."""

    group = 16

    def __init__(self, source: nn.Linear, group: int = 16) -> None:
        super().__init__()
        self.group, (self.out_features, self.in_features) = group, source.weight.shape
        groups = source.weight.detach().unflatten(1, (-1, group))
        scales = groups.abs().amax(-1, keepdim=True) / 7
        codes = (groups / scales).round().add(8).to(torch.uint8).flatten(1)
        self.register_buffer("qweight", codes[:, ::2] | codes[:, 1::2] << 4)
        self.register_buffer("scales", scales.squeeze(-1))
        self.register_buffer("bias", None if source.bias is None else source.bias.detach().clone())

    def unpacked(self) -> Tensor:
        codes = torch.stack([self.qweight & 15, self.qweight >> 4], -1).flatten(1).to(self.scales.dtype) - 8
        return (codes.unflatten(1, (-1, self.group)) * self.scales.unsqueeze(-1)).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.unpacked(), self.bias)


class OldNames(nn.Module):
    """The sizes under AutoGPTQ's old names, and a Parameter that is no floating one."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__()
        self.outfeatures, self.infeatures = source.weight.shape
        scale = source.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((source.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = source.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


class Tanh(Packed4):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


class RoundedInput(Packed4):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x * 16).round() / 16)


class WrongBias(Packed4):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.bias


class Fails(Packed4):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("no such kernel")


class Narrow(Packed4):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., :3]


def source(bias: bool = True) -> nn.Linear:
    torch.manual_seed(7)
    return nn.Linear(K, M, bias=bias)


def bnb_4bit(bias: bool = True, **options: Any) -> nn.Module:
    bnb = importlib.import_module("bitsandbytes")
    blocksize = options.pop("blocksize", 64)
    layer = bnb.nn.Linear4bit(K, M, bias=bias, compute_dtype=torch.float32, **options)
    layer.weight.blocksize = blocksize
    layer.load_state_dict(source(bias).state_dict())
    return layer.to("cpu")


def bnb_8bit(threshold: float = 0.0) -> nn.Module:
    bnb = importlib.import_module("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(K, M, has_fp16_weights=False, threshold=threshold)
    layer.load_state_dict(source().state_dict())
    return layer.to("cpu")


@functools.cache
def int8_saturates() -> bool:
    """On some processors (AVX-512 without VNNI) torch's product of int8 adds up in int16, and bitsandbytes uses it."""
    layer, x = source(), data()
    with torch.no_grad():
        return bool((bnb_8bit().eval()(x) - layer(x)).norm() > 0.02 * layer(x).norm())


def torchao(config: str, *args: Any) -> nn.Module:
    api = importlib.import_module("torchao.quantization")
    layer = source()
    api.quantize_(layer, getattr(api, config)(*args))
    return layer


def torchao_group(bits: torch.dtype, size: int) -> nn.Module:
    return torchao("IntxWeightOnlyConfig", bits, importlib.import_module("torchao.quantization").PerGroup(size))


def gguf() -> nn.Module:
    package, utils = importlib.import_module("gguf"), importlib.import_module("diffusers.quantizers.gguf.utils")
    kind = package.GGMLQuantizationType.Q8_0
    codes = package.quants.quantize(source().weight.detach().numpy(), kind)
    layer = utils.GGUFLinear(K, M, bias=True, compute_dtype=torch.float32)
    layer.weight, layer.bias = utils.GGUFParameter(torch.from_numpy(codes), quant_type=kind), source().bias
    return layer


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], nn.Module]
    packages: str = ""
    """What must be installed, by a space between two."""
    error: float = 1e-6
    """Of the kernel against x W^T, as a share: int8 kernels round x as well."""
    requantises: bool = True
    copies: bool = True
    pickles: bool = True

    def __str__(self) -> str:
        return self.name

    def built(self) -> nn.Module:
        """The layer behind a plain one, so that its input can have a gradient."""
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(K, K), self.make()).eval()

    def patched(self, **options: Any) -> nn.Module:
        return mapsurgery.patch(self.built(), **{"targets": "1", "rank": 4, **options})


CASES = [
    Case("packed", lambda: Packed4(source()), requantises=False),
    Case("packed_no_bias", lambda: Packed4(source(False)), requantises=False),
    Case("packed_old_names", lambda: OldNames(source()), requantises=False),
    Case("gguf", gguf, "gguf diffusers", requantises=False, copies=False, pickles=False),
    Case("bnb_fp4", bnb_4bit, "bitsandbytes"),
    Case("bnb_nf4", lambda: bnb_4bit(quant_type="nf4", compress_statistics=False), "bitsandbytes"),
    Case("bnb_nf4_no_bias", lambda: bnb_4bit(False, quant_type="nf4"), "bitsandbytes"),
    Case(
        "bnb_nf4_stored_as_bfloat16", lambda: bnb_4bit(quant_type="nf4", quant_storage=torch.bfloat16), "bitsandbytes"
    ),
    Case("bnb_nf4_blocks", lambda: bnb_4bit(quant_type="nf4", blocksize=128), "bitsandbytes"),
    Case("bnb_8bit", bnb_8bit, "bitsandbytes", error=0.02),
    Case("bnb_8bit_outliers", lambda: bnb_8bit(1.0), "bitsandbytes", error=0.02),
    Case("torchao_int8", lambda: torchao("Int8WeightOnlyConfig"), "torchao", pickles=False),
    Case("torchao_int4", lambda: torchao_group(torch.int4, 32), "torchao", pickles=False),
]


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    for package in request.param.packages.split():
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    if "8bit" in request.param.name and int8_saturates():
        pytest.skip("the base's own products are wrong on this processor")
    return request.param


def data(*shape: int) -> Tensor:
    torch.manual_seed(3)
    return torch.randn(*(shape or (5,)), K)


def by_definition(model: nn.Module, x: Tensor) -> Tensor:
    """The adapted output in float64 with W dequantised and W' materialised."""
    layer = model[1]
    weight = weight_by(layer.adapter, layer.base_of("weight"))
    bias = None if layer.bias is None else layer.bias.double()
    return F.linear(model[0](x).double(), weight, bias)


def assert_near(found: Tensor, expected: Tensor, error: float) -> None:
    assert (found.double() - expected.double()).norm() <= error * expected.double().norm()


def test_the_plan_says_how_it_runs(case: Case) -> None:
    plan = mapsurgery.plan(case.built(), "*", rank=4)
    assert [layer.path for layer in plan.layers] == ["0", "1"] and not plan.skipped
    layer = plan.layers[1]
    assert layer.way == "around" and layer.shape == (M, K) and layer.trainable == 4 * (M + K) + 2
    assert "quantised" in str(plan) and "around" in str(plan)


@pytest.mark.parametrize("init", STARTS, ids=start_name)
def test_the_start_is_the_base_bit_for_bit(case: Case, init: mapsurgery.Init) -> None:
    x = data()
    expected = case.built()(x)
    found = case.patched(init=init)(x)
    if init.kind == "random":  # its beta is 0, its BA is not
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    else:
        assert torch.equal(found, expected)


def test_the_norm_is_that_of_the_dequantised_weight(case: Case) -> None:
    layer = case.patched()[1]
    weight = layer.base_of("weight")
    assert weight.shape == (M, K) and weight.dtype == torch.float32
    torch.testing.assert_close(layer.adapter.weight_norm.item(), weight.double().norm().item(), rtol=1e-6, atol=0)
    assert_near(weight, source(layer.bias is not None).weight, 0.2)


def test_an_unknown_weight_is_read_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Packed4(source())
    monkeypatch.setattr(kinds, "_PROBE_ELEMENTS", 7 * M)  # blocks of 7 inputs, the last of 1
    torch.testing.assert_close(kinds.dequantised(layer), layer.unpacked(), rtol=1e-6, atol=1e-7)
    layer.bias.add_(1000)
    torch.testing.assert_close(kinds.dequantised(layer), layer.unpacked(), rtol=1e-3, atol=1e-5)
    half = Packed4(source()).half()
    torch.testing.assert_close(kinds.dequantised(half), half.unpacked().float(), rtol=2e-3, atol=1e-4)


def test_the_dequantised_weight_is_what_the_kernel_multiplies_with(case: Case) -> None:
    model = case.patched()
    with mapsurgery.disabled(model):
        assert_near(model(data()), F.linear(model[0](data()), model[1].base_of("weight"), model[1].bias), case.error)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)], ids=str)
def test_outputs_are_those_of_the_definition(case: Case, shape: tuple[int, ...]) -> None:
    if not shape and case.name.startswith("bnb_8bit"):
        pytest.skip("its kernel takes batches alone")
    model = to_generic_point(case.patched())
    x = torch.randn(*shape, K, generator=torch.Generator().manual_seed(4))
    expected = by_definition(model, x)
    found = model(x)
    assert found.shape == (*shape, M) and found.dtype == torch.float32
    assert_near(found, expected, case.error)
    assert (found - case.built()(x)).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("init", STARTS, ids=start_name)
def test_gradients_are_those_of_autograd_through_the_definition(case: Case, init: mapsurgery.Init, train: bool) -> None:
    model = to_generic_point(case.patched(init=init)).train(train)
    layer, adapter = model[1], model[1].adapter
    own, x = list(adapter.own_parameters().values()), data().requires_grad_()
    direction = torch.randn(5, M)
    found = torch.autograd.grad((layer(x) * direction).sum(), [x, *own])

    exact = [t.detach().double().requires_grad_() for t in (x, *own)]
    weight = layer.base_of("weight").double()
    tau, relative = adapter.init.tau, adapter.init.relative
    s_w, s_d = ops.map_scales(*exact[1:], weight.norm().reshape(1), tau, relative)
    effective = s_w * weight + s_d * (exact[2] @ exact[1])
    output = F.linear(exact[0], effective, None if layer.bias is None else layer.bias.double())
    expected = torch.autograd.grad((output * direction).sum(), exact)
    for name, want, got in zip(["x", *adapter.own_parameters()], expected, found, strict=True):
        # alpha's is one sum of products of either sign, in which the kernel's rounding of x weighs more
        error = case.error * 20 if name == "alpha" and case.error > 1e-4 else max(case.error, 1e-5)
        assert got.dtype == torch.float32, name
        assert_near(got, want, error), name


def test_the_gradient_of_alpha_is_not_lost_beside_a_large_bias() -> None:
    model = nn.Sequential(nn.Identity(), Packed4(source()))
    model[1].bias.add_(1000)
    layer = to_generic_point(mapsurgery.patch(model, "1", rank=4))[1]
    x = data()
    (found,) = torch.autograd.grad(layer(x).sum(), layer.adapter.alpha)
    assert_near(found, F.linear(x, layer.base_of("weight")).sum().reshape(1), 1e-3)


def test_a_small_change_of_alpha_acts_in_bfloat16() -> None:
    model = mapsurgery.patch(nn.Sequential(nn.Identity(), Packed4(source(False)).bfloat16()), "1", rank=4)
    x = data(1000).bfloat16()
    before = model(x).float()
    with torch.no_grad():
        model[1].adapter.alpha.fill_(0.003)  # 1.003 would round to 1 in bfloat16
    after = model(x).float()
    share = ((after - before) * before).sum() / before.square().sum()
    assert model(x).dtype == torch.bfloat16 and 0.001 < share < 0.005


def test_the_weight_reads_as_the_quantised_one(case: Case) -> None:
    plain, model = case.built(), case.built()
    weight = getattr(model[1], "weight", None)
    mapsurgery.patch(model, "1", rank=4)
    assert getattr(model[1], "weight", None) is weight
    assert [name for name, _ in model.named_buffers() if "adapter" not in name] == [n for n, _ in plain.named_buffers()]
    assert isinstance(model[1], type(plain[1])) and isinstance(model[1], QuantisedLinear)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"1.adapter.{name}" for name in ("A", "B", "alpha", "beta")}


def test_dropout_drops_the_input_of_the_update_alone(case: Case) -> None:
    model = to_generic_point(case.patched(dropout=0.5)).train()
    x = data()
    with torch.no_grad():
        outputs = torch.stack([model(x) for _ in range(400)])
        assert outputs.std(0).max() > 0
        assert_near(outputs.mean(0), by_definition(model, x), 0.05)
        assert torch.equal(model.eval()(x), model(x))
        model[1].adapter.beta.zero_()
        assert torch.equal(model.train()(x), model(x))


def test_training_lowers_a_loss(case: Case) -> None:
    model = case.patched(targets="*").train()
    target = torch.randn(5, M)
    optimizer = torch.optim.AdamW(mapsurgery.param_groups(model, lr=2e-2))
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(data()) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_verify_finds_nothing_wrong(case: Case) -> None:
    model = case.patched(targets="*")
    model(data())
    snapshot = Snapshot(model)
    mapsurgery.verify(model, data())
    snapshot.assert_holds(model)


def test_unpatch_is_the_original_bitwise(case: Case) -> None:
    model = case.built()
    expected = model(data())
    snapshot = Snapshot(model)
    mapsurgery.patch(model, "*", rank=4)
    to_generic_point(model)(data())
    mapsurgery.unpatch(model)
    snapshot.assert_holds(model)
    assert torch.equal(model(data()), expected)


def test_disabled_is_the_base_bitwise(case: Case) -> None:
    model = to_generic_point(case.patched())
    with mapsurgery.disabled(model):
        assert torch.equal(model(data()), case.built()(data()))


def test_copies_compute_the_same(case: Case) -> None:
    model = to_generic_point(case.patched())
    expected = model(data())
    if case.copies:
        assert torch.equal(copy.deepcopy(model)(data()), expected)
    if case.pickles:
        assert torch.equal(pickle.loads(pickle.dumps(model))(data()), expected)


def test_report_is_that_of_the_dequantised_weight(case: Case) -> None:
    model = to_generic_point(case.patched())
    adapter, weight = model[1].adapter, model[1].base_of("weight").double()
    found = mapsurgery.report(model).layers["1"]
    change = (weight_by(adapter, weight) - weight).norm() / weight.norm()
    assert found["change"] == pytest.approx(change.item(), rel=1e-4)
    assert found["weight_norm"] == pytest.approx(weight.norm().item(), rel=1e-6)


COMPILED = (
    "packed",
    "bnb_nf4",
    "bnb_8bit",
    "torchao_int8",
)  # the others are one more of a kind; gguf torch cannot compile


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=() if c.name in COMPILED else pytest.mark.long) for c in CASES if c.name != "gguf"],
    ids=str,
    indirect=True,
)
def test_compiled_is_eager(case: Case, _fresh_compiler: None) -> None:
    model = to_generic_point(case.patched())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(data()), model(data()), rtol=1e-5, atol=1e-6)


def test_autocast_is_the_base_s(case: Case) -> None:
    if case.name == "gguf":
        pytest.skip("its own forward does not take it")
    model = case.built()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(data())
        mapsurgery.patch(model, "1", rank=4)
        found = model(data())
        assert found.dtype == expected.dtype and torch.equal(found, expected)
        to_generic_point(model)(data()).float().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model[1].adapter.parameters())
    assert_near(model(data()), by_definition(model, data()), max(case.error, 1e-5))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_cuts_no_gradient(case: Case, reentrant: bool) -> None:
    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=reentrant)

    model = mapsurgery.patch(Checkpointed(*case.built()), "*", rank=4)
    mapsurgery.verify(model, data())


def test_a_tie_that_is_shared_stays_a_tie() -> None:
    pytest.importorskip("bitsandbytes")
    model = nn.ModuleList([bnb_4bit(), bnb_4bit()])
    model[1].weight = model[0].weight
    to_generic_point(mapsurgery.patch(model, "0", rank=4))
    assert model[0].adapter is model[1].adapter
    expected = [layer(data()) for layer in model]
    mapsurgery.merge(model, quantised="requantise")
    assert model[0].weight is model[1].weight
    mapsurgery.unmerge(model)
    assert all(torch.equal(layer(data()), want) for layer, want in zip(model, expected, strict=True))


def test_a_trained_bias_has_its_gradient(case: Case) -> None:
    model = case.built()
    if not isinstance(model[1].bias, nn.Parameter):
        pytest.skip("its bias is no Parameter")
    mapsurgery.patch(model, "1", rank=4, train="1.bias")
    to_generic_point(model)(data()).sum().backward()
    torch.testing.assert_close(model[1].bias.grad, torch.full((M,), 5.0))


# --- merging


def test_merging_restores_what_required_a_gradient(case: Case) -> None:
    model = case.built()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    mapsurgery.patch(model, "1", rank=4)
    mapsurgery.merge(model, quantised="dequantise")
    after = {name: p.requires_grad for name, p in model.named_parameters()}
    assert before.items() <= after.items() and not after["1.weight"]


def test_merge_is_refused_unless_a_choice_is_made(case: Case) -> None:
    model = to_generic_point(case.patched(targets="*"))
    expected, snapshot = model(data()), Snapshot(model)
    with pytest.raises(ValueError, match=r'quantised weights.*\(1\).*"dequantise".*"requantise"'):
        mapsurgery.merge(model)
    with pytest.raises(ValueError, match="quantised must be one of"):
        mapsurgery.merge(model, quantised="both")
    snapshot.assert_holds(model)
    assert torch.equal(model(data()), expected)


def test_dequantised_merge_makes_a_plain_layer_and_unmerge_takes_it_back(case: Case) -> None:
    model = to_generic_point(case.patched())
    model(data())
    layer, expected, snapshot = model[1], model(data()), Snapshot(model)
    weight = weight_by(layer.adapter, layer.base_of("weight"))
    mapsurgery.merge(model, quantised="dequantise")
    assert model[1] is layer and type(layer) is nn.Linear and type(layer.weight) is nn.Parameter
    assert set(layer.__dict__) - {"_mapsurgery_merged"} == set(nn.Linear(1, 1).__dict__)
    assert not list(layer.buffers()) and layer.weight.dtype == torch.float32
    assert_near(layer.weight, weight, 1e-6)
    assert_near(model(data()), expected, case.error)
    assert not any(isinstance(module, Adapter) for module in model.modules())
    mapsurgery.unmerge(model)
    snapshot.assert_holds(model)
    assert torch.equal(model(data()), expected)
    mapsurgery.unpatch(model)
    assert torch.equal(model(data()), case.built()(data()))


def test_requantised_merge_keeps_the_kind_and_unmerge_takes_it_back(case: Case) -> None:
    model = to_generic_point(case.patched(targets="*"))
    model(data())
    layer, expected, snapshot = model[1], model(data()), Snapshot(model)
    if not case.requantises:
        with pytest.raises(ValueError, match=r"1 \(packed\) cannot be quantised again.*dequantise"):
            mapsurgery.merge(model, quantised="requantise")
        snapshot.assert_holds(model)
        assert torch.equal(model(data()), expected)
        return
    before = case.built()[1]
    weight = weight_by(layer.adapter, layer.base_of("weight"))
    mapsurgery.merge(model, quantised="requantise", keep_base=True)
    assert model[1] is layer and type(layer) is type(before) and type(layer.weight) is type(before.weight)
    assert layer.weight.shape == before.weight.shape and layer.weight.dtype == before.weight.dtype
    assert_near(kinds.dequantised(layer), weight, 0.2 if "4" in case.name else 0.02)
    assert_near(model(data()), expected, 0.2 if "4" in case.name else 0.03)
    mapsurgery.unmerge(model)
    snapshot.assert_holds(model)
    assert torch.equal(model(data()), expected)


def test_requantising_an_unchanged_weight_changes_little(case: Case) -> None:
    if not case.requantises:
        pytest.skip("this library cannot pack its weight")
    model = case.patched()
    base = model[1].base_of("weight")
    mapsurgery.merge(model, quantised="requantise")
    # torchao's symmetric 4-bit scale is max/7.5, though 7 is the largest code: each time, the range shrinks by that
    error = 0.07 if case.name == "torchao_int4" else 0.01
    assert (kinds.dequantised(model[1]) - base).abs().max() <= error * base.abs().max()


def test_a_final_merge_keeps_nothing(case: Case) -> None:
    model = to_generic_point(case.patched())
    expected = model(data())
    mapsurgery.merge(model, quantised="dequantise", final=True)
    assert b"mapsurgery" not in pickle.dumps(model)
    assert_near(model(data()), expected, case.error)
    with pytest.raises(ValueError, match="holds nothing"):
        mapsurgery.unmerge(model)


def test_a_failed_merge_leaves_the_model_patched(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model = to_generic_point(case.patched(targets="*"))
    expected, snapshot = model(data()), Snapshot(model)
    original = type(model[1].adapter).merge_into

    def failing(self: Adapter, weight: Tensor, norm: Tensor) -> None:
        if self is model[0].adapter:  # in place, after the quantised one was made
            raise MemoryError("midway")
        original(self, weight, norm)

    monkeypatch.setattr(type(model[1].adapter), "merge_into", failing)
    with pytest.raises(MemoryError, match="midway"):
        mapsurgery.merge(model, quantised="dequantise")
    snapshot.assert_holds(model)
    assert torch.equal(model(data()), expected)


def test_hooks_of_the_user_live_through_a_merge() -> None:
    model = to_generic_point(mapsurgery.patch(nn.Sequential(nn.Identity(), Packed4(source())), "1", rank=4))
    calls: list[int] = []
    model[1].register_forward_hook(lambda *args: calls.append(1))
    mapsurgery.merge(model, quantised="dequantise")
    model(data())
    mapsurgery.unmerge(model)
    model(data())
    assert len(calls) == 2


def test_a_half_precision_layer_becomes_one_of_its_dtype() -> None:
    model = mapsurgery.patch(nn.Sequential(nn.Identity(), Packed4(source()).bfloat16()), "1", rank=4)
    expected = to_generic_point(model)(data().bfloat16())
    mapsurgery.merge(model, quantised="dequantise")
    assert model[1].weight.dtype == model[1].bias.dtype == torch.bfloat16
    assert_near(model(data().bfloat16()), expected, 0.02)


# --- files


def test_a_saved_adapter_loads_onto_a_fresh_base(case: Case, tmp_path: Path) -> None:
    model = to_generic_point(case.patched())
    mapsurgery.save(model, tmp_path / "a.safetensors")
    fresh = mapsurgery.load(case.built(), tmp_path / "a.safetensors")
    assert torch.equal(fresh(data()), model(data()))


def test_an_adapter_is_refused_by_another_base_and_taken_by_the_unquantised_one(case: Case, tmp_path: Path) -> None:
    model = to_generic_point(case.patched())
    mapsurgery.save(model, tmp_path / "a.safetensors")
    plain = nn.Sequential(case.built()[0], source(model[1].bias is not None))
    mapsurgery.load(plain, tmp_path / "a.safetensors")
    assert_near(plain(data()), model(data()), 0.2)
    other = nn.Sequential(case.built()[0], source(model[1].bias is not None))
    with torch.no_grad():
        other[1].weight.mul_(1.1)
    with pytest.raises(ValueError, match="another base"):
        mapsurgery.load(other, tmp_path / "a.safetensors")


def test_an_adapter_goes_from_base_to_base_and_stays_loadable(case: Case, tmp_path: Path) -> None:
    """A file says the norm of the base that it was saved on, also where the adapter came from the other one."""

    def plain() -> nn.Module:
        return nn.Sequential(case.built()[0], source(case.built()[1].bias is not None))

    mapsurgery.save(to_generic_point(case.patched()), tmp_path / "quantised.safetensors")
    mapsurgery.save(to_generic_point(mapsurgery.patch(plain(), "1", rank=4)), tmp_path / "plain.safetensors")
    for file, make in (("plain", case.built), ("quantised", plain)):
        model = mapsurgery.load(make(), tmp_path / f"{file}.safetensors")
        mapsurgery.save(model, tmp_path / "again.safetensors")
        mapsurgery.load(make(), tmp_path / "again.safetensors")
        other = mapsurgery.load(make(), tmp_path / f"{file}.safetensors")
        mapsurgery.load_adapter_state_dict(other, mapsurgery.adapter_state_dict(model))
        assert torch.equal(other(data()), model(data()))


def test_loading_other_codes_takes_their_norm() -> None:
    model = mapsurgery.patch(nn.Sequential(nn.Identity(), Packed4(source())), "1", rank=4)
    doubled = nn.Sequential(nn.Identity(), Packed4(source()))
    doubled[1].scales.mul_(2)
    before = model[1].adapter.weight_norm.clone()
    model.load_state_dict(doubled.state_dict())
    torch.testing.assert_close(model[1].adapter.weight_norm, 2 * before)
    assert torch.equal(model(data()), doubled(data()))


# --- what is refused, and accelerate


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Tanh(source()), "its output is not linear in its input"),
        (lambda: RoundedInput(source()), "passes no gradient|gradient that it passes"),
        (lambda: WrongBias(source()), "for an input of 0 is not its `bias`"),
        (lambda: Fails(source()), "RuntimeError: no such kernel"),
        (lambda: Narrow(source()), r"does not make \(..., 96\) of \(..., 64\)"),
        (lambda: Packed4(source()).to("meta"), "on meta"),
    ],
    ids=["tanh", "rounded_input", "wrong_bias", "fails", "narrow", "meta"],
)
def test_what_does_not_act_like_a_linear_layer_is_skipped_with_the_reason(
    make: Callable[[], nn.Module], reason: str
) -> None:
    model = nn.Sequential(nn.Linear(K, K), make())
    plan = mapsurgery.plan(model, "*", rank=4)
    assert [layer.path for layer in plan.layers] == ["0"]
    assert [skip.path for skip in plan.skipped] == ["1"] and plan.skipped[0].reason.startswith("quantised (packed")
    with pytest.raises(ValueError, match=reason):
        mapsurgery.patch(model, "1", rank=4)


@pytest.mark.filterwarnings("ignore")
def test_layers_that_pass_no_gradient_are_refused() -> None:
    dynamic = torch.ao.quantization.quantize_dynamic(nn.Sequential(source()), {nn.Linear}, torch.qint8)
    layers = {"torch": dynamic[0]}
    if importlib.util.find_spec("torchao") is not None:
        layers["torchao"] = torchao("Int8DynamicActivationInt8WeightConfig")
    plan = mapsurgery.plan(nn.ModuleDict({"plain": nn.Linear(K, K), **layers}), "*", rank=4)
    assert {skip.path for skip in plan.skipped} == set(layers)
    assert all("passes no gradient to its input" in skip.reason for skip in plan.skipped)


def test_other_quantised_layers_are_named() -> None:
    pytest.importorskip("bitsandbytes")
    bnb = importlib.import_module("bitsandbytes")
    layers = {
        "late": bnb.nn.Linear4bit(K, M),
        "floating": bnb.nn.Linear8bitLt(K, M, has_fp16_weights=True),
        "embedding": bnb.nn.Embedding4bit(10, K).to("cpu"),
        "plain": nn.Linear(K, K),
    }
    plan = mapsurgery.plan(nn.ModuleDict(layers), "*", rank=4)
    reasons = {skip.path: skip.reason for skip in plan.skipped}
    assert "not quantised yet" in reasons["late"] and "has_fp16_weights" in reasons["floating"]
    assert "Params4bit" in reasons["embedding"] and [layer.path for layer in plan.layers] == ["plain"]


def test_no_layer_of_a_patched_model_is_packed_for_inference() -> None:
    """As bitsandbytes does in eval mode on CPUs with AVX512-BF16: gradients would no longer pass."""
    pytest.importorskip("bitsandbytes")
    model, x = nn.Sequential(bnb_4bit(), nn.Linear(M, K), bnb_4bit()), data()
    for i in (0, 2):
        model[i].support_avx512bf16_for_cpu = True
    mapsurgery.patch(model, "0", rank=4)
    packed = model[2].weight.clone()
    for _ in range(2):
        assert not mapsurgery.verify(model, x).failures
        with torch.no_grad():
            model.eval()(x)
        model.train()(x).square().sum().backward()
        assert model[0].adapter.B.grad.any() and torch.equal(model[2].weight, packed)
    mapsurgery.merge(copy.deepcopy(model), quantised="dequantise")
    mapsurgery.unpatch(model)
    assert model[0].support_avx512bf16_for_cpu and model[2].support_avx512bf16_for_cpu
    assert not [name for name in vars(model[2]) if "mapsurgery" in name]


def test_a_layer_that_was_packed_for_inference_before_is_told() -> None:
    pytest.importorskip("bitsandbytes")
    functional = importlib.import_module("bitsandbytes.functional")
    model = nn.Sequential(nn.Linear(K, K), bnb_4bit())
    model[1].weight.data, _ = functional._convert_weight_packed_for_cpu(
        model[1].weight.data, model[1].weight.quant_state
    )
    with pytest.warns(UserWarning, match="has packed 1 for inference: no gradient passes"):
        mapsurgery.patch(model, "0", rank=4)


def test_a_weight_that_was_packed_for_inference_is_refused() -> None:
    pytest.importorskip("bitsandbytes")
    functional = importlib.import_module("bitsandbytes.functional")
    model = nn.Sequential(nn.Linear(K, K), bnb_4bit())
    weight = model[1].weight
    weight.data, weight.quant_state = functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    with pytest.raises(ValueError, match="packed it for inference"):
        mapsurgery.patch(model, "1", rank=4)


def test_an_adapted_layer_is_not_packed_for_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    model = nn.Sequential(nn.Linear(K, K), bnb_4bit())
    model[1].support_avx512bf16_for_cpu = True  # as on such a CPU
    mapsurgery.patch(model, "1", rank=4).eval()
    with torch.no_grad():
        model(data())
    assert not getattr(model[1].weight.quant_state, "packing_format_for_cpu", False)
    mapsurgery.unpatch(model)
    assert model[1].support_avx512bf16_for_cpu is True


@pytest.mark.parametrize("make", [lambda: Packed4(source()), source], ids=["packed", "plain"])
def test_the_hooks_of_accelerate_run_the_adapter(make: Callable[[], nn.Module]) -> None:
    hooks = importlib.import_module("accelerate.hooks")
    model = nn.Sequential(nn.Identity(), make())
    hooks.add_hook_to_module(model[1], hooks.ModelHook())
    expected = model(data())
    mapsurgery.patch(model, "1", rank=4)
    mapsurgery.verify(model, data())
    assert (to_generic_point(model)(data()) - expected).abs().max() > 1e-2
    hooks.remove_hook_from_module(model[1])
    assert (model(data()) - expected).abs().max() > 1e-2
    mapsurgery.unpatch(model)
    assert torch.equal(model(data()), expected)


def test_a_language_model_in_four_bits_learns_and_merges(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    transformers = importlib.import_module("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    bits = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=bits).eval()
    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    base = model(ids).logits
    model.gradient_checkpointing_enable()
    mapsurgery.patch(model, ["*_proj"], rank=4)
    assert sum(isinstance(module, QuantisedLinear) for module in model.modules()) == 14
    assert torch.equal(model(ids).logits, base)
    mapsurgery.verify(model, input_ids=ids, labels=ids)
    optimizer = torch.optim.AdamW(mapsurgery.param_groups(model, lr=1e-2))
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model.train()(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    expected = model.eval()(ids).logits
    mapsurgery.save(model, tmp_path / "a.safetensors")
    fresh = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=bits).eval()
    assert torch.equal(mapsurgery.load(fresh, tmp_path / "a.safetensors")(ids).logits, expected)
    mapsurgery.merge(model, quantised="dequantise")
    assert_near(model(ids).logits, expected, 1e-5)
