"""Every invariant, for every method with every update family, and for both on each way in which a layer is computed."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from definition import CASES, Case, Snapshot, to_generic_point, weight_by, weight_of
from test_layer_types import CASES as MORE_CASES
from torch import Tensor, nn
from torch.func import functional_call

import mapsurgery
from mapsurgery import updates
from mapsurgery.methods import METHODS as REGISTERED_METHODS
from mapsurgery.methods import Coefficients

METHODS = {
    "map": "map",
    "map_paper": "map",
    "lora": mapsurgery.Lora(alpha=4.0),
    "rslora": mapsurgery.Lora(alpha=2.0, rslora=True),
    "dora": mapsurgery.Dora(alpha=4.0),
    "dora_exact": mapsurgery.Dora(alpha=4.0, exact=True),
}
UPDATES = {name: name for name in updates.REGISTRY} | {
    "lokr_full": updates.LoKr(factor=2),
    "pissa_fast": updates.Pissa(niter=4),
}
_NAMES = ("linear", "transformers_conv1d", "conv2d", "conv2d_grouped_wide", "conv1d_depthwise")  # fused
_OWN_FORWARD = ("timm_std_conv", "conv_transpose2d")  # on W'
LAYERS = [case for case in CASES if case.name in (*_NAMES, *_OWN_FORWARD)]
FEW_LAYERS = [case for case in LAYERS if case.name in ("linear", "conv2d", "conv1d_depthwise")]
_OTHERS = ("embedding", "experts", "lstm", "attention", "parametrized", "tied")
OTHERS = [case for case in MORE_CASES if case.name in _OTHERS]

# rsLoRA differs from LoRA in a number, DoRA from its exact form in its gradient alone: no layer is run with both.
every_method = pytest.mark.parametrize("method", [name for name in METHODS if name not in ("rslora", "dora")])
every_update = pytest.mark.parametrize("update", UPDATES)
few_layers = pytest.mark.parametrize("case", FEW_LAYERS, ids=str)
# The families once, MAP as it starts by default.
MAIN_METHODS = ("map", "lora", "dora_exact")
main_methods = pytest.mark.parametrize("method", MAIN_METHODS)
main_updates = pytest.mark.parametrize("update", updates.REGISTRY)


def every_pair(cases: Sequence[object]) -> pytest.MarkDecorator:
    """Layers, families and methods: each of one with each of another; all of all only in `make test-long`."""
    found = []
    for (i, case), (j, update), (k, method) in itertools.product(
        enumerate(cases), enumerate(updates.REGISTRY), enumerate(MAIN_METHODS)
    ):
        marks = () if (i + j + k) % len(MAIN_METHODS) == 0 else pytest.mark.long
        found.append(pytest.param(case, update, method, marks=marks, id=f"{case}-{update}-{method}"))
    return pytest.mark.parametrize(("case", "update", "method"), found)


on_every_layer = every_pair(LAYERS)


def options(method: str, update: str) -> dict:
    return {"method": METHODS[method], "update": UPDATES[update]} | ({"init": "zero"} if method == "map_paper" else {})


def adapted_case(
    case: Case, method: str, update: str, dtype: torch.dtype = torch.float64, generic: bool = True
) -> tuple[nn.Module, nn.Module, Tensor]:
    """The layer as it was, adapted, and an input."""
    torch.manual_seed(3)
    original = case.make().to(dtype)
    with torch.no_grad():
        for p in original.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    adapted = mapsurgery.patch(copy.deepcopy(original), "*", rank=case.rank, **options(method, update))
    return original, to_generic_point(adapted) if generic else adapted, torch.randn(case.shape, dtype=dtype)


@on_every_layer
def test_the_start_is_the_base(case: Case, update: str, method: str) -> None:
    original, adapted, x = adapted_case(case, method, update, generic=False)
    torch.testing.assert_close(adapted.weight, original.weight.detach(), rtol=0, atol=1e-15 if "dora" in method else 0)
    torch.testing.assert_close(adapted(x), original(x), rtol=1e-13, atol=1e-13)


@on_every_layer
def test_forward_gradients_and_merge_are_those_of_the_materialised_weight(case: Case, update: str, method: str) -> None:
    original, adapted, x = adapted_case(case, method, update)
    W = weight_of(adapted)
    torch.testing.assert_close(adapted.weight, W, rtol=1e-10, atol=1e-11)
    W.requires_grad_()
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    expected, y = functional_call(original, {"weight": W}, (inputs[0],)), adapted(inputs[1])
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    assert (y - original(x)).abs().max() > 1e-4  # the adapter acts
    direction = torch.randn_like(y)
    own = list(adapted.adapter.own_parameters().values())
    dx, dW = torch.autograd.grad(expected, [inputs[0], W], direction)
    found = torch.autograd.grad(y, [inputs[1], *own], direction)
    torch.testing.assert_close(found[0], dx, rtol=1e-9, atol=1e-9)
    through_weight = torch.autograd.grad(adapted.weight, own, dW)  # the other path to the same gradients
    for got, want in zip(found[1:], through_weight, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)
    y = y.detach()
    mapsurgery.merge(adapted)
    assert type(adapted) is type(original)
    torch.testing.assert_close(adapted(x), y, rtol=1e-10, atol=1e-10)
    mapsurgery.unmerge(adapted)
    base = adapted.get_parameter("weight") if hasattr(adapted, "adapter") else None
    torch.testing.assert_close(base.detach(), original.weight.detach(), rtol=1e-9, atol=1e-11)


@every_method
@every_update
@few_layers
def test_gradcheck(case: Case, update: str, method: str) -> None:
    _, adapted, x = adapted_case(case, method, update)
    own = adapted.adapter.own_parameters()

    def forward(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(adapted, {f"adapter.{n}": v for n, v in zip(own, values, strict=True)}, (x,))

    inputs = [x.requires_grad_(), *(p.detach().clone().requires_grad_() for p in own.values())]
    assert torch.autograd.gradcheck(forward, inputs, fast_mode=True)


@every_update
def test_the_gradient_of_dora_takes_the_lengths_as_constants(update: str) -> None:
    case = LAYERS[0]
    _, adapted, x = adapted_case(case, "dora", update)
    a, own = adapted.adapter, adapted.adapter.own_parameters()
    W = adapted.get_parameter("weight").detach()
    lengths = (W + a.scaling * a.update.delta(a)).norm(dim=1).detach()
    rows = ((W.norm(dim=1) + a.m) / lengths)[:, None]
    y = torch.nn.functional.linear(x, rows * (W + a.scaling * a.update.delta(a)), adapted.bias)
    direction = torch.randn_like(y)
    expected = torch.autograd.grad(y, list(own.values()), direction)
    found = torch.autograd.grad(adapted(x), list(own.values()), direction)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want)


@every_method
@every_update
@few_layers
def test_the_first_step_moves_the_weight_a_little_and_every_parameter_can_learn(
    case: Case, update: str, method: str
) -> None:
    _, adapted, x = adapted_case(case, method, update, torch.float32, generic=False)
    W, lr = adapted.weight.detach().clone(), 1e-3
    adapted(x).pow(3).sum().backward()
    grads = {name: p.grad for name, p in adapted.adapter.own_parameters().items()}
    assert all(g is not None and g.isfinite().all() for g in grads.values())
    assert any(grads[name].any() for name, role in adapted.adapter.roles.items() if role != "base")
    torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=lr, weight_decay=0.0).step()
    change = ((adapted.weight - W).norm() / W.norm()).item()
    # The paper's formula jumps by beta; plain LoRA's and DoRA's steps are in units of 1, not of W.
    assert 0 < change < {"map": 30 * lr, "map_paper": 0.15}.get(method, 1.0)


@on_every_layer
def test_the_original_comes_back_and_a_file_gives_the_same(case: Case, update: str, method: str, tmp_path) -> None:
    torch.manual_seed(3)
    original = case.make()
    layer = copy.deepcopy(original)
    snapshot = Snapshot(layer)
    to_generic_point(mapsurgery.patch(layer, "*", rank=case.rank, **options(method, update)))
    x = torch.randn(case.shape)
    with mapsurgery.disabled(layer):
        assert torch.equal(layer(x), original(x))
    mapsurgery.save(layer, tmp_path / "a.safetensors")
    loaded = mapsurgery.load(copy.deepcopy(original), tmp_path / "a.safetensors")
    assert torch.equal(loaded(x), layer(x)) and torch.equal(loaded.weight, layer.weight)
    assert loaded.adapter.method == layer.adapter.method and loaded.adapter.update == layer.adapter.update
    assert mapsurgery.plan(original, "*", rank=case.rank, **options(method, update)).adapter_parameters == sum(
        p.numel() for p in layer.parameters() if p.requires_grad
    )
    mapsurgery.unpatch(layer)
    snapshot.assert_holds(layer)


@on_every_layer
def test_verify_and_report(case: Case, update: str, method: str) -> None:
    if (update, method, case.rank) == ("adalora", "map_paper", 1):
        pytest.skip("one λ is a factor of the whole update, which the paper's formula does not depend on")
    _, adapted, x = adapted_case(case, method, update, torch.float32, generic=False)
    assert not mapsurgery.verify(adapted, x).failures
    to_generic_point(adapted)
    a, W_ = adapted.adapter, weight_of(adapted)
    W = adapted.get_parameter("weight").detach().double()
    matrix = (lambda t: t.t()) if a.transposed else (lambda t: t.flatten(1))
    numbers = mapsurgery.report(adapted).layers[""]
    assert numbers["change"] == pytest.approx(((W_ - W).norm() / W.norm()).item(), rel=1e-3)
    along = ((W_ - W) * W).sum() / W.norm() / (W_ - W).norm()
    assert numbers["scaling"] == pytest.approx(along.square().item(), abs=1e-3)
    cosines = torch.nn.functional.cosine_similarity(matrix(W_), matrix(W), dim=1)
    assert numbers["direction_change"] == pytest.approx((1 - cosines).mean().item(), rel=1e-3, abs=1e-5)
    singular = torch.linalg.svdvals(a.update.delta(a).detach().double())
    share = singular[singular > 1e-9 * singular.max()]
    share = share / share.sum()
    assert numbers["effective_rank"] == pytest.approx(torch.exp(-(share * share.log()).sum()).item(), rel=1e-3)


@every_pair(OTHERS)
def test_other_layers_compute_with_the_same_weight(case, update: str, method: str, tmp_path) -> None:
    original, data = case.built(), case.data()
    adapted = case.patched(**options(method, update))
    torch.testing.assert_close(adapted(data), original(data), rtol=1e-10, atol=1e-10)
    to_generic_point(adapted)
    expected = adapted(data).detach()
    sites = mapsurgery.surgery.record.all_sites(adapted)
    for site in sites:
        W = site.layer.base_of(site.parameter).detach()
        found = getattr(site.layer, site.parameter).detach()
        torch.testing.assert_close(found, weight_by(site.adapter, W), rtol=1e-9, atol=1e-10)
    loss = adapted(data).square().sum()
    loss.backward()
    assert all(p.grad is not None for site in sites for p in site.adapter.own_parameters().values())
    mapsurgery.save(adapted, tmp_path / "a.safetensors")
    loaded = mapsurgery.load(case.built(), tmp_path / "a.safetensors").eval()
    assert torch.equal(loaded(data), expected)
    if case.pickles:
        assert torch.equal(copy.deepcopy(adapted)(data), expected)
    mapsurgery.merge(adapted)
    torch.testing.assert_close(adapted(data), expected, rtol=1e-9, atol=1e-9)


@every_method
@every_update
def test_half_precision_bases_and_autocast(update: str, method: str) -> None:
    for case in LAYERS[:1] + [c for c in LAYERS if c.name == "conv2d"]:
        original, adapted, x = adapted_case(case, method, update, torch.bfloat16)
        expected = functional_call(copy.deepcopy(original).double(), {"weight": weight_of(adapted)}, (x.double(),))
        eps = torch.finfo(torch.bfloat16).eps
        y = adapted(x)
        assert y.dtype == torch.bfloat16 and all(
            p.dtype == torch.float32 for p in adapted.adapter.own_parameters().values()
        )
        assert (y.double() - expected).norm() <= 12 * eps * expected.norm()
        with torch.autocast("cpu", torch.bfloat16):
            original, adapted, x = adapted_case(case, method, update, torch.float32)
            assert adapted(x).dtype == original(x).dtype
            adapted(x).float().sum().backward()


_COMPILED = [*(("map", update) for update in UPDATES), *((method, "lora") for method in METHODS if method != "map")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "update"),
    [
        _COMPILED[0],
        *(pytest.param(*each, marks=pytest.mark.long) for each in [*_COMPILED[1:], ("lora", "lokr")]),
        ("dora_exact", "dense"),
    ],
)
@pytest.mark.usefixtures("_fresh_compiler")
def test_compiles_into_one_graph(update: str, method: str) -> None:
    for name in ("linear", "conv2d"):
        case = next(c for c in LAYERS if c.name == name)
        _, adapted, x = adapted_case(case, method, update)
        compiled = torch.compile(adapted, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), adapted(x))
        expected = torch.autograd.grad(adapted(x).sum(), list(adapted.adapter.own_parameters().values()))
        found = torch.autograd.grad(compiled(x).sum(), list(adapted.adapter.own_parameters().values()))
        for got, want in zip(found, expected, strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("update", "method"),
    [
        pytest.param(
            u, m, marks=() if (u, m) in (("lora", "map"), ("dense", "dora"), ("lokr", "lora")) else pytest.mark.long
        )
        for u in UPDATES
        for m in ("map", "lora", "dora")
    ],
)
def test_exports(update: str, method: str) -> None:
    case = LAYERS[0]
    _, adapted, x = adapted_case(case, method, update)
    program = torch.export.export(adapted.eval(), (x,))
    torch.testing.assert_close(program.module()(x), adapted(x))
    decomposed = program.run_decompositions()
    assert not any("mapsurgery" in str(node.target) for node in decomposed.graph.nodes)
    torch.testing.assert_close(decomposed.module()(x), adapted(x))


# A family of one's own -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Diagonal(mapsurgery.Update):
    """ΔW is W's shape with one trained diagonal."""

    name: ClassVar[str] = "test_diagonal"
    roles: ClassVar = {"diagonal": "up"}
    first: float = 0.0

    def shapes(self, matrix: updates.Matrix, rank: int) -> dict[str, tuple[int, ...]]:
        return {"diagonal": (*matrix.stack, min(matrix.m, matrix.K))}

    def start(self, p, weight, live: bool) -> None:
        p.diagonal.fill_(1.0 if live else self.first)

    def delta(self, p) -> Tensor:
        delta = p.diagonal.new_zeros(p.matrix.m, p.matrix.K)
        return torch.diagonal_scatter(delta, p.diagonal)


