"""A part of a model that TorchScript compiled is left alone, and said; the rest is adapted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from homes import trained
from torch import Tensor, nn

import mapsurgery

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")


class Net(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.first, self.part, self.last = nn.Linear(4, 4), part, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.part(self.first(x)))


PARTS: dict[str, Callable[[], nn.Module]] = {
    "scripted": lambda: torch.jit.script(nn.Linear(4, 4)),
    "scripted_block": lambda: torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU())),
    "traced": lambda: torch.jit.trace(nn.Linear(4, 4), torch.randn(2, 4)),
}


@pytest.fixture(params=PARTS.values(), ids=PARTS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return Net(request.param()).eval()


def test_the_plan_lists_it_as_not_adapted(model: nn.Module) -> None:
    planned = mapsurgery.plan(model, "*", parameters="*")
    assert [layer.path for layer in planned.layers] == ["first", "last"]
    skipped = {skip.path: skip.reason for skip in planned.skipped}
    assert any(path.startswith("part") and "TorchScript" in reason for path, reason in skipped.items())
    with pytest.raises(ValueError, match=r"part.*TorchScript"):
        mapsurgery.patch(model, "part*")


def test_the_rest_lives_as_in_any_model(model: nn.Module, tmp_path: Path) -> None:
    x = torch.randn(2, 4)
    plain, file = model(x), tmp_path / "a.safetensors"
    trained(mapsurgery.patch(model, "*", rank=2))
    adapted = model(x)
    mapsurgery.verify(model, x)
    mapsurgery.report(model)
    mapsurgery.save(model, file)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), adapted)
    model.load_state_dict(copied.state_dict())
    mapsurgery.merge(model, keep_base=True)
    torch.testing.assert_close(model(x), adapted)
    mapsurgery.unpatch(mapsurgery.unmerge(model))
    assert torch.equal(model(x), plain)
    assert torch.equal(mapsurgery.load(model, file)(x), adapted)


def test_it_may_be_trained_in_full(model: nn.Module) -> None:
    mapsurgery.patch(model, ["first", "last"], rank=2, train=["part*"])
    model(torch.randn(2, 4)).sum().backward()
    assert all(p.grad is not None for p in model.part.parameters())
