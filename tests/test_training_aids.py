"""What training scripts do around the adapters: averaging weights, dropout, ranks by layer, frozen magnitudes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from definition import Snapshot, image, net, train_steps
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import mapsurgery
from mapsurgery.surgery import record
from mapsurgery.updates import REGISTRY

METHODS = ["map", "lora", "dora"]
UPDATES = sorted(family for family, cls in REGISTRY.items() if cls.__module__.startswith("mapsurgery."))

every_method = pytest.mark.parametrize("method", METHODS)
every_family = pytest.mark.parametrize("update", UPDATES)


def _model(method: object = "map", update: str = "lora", targets: object = "*", **options: object) -> nn.Module:
    return mapsurgery.patch(net(), targets, rank=2, method=method, update=update, **options)


def _trained(*args: object, **options: object) -> nn.Module:
    return train_steps(_model(*args, **options), image(), lr=0.05)


# Averages of weights --------------------------------------------------------------------------------------------------


def _torch_ema(model: nn.Module, decay: float) -> tuple[nn.Module, Callable[[nn.Module], None]]:
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    return ema.module, ema.update_parameters


def _timm_ema(model: nn.Module, decay: float) -> tuple[nn.Module, Callable[[nn.Module], None]]:
    ema = pytest.importorskip("timm").utils.ModelEmaV3(model, decay=decay)
    return ema.module, ema.update


@every_method
@pytest.mark.parametrize(
    ("make", "update"),
    [(_torch_ema, "lora"), (_timm_ema, "pissa"), (_torch_ema, "adalora"), (_timm_ema, "vera"), (_torch_ema, "lokr")],
    ids=["torch-lora", "timm-pissa", "torch-adalora", "timm-vera", "torch-lokr"],
)
def test_an_average_of_weights_is_a_patched_model_of_its_own(
    make: Callable, update: str, method: str, tmp_path: Path
) -> None:
    model, decay = _model(method, update), 0.7
    average, update_average = make(model, decay)
    update_average(model)  # torch's first update copies
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        train_steps(model, image(), steps=1, lr=0.05)
        update_average(model)
        for name, p in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach()
    moved = 0
    for name, p in average.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-5, atol=1e-6)
        moved += not p.equal(model.get_parameter(name))
    assert moved >= 4
    for path, adapter in record.adapters_of(average).items():
        assert adapter.weight_norm.equal(record.adapters_of(model)[path].weight_norm)
    output = average.eval()(image())
    assert not torch.allclose(output, model.eval()(image()), rtol=1e-4)
    mapsurgery.save(average, tmp_path / "ema.safetensors")
    loaded = mapsurgery.load(net(), tmp_path / "ema.safetensors").eval()
    torch.testing.assert_close(loaded(image()), output, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(mapsurgery.merge(average)(image()), output, rtol=1e-4, atol=1e-5)


# Dropout --------------------------------------------------------------------------------------------------------------


def _layer(kind: str, **options: object) -> tuple[nn.Module, nn.Module, Tensor]:
    """A layer, the same one adapted and trained with dropout, and an input."""
    torch.manual_seed(0)
    conv = kind == "conv"
    original = nn.Conv2d(8, 12, 3, padding=1) if conv else nn.Linear(8, 12)
    x = torch.randn(2, 8, 5, 5) if conv else torch.randn(6, 8)
    adapted = mapsurgery.patch(copy.deepcopy(original), "*", rank=2, dropout=0.5, **options)
    train_steps(adapted, x, steps=4, lr=0.05)
    return original, adapted, x


@every_method
@every_family
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_dropout_is_off_in_eval_and_right_on_average(
    kind: str, update: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output is linear in what is dropped: the mean over a mask and its complement is that over all masks."""
    original, adapted, x = _layer(kind, method=method, update=update)
    plain = copy.deepcopy(original)
    plain.weight = nn.Parameter(adapted.weight.detach().clone())
    with torch.no_grad():
        expected = plain(x)
        torch.testing.assert_close(adapted.eval()(x), expected, rtol=1e-4, atol=1e-5)
        adapted.train()
        assert not adapted(x).equal(adapted(x))
        mask = torch.rand(x.shape) < 0.5
        outputs = []
        for kept in (mask, ~mask):
            monkeypatch.setattr(nn.functional, "dropout", _dropping(kept))
            outputs.append(adapted(x))
    assert not torch.allclose(*outputs, rtol=1e-3)
    torch.testing.assert_close(sum(outputs) / 2, expected, rtol=1e-4, atol=1e-5)


def _dropping(kept: Tensor) -> Callable[[Tensor, float, bool], Tensor]:
    """F.dropout with a mask that is given."""

    def dropout(x: Tensor, p: float, training: bool) -> Tensor:
        assert p == 0.5 and training
        return x * kept / p

    return dropout


