"""The tasks of the comparison: a model, what to adapt in it, a loss, a score, and three disjoint sets of data."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import packaged  # noqa: E402

Loss = Callable[[nn.Module, Tensor, torch.Generator], Tensor]
Score = Callable[[nn.Module, str], float]
SPLITS = ("validation", "test")


@dataclass(frozen=True)
class Task:
    """What every method is trained on.

    Attributes:
        name: as on the command line.
        about: model, data and sizes, in words: a result is only compared with results of the same words.
        model: makes a fresh pretrained model on the task's device, the same each time.
        targets: globs of the layers to adapt.
        head: globs of what is trained in full beside the adapter; empty where nothing is.
        head_lr: learning rate of the head, the same for every method and every learning rate of the adapter.
        loss: (model, indices of training samples (b,), random numbers) -> scalar. What it draws comes from the
            generator, so that every method sees the same noise.
        score: (model, "validation" or "test") -> higher is better. Validation chooses the learning rate, test is
            what is reported; the two and the training samples have nothing in common.
        useless: score of a model that knows nothing, given to a training that diverged.
        samples, epochs, batch: of the training.
    """

    name: str
    about: str
    model: Callable[[], nn.Module]
    targets: tuple[str, ...]
    head: tuple[str, ...]
    head_lr: float
    loss: Loss
    score: Score
    useless: float
    samples: int
    epochs: int
    batch: int

    @property
    def steps(self) -> int:
        """Steps of one training; what does not fill a batch is left out of its epoch."""
        return self.epochs * (self.samples // self.batch)

    @property
    def setting(self) -> str:
        """Everything that has to agree between two results that are compared, but for the adapters' options."""
        head = f", head {self.head_lr:g}" if self.head else ""
        return f"{self.about}; {self.samples} samples, {self.epochs} epochs, batch {self.batch}{head}"


@dataclass(frozen=True)
class Options:
    """What the command line says about where to compute and where data is."""

    device: torch.device
    sst2: Path | None = None
    commonsense: Path | None = None


@dataclass(frozen=True)
class Kind:
    """A task before its model and data are loaded."""

    title: str
    measure: str
    load: Callable[[Options], Task]


# --- classification ---------------------------------------------------------------------------------------------------

Samples = tuple[Tensor, Tensor]
"""Inputs (n, ...) and classes (n,)."""


def classification(train: Samples, held_out: Mapping[str, Samples]) -> tuple[Loss, Score]:
    """Cross-entropy and accuracy of a model that maps inputs to logits."""

    def loss(model: nn.Module, indices: Tensor, _random: torch.Generator) -> Tensor:
        return F.cross_entropy(model(train[0][indices]), train[1][indices])

    def score(model: nn.Module, split: str) -> float:
        inputs, labels = held_out[split]
        predicted = torch.cat([model(part).argmax(1) for part in inputs.split(EVALUATION_BATCH)])
        return (predicted == labels).float().mean().item()

    return loss, score


EVALUATION_BATCH = 200


def zero_head(model: nn.Module, head: str) -> nn.Module:
    """Start the head at zero: all methods then start from the same uniform answer."""
    for parameter in model.get_submodule(head).parameters():
        nn.init.zeros_(parameter)
    return model


def split_samples(inputs: Tensor, labels: Tensor, sizes: Mapping[str, int]) -> dict[str, Samples]:
    """Disjoint sets of the given sizes, drawn at random and the same every time."""
    if sum(sizes.values()) > len(labels):
        raise ValueError(f"{sum(sizes.values())} samples are wanted ({dict(sizes)}), there are {len(labels)}")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = order[: sum(sizes.values())].split(list(sizes.values()))
    return {name: (inputs[part], labels[part]) for name, part in zip(sizes, parts, strict=True)}


def vision(options: Options) -> Task:
    """ViT-S/14 on MNIST digits of 42 pixels."""
    images = packaged.mnist()
    pixels = F.interpolate(images.pixels[:, None].float() / 255, size=42, mode="bilinear", antialias=True)
    pixels = ((pixels - 0.45) / 0.25).expand(-1, 3, -1, -1)
    data = split_samples(pixels, images.labels, {"train": 256, "validation": 400, "test": 800})
    data = {name: (x.to(options.device), y.to(options.device)) for name, (x, y) in data.items()}
    pretrained = zero_head(packaged.vit_small_patch14(10, 42), "head").to(options.device)
    loss, score = classification(data.pop("train"), data)
    return Task(
        name="vision",
        about="ViT-S/14, MNIST at 42 px, attention and MLP",
        model=lambda: copy.deepcopy(pretrained),
        targets=("*attn*", "*mlp*"),
        head=("head",),
        head_lr=1e-3,
        loss=loss,
        score=score,
        useless=0.1,
        samples=256,
        epochs=3,
        batch=32,
    )


TASKS: dict[str, Kind] = {
    "vision": Kind("Images: ViT-S/14 on MNIST", "accuracy", vision),
}
