"""Convolutions of every kind: grouped, depthwise, dilated, padded, 1x1, transposed, in one to three dimensions."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..entry import Entry
from .common import hazard, rows

_KINDS: dict[str, tuple[type[nn.Module], tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    # name: class, (in, out, kernel), shape of the input, options
    "1d": (nn.Conv1d, (4, 6, 3), (2, 4, 9), {}),
    "1d_dilated": (nn.Conv1d, (4, 6, 3), (2, 4, 12), {"dilation": 3, "padding": 3}),
    "1d_depthwise": (nn.Conv1d, (6, 6, 4), (2, 6, 9), {"groups": 6, "padding": 3}),
    "1d_replicate": (nn.Conv1d, (4, 6, 3), (2, 4, 9), {"padding": 2, "padding_mode": "replicate"}),
    "2d_pointwise": (nn.Conv2d, (8, 6, 1), (2, 8, 5, 5), {}),
    "2d_strided": (nn.Conv2d, (4, 6, 3), (2, 4, 9, 8), {"stride": (2, 3), "padding": (1, 2)}),
    "2d_same": (nn.Conv2d, (4, 6, 4), (2, 4, 7, 7), {"padding": "same"}),
    "2d_grouped": (nn.Conv2d, (8, 12, 3), (2, 8, 6, 6), {"groups": 4, "bias": False}),
    "2d_grouped_wide": (nn.Conv2d, (32, 32, 3), (1, 32, 4, 4), {"groups": 2, "padding": 1}),
    "2d_depthwise": (nn.Conv2d, (6, 6, 3), (2, 6, 6, 6), {"groups": 6, "padding": 1}),
    "2d_depthwise_multiplied": (nn.Conv2d, (4, 12, 3), (2, 4, 6, 6), {"groups": 4, "dilation": 2}),
    "2d_grouped_pointwise": (nn.Conv2d, (8, 12, 1), (2, 8, 5, 5), {"groups": 2}),
    "2d_circular": (nn.Conv2d, (4, 6, 3), (2, 4, 6, 6), {"padding": 1, "padding_mode": "circular"}),
    "2d_reflect": (nn.Conv2d, (4, 6, 3), (2, 4, 6, 6), {"padding": (2, 1), "padding_mode": "reflect"}),
    "2d_one_channel": (nn.Conv2d, (1, 1, 3), (2, 1, 6, 6), {}),
    "2d_unbatched": (nn.Conv2d, (4, 6, 3), (4, 6, 6), {}),
    "3d": (nn.Conv3d, (3, 5, 2), (2, 3, 4, 4, 4), {"stride": (1, 2, 2)}),
    "3d_depthwise": (nn.Conv3d, (4, 4, 3), (2, 4, 4, 4, 4), {"groups": 4, "padding": 1}),
    "transposed_1d": (nn.ConvTranspose1d, (4, 6, 4), (2, 4, 5), {"stride": 2, "padding": 1}),
    "transposed_2d": (nn.ConvTranspose2d, (4, 6, 3), (2, 4, 4, 4), {"stride": 2, "output_padding": 1, "padding": 1}),
    "transposed_2d_square": (nn.ConvTranspose2d, (4, 4, 2), (2, 4, 4, 4), {"stride": 2}),
    "transposed_2d_grouped": (nn.ConvTranspose2d, (8, 6, 3), (2, 8, 4, 4), {"groups": 2, "dilation": 2}),
    "transposed_2d_depthwise": (nn.ConvTranspose2d, (4, 4, 4), (2, 4, 4, 4), {"groups": 4, "stride": 2}),
    "transposed_3d": (nn.ConvTranspose3d, (3, 5, 2), (2, 3, 3, 3, 3), {"stride": 2, "bias": False}),
}


def _layer(kind: type[nn.Module], shape: tuple[int, ...], options: dict[str, Any]) -> nn.Module:
    """The layer alone is enough: a neighbour would only blur which of them differs."""
    return nn.Sequential(kind(*shape, **options), nn.Tanh())


def entries() -> list[Entry]:
    found = []
    for name, (kind, shape, size, options) in _KINDS.items():
        make = lambda k=kind, s=shape, o=options: _layer(k, s, o)  # noqa: E731
        found += hazard(f"conv_{name}", make, rows(*size))
    return found