@pytest.fixture
def _diagonal():
    mapsurgery.register_update(Diagonal)
    yield
    del updates.REGISTRY["test_diagonal"]


@pytest.mark.usefixtures("_diagonal")
@pytest.mark.parametrize("method", ["map", "lora", "dora"])
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_a_family_of_ones_own_needs_nothing_else(case: Case, method: str, tmp_path) -> None:
    torch.manual_seed(3)
    original = case.make().double()
    layer = mapsurgery.patch(copy.deepcopy(original), "*", method=method, update="test_diagonal")
    x = torch.randn(case.shape, dtype=torch.float64)
    torch.testing.assert_close(layer(x), original(x))
    assert not mapsurgery.verify(layer, x).failures
    with torch.no_grad():
        layer.adapter.diagonal.uniform_(0.5, 1)
    changed = (layer.weight - original.weight).detach()
    assert changed.any()
    y = layer(x).detach()
    mapsurgery.save(layer, tmp_path / "a.safetensors")
    torch.testing.assert_close(
        mapsurgery.load(copy.deepcopy(original), tmp_path / "a.safetensors")(x), y, rtol=0, atol=0
    )
    mapsurgery.report(layer)
    mapsurgery.merge(layer)
    torch.testing.assert_close(layer(x), y)


@dataclass(frozen=True)
class Rows(mapsurgery.Method):
    """W' = diag(g) (W + ΔW)."""

    name: ClassVar[str] = "test_rows"
    roles: ClassVar = {"g": "base"}

    def shapes(self, matrix) -> dict[str, tuple[int, ...]]:
        return {"g": (*matrix.stack, matrix.m)}

    def start(self, p, weight) -> None:
        nn.init.ones_(p.g)

    def coefficients(self, p, W, norm) -> Coefficients:
        return Coefficients(None, 1.0, p.g)


