"""The start: its options, and what it means for the first steps."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from definition import STARTS, Snapshot, image, net, start_name, to_generic_point, weight_of
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import mapsurgery
from mapsurgery import Init


def test_the_default_is_soft_and_relative() -> None:
    assert Init() == Init("soft", 0.1, 4.0, True, "weight") and Init.parse("soft") == Init()
    layer = mapsurgery.patch(nn.Linear(6, 5), "*", rank=2)
    assert layer.adapter.init == Init()
    assert not layer.adapter.B.any() and layer.adapter.alpha.item() == 0
    assert layer.adapter.beta.item() == pytest.approx(0.1)


@pytest.mark.parametrize("init", STARTS, ids=start_name)
def test_magnitudes_start_in_their_unit(init: Init) -> None:
    layer = mapsurgery.patch(nn.Linear(6, 5), "*", rank=2, init=init)
    a = layer.adapter
    norm = 1.0 if init.relative else layer.get_parameter("weight").norm().item()
    assert a.alpha.item() == 0 and a.alpha.shape == a.beta.shape == (1,)
    assert a.beta.item() == pytest.approx(0.0 if init.kind == "random" else 0.1 * norm)
    assert bool(a.B.any()) == (init.kind == "random") and a.A.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "hard"}, "'hard'.*'soft', 'zero', 'random'"),
        ({"beta": 0}, "beta.*0"),
        ({"beta": -0.1}, "beta.*-0.1"),
        ({"beta": float("nan")}, "beta.*nan"),
        ({"beta": float("inf")}, "beta.*inf"),
        ({"beta": True}, "beta.*True"),
        ({"beta": "0.1"}, "beta.*'0.1'"),
        ({"gain": 0}, "gain.*0"),
        ({"gain": None}, "gain.*None"),
        ({"relative": 1}, "relative.*1"),
    ],
)
def test_a_bad_option_is_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Init(**arguments)


def test_an_init_is_a_value() -> None:
    init = Init("zero", 0.2)
    assert Init(**init.to_dict()) == init and hash(init) == hash(Init("zero", 0.2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        init.beta = 1.0


def test_soft_starts_as_lora_with_scaling_gain() -> None:
    layer = nn.Linear(20, 30).double()
    x = torch.randn(8, 20, dtype=torch.float64)
    base = layer(x)
    mapsurgery.patch(layer, "*", rank=4, init=Init("soft", 0.1, 3.0))
    with torch.no_grad():
        layer.adapter.B.normal_().mul_(1e-6)  # ||BA|| far below tau
    lora = base + 3.0 * (x @ layer.adapter.A.t()) @ layer.adapter.B.t()
    assert ((layer(x) - lora).norm() / (lora - base).norm()).item() < 1e-4


def test_soft_becomes_map_as_the_product_outgrows_tau() -> None:
    layer = mapsurgery.patch(nn.Linear(20, 30).double(), "*", rank=4)
    W = layer.get_parameter("weight").detach().clone()
    with torch.no_grad():
        layer.adapter.B.normal_().mul_(1e4)
    assert ((layer.weight - W).norm() / W.norm()).item() == pytest.approx(0.1, rel=1e-6)


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("lr", [1e-4, 1e-3])
def test_the_default_start_does_not_jump_and_the_zero_start_jumps_by_beta(lr: float, relative: bool) -> None:
    changes = {}
    for kind in ("soft", "zero", "random"):
        torch.manual_seed(0)
        layer = nn.Linear(64, 64)
        W = layer.weight.detach().clone()
        mapsurgery.patch(layer, "*", rank=4, init=Init(kind, relative=relative))
        optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=lr, weight_decay=0)
        layer(torch.randn(16, 64)).pow(3).sum().backward()
        optimizer.step()
        changes[kind] = ((weight_of(layer) - W).norm() / W.norm()).item()
    assert 0 < changes["soft"] < 10 * lr and 0 < changes["random"] < 10 * lr
    assert changes["zero"] == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("init", STARTS, ids=start_name)
def test_training_from_every_start_lowers_the_loss(init: Init) -> None:
    torch.manual_seed(0)
    target = torch.randn(64, 8)
    x = torch.randn(64, 16)
    model = nn.Linear(16, 8)
    mapsurgery.patch(model, "*", rank=4, init=init)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


def test_the_seed_decides_the_start() -> None:
    def start(seed: int) -> torch.Tensor:
        model = net()
        torch.manual_seed(seed)
        return mapsurgery.patch(model, "body", rank=2).body[0].adapter.A

    assert torch.equal(start(1), start(1)) and not torch.equal(start(1), start(2))


def test_patching_keeps_the_models_output_and_its_own_dtype_of_adapters() -> None:
    model = net().eval()
    expected = model(image())
    for dtype, found in ((None, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float64, torch.float64)):
        other = mapsurgery.patch(copy.deepcopy(model), "*", rank=2, dtype=dtype)
        assert {p.dtype for p in other.stem.adapter.own_parameters().values()} == {found}
        torch.testing.assert_close(other(image()), expected, rtol=1e-5, atol=1e-6)
    assert mapsurgery.patch(net().double(), "*", rank=2).stem.adapter.A.dtype == torch.float64


# Methods that have one start ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("zero", "kind='zero'"),
        (Init("zero"), "kind='zero'"),
        (Init(beta=0.3), "beta=0.3"),
        (Init(gain=8.0), "gain=8.0"),
        (Init(relative=False), "relative=False"),
    ],
    ids=str,
)
def test_an_option_that_does_nothing_is_refused_and_changes_nothing(
    method: str, init: str | Init, message: str
) -> None:
    model = net()
    snapshot = Snapshot(model)
    expected = f"init {message} does nothing with method '{method}'.*a_scale: leave"
    for refuse in (mapsurgery.plan, mapsurgery.patch):
        with pytest.raises(ValueError, match=expected):
            refuse(model, "*", method=method, init=init)
    snapshot.assert_holds(model)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("init", [None, "soft", Init(), Init(a_scale="kaiming")], ids=str)
def test_what_other_methods_read_of_a_start_is_accepted(method: str, init: str | Init | None) -> None:
    weight = torch.randn(64, 256)
    layer = nn.Linear(256, 64)
    layer.weight.data.copy_(weight)
    mapsurgery.patch(layer, "*", method=method, init=init)
    kaiming = init is None or (isinstance(init, Init) and init.a_scale == "kaiming")
    size = (3 * 256) ** -0.5 if kaiming else weight.square().mean().sqrt().item()
    assert layer.adapter.A.detach().square().mean().sqrt().item() == pytest.approx(size, rel=0.1)


def test_a_method_may_read_more_of_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapsurgery.Lora, "init_options", ("beta",))
    assert mapsurgery.plan(net(), "*", method="lora", init=Init(beta=0.3)).config.init.beta == 0.3


def test_a_file_of_an_older_version_with_an_option_that_does_nothing_loads(tmp_path: Path) -> None:
    x, base = image(), net()
    model = to_generic_point(mapsurgery.patch(copy.deepcopy(base), "*", rank=2, method="lora"))
    mapsurgery.save(model, tmp_path / "new.safetensors")
    with safe_open(tmp_path / "new.safetensors", "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata["config"] = json.dumps(json.loads(metadata["config"]) | {"init": Init("zero", 0.3).to_dict()})
    metadata |= {"format_version": "3"}
    del metadata["checksum"], metadata["surroundings"]
    save_file(tensors, tmp_path / "old.safetensors", metadata)
    loaded = mapsurgery.load(copy.deepcopy(base), tmp_path / "old.safetensors")
    assert torch.equal(loaded(x), model(x))
