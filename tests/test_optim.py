"""Optimiser groups."""

from __future__ import annotations

import pytest
import torch
from definition import image, net, train_steps
from torch import nn

import mapsurgery


def _model() -> nn.Module:
    return mapsurgery.patch(net(), ["stem", "body"], rank=2, train=["head", "norm"])


def _names(model: nn.Module, group: dict) -> set[str]:
    own = {id(p): name for name, p in model.named_parameters()}
    return {own[id(p)] for p in group["params"]}


def test_every_trained_parameter_is_in_exactly_one_group() -> None:
    model = _model()
    grouped = [p for group in mapsurgery.param_groups(model, 1e-3) for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {p for p in model.parameters() if p.requires_grad}


def test_rates_and_decay_are_those_of_the_role() -> None:
    model = _model()
    groups = mapsurgery.param_groups(model, 1e-3, 0.05, magnitude_lr_factor=10.0, b_lr_factor=4.0)
    found = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert found == {
        "down": (1e-3, 0.05),
        "up": (4e-3, 0.05),
        "magnitude": (1e-2, 0.0),
        "decay": (1e-3, 0.05),
        "no_decay": (1e-3, 0.0),
    }
    by_name = {group["name"]: _names(model, group) for group in groups}
    assert by_name["down"] == {f"{layer}.adapter.A" for layer in ("stem", "body.0", "body.2")}
    assert by_name["up"] == {f"{layer}.adapter.B" for layer in ("stem", "body.0", "body.2")}
    assert {name.rpartition(".")[2] for name in by_name["magnitude"]} == {"alpha", "beta"}
    assert by_name["decay"] == {"head.weight"}
    assert by_name["no_decay"] == {"head.bias", "norm.weight", "norm.bias"}


def test_empty_groups_and_frozen_parameters_are_left_out() -> None:
    model = mapsurgery.patch(net(), "body", rank=2)
    for layer in (model.body[0], model.body[2]):
        layer.adapter.alpha.requires_grad_(False)
    groups = {group["name"]: _names(model, group) for group in mapsurgery.param_groups(model, 1e-3)}
    assert set(groups) == {"down", "up", "magnitude"}
    assert groups["magnitude"] == {"body.0.adapter.beta", "body.2.adapter.beta"}


def test_a_shared_layer_is_counted_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.append(model[0])
    mapsurgery.patch(model, "*", rank=2)
    assert sum(len(group["params"]) for group in mapsurgery.param_groups(model, 1e-3)) == 4


@pytest.mark.parametrize("name", ["lr", "weight_decay", "magnitude_lr_factor", "b_lr_factor"])
@pytest.mark.parametrize("value", [-1e-3, float("nan")])
def test_a_negative_number_is_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        mapsurgery.param_groups(_model(), **{"lr": 1e-3, name: value})


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_any_optimizer_takes_the_groups_and_trains_every_parameter(optimizer: type) -> None:
    model = _model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    opt = optimizer(mapsurgery.param_groups(model, 1e-2))
    for _ in range(2):  # A moves once B has
        opt.zero_grad()
        model(image()).square().sum().backward()
        opt.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_frozen_weights_do_not_move_in_training() -> None:
    model = mapsurgery.patch(net(), "body", rank=2)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    train_steps(model, image(), steps=3)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in frozen.items())


def test_a_norm_of_several_dimensions_is_not_decayed() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm([3, 4]))
    mapsurgery.patch(model, "0", rank=2, train="1")
    groups = {group["name"]: group["params"] for group in mapsurgery.param_groups(model, 1e-3, 0.1)}
    assert {id(p) for p in groups["no_decay"]} == {id(p) for p in model[1].parameters()}
    assert "decay" not in groups


def test_groups_of_a_model_on_meta_are_refused() -> None:
    with torch.device("meta"):
        model = mapsurgery.patch(nn.Sequential(nn.Linear(4, 4)), "*", rank=2)
    with pytest.raises(ValueError, match="0: .*meta"):
        mapsurgery.param_groups(model, 1e-3)


# Learning rates by layer ---------------------------------------------------------------------------------------------


def _rates(model: nn.Module, **options: object) -> dict[str, float]:
    """Learning rate of every trained parameter by its name."""
    own = {id(p): name for name, p in model.named_parameters()}
    groups = mapsurgery.param_groups(model, 1e-3, 0.05, **options)
    return {own[id(p)]: group["lr"] for group in groups for p in group["params"]}


def test_layers_have_their_own_rates_on_top_of_the_roles() -> None:
    model = _model()
    plain = _rates(model, magnitude_lr_factor=10.0, b_lr_factor=4.0)
    factors = {"body.0": 0.5, "body": 0.1, "norm*": 3.0}
    found = _rates(model, magnitude_lr_factor=10.0, b_lr_factor=4.0, layer_lr_factors=factors)
    assert set(found) == set(plain)
    for name, rate in found.items():
        expected = 0.5 if name.startswith("body.0") else 0.1 if name.startswith("body") else 1.0
        expected = 3.0 if name.startswith("norm") else expected
        assert rate == pytest.approx(expected * plain[name]), name
    assert found["body.2.adapter.alpha"] == pytest.approx(1e-3)  # 1e-3 x 10 x 0.1


def test_groups_say_their_factor_and_keep_their_decay() -> None:
    groups = mapsurgery.param_groups(_model(), 1e-3, 0.05, layer_lr_factors={"body": 0.1})
    found = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert found["down x0.1"] == (pytest.approx(1e-4), 0.05) and found["down"] == (1e-3, 0.05)
    assert found["magnitude x0.1"] == (pytest.approx(1e-4), 0.0)
    assert "decay x0.1" not in found


def test_a_factor_of_zero_stops_a_layer() -> None:
    model = _model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    opt = torch.optim.AdamW(mapsurgery.param_groups(model, 1e-2, layer_lr_factors={"body": 0.0}))
    for _ in range(2):
        opt.zero_grad()
        model(image()).square().sum().backward()
        opt.step()
    for name, parameter in model.named_parameters():
        still = name.startswith("body") or not parameter.requires_grad
        assert parameter.equal(before[name]) == still, name


def test_a_layer_pattern_or_factor_that_is_wrong_is_named() -> None:
    with pytest.raises(ValueError, match="'bodi' matches nothing that is trained; the nearest: .*body"):
        mapsurgery.param_groups(_model(), 1e-3, layer_lr_factors={"bodi": 0.1})
    with pytest.raises(ValueError, match=r"layer_lr_factors\['body'\] must not be negative, got -1"):
        mapsurgery.param_groups(_model(), 1e-3, layer_lr_factors={"body": -1})


def test_a_tied_weight_goes_by_any_of_its_names() -> None:
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6, bias=False))
    model[2].weight = model[0].weight
    mapsurgery.patch(model, ["1", "2"], rank=2)
    for name in ("0", "2"):
        rates = _rates(model, layer_lr_factors={name: 0.5})
        assert sorted(rates.values()) == pytest.approx([5e-4] * 4 + [1e-3] * 4)
