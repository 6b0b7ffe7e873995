"""A short part of the zoo in every test run: the hazards, and quick models of each family. `make zoo` runs it all."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from . import inventory
from .check import check
from .entry import Entry, args, floats
from .run import FOLDER, read
from .verdict import Verdict

QUICK = (
    "diffusers/SD3ControlNetModel",
    "diffusers/UNet2DConditionModel",
    "timm/ghostnet",
    "torchvision/mvit",
    "torchvision/squeezenet1_1",
    "transformers/clip",
    "transformers/gpt_oss",
    "transformers/llama",
    "transformers/mamba",
    "transformers/mixtral",
    "transformers/reformer",
    "transformers/t5",
    "transformers/wav2vec2",
)


HAZARDS = [  # each is judged in float64, and in the dtype in which models are used only in `make test-long`
    pytest.param(entry, marks=pytest.mark.long if entry.name.endswith("_float32") else ())
    for entry in inventory.family("hazard")
]


@pytest.mark.parametrize("entry", HAZARDS, ids=str)
def test_hazard(entry: Entry) -> None:
    verdict = check(entry)
    assert verdict.kind == "right" or (verdict.kind == "refused" and "max_norm" in entry.name), verdict.reason


@pytest.mark.parametrize("name", QUICK)
def test_model(name: str) -> None:
    pytest.importorskip(name.partition("/")[0])
    verdict = check(inventory.find(name))
    assert verdict.kind == "right", verdict.reason


class _Bypassing(nn.Module):
    """Keeps a copy of a weight, which no adapter can reach."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.register_buffer("kept", self.fc.weight.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x @ self.kept)


def test_the_check_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from mapsurgery.surgery.adapted import FusedLinear

    entry = Entry("hazard/none", "hazard", _Bypassing, lambda: args(floats(4, 6)))
    assert check(entry).kind == "right"  # fc is not live in the plain model
    monkeypatch.setattr(FusedLinear, "forward", lambda self, x: F.linear(x, self.get_parameter("weight"), self.bias))
    verdict = check(entry)
    assert verdict.kind == "wrong" and {"learns", "output"} <= set(verdict.failures)


def test_verdicts_survive_their_file() -> None:
    verdict = Verdict("a/b", "a", kind="wrong", failures={"start": "differs"}, notes=["n"], sites=3, dtype="float64")
    assert Verdict.from_json(verdict.to_json()) == verdict
    assert read("no such column") == {} and FOLDER.parts[-2:] == ("outputs", "zoo")
