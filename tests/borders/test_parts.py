"""A patched part of a model, and models inside what wraps them: nothing that trains is left out, names stay."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import mapsurgery


class Classifier(nn.Module):
    """A backbone and a head, as a LightningModule or a user's own model holds them."""

    def __init__(self, patched: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8))
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)
        if patched:
            mapsurgery.patch(self.backbone, "*", rank=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.backbone(x)))


def data() -> Tensor:
    return torch.randn(12, 8, generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module) -> nn.Module:
    with pytest.warns(UserWarning, match="only a part of the model.*head.weight"):
        optimizer = torch.optim.AdamW(mapsurgery.param_groups(model, 1e-1))
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data()), torch.arange(12) % 3).backward()
        optimizer.step()
    return model.eval()


def test_what_trains_outside_of_the_part_is_in_the_groups() -> None:
    model = Classifier()
    start = model.head.weight.clone()
    trained(model)
    assert not torch.equal(start, model.head.weight)


def test_what_trains_outside_of_the_part_is_in_the_file(tmp_path: Path) -> None:
    """Under the names of the whole; it loads into the whole, whether or not that patches its part by itself."""
    model = trained(Classifier())
    mapsurgery.save(model, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert {"head.weight", "norm.running_mean", "backbone.0.adapter.A", "backbone.1.running_mean"} <= {*file.keys()}
    fresh = mapsurgery.load(Classifier(patched=False), tmp_path / "a.safetensors").eval()
    assert torch.equal(fresh(data()), model(data()))
    other = Classifier().eval()
    mapsurgery.load_adapter_state_dict(other, mapsurgery.adapter_state_dict(model))
    assert torch.equal(other(data()), model(data()))


def test_a_part_alone_keeps_its_own_names(tmp_path: Path) -> None:
    model = trained(Classifier())
    mapsurgery.save(model.backbone, tmp_path / "a.safetensors")
    fresh = Classifier(patched=False)
    mapsurgery.load(fresh.backbone, tmp_path / "a.safetensors")
    assert torch.equal(fresh.backbone.eval()(data()), model.backbone(data()))


def test_a_whole_whose_rest_is_frozen_has_the_names_of_the_part(tmp_path: Path) -> None:
    """A module that only holds the patched one (a trainer's own) writes what the patched one would."""
    model = Classifier()
    model.head.requires_grad_(False)
    model.norm = nn.Identity()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mapsurgery.param_groups(model, 1e-3)
    assert "0.adapter.A" in mapsurgery.adapter_state_dict(model)


def test_the_rest_that_patch_left_trainable_is_said() -> None:
    model = Classifier(patched=False)
    mapsurgery.patch(model.backbone, "*", rank=2)
    with pytest.warns(UserWarning, match="4 parameters outside.*norm.weight.*Freeze"):
        groups = mapsurgery.param_groups(model, 1e-3)
    inside = {id(p) for group in groups for p in group["params"]}
    assert inside == {id(p) for p in model.parameters() if p.requires_grad}


def _compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [_compiled, nn.DataParallel], ids=["compile", "DataParallel"])
def test_load_patches_the_model_inside_its_wrapper(wrap, tmp_path: Path) -> None:
    model = mapsurgery.patch(Classifier(patched=False), "*", rank=2).eval()
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    mapsurgery.save(wrap(model), tmp_path / "a.safetensors")
    fresh = wrap(Classifier(patched=False)).eval()
    assert mapsurgery.load(fresh, tmp_path / "a.safetensors") is fresh
    torch.testing.assert_close(fresh(data()), model(data()))
    for one in (fresh, model):
        assert {*mapsurgery.report(one).layers} == {"backbone.0", "backbone.3", "head"}


@pytest.mark.parametrize("wrap", [_compiled, nn.DataParallel], ids=["compile", "DataParallel"])
def test_a_load_that_fails_leaves_the_model_inside_its_wrapper(wrap, tmp_path: Path) -> None:
    mapsurgery.save(mapsurgery.patch(Classifier(patched=False), "*", rank=2), tmp_path / "a.safetensors")
    other = Classifier(patched=False)
    with torch.no_grad():
        other.head.weight.mul_(2)
    with pytest.raises(ValueError, match="another base.*head has"):
        mapsurgery.load(wrap(other), tmp_path / "a.safetensors")
    assert type(other.head) is nn.Linear


def test_statistics_outside_of_the_part_are_in_the_file(tmp_path: Path) -> None:
    """Though nothing trains there."""
    model = Classifier()
    model.head.requires_grad_(False)
    model.norm.requires_grad_(False)
    model.train()(data())
    mapsurgery.save(model.eval(), tmp_path / "a.safetensors")
    fresh = mapsurgery.load(Classifier(patched=False).eval(), tmp_path / "a.safetensors")
    assert torch.equal(fresh(data()), model(data()))


def test_a_weight_that_the_rest_shares_is_said() -> None:
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(4, 4)), "out": nn.Linear(4, 4, bias=False)})
    model["out"].weight = model["body"][0].weight
    mapsurgery.patch(model["body"], "*", rank=2)
    with pytest.warns(UserWarning, match="computes with the base: out.weight with body.0. Patch the whole"):
        mapsurgery.param_groups(model, 1e-3)
