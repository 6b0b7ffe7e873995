"""The layers beyond Linear and Conv, raw parameters, parametrised weights and ties: one set of properties for all."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from definition import Snapshot, to_generic_point, weight_of
from modules import Doubled, First, Tied, parametrized
from timm.layers import StdConv2d
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from transformers.pytorch_utils import Conv1D

import mapsurgery
from mapsurgery.methods import Adapter
from mapsurgery.surgery import record

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


class Experts(nn.Module):
    """A stack of raw matrices, used as mixtures of experts use theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 5))
        self.bank = nn.Parameter(torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("td,edh,ch->tec", x, self.up.transpose(1, 2).mT, self.bank).flatten(1)


class PerExpert(nn.Module):
    """Reads its stack once for each expert."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 5))

    def forward(self, x: Tensor) -> Tensor:
        return sum(F.linear(x, self.up[e]) for e in range(3))


class Twice(nn.Module):
    """Two steps of a recurrent cell: in the first, the state is 0, and so is the gradient of what multiplies it."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state = self.cell(x, self.cell(x))
        return state[0] if isinstance(state, tuple) else state


def _two_parametrizations() -> nn.Module:
    layer = parametrized()
    parametrize.register_parametrization(layer, "bias", Doubled())
    return layer


Device = torch.device | str


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], nn.Module]
    input: Callable[[], Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    count: int = 1
    """Adapters."""
    pickles: bool = True

    def __str__(self) -> str:
        return self.name

    def built(self, dtype: torch.dtype = torch.float64, device: Device = "cpu") -> nn.Module:
        torch.manual_seed(2)
        return self.make().to(dtype).to(device).eval()

    def data(self, dtype: torch.dtype = torch.float64, device: Device = "cpu") -> Tensor:
        torch.manual_seed(3)
        x = self.input().to(device)
        return x.to(dtype) if x.is_floating_point() else x

    def patched(self, dtype: torch.dtype = torch.float64, device: Device = "cpu", **options: Any) -> nn.Module:
        options = {"targets": "*", "rank": 2, **self.options, **options}
        return mapsurgery.patch(self.built(dtype, device), **options)


def ids() -> Tensor:
    return torch.tensor([[1, 2, 5], [2, 8, 0]])


def rows(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape, dtype=torch.float64)


RAW = {"targets": (), "parameters": "*"}
CASES = [
    Case("embedding", lambda: nn.Embedding(9, 6), ids),
    Case("embedding_padded", lambda: nn.Embedding(9, 6, padding_idx=2), ids),
    Case("embedding_by_frequency", lambda: nn.Embedding(9, 6, scale_grad_by_freq=True), ids),
    Case("embedding_sparse", lambda: nn.Embedding(9, 6, sparse=True), ids),
    Case("embedding_bag", lambda: nn.EmbeddingBag(9, 6, mode="mean"), ids),
    Case("embedding_bag_sparse", lambda: nn.EmbeddingBag(9, 6, mode="sum", sparse=True), ids),
    Case("conv_transpose", lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), rows(2, 4, 5, 5)),
    Case("bilinear", lambda: First(nn.Bilinear(6, 6, 4), 2), rows(3, 6)),
    Case("attention", lambda: First(nn.MultiheadAttention(6, 2, batch_first=True), 3), rows(2, 4, 6), count=2),
    Case("attention_apart", lambda: First(nn.MultiheadAttention(6, 2, kdim=6, vdim=6), 3), rows(4, 2, 6), count=2),
    Case("attention_bias_kv", lambda: First(nn.MultiheadAttention(6, 2, add_bias_kv=True), 3), rows(4, 2, 6), count=2),
    Case("encoder", lambda: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), rows(2, 4, 6), count=4),
    Case("lstm", lambda: First(nn.LSTM(6, 5, 2, bidirectional=True)), rows(4, 2, 6), count=8),
    Case("lstm_projected", lambda: First(nn.LSTM(6, 5, proj_size=3)), rows(4, 2, 6), count=3),
    Case("gru", lambda: First(nn.GRU(6, 5, batch_first=True)), rows(2, 4, 6), count=2),
    Case("rnn", lambda: First(nn.RNN(6, 5)), rows(4, 2, 6), count=2),
    Case("lstm_cell", lambda: Twice(nn.LSTMCell(6, 5)), rows(2, 6), count=2),
    Case("gru_cell", lambda: Twice(nn.GRUCell(6, 5)), rows(2, 6), count=2),
    Case("experts", Experts, rows(3, 6), RAW, count=2),
    Case("tied", Tied, ids, count=2),
    Case("tied_one_side", Tied, ids, {"targets": "out"}, count=1),
    Case("tied_separate", Tied, ids, {"tied": "separate"}, count=3),
    Case("parametrized", parametrized, rows(3, 6), pickles=False),
    Case("two_parametrizations", _two_parametrizations, rows(3, 6), pickles=False),
    Case("weight_norm", lambda: parametrizations.weight_norm(nn.Conv1d(6, 5, 3)), rows(2, 6, 7), pickles=False),
    Case("spectral_norm", lambda: parametrizations.spectral_norm(nn.Linear(6, 5)), rows(3, 6), pickles=False),
    Case("orthogonal", lambda: parametrizations.orthogonal(nn.Linear(6, 5)), rows(3, 6), pickles=False),
    Case("old_weight_norm", lambda: nn.utils.weight_norm(nn.Linear(6, 5)), rows(3, 6)),
    Case("old_spectral_norm", lambda: nn.utils.spectral_norm(nn.Conv2d(4, 5, 3)), rows(2, 4, 5, 5)),
    Case(
        "weight_norm_of_lstm",
        lambda: First(nn.utils.weight_norm(nn.LSTM(6, 5), "weight_hh_l0")),
        rows(4, 2, 6),
        count=2,
    ),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def adapters(model: nn.Module) -> list[Adapter]:
    return [module for module in model.modules() if isinstance(module, Adapter)]


