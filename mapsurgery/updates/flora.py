"""FLoRA: a Tucker decomposition of ΔW in the weight's own tensor shape (arXiv 2405.14739)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import ops
from .base import FactoredUpdate, Matrix, Parameters, uniform_


@dataclass(frozen=True)
class Flora(FactoredUpdate):
    """ΔW = G ×₁ U ×₂ V: for a convolution G (r, r, *kernel), for a matrix (r, r) (FLoRA, eqs. 4 and 6).

    U (m, r), V (r, channels); G starts at 0. The kernel keeps its full size in the core, so that its own two factors
    are part of G.
    """

    name: ClassVar[str] = "flora"
    roles: ClassVar = {"U": "down", "G": "up", "V": "down"}
    linear_in: ClassVar = (("U",), ("G",), ("V",))

    def shapes(self, matrix: Matrix, rank: int) -> dict[str, tuple[int, ...]]:
        rows = min(rank, matrix.channels)
        return {
            "U": (*matrix.stack, matrix.m, rank),
            "G": (*matrix.stack, rank, rows, *matrix.kernel),
            "V": (*matrix.stack, rows, matrix.channels),
        }

    @torch.no_grad()
    def start(self, p: Parameters, weight: Callable[[], Tensor], live: bool) -> None:
        uniform_(p.U, p.U.shape[-1] ** -0.5)
        uniform_(p.V, p.entry_size())
        uniform_(p.G) if live else p.G.zero_()

    def factors(self, p: Parameters) -> tuple[Tensor, Tensor]:
        """LoRA's factors U and A = G ×₂ V (r, channels · taps): only the core is contracted, nothing of size (m, K)."""
        stack = p.V.dim() - 2
        core = p.G.flatten(stack + 2) if p.G.dim() > stack + 2 else p.G.unsqueeze(-1)  # (..., r, rows, taps)
        with ops.full_precision(p.V.device.type):
            A = torch.einsum("...abk,...bc->...ack", core, p.V)
        return A.flatten(-2), p.U
