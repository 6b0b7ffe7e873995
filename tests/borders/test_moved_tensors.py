"""What no optimiser trains, and what changes all the same: averages, codebooks, bases that arrive."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import load_checkpoint_in_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import mapsurgery


class Momentum(nn.Module):
    """As MoCo and BYOL: a second encoder, an average of the first, that no gradient reaches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        self.average = copy.deepcopy(self.encoder).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.encoder(x) - self.average(x)).square().mean()

    @torch.no_grad()
    def update(self) -> None:
        for average in self.average.parameters():
            average.mul_(0.9).add_(0.1)

    def update_data(self) -> None:
        for average in self.average.parameters():
            average.data.mul_(0.9)

    def update_assigned(self) -> None:
        for average in self.average.parameters():
            average.data = average.data * 0.9


class Codebook(nn.Module):
    """As vector-quantised autoencoders: codes that follow the data, a frozen Parameter and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(8, 4)
        self.codes = nn.Embedding(16, 4)
        self.codes.weight.requires_grad_(False)
        self.register_buffer("sizes", torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        h = self.encoder(x)
        nearest = torch.cdist(h, self.codes.weight).argmin(-1)
        if self.training:
            with torch.no_grad():
                self.codes.weight[nearest] = 0.9 * self.codes.weight[nearest] + 0.1 * h
                self.sizes[nearest] += 1
        return (h - self.codes(nearest)).square().mean()


def data() -> Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def moved(path: Path) -> list[str]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["moved"])


@pytest.mark.parametrize("update", [Momentum.update, Momentum.update_data, Momentum.update_assigned])
@pytest.mark.parametrize("cast", [None, torch.bfloat16], ids=["kept", "cast"])
def test_an_average_is_in_the_file(update: Callable, cast: torch.dtype | None, tmp_path: Path) -> None:
    model = mapsurgery.patch(Momentum(), "encoder*", rank=2)
    if cast is not None:
        model.to(cast)
    mapsurgery.save(model, tmp_path / "before.safetensors")
    assert moved(tmp_path / "before.safetensors") == []
    update(model)
    mapsurgery.save(model, tmp_path / "a.safetensors")
    assert {*moved(tmp_path / "a.safetensors")} == {
        f"average.{i}.{name}" for i in (0, 2) for name in ("weight", "bias")
    }
    fresh = Momentum() if cast is None else Momentum().to(cast)
    mapsurgery.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(fresh.average[0].weight, model.average[0].weight)
    assert not fresh.average[0].weight.requires_grad
    again = tmp_path / "again.safetensors"
    mapsurgery.save(fresh, again)
    assert moved(again) == moved(tmp_path / "a.safetensors")


def test_a_codebook_is_in_the_file(tmp_path: Path) -> None:
    model = mapsurgery.patch(Codebook(), "encoder", rank=2)
    model(data())
    mapsurgery.save(model.eval(), tmp_path / "a.safetensors")
    fresh = mapsurgery.load(Codebook().eval(), tmp_path / "a.safetensors")
    assert torch.equal(fresh(data()), model(data()))
    other = mapsurgery.patch(Codebook().eval(), "encoder", rank=2)
    mapsurgery.load_adapter_state_dict(other, mapsurgery.adapter_state_dict(model))
    assert torch.equal(other(data()), model(data()))


def test_what_stays_is_not_in_the_file(tmp_path: Path) -> None:
    """Neither moving, casting, verifying nor merging and back moves a parameter."""
    model = mapsurgery.patch(Momentum(), "encoder*", rank=2)
    model.average.load_state_dict({name: t / 2 for name, t in model.average.state_dict().items()})
    model.double().float()
    mapsurgery.verify(model, data())
    mapsurgery.unmerge(mapsurgery.merge(model, keep_base=True))
    assert not any(name.startswith("average") for name in mapsurgery.adapter_state_dict(copy.deepcopy(model)))


class Normed(nn.Module):
    """Adapted layers beside batch normalisation, whose statistics a base's checkpoint brings."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)
        for norm in (self.body[1], self.norm):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x)))


def _whole(model: nn.Module, other: nn.Module, path: Path) -> None:
    model.load_state_dict(other.state_dict())


def _above(model: nn.Module, other: nn.Module, path: Path) -> None:
    nn.ModuleDict({"model": model}).load_state_dict({f"model.{k}": t for k, t in other.state_dict().items()})


def _children(model: nn.Module, other: nn.Module, path: Path) -> None:
    for name, child in model.named_children():
        child.load_state_dict(getattr(other, name).state_dict())


def _accelerate(model: nn.Module, other: nn.Module, path: Path) -> None:
    save_file(other.state_dict(), path / "base.safetensors")
    load_checkpoint_in_model(model, str(path / "base.safetensors"))


def _accelerate_strict(model: nn.Module, other: nn.Module, path: Path) -> None:
    save_file(other.state_dict(), path / "base.safetensors")
    load_checkpoint_in_model(model, str(path / "base.safetensors"), strict=True)


def _accelerate_by_device(model: nn.Module, other: nn.Module, path: Path) -> None:
    save_file(other.state_dict(), path / "base.safetensors")
    load_checkpoint_in_model(model, str(path / "base.safetensors"), device_map={"": "cpu"})


ARRIVALS = [_whole, _above, _children, _accelerate, _accelerate_strict, _accelerate_by_device]


@pytest.mark.parametrize("arrive", ARRIVALS)
def test_a_base_arrives_in_every_layer(arrive: Callable, tmp_path: Path) -> None:
    model = mapsurgery.patch(Normed(), ["body*", "head"], rank=2, train=["norm"])
    arrive(model, Normed(seed=1), tmp_path)
    with mapsurgery.disabled(model):
        assert torch.equal(model.eval()(data()), Normed(seed=1).eval()(data()))
    own = model.body[0]
    assert torch.equal(
        own.adapter.norm_of(own.get_parameter("weight")), Normed(seed=1).body[0].weight.norm().reshape(1)
    )


@pytest.mark.parametrize("arrive", ARRIVALS[:5])
def test_unpatch_gives_the_base_that_arrived(arrive: Callable, tmp_path: Path) -> None:
    """Weights, what `train` named and statistics are of one checkpoint, though training moved some since."""
    model = mapsurgery.patch(Normed(), ["body*", "head"], rank=2, train=["norm"])
    model.train()(data())
    arrive(model, Normed(seed=1), tmp_path)
    model(data())
    with torch.no_grad():
        model.norm.weight.add_(1)
    mapsurgery.unpatch(model)
    expected = Normed(seed=1).state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in model.state_dict().items())


def test_a_checkpoint_of_the_patched_model_is_what_was_trained() -> None:
    """`unpatch` then gives back what was there at `patch`."""
    model = mapsurgery.patch(Normed(), "body*", rank=2)
    model.train()(data())
    state = copy.deepcopy(model.state_dict())
    other = mapsurgery.patch(Normed(), "body*", rank=2)
    other.load_state_dict(state)
    assert torch.equal(other.norm.running_mean, model.norm.running_mean)
    assert "norm.running_mean" in mapsurgery.adapter_state_dict(other)
    mapsurgery.unpatch(other)
    assert torch.equal(other.norm.running_mean, Normed().norm.running_mean)
