"""What a task of the comparison is: a model, what to adapt in it, a loss, a score, and three disjoint sets of data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

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
        samples, epochs, batch: of the training; what does not fill a batch is left out of its epoch.
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
        """Steps of one training."""
        return self.epochs * (self.samples // self.batch)

    @property
    def setting(self) -> str:
        """Everything that has to agree between two results that are compared, but for the adapters' options."""
        head = f", head {self.head_lr:g}" if self.head else ""
        return f"{self.about}; {self.samples} samples, {self.epochs} epochs, batch {self.batch}{head}"


@dataclass(frozen=True)
class Options:
    """What the command line says about where to compute and where data is.

    Attributes:
        sst2: folder of SST-2's tab-separated files.
        commonsense: folder of ARC-Easy's (or a like set's) JSON files.
        cache: folder in which a model that had to be trained first is kept.
    """

    device: torch.device
    sst2: Path | None = None
    commonsense: Path | None = None
    cache: Path = Path("outputs")


def required(folder: Path | None, option: str) -> Path:
    """The folder that an option names.

    Raises:
        SystemExit: it was left out.
    """
    if folder is None:
        raise SystemExit(f"this task needs {option} FOLDER")
    return folder
