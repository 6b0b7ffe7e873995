"""Forwards that change their own weight: refused by name, as W' is computed; forwards that only read it are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mapsurgery


class MaskedConv2d(nn.Conv2d):
    """PixelCNN's."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.register_buffer("mask", torch.ones_like(self.weight))
        self.mask[:, :, 1, 2:] = 0

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data *= self.mask
        return super().forward(x)


class Conv2dWithConstraint(nn.Conv2d):
    """EEGNet's."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=1)
        return super().forward(x)


class ClampedLinear(nn.Linear):
    def constrain(self) -> None:
        weight = self.weight.data
        weight.clamp_(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.constrain()
        return super().forward(x)


class ReplacedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.weight = nn.Parameter(self.weight.abs())
        return super().forward(x)


class NormalisedInTraining(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.weight.copy_(F.normalize(self.weight))
        return super().forward(x)


class OtherInputs(nn.Linear):
    """Nobody knows what it takes: only its source tells."""

    def forward(self, x: Tensor, lengths: dict[str, int]) -> Tensor:
        nn.init.constant_(self.weight, lengths["a"])
        return super().forward(x)


class MPConv(nn.Module):
    """EDM2's, with a raw parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor, gain: float = 1) -> Tensor:
        w = self.weight.to(torch.float32)
        if self.training:
            with torch.no_grad():
                self.weight.copy_(F.normalize(w))
        return x @ (F.normalize(w) * gain).t()


def clamped_by_its_object() -> nn.Module:
    layer = nn.Linear(6, 5)

    def forward(x: Tensor) -> Tensor:
        layer.weight.data.clamp_(-1, 1)
        return F.linear(x, layer.weight, layer.bias)

    layer.forward = forward
    return layer


WRITERS: list[Callable[[], nn.Module]] = [
    lambda: MaskedConv2d(3, 4, 3),
    lambda: Conv2dWithConstraint(3, 4, 3),
    lambda: ClampedLinear(6, 5),
    lambda: ReplacedLinear(6, 5),
    lambda: NormalisedInTraining(9, 6),
    lambda: OtherInputs(6, 5),
    clamped_by_its_object,
]


@pytest.mark.parametrize("make", WRITERS)
@pytest.mark.parametrize("training", [True, False])
def test_a_forward_that_writes_its_weight_is_refused_by_name(make: Callable[[], nn.Module], training: bool) -> None:
    model = nn.Sequential(make(), nn.Linear(6, 4)).train(training)
    before = {name: (t, t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    state = torch.get_rng_state()
    planned = mapsurgery.plan(model, "*")
    assert [layer.path for layer in planned.layers] == ["1"]
    assert planned.skipped[0].path == "0" and "changes the weight itself" in planned.skipped[0].reason
    with pytest.raises(ValueError, match=r"0 \(.*changes the weight itself"):
        mapsurgery.patch(model, "0")
    after = model.state_dict(keep_vars=True)
    assert all(after[name] is t and torch.equal(t, copy) for name, (t, copy) in before.items())
    assert all(m.training == training for m in model.modules()) and torch.equal(torch.get_rng_state(), state)


def test_a_raw_parameter_that_its_forward_writes_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"0 \(MPConv\).*`self.weight.copy_\(F.normalize\(w\)\)`"):
        mapsurgery.patch(nn.Sequential(MPConv()), (), parameters="*")


class ReadsOnly(nn.Linear):
    """Writes into what it computed of its weight, into its bias and into its input."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * 2
        weight.clamp_(-1, 1)
        weight = self.weight.detach().clone().mul_(0) + self.weight
        x = x.clone().mul_(self.weight.mean())
        x.add_(self.weight[0])
        self.bias.data.zero_()
        return F.linear(x, weight, self.bias)


def test_a_forward_that_reads_its_weight_is_adapted() -> None:
    layers = mapsurgery.plan(nn.Sequential(ReadsOnly(6, 5), nn.Linear(5, 4)), "*").layers
    assert [layer.path for layer in layers] == ["0", "1"]


@pytest.mark.parametrize("name", ["test_nfnet", "test_resnet", "test_efficientnet", "fastvit_t8"])
def test_models_of_timm_are_adapted_as_a_whole(name: str) -> None:
    """ScaledStdConv2d, StdConv2d, Conv2dSame; layer scales that multiply in place."""
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=5)
    reasons = [s.reason for s in mapsurgery.plan(model, "*").skipped]
    reasons += [s.reason for s in mapsurgery.plan(model, "*", parameters="*").skipped]
    assert not [reason for reason in reasons if "forward" in reason]