def by_definition(case: Case, model: nn.Module) -> nn.Module:
    """A model without adapters whose plain weights are W' by the definition."""
    sites = {(s.layer_path, s.parameter): weight_of(s.layer, s.parameter) for s in record.all_sites(model)}
    device = next(model.parameters()).device
    plain = case.built(device=device)
    plain(case.data(device=device))  # hooks leave their weights in the layer
    for (path, name), weight in sites.items():
        layer = plain.get_submodule(path)
        if parametrize.is_parametrized(layer, name):
            parametrize.remove_parametrizations(layer, name)
        for removal in (nn.utils.remove_weight_norm, nn.utils.remove_spectral_norm):
            try:
                removal(layer, name)
            except ValueError:
                continue
        layer._parameters[name] = nn.Parameter(weight)
        if isinstance(layer, nn.RNNBase):
            layer._init_flat_weights()
    return plain


@every_case
def test_the_start_is_the_base_and_every_weight_is_adapted(case: Case) -> None:
    model = case.patched()
    assert len(adapters(model)) == case.count
    torch.testing.assert_close(model(case.data()), case.built()(case.data()), rtol=1e-12, atol=1e-12)


@every_case
def test_outputs_are_those_of_the_definition(case: Case, device: torch.device) -> None:
    model, x = to_generic_point(case.patched(device=device)), case.data(device=device)
    expected = by_definition(case, model)(x)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    assert (expected - case.built(device=device)(x)).abs().max() > 1e-3