@few_layers
def test_a_method_of_ones_own_needs_nothing_else(case: Case, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(REGISTERED_METHODS, "test_rows", Rows)
    torch.manual_seed(3)
    original = case.make().double()
    x = torch.randn(case.shape, dtype=torch.float64)
    layer = mapsurgery.patch(copy.deepcopy(original), "*", rank=2, method="test_rows")
    torch.testing.assert_close(layer(x), original(x))
    assert not mapsurgery.verify(layer, x).failures
    to_generic_point(layer)
    y = layer(x).detach()
    mapsurgery.save(layer, tmp_path / "a.safetensors")
    assert torch.equal(mapsurgery.load(copy.deepcopy(original), tmp_path / "a.safetensors")(x), y)
    mapsurgery.merge(layer)
    torch.testing.assert_close(layer(x), y)
    mapsurgery.unmerge(layer)
    torch.testing.assert_close(layer.get_parameter("weight"), original.weight)


def test_a_file_of_an_unknown_family_names_it(tmp_path) -> None:
    mapsurgery.register_update(Diagonal)
    layer = mapsurgery.patch(nn.Linear(4, 4), "*", update=Diagonal(first=0.5))
    mapsurgery.save(layer, tmp_path / "a.safetensors")
    del updates.REGISTRY["test_diagonal"]
    with pytest.raises(ValueError, match="test_diagonal.*register_update"):
        mapsurgery.load(nn.Linear(4, 4), tmp_path / "a.safetensors")


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"update": "lhoa"}, "update 'lhoa'.*'loha'"),
        ({"method": "drora"}, "method 'drora'.*'dora'"),
        ({"update": 3}, "update must be one of.*got 3"),
        ({"update": "pissa", "init": "random"}, "pissa.*random"),
        ({"method": "lora", "init": "random"}, "random.*lora"),
        ({"method": mapsurgery.Map(train_beta=False), "init": "random"}, "train_beta"),
        ({"update": mapsurgery.Lora()}, "update must be"),
    ],
)
def test_a_bad_choice_is_named_and_changes_nothing(arguments: dict, message: str) -> None:
    layer = nn.Linear(4, 4)
    snapshot = Snapshot(layer)
    with pytest.raises((ValueError, TypeError), match=message):
        mapsurgery.patch(layer, "*", **arguments)
    snapshot.assert_holds(layer)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mapsurgery.Lora(alpha=0), "alpha.*0"),
        (lambda: mapsurgery.Lora(alpha=10**400), "alpha.*number"),
        (lambda: mapsurgery.Lora(rslora="yes"), "rslora.*yes"),
        (lambda: mapsurgery.Dora(exact=1), "exact.*1"),
        (lambda: mapsurgery.Map(train_alpha=None), "train_alpha.*None"),
        (lambda: updates.LoKr(factor=0), "factor.*0"),
        (lambda: updates.Pissa(niter=-1), "niter.*-1"),
        (lambda: updates.Vera(seed=-1), "seed.*-1"),
    ],
)
def test_a_bad_option_is_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_registering_refuses_what_cannot_be_used() -> None:
    with pytest.raises(TypeError, match="subclass of Update"):
        mapsurgery.register_update(int)
    with pytest.raises(TypeError, match="frozen dataclass"):
        mapsurgery.register_update(type("Loose", (mapsurgery.Update,), {"name": "loose"}))
    taken = dataclass(frozen=True)(type("Other", (mapsurgery.Update,), {"name": "loha"}))
    with pytest.raises(ValueError, match="'loha' is taken"):
        mapsurgery.register_update(taken)
    required = dataclass(frozen=True)(
        type("Required", (mapsurgery.Update,), {"name": "required", "__annotations__": {"scale": "float"}})
    )
    with pytest.raises(TypeError, match="Required needs a default.*scale"):
        mapsurgery.register_update(required)
    role = dataclass(frozen=True)(type("Role", (mapsurgery.Update,), {"name": "role", "roles": {"D": "upward"}}))
    with pytest.raises(ValueError, match="Role has the role 'upward'"):
        mapsurgery.register_update(role)
    role = dataclass(frozen=True)(type("Role", (mapsurgery.Method,), {"name": "role", "roles": {"m": "up"}}))
    with pytest.raises(ValueError, match="Role has the role 'up'"):
        mapsurgery.register_method(role)
    assert {"required", "role"}.isdisjoint([*updates.REGISTRY, *REGISTERED_METHODS])


