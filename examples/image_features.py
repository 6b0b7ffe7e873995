"""How like one another two sets of images are: cosine similarity of a pretrained network's features.

With DINO's or CLIP's weights this is the DINO and CLIP-I score of DreamBooth (arXiv 2208.12242, section 4.2):

    load_features("vit_small_patch16_224.dino")                 # DINO
    load_features("vit_base_patch32_clip_224.openai")           # CLIP-I
    load_features("tf_efficientnet_lite0", "packaged", 64)      # works without a network

Of images that are all much alike (digits), plain cosines say little: all are near 1, and images of one class may score
higher on another than on their own. `Features.whiten` removes what all have in common.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from finetune_timm import build_model
from packaged import VISION_MODELS
from timm.data import resolve_data_config
from torch import Tensor, nn
from torch.nn import functional as F

BATCH = 64


class Features:
    """Images (n, 1 or 3, h, w) in [0, 1] to features of length one, float32 (n, d)."""

    def __init__(self, model: nn.Module, size: int, device: torch.device | None = None) -> None:
        """``model`` is a timm model without a classifier, ``size`` the side of its input."""
        config: dict[str, Any] = resolve_data_config({}, model=model)
        self.device = device or torch.device("cpu")
        self.model = model.eval().requires_grad_(False).to(self.device)
        self.size = size
        self.center: Tensor | None = None
        self.mean, self.std = (torch.tensor(config[key]).reshape(1, 3, 1, 1).to(self.device) for key in ("mean", "std"))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features of each image; grey ones are taken as RGB with equal channels."""
        plain = torch.cat([self._of_batch(batch.to(self.device)) for batch in images.split(BATCH)]).cpu()
        return plain if self.center is None else F.normalize((plain - self.center) @ self.directions, dim=1)

    def whiten(self, images: Tensor, components: int = 32) -> Features:
        """From now on, give features in the principal directions of those of ``images``, each with variance one.

        No labels are used. The images are real ones, many more than ``components``.

        Raises:
            ValueError: no more images than components.
        """
        if len(images) <= components:
            raise ValueError(f"{components} components need more than {len(images)} images")
        plain = self(images)
        self.center = plain.mean(dim=0)
        _, spread, directions = torch.linalg.svd(plain - self.center, full_matrices=False)
        self.directions = directions[:components].T / spread[:components] * len(images) ** 0.5
        return self

    def _of_batch(self, images: Tensor) -> Tensor:
        resized = F.interpolate(images.float(), size=(self.size, self.size), mode="bicubic", antialias=True)
        normal = (resized.clamp(0, 1).expand(-1, 3, -1, -1) - self.mean) / self.std
        return F.normalize(self.model(normal), dim=1)


def load_features(
    name: str, weights: str = "hub", size: int | None = None, device: torch.device | None = None
) -> Features:
    """A feature extractor by its timm name.

    Args:
        weights: hub (downloaded by timm), or packaged (see examples/packaged.py), or what ``finetune_timm`` takes.
        size: side of the square input; the model's own if left out.

    Raises:
        ValueError: a name that timm does not know, or that has no packaged weights.
    """
    if weights == "packaged" and name not in VISION_MODELS:
        raise ValueError(f"features {name!r}: there are packaged weights for {', '.join(VISION_MODELS)}")
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    own = config.input_size[-1] if config is not None else 224
    return Features(build_model(name, weights, 0, size, seed=0), size or own, device)


def similarity(first: Tensor, second: Tensor) -> float:
    """Mean cosine over all pairs of a feature of ``first`` (n, d) and one of ``second`` (m, d), all of length one."""
    return (first.mean(dim=0) @ second.mean(dim=0)).item()  # the mean of all products is the product of the means


def similarity_within(features: Tensor) -> float:
    """Mean cosine over all pairs of two different rows of ``features`` (n, d), n > 1, all of length one."""
    n = len(features)
    if n < 2:
        raise ValueError("one image has no other to be compared with: give at least two")
    total = features.sum(dim=0).square().sum() - features.square().sum()
    return (total / (n * (n - 1))).item()
