"""Dense ΔW: MAP as such, full fine-tuning decomposed into directions and magnitudes (arXiv 2505.23094, eq. 4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Matrix, Parameters, Update, frobenius, stacked_scalars, uniform_


@dataclass(frozen=True)
class Dense(Update):
    """ΔW = u T with T (m, K) trained, which starts at 0; the rank plays no part.

    u, fixed, is the root mean square of W's entries where the start is of the size of W (`Init.a_scale` "weight"): an
    optimiser's step then moves every layer by the same share. With "kaiming" it is 1.
    """

    name: ClassVar[str] = "dense"
    roles: ClassVar = {"T": "up"}

    def shapes(self, matrix: Matrix, rank: int) -> dict[str, tuple[int, ...]]:
        return {"T": (*matrix.stack, matrix.m, matrix.K)}

    def limited(self, rank: int, matrix: Matrix) -> int:
        return min(matrix.m, matrix.K)

    @torch.no_grad()
    def start(self, p: Parameters, weight: Callable[[], Tensor], live: bool) -> None:
        uniform_(p.T) if live else p.T.zero_()

    def _unit(self, p: Parameters) -> Tensor:
        m, K = p.T.shape[-2:]
        return (p.unit() * (m * K) ** -0.5 if p.init.a_scale == "weight" else p.unit()).to(p.T.dtype)

    def delta(self, p: Parameters) -> Tensor:
        return stacked_scalars(self._unit(p), p.T) * p.T

    def norm(self, p: Parameters) -> Tensor:
        return frobenius(p.T) * self._unit(p)

    def size(self, p: Parameters) -> Tensor:
        """‖W‖_F: ΔW = 0 has no size of its own, and must get a gradient."""
        return p.unit()
