"""The example that tracks a run: it trains, and writes what it says."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

import mapsurgery

for package in ("timm", "matplotlib"):
    pytest.importorskip(package, reason=f"the example needs {package}")


@pytest.fixture
def interpret(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example, with ten images and models of random weights in place of a package's and a hub's."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    module = importlib.import_module("interpret")
    pixels = torch.randint(0, 256, (10, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = importlib.import_module("packaged").Images(pixels, torch.arange(10))
    monkeypatch.setattr(module, "mnist", lambda: images)
    create = module.timm.create_model
    monkeypatch.setattr(module.timm, "create_model", lambda name, pretrained, **options: create(name, **options))
    return module


@pytest.mark.parametrize("method", ["map", "dora"])
def test_the_example_tracks_a_run_and_draws_it(
    interpret: ModuleType, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--model",
        "test_vit",
        "--img-size",
        "32",
        "--steps",
        "4",
        "--every",
        "2",
        "--rank",
        "2",
        "--device",
        "cpu",
    ]
    interpret.main([*options, "--method", method, "--output", str(tmp_path / "out")])
    history = mapsurgery.History.load(tmp_path / "out" / "history.safetensors")
    assert history.steps.tolist() == [0, 2, 4]
    assert history.values["change"][0].max() < 1e-6 < history.values["change"][2].min()
    assert all(".attn." in path or ".mlp." in path for path in history.layers)
    for name in ("change.png", "magnitude_direction.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    text = capsys.readouterr().out
    assert "blocks.0.attn.qkv" in text and "loss over the last tenth of 4 steps" in text


def test_the_head_starts_at_zero_and_is_trained(interpret: ModuleType) -> None:
    model, head = interpret.build_model("test_vit", 32)
    assert head == ["head.weight", "head.bias"]
    assert not any(model.get_parameter(name).any() for name in head)