@every_case
def test_every_adapter_parameter_has_the_gradient_of_finite_differences(case: Case) -> None:
    model = to_generic_point(case.patched())
    x = case.data()
    direction = torch.randn_like(model(x))
    grads = torch.autograd.grad(
        (model(x) * direction).sum(), [p for a in adapters(model) for p in a.own_parameters().values()]
    )
    torch.manual_seed(0)
    steps = [torch.randn_like(grad) for grad in grads]
    slope = sum((g * s).sum() for g, s in zip(grads, steps, strict=True))
    parameters = [p for a in adapters(model) for p in a.own_parameters().values()]
    eps, values = 1e-6, []
    with torch.no_grad():
        for sign in (1, -2):
            for p, s in zip(parameters, steps, strict=True):
                p.add_(s, alpha=sign * eps)
            values.append((model(x) * direction).sum())
    if case.name in ("embedding_padded", "embedding_by_frequency"):
        pytest.skip("the layer's gradient is, by design, not that of its output")
    torch.testing.assert_close(slope, (values[0] - values[1]) / (2 * eps), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["embedding_padded", "embedding_by_frequency", "embedding_sparse"])
def test_gradients_of_an_embedding_are_those_of_its_own_backward(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    model = to_generic_point(case.patched())
    own = list(model.adapter.own_parameters().values())
    direction = torch.randn_like(model(case.data()))
    plain = case.built()
    weight = model.adapter("effective_weight", model.get_parameter("weight"))
    output = F.embedding(case.data(), weight, plain.padding_idx, scale_grad_by_freq=plain.scale_grad_by_freq)
    expected = torch.autograd.grad((output * direction).sum(), own)
    found = torch.autograd.grad((model(case.data()) * direction).sum(), own)
    for want, got in zip(expected, found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@every_case
def test_verify_finds_nothing_wrong(case: Case) -> None:
    model = case.patched()
    snapshot = Snapshot(model)
    mapsurgery.verify(model, case.data())
    if "norm" not in case.name:  # whose hooks leave the last weight in the layer
        snapshot.assert_holds(model)


@every_case
def test_merge_is_the_adapted_output_and_unmerge_takes_it_back(case: Case) -> None:
    model = to_generic_point(case.patched())
    expected, classes = model(case.data()), {path: type(m) for path, m in model.named_modules()}
    mapsurgery.merge(model)
    assert not adapters(model)
    torch.testing.assert_close(model(case.data()), expected, rtol=1e-10, atol=1e-10)
    mapsurgery.unmerge(model)
    torch.testing.assert_close(model(case.data()), expected, rtol=1e-9, atol=1e-9)
    assert [path for path, _ in model.named_modules()] == list(classes)
    mapsurgery.unpatch(model)
    torch.testing.assert_close(model(case.data()), case.built()(case.data()), rtol=1e-9, atol=1e-9)


@every_case
def test_unpatch_is_the_original_bitwise(case: Case) -> None:
    model = case.built()
    expected = model(case.data())
    snapshot = Snapshot(model)
    mapsurgery.patch(model, **{"targets": "*", "rank": 2, **case.options})
    to_generic_point(model)(case.data())
    mapsurgery.unpatch(model)
    snapshot.assert_holds(model)
    assert torch.equal(model(case.data()), expected)


@every_case
def test_a_failed_merge_leaves_the_model_patched(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model = to_generic_point(case.patched())
    expected, last = model(case.data()), adapters(model)[-1]
    merge_into = type(last).merge_into

    def failing(self: Adapter, weight: Tensor, norm: Tensor) -> None:
        if self is last:
            raise MemoryError("midway")
        merge_into(self, weight, norm)

    monkeypatch.setattr(type(last), "merge_into", failing)
    with pytest.raises(MemoryError, match="midway"):
        mapsurgery.merge(model)
    assert len(adapters(model)) == case.count
    torch.testing.assert_close(model(case.data()), expected, rtol=1e-9, atol=1e-9)


@every_case
def test_a_saved_adapter_loads_into_a_fresh_model(case: Case, tmp_path: Path) -> None:
    model = to_generic_point(case.patched())
    mapsurgery.save(model, tmp_path / "a.safetensors")
    fresh = mapsurgery.load(case.built(), tmp_path / "a.safetensors")
    assert torch.equal(fresh(case.data()), model(case.data()))
    assert len(adapters(fresh)) == case.count
    other = case.built()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    if case.name not in ("weight_norm", "old_weight_norm", "spectral_norm", "old_spectral_norm", "orthogonal"):
        with pytest.raises(ValueError, match="another base"):
            mapsurgery.load(other, tmp_path / "a.safetensors")


@every_case
def test_disabled_is_the_base(case: Case) -> None:
    model = to_generic_point(case.patched())
    with mapsurgery.disabled(model):
        torch.testing.assert_close(model(case.data()), case.built()(case.data()), rtol=1e-12, atol=1e-12)


@every_case
def test_copies_compute_the_same(case: Case) -> None:
    model = to_generic_point(case.patched())
    expected = model(case.data())
    assert torch.equal(copy.deepcopy(model)(case.data()), expected)
    if case.pickles and not case.name.startswith("weight_norm"):
        assert torch.equal(pickle.loads(pickle.dumps(model))(case.data()), expected)


COMPILED = ("embedding", "attention", "experts", "tied", "weight_norm")  # the others are one more of a kind


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c.name in COMPILED else pytest.mark.long) for c in CASES], ids=str
)
def test_compiled_is_eager(case: Case, _fresh_compiler: None) -> None:
    if (
        case.name in ("embedding_bag_sparse", "old_spectral_norm", "old_weight_norm")
        or case.name[:4] == "lstm"
        or case.name in ("gru", "rnn", "weight_norm_of_lstm")
    ):
        pytest.skip("torch does not compile the base in one graph")
    model = to_generic_point(case.patched())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(case.data()), model(case.data()), rtol=1e-10, atol=1e-10)


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_other_dtypes_run_and_learn(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    if dtype == torch.bfloat16 and case.name == "orthogonal":
        pytest.skip("torch has no bfloat16 orthogonal parametrisation")
    model = case.patched(dtype, device).train()
    y = model(case.data(dtype, device))
    assert y.dtype == dtype
    y.float().square().sum().backward()
    for adapter in adapters(model):
        assert adapter.A.dtype == torch.float32
        grads = [p.grad for p in adapter.own_parameters().values()]
        assert all(g is not None and g.isfinite().all() for g in grads) and any(g.any() for g in grads)


def test_a_tie_that_is_shared_stays_a_tie() -> None:
    model = mapsurgery.patch(Tied(), "out", rank=2)
    assert model.out.adapter is model.embed.adapter
    assert "tied" in str(mapsurgery.plan(Tied(), "out"))
    mapsurgery.merge(to_generic_point(model))
    assert model.out.weight is model.embed.weight


def test_a_tie_can_be_refused_and_its_holders_excluded_are_named() -> None:
    with pytest.raises(ValueError, match=r"tied with .*embed"):
        mapsurgery.patch(Tied(), "out", tied="refuse")
    with pytest.raises(ValueError, match=r"embed.*excluded.*separate"):
        mapsurgery.patch(Tied(), "out", exclude="embed")
    with pytest.raises(ValueError, match="tied must be one of"):
        mapsurgery.patch(Tied(), "out", tied="both")


def test_raw_parameters_are_named_by_the_plan_and_by_parameters_alone() -> None:
    model = nn.ModuleDict([("plain", nn.Linear(4, 4)), ("experts", Experts())])
    plan = mapsurgery.plan(model, "*", rank=2)
    assert [layer.path for layer in plan.layers] == ["plain"]
    assert "name its raw parameters in `parameters`: up (3, 6, 5), bank (4, 5)" in plan.skipped[0].reason
    plan = mapsurgery.plan(model, "plain", parameters="*.up", rank=2)
    assert [layer.path for layer in plan.layers] == ["plain", "experts.up"]
    assert plan.layers[1].trainable == 3 * (2 * (6 + 5) + 2)
    assert not mapsurgery.plan(model, "*", parameters=["*.up", "*.bank"], rank=2).skipped
    with pytest.raises(ValueError, match="parameters pattern 'down'.*experts"):
        mapsurgery.plan(model, "plain", parameters="down")


def test_a_vector_is_no_matrix() -> None:
    with pytest.raises(ValueError, match="bias.*no matrix"):
        mapsurgery.patch(nn.Linear(4, 4), (), parameters="bias")


def _channels_last() -> nn.Module:
    return StdConv2d(4, 6, 3).to(memory_format=torch.channels_last)


METADATA = {
    "linear": (lambda: nn.Linear(6, 5), "weight"),
    "conv1d": (lambda: Conv1D(5, 6), "weight"),
    "channels_last": (_channels_last, "weight"),
    "stack": (PerExpert, "up"),
}


@pytest.mark.parametrize(("make", "name"), METADATA.values(), ids=METADATA)
def test_metadata_of_a_weight_costs_no_product(make, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = make()
    want = getattr(original, name)
    layer = to_generic_point(mapsurgery.patch(copy.deepcopy(original), "*", parameters=name, rank=2))
    calls = []
    value = mapsurgery.ops.lazy.LazyWeight.value
    monkeypatch.setattr(mapsurgery.ops.lazy.LazyWeight, "value", lambda self: calls.append(1) or value(self))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            weight = getattr(layer, name)
            assert (weight.shape, weight.dtype, weight.device) == (want.shape, want.dtype, want.device)
            assert (weight.size(0), weight.dim(), weight.numel()) == (want.size(0), want.dim(), want.numel())
            assert (weight.stride(), weight.requires_grad, isinstance(weight, Tensor)) == (want.stride(), grad, True)
    assert not calls
    assert (getattr(layer, name) + 0).stride() == want.stride() and calls


def test_a_weight_read_by_a_function_of_autograd_keeps_its_gradient() -> None:
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x @ weight.t()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
            return None, grad.t() @ ctx.saved_tensors[0]

    layer = to_generic_point(mapsurgery.patch(nn.Linear(6, 5, bias=False), "*", rank=2))
    x = torch.randn(3, 6)
    expected = torch.autograd.grad(layer(x).sum(), list(layer.adapter.own_parameters().values()))
    found = torch.autograd.grad(Product.apply(x, layer.weight).sum(), list(layer.adapter.own_parameters().values()))
    for want, got in zip(expected, found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_functional_call_with_other_adapter_values_is_that_of_the_definition() -> None:
    model = to_generic_point(mapsurgery.patch(Tied().double(), "*", rank=2))
    other = {name: p.detach() * 1.1 for name, p in model.named_parameters() if p.requires_grad}
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for name, value in other.items():
            copied.get_parameter(name).copy_(value)
    torch.testing.assert_close(functional_call(model, other, (ids(),)), copied(ids()), rtol=1e-12, atol=1e-12)


def test_w_that_was_read_before_a_change_is_not_computed_from_what_came_after() -> None:
    layer = to_generic_point(mapsurgery.patch(nn.Linear(6, 5), "*", rank=2))
    weight, used = layer.weight, layer.weight
    expected = used.detach().clone()
    with torch.no_grad():
        layer.adapter.A.mul_(2)
        layer.adapter.beta.add_(1)
    with pytest.raises(RuntimeError, match="read it again"):
        weight + 0
    assert torch.equal(used.detach(), expected) and not torch.equal(layer.weight.detach(), expected)


def test_writing_to_a_computed_weight_is_refused() -> None:
    layer = mapsurgery.patch(nn.Linear(6, 5), "*", rank=2)
    for write in (lambda: layer.weight.copy_(torch.ones(5, 6)), lambda: layer.weight.zero_(), layer.reset_parameters):
        with torch.no_grad(), pytest.raises(RuntimeError, match="is lost"):
            write()


def test_writing_what_is_there_already_is_no_harm() -> None:
    layer = to_generic_point(mapsurgery.patch(nn.Linear(6, 5), "*", rank=2))
    with torch.no_grad():
        weight = layer.weight
        assert weight.div_(1) is weight and torch.equal(weight + 0, layer.weight + 0)


def test_a_weight_whose_numbers_nobody_used_has_its_gradient() -> None:
    layer = to_generic_point(mapsurgery.patch(nn.Linear(6, 5).double(), "*", rank=2))
    own = list(layer.adapter.own_parameters().values())
    direction = torch.randn(5, 6, dtype=torch.float64)
    found = torch.autograd.grad(layer.weight, own, direction)
    for want, got in zip(torch.autograd.grad((layer.weight * direction).sum(), own), found, strict=True):
        torch.testing.assert_close(got, want)


def test_a_weight_first_used_in_inference_mode_can_be_used_outside() -> None:
    layer = to_generic_point(mapsurgery.patch(nn.Linear(6, 5), "*", rank=2))
    weight = layer.weight
    with torch.inference_mode():
        weight + 0
    (weight * 2).sum().backward()
    assert layer.adapter.A.grad is not None


def test_a_stack_is_computed_once_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model = to_generic_point(mapsurgery.patch(PerExpert(), (), parameters="up", rank=2))
    calls, made = [], mapsurgery.methods.Adapter.forward
    monkeypatch.setattr(mapsurgery.methods.Adapter, "forward", lambda *a: calls.append(1) or made(*a))
    model(torch.randn(2, 5)).sum().backward()
    model(torch.randn(2, 5)).sum().backward()
    assert len(calls) == 2 and not any("memo" in name for name in model.__dict__)


def test_a_stack_can_be_differentiated_twice() -> None:
    model = to_generic_point(mapsurgery.patch(PerExpert().double(), (), parameters="up", rank=2))
    A = model.adapter_up.A
    (grad,) = torch.autograd.grad(model.up.square().sum(), A, create_graph=True)
    grad.square().sum().backward()
    assert A.grad is not None and A.grad.isfinite().all()


def test_containers_keep_their_length() -> None:
    class Routed(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(4, 4))
            self.router = nn.Parameter(torch.randn(4, 4))

    with pytest.raises(ValueError, match="router.*Routed"):
        mapsurgery.patch(Routed(), "0", parameters="router")


def test_a_parametrised_layer_can_be_cast_after_patch() -> None:
    model = mapsurgery.patch(nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 4))), "*", rank=2).double()
    assert model(torch.randn(2, 5, dtype=torch.float64)).dtype == torch.float64


def test_nested_tensors_run_on_the_effective_weight() -> None:
    layer = to_generic_point(mapsurgery.patch(nn.Linear(6, 5), "*", rank=2))
    parts = [torch.randn(2, 6), torch.randn(3, 6)]
    found = layer(torch.nested.nested_tensor(parts, layout=torch.jagged))
    for part, got in zip(parts, found.unbind(), strict=True):
        torch.testing.assert_close(got, layer(part), rtol=1e-4, atol=1e-5)


def test_conv1d_of_transformers_takes_its_keyword() -> None:
    layer = mapsurgery.patch(Conv1D(5, 6), "*", rank=2)
    assert layer(x=torch.randn(2, 6)).shape == (2, 5)


def test_memory_that_another_parameter_shares_is_a_tie() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(model[0].weight.data)
    assert "shares memory with 1.weight" in str(mapsurgery.plan(model, "0"))
    with pytest.raises(ValueError, match="1.weight"):
        mapsurgery.patch(model, "0", tied="refuse")


def test_dropout_that_does_not_apply_is_noted() -> None:
    plan = mapsurgery.plan(nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4)), "*", dropout=0.5)
    assert ["no dropout" in layer.notes for layer in plan.layers] == [True, False]