@pytest.mark.usefixtures("_diagonal")
def test_a_class_of_ones_own_that_no_file_could_bring_back_is_refused() -> None:
    layer = nn.Linear(4, 4)
    snapshot = Snapshot(layer)
    below = dataclass(frozen=True)(type("Below", (updates.LoraUpdate,), {}))
    with pytest.raises(TypeError, match="Below.*register_update"):
        mapsurgery.patch(layer, "*", update=below())
    with pytest.raises(TypeError, match="cannot hold"):
        mapsurgery.patch(layer, "*", update=Diagonal(first=torch.ones(())))
    snapshot.assert_holds(layer)


@pytest.mark.parametrize(("name", "method"), [("alpha", "map"), ("m", "dora"), ("weight_norm", "lora")])
def test_a_family_whose_names_are_taken_is_refused(name: str, method: str, monkeypatch) -> None:
    def shapes(self, matrix, rank: int) -> dict[str, tuple[int, ...]]:
        return {name: (matrix.m, matrix.K)}

    body = {"name": "test_taken", "roles": {name: "up"}, "shapes": shapes}
    family = dataclass(frozen=True)(type("Taken", (mapsurgery.Update,), body))
    monkeypatch.setitem(updates.REGISTRY, "test_taken", family)
    layer = nn.Linear(4, 4)
    snapshot = Snapshot(layer)
    with pytest.raises(ValueError, match=f"test_taken.*{name}.*taken"):
        mapsurgery.patch(layer, "*", method=method, update="test_taken")
    snapshot.assert_holds(layer)


