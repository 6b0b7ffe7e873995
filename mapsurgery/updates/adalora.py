"""AdaLoRA: ΔW = P diag(λ) Q, with ranks moved between layers in training (arXiv 2303.10512); see `RankAllocator`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from .base import FactoredUpdate, Matrix, Parameters, uniform_


@dataclass(frozen=True)
class AdaLora(FactoredUpdate):
    """ΔW = u P diag(λ) Q, P (m, r) and Q (r, K) that start orthonormal, λ (r) that starts at 0 (eq. 3).

    u, fixed, is ‖W‖_F where the start is of the size of W (`Init.a_scale` "weight"), so that a step of λ moves every
    layer by the same share, and 1 with "kaiming", as in the paper.
    """

    name: ClassVar[str] = "adalora"
    roles: ClassVar = {"P": "up", "lam": "magnitude", "Q": "down"}

    def shapes(self, matrix: Matrix, rank: int) -> dict[str, tuple[int, ...]]:
        stack = matrix.stack
        return {"P": (*stack, matrix.m, rank), "lam": (*stack, rank), "Q": (*stack, rank, matrix.K)}

    @torch.no_grad()
    def start(self, p: Parameters, weight: Callable[[], Tensor], live: bool) -> None:
        for factor in (p.P, p.Q):
            for matrix in factor if factor.dim() == 3 else [factor]:
                _orthonormal_(matrix)
        uniform_(p.lam) if live else p.lam.zero_()

    def factors(self, p: Parameters) -> tuple[Tensor, Tensor]:
        lam = p.lam * p.unit().reshape(-1, *[1] * (p.lam.dim() - 1)).to(p.lam.dtype)
        return lam.unsqueeze(-1) * p.Q, p.P


def _orthonormal_(matrix: Tensor) -> None:
    """Orthonormal rows or columns, whichever are fewer; drawn in float32, which every device decomposes."""
    drawn = torch.empty_like(matrix, dtype=torch.promote_types(matrix.dtype, torch.float32))
    matrix.copy_(nn.init.orthogonal_(drawn))
