"""Image classification data for the examples: a folder of images, or one of the packaged sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import packaged
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

PACKAGED_SETS = ("mnist", "fashion-mnist")
TEST_FOLDERS = ("val", "validation", "test")
TEST_SHARE = 0.2
"""Share of the images that are held out where the data has no test split and no number is asked for."""


class Samples(NamedTuple):
    """n images, not loaded yet or still raw, and their classes.

    ``images`` are n paths, or raw grey pixels, uint8 (n, height, width); ``labels`` int64 (n,).
    """

    images: Sequence[str] | Tensor
    labels: Tensor

    def pick(self, indices: Tensor) -> Samples:
        """The samples at ``indices``, int64 (k,), in that order."""
        if isinstance(self.images, Tensor):
            return Samples(self.images[indices], self.labels[indices])
        return Samples([self.images[i] for i in indices.tolist()], self.labels[indices])


class ImageSplits(NamedTuple):
    """Samples to train on, samples to test on (none in both), and the classes' names."""

    train: Samples
    test: Samples
    classes: list[str]


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Samples as (transformed image, class); grey images become RGB first."""

    def __init__(self, samples: Samples, transform: Callable[[Image.Image], Tensor]) -> None:
        self.samples = samples
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        source = self.samples.images[index]
        image = Image.fromarray(source.numpy()) if isinstance(source, Tensor) else Image.open(source)
        return self.transform(image.convert("RGB")), int(self.samples.labels[index])


def load_splits(
    source: str, train_samples: int | None = None, test_samples: int | None = None, seed: int = 0
) -> ImageSplits:
    """Find the data that ``source`` names and draw the two splits from it.

    Args:
        source: ``"mnist"``, ``"fashion-mnist"``, or a folder: of idx files as Fashion-MNIST's, of class subfolders, or
            of ``train/`` and ``val/`` (``validation/``, ``test/``) that each hold the same class subfolders.
        train_samples: how many images to train on, drawn at random; None for all.
        test_samples: how many images to test on, drawn at random; None for all of the test split, or a fifth of the
            images where there is none.
        seed: of the draw.
    """
    train, test, classes = _open(source)
    random = torch.Generator().manual_seed(seed)
    if test is None:
        train, test = _hold_out(train, test_samples, random)
    train = _draw(train, train_samples, random, f"the training split of {source}")
    test = _draw(test, test_samples, random, f"the test split of {source}")
    return ImageSplits(train, test, classes)


def _hold_out(samples: Samples, count: int | None, random: torch.Generator) -> tuple[Samples, Samples]:
    """Part the samples at random into those to train on and ``count`` (or a fifth) to test on."""
    total = len(samples.labels)
    count = max(1, round(TEST_SHARE * total)) if count is None else count
    if count >= total:
        raise ValueError(f"{count} images to test on were asked for, which leaves none of the {total} to train on")
    order = torch.randperm(total, generator=random)
    return samples.pick(order[count:]), samples.pick(order[:count])


def _open(source: str) -> tuple[Samples, Samples | None, list[str]]:
    """All samples to train on, all to test on (None where the source has no split of its own), the classes."""
    if source == "mnist":
        return Samples(*packaged.mnist()), None, [str(digit) for digit in range(10)]
    if source == "fashion-mnist":
        return _open_idx(packaged.FASHION_MNIST_DEBIAN)
    folder = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(f"--data {source}: neither a folder nor one of {', '.join(PACKAGED_SETS)}")
    if any(folder.glob("train-images-idx3-ubyte.gz")):
        return _open_idx(folder)
    return _open_folder(folder)


def _open_idx(folder: Path) -> tuple[Samples, Samples, list[str]]:
    train = packaged.fashion_mnist("train", folder)
    test = packaged.fashion_mnist("test", folder)
    return Samples(*train), Samples(*test), [str(label) for label in train.labels.unique().tolist()]


def _open_folder(folder: Path) -> tuple[Samples, Samples | None, list[str]]:
    test_folder = next((folder / name for name in TEST_FOLDERS if (folder / name).is_dir()), None)
    if test_folder is None or not (folder / "train").is_dir():
        samples, classes = _scan(folder)
        return samples, None, classes
    train, classes = _scan(folder / "train")
    test, test_classes = _scan(test_folder)
    if classes != test_classes:
        differing = sorted(set(classes) ^ set(test_classes))
        raise ValueError(f"{folder / 'train'} and {test_folder} hold different classes: {', '.join(differing)}")
    return train, test, classes


def _scan(folder: Path) -> tuple[Samples, list[str]]:
    """The images below ``folder``, whose subfolders are the classes."""
    from torchvision.datasets import ImageFolder

    found = ImageFolder(str(folder))  # its error names the folder, and the classes without an image
    paths = [path for path, _ in found.samples]
    return Samples(paths, torch.tensor([label for _, label in found.samples])), found.classes


def _draw(samples: Samples, count: int | None, random: torch.Generator, source: str) -> Samples:
    """``count`` samples in random order, or all of them."""
    total = len(samples.labels)
    if count is not None and count > total:
        raise ValueError(f"{count} images were asked for, but {source} has {total}")
    return samples.pick(torch.randperm(total, generator=random)[:count])