@every_method
@every_family
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_dropout_leaves_the_base_alone(kind: str, update: str, method: str) -> None:
    """At the start ΔW is 0: nothing is left to be dropped, whatever the method and family."""
    torch.manual_seed(0)
    original = nn.Conv2d(8, 12, 3, padding=1) if kind == "conv" else nn.Linear(8, 12)
    x = torch.randn(2, 8, 5, 5) if kind == "conv" else torch.randn(6, 8)
    adapted = mapsurgery.patch(copy.deepcopy(original), "*", rank=2, dropout=0.5, method=method, update=update)
    torch.testing.assert_close(adapted.train()(x), original(x), rtol=1e-5, atol=1e-6)


@every_method
@every_family
def test_every_trained_parameter_gets_a_gradient_through_dropout(update: str, method: str) -> None:
    _, adapted, x = _layer("linear", method=method, update=update)
    adapted.zero_grad()
    adapted.train()(x).square().sum().backward()
    trained = adapted.adapter.trained_parameters()
    assert trained and all(p.grad is not None and p.grad.any() for p in trained.values())


# Ranks ----------------------------------------------------------------------------------------------------------------


@every_method
@every_family
def test_ranks_by_layer_reach_the_parameters_the_report_and_the_file(update: str, method: str, tmp_path: Path) -> None:
    model = _model(method, update, rank_pattern={"body.0": 3, "body.*": 1, "head": 99})
    family = record.adapters_of(model)["stem"].update
    for path, asked in {"stem": 2, "body.0": 3, "body.2": 1, "head": 99}.items():
        adapter = record.adapters_of(model)[path]
        expected = family.limited(asked, adapter.matrix)
        assert adapter.rank == expected
        shapes = family.shapes(adapter.matrix, expected)
        assert {name: tuple(getattr(adapter, name).shape) for name in shapes} == shapes
    train_steps(model, image())
    assert {path: layer["rank"] for path, layer in mapsurgery.report(model).layers.items()} == {
        path: adapter.rank for path, adapter in record.adapters_of(model).items()
    }
    mapsurgery.save(model, tmp_path / "ranks.safetensors")
    loaded = mapsurgery.load(net(), tmp_path / "ranks.safetensors")
    assert loaded.eval()(image()).equal(model.eval()(image()))


# Frozen magnitudes ----------------------------------------------------------------------------------------------------

FROZEN = {
    "alpha": mapsurgery.Map(train_alpha=False),
    "beta": mapsurgery.Map(train_beta=False),
    "alpha, beta": mapsurgery.Map(train_alpha=False, train_beta=False),
}


def _frozen(model: nn.Module) -> dict[str, set[str]]:
    """Names of each adapter's own parameters that require no gradient."""
    own = {path: adapter.own_parameters() for path, adapter in record.adapters_of(model).items()}
    return {path: {name for name, p in found.items() if not p.requires_grad} for path, found in own.items()}


@pytest.mark.parametrize(
    ("names", "update"),
    [*((names, "lora") for names in FROZEN), *(("alpha, beta", u) for u in ("adalora", "loha", "dense"))],
)
def test_a_frozen_magnitude_stays_from_patch_to_merge(names: str, update: str, tmp_path: Path) -> None:
    base, chosen = net(), set(names.split(", "))
    before = Snapshot(base)
    model = mapsurgery.patch(base, "*", rank=2, method=FROZEN[names], update=update)
    everywhere = {path: chosen for path in ("stem", "body.0", "body.2", "head")}
    assert _frozen(model) == everywhere
    start = {site.entry(n): getattr(site.adapter, n).clone() for site in record.all_sites(model) for n in chosen}

    groups = mapsurgery.param_groups(model, 1e-2)
    grouped = {id(p) for group in groups for p in group["params"]}
    assert not grouped & {id(model.get_parameter(name)) for name in start}
    assert ("magnitude" in {group["name"] for group in groups}) == (len(chosen) < 2 or update == "adalora")
    assert not mapsurgery.verify(model, image()).failures
    train_steps(model, image(), lr=0.05)
    assert all(model.get_parameter(name).equal(value) for name, value in start.items())
    assert all(layer["change"] > 0 for layer in mapsurgery.report(model).layers.values())
    assert not mapsurgery.verify(model, image()).failures

    output = model.eval()(image())
    mapsurgery.save(model, tmp_path / "frozen.safetensors")
    loaded = mapsurgery.load(net(), tmp_path / "frozen.safetensors")
    assert loaded.eval()(image()).equal(output) and _frozen(loaded) == everywhere
    train_steps(loaded, image())
    assert all(loaded.get_parameter(name).equal(value) for name, value in start.items())

    copied = copy.deepcopy(model)
    assert _frozen(copied) == everywhere
    mapsurgery.merge(copied, keep_base=True)
    torch.testing.assert_close(copied(image()), output, rtol=1e-4, atol=1e-5)
    mapsurgery.unmerge(copied)
    assert _frozen(copied) == everywhere and copied(image()).equal(output)

    mapsurgery.unpatch(model.train())
    before.assert_holds(model)


def test_a_switch_that_is_no_bool_is_refused() -> None:
    with pytest.raises(ValueError, match="train_alpha of method 'map' must be True or False, got 1"):
        mapsurgery.Map(train_alpha=1)  # type: ignore[arg-type]
