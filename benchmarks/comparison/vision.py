"""Image classification: ViT-S/14 on MNIST digits."""

from __future__ import annotations

import copy

import packaged
from torch.nn import functional as F

from .classification import classification, split_samples, zero_head
from .task import Options, Task


def load(options: Options) -> Task:
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
