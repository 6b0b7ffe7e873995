"""LoHa: ΔW = (B₁A₁) ∘ (B₂A₂), a Hadamard product (FedPara, arXiv 2108.06098; LyCORIS, arXiv 2309.14859)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import ops
from .base import Matrix, Parameters, Update, frobenius, lowrank_norm, uniform_


@dataclass(frozen=True)
class LoHa(Update):
    """ΔW = (B₁A₁) ∘ (B₂A₂), each of rank r, together up to r² (FedPara, eq. 1); B₂ starts at 0.

    As a product of factors it has the rank r², with rows a₁ᵢ ∘ a₂ⱼ and columns b₁ᵢ ∘ b₂ⱼ (Khatri-Rao); they are used
    where that is cheaper than ΔW itself.
    """

    name: ClassVar[str] = "loha"
    roles: ClassVar = {"A1": "down", "B1": "down", "A2": "down", "B2": "up"}
    linear_in: ClassVar = (("A1",), ("B1",), ("A2",), ("B2",))

    def shapes(self, matrix: Matrix, rank: int) -> dict[str, tuple[int, ...]]:
        A, B = (*matrix.stack, rank, matrix.K), (*matrix.stack, matrix.m, rank)
        return {"A1": A, "B1": B, "A2": A, "B2": B}

    @torch.no_grad()
    def start(self, p: Parameters, weight: Callable[[], Tensor], live: bool) -> None:
        size = p.A1.shape[-2] ** -0.25  # B₁A₁ has entries of size 1
        uniform_(p.A1, size)
        uniform_(p.B1, size)
        uniform_(p.A2, p.entry_size())
        uniform_(p.B2) if live else p.B2.zero_()

    def delta(self, p: Parameters) -> Tensor:
        with ops.full_precision(p.A1.device.type):
            return (p.B1 @ p.A1) * (p.B2 @ p.A2)

    def factors(self, p: Parameters) -> tuple[Tensor, Tensor] | None:
        rank, K = p.A1.shape[-2:]
        m = p.B1.shape[-2]
        if rank * rank * (m + K) > m * K:
            return None
        A = p.A1.unsqueeze(-2) * p.A2.unsqueeze(-3)  # (..., r, r, K)
        B = p.B1.unsqueeze(-1) * p.B2.unsqueeze(-2)  # (..., m, r, r)
        return A.flatten(-3, -2), B.flatten(-2)

    def norm(self, p: Parameters) -> Tensor:
        factors = self.factors(p)
        return frobenius(self.delta(p)) if factors is None else lowrank_norm(*factors)
