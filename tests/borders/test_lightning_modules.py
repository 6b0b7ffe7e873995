"""A patched model inside a LightningModule: groups, files, precisions and checkpoints of Lightning itself."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import mapsurgery

pl = pytest.importorskip("pytorch_lightning")


def backbone() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = mapsurgery.patch(backbone(), "*", rank=2)
        torch.manual_seed(1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x.to(self.dtype)), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the head, which is meant to train
            return torch.optim.AdamW(mapsurgery.param_groups(self, 1e-2))


def data() -> TensorDataset:
    torch.manual_seed(2)
    return TensorDataset(torch.randn(12, 8), torch.arange(12) % 3)


def trainer(folder: Path, **options: object) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(accelerator="cpu", devices=1, default_root_dir=folder, **quiet, **options)


def fitted(folder: Path, **options: object) -> Classifier:
    model = Classifier()
    trainer(folder, max_epochs=2, enable_checkpointing=False, **options).fit(model, DataLoader(data(), batch_size=4))
    return model.eval()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_backbone_and_head_learn_and_are_in_the_file(precision: str, tmp_path: Path) -> None:
    model, start = fitted(tmp_path, precision=precision), Classifier()
    assert not torch.equal(model.head.weight.float(), start.head.weight)
    moved = {name for name, p in start.named_parameters() if not torch.equal(p, model.get_parameter(name).float())}
    assert {f"backbone.{i}.adapter.{name}" for i in (0, 2) for name in ("B", "alpha", "beta")} <= moved
    mapsurgery.save(model, tmp_path / "a.safetensors")
    plain = nn.ModuleDict({"backbone": backbone(), "head": nn.Linear(8, 3)}).to(model.head.weight.dtype)
    mapsurgery.load(plain, tmp_path / "a.safetensors")
    x = data().tensors[0].to(model.head.weight.dtype)
    assert torch.equal(plain["head"](plain["backbone"](x)), model(x))


def test_a_checkpoint_of_lightning_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = Classifier()
    trainer(tmp_path, max_epochs=3, enable_checkpointing=False).fit(whole, DataLoader(data(), batch_size=4))
    first = trainer(tmp_path, max_epochs=2, enable_checkpointing=False)
    first.fit(Classifier(), DataLoader(data(), batch_size=4))
    first.save_checkpoint(tmp_path / "two.ckpt")
    resumed = Classifier()
    second = trainer(tmp_path, max_epochs=3, enable_checkpointing=False)
    second.fit(resumed, DataLoader(data(), batch_size=4), ckpt_path=tmp_path / "two.ckpt")
    for name, p in whole.named_parameters():
        assert torch.equal(p, resumed.get_parameter(name)), name
    second.save_checkpoint(tmp_path / "three.ckpt")
    again = Classifier.load_from_checkpoint(tmp_path / "three.ckpt").eval()
    assert torch.equal(again(data().tensors[0]), whole.eval()(data().tensors[0]))