# Threads --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "update"), [("map", "dense"), ("lora", "lora"), ("dora", "lora")])
def test_threads_may_compute_with_one_model(method: str, update: str) -> None:
    torch.manual_seed(0)
    layer = mapsurgery.patch(nn.ConvTranspose1d(16, 16, 3), "*", rank=2, method=method, update=update)
    x = torch.randn(2, 16, 8)
    with torch.no_grad():
        expected = to_generic_point(layer)(x)

    def work(_: int) -> bool:
        with torch.no_grad():
            return all(torch.equal(layer(x), expected) for _ in range(50))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


# Autocast ---------------------------------------------------------------------------------------------------------


@every_method
@every_update
@pytest.mark.parametrize("dropout", [0.0, 1e-9], ids=["plain", "dropout"])
def test_autocast_does_not_reach_norms_and_weights(update: str, method: str, dropout: float) -> None:
    case = LAYERS[0]
    layer = mapsurgery.patch(case.make(), "*", rank=3, dropout=dropout, **options(method, update))
    to_generic_point(layer)
    W = layer.weight.detach().clone()
    a, base = layer.adapter, layer.get_parameter("weight")
    plain = a.method.coefficients(a, lambda: base, a.weight_norm)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.weight.detach() + 0, W)
        inside = a.method.coefficients(a, lambda: base, a.weight_norm)
    for want, got in zip(plain, inside, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@every_method
@every_update
def test_rows_of_an_embedding_are_those_of_the_weight_under_autocast(update: str, method: str) -> None:
    case = next(c for c in OTHERS if c.name == "embedding")
    model = to_generic_point(case.patched(torch.float32, **options(method, update)))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(case.data()), model.weight.detach()[case.data()], rtol=1e-5, atol=1e-6)


# On a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@every_method
@every_update
@few_layers
def test_a_gpu_computes_the_same_and_the_host_waits_for_nothing(case: Case, update: str, method: str) -> None:
    _, adapted, x = adapted_case(case, method, update)
    own = list(adapted.adapter.own_parameters().values())
    expected = adapted(x)
    direction = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, own, direction)
    adapted, x, direction = adapted.cuda(), x.cuda(), direction.cuda()
    own = list(adapted.adapter.own_parameters().values())
    adapted(x)  # the first call may initialise libraries
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = adapted(x)
        found = torch.autograd.grad(y, own, direction)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for got, want in zip((y, *found), (expected, *gradients), strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-9, atol=1e-9)
