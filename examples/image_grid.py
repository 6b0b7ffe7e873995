"""A picture of pictures: one labelled row for each model, one file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

LABEL_WIDTH = 72
GAP = 4
BACKGROUND = 255


def save_grid(rows: Mapping[str, Tensor], path: str | Path, side: int = 48) -> None:
    """Write labelled rows of images as one PNG.

    Args:
        rows: label -> float images (n, 1 or 3, h, w) in [0, 1]; rows may differ in length.
        side: each image's side in the picture, in pixels.

    Raises:
        ValueError: no row, or one without images.
    """
    if not rows or any(len(images) == 0 for images in rows.values()):
        raise ValueError("a grid needs at least one row, and an image in each")
    columns = max(len(images) for images in rows.values())
    width, height = LABEL_WIDTH + columns * (side + GAP), len(rows) * (side + GAP) + GAP
    picture = Image.new("RGB", (width, height), (BACKGROUND,) * 3)
    draw = ImageDraw.Draw(picture)
    for row, (label, images) in enumerate(rows.items()):
        top = GAP + row * (side + GAP)
        draw.text((GAP, top + side // 2 - 6), label, fill=0)
        for column, pixels in enumerate(_as_bytes(images, side)):
            picture.paste(Image.fromarray(pixels.numpy()), (LABEL_WIDTH + column * (side + GAP), top))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, optimize=True)


def _as_bytes(images: Tensor, side: int) -> Tensor:
    """uint8 (n, side, side, 3); small images keep their pixels visible."""
    mode = "nearest" if images.shape[-1] <= side else "area"
    sized = F.interpolate(images.float().cpu(), size=(side, side), mode=mode).expand(-1, 3, -1, -1)
    return (sized.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
