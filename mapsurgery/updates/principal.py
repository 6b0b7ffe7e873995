"""LoRA that starts from parts of W itself: PiSSA (arXiv 2404.02948) and OLoRA (arXiv 2406.01775).

Both papers put B₀A₀ into the factors and take it out of the frozen weight, W - B₀A₀. Here W keeps its exact value and
the residual is accounted for in the update, ΔW = BA - B₀A₀: what is computed is the same. Written as

    ΔW = [B - B₀, B₀] [A; A - A₀]

it is exactly 0 at the start, and its norm, by Gram matrices of the size 2r, loses no digits near it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import FactoredUpdate, Matrix, Parameters


@dataclass(frozen=True)
class _Principal(FactoredUpdate):
    roles: ClassVar = {"A": "down", "B": "up"}
    frozen: ClassVar = ("A0", "B0")

    def shapes(self, matrix: Matrix, rank: int) -> dict[str, tuple[int, ...]]:
        A, B = (*matrix.stack, rank, matrix.K), (*matrix.stack, matrix.m, rank)
        return {"A": A, "B": B, "A0": A, "B0": B}

    def refuse(self, live: bool) -> None:
        if live:
            raise ValueError(f'update {self.name!r} starts from W: init="random" does not go with it')

    @torch.no_grad()
    def start(self, p: Parameters, weight: Callable[[], Tensor], live: bool) -> None:
        W = weight()
        A, B = self.parts(W.to(torch.promote_types(W.dtype, torch.float32)), p.rank, p.scaling)
        for name, value in (("A", A), ("A0", A), ("B", B), ("B0", B)):
            getattr(p, name).copy_(value)

    def parts(self, weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
        """A₀ and B₀, of W (m, K) or a stack; with scaling · B₀A₀ the part of W that they stand for."""
        raise NotImplementedError

    def factors(self, p: Parameters) -> tuple[Tensor, Tensor]:
        return torch.cat([p.A, p.A - p.A0], dim=-2), torch.cat([p.B - p.B0, p.B0], dim=-1)


@dataclass(frozen=True)
class Pissa(_Principal):
    """PiSSA: B₀ = U √S, A₀ = √S Vᵀ of the r largest singular values of W (arXiv 2404.02948, eqs. 2-4).

    Args: niter: 0 for the exact decomposition, else subspace iterations of a randomised one (the paper's fast SVD).
    """

    name: ClassVar[str] = "pissa"
    niter: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.niter, bool) or not isinstance(self.niter, int) or self.niter < 0:
            raise ValueError(f"niter of update 'pissa' must be a whole number of at least 0, got {self.niter!r}")

    def parts(self, weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
        if self.niter and not weight.is_meta:
            U, S, V = torch.svd_lowrank(weight, q=rank, niter=self.niter)
            Vh = V.mT
        else:
            U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        root = (S[..., :rank] / scaling).sqrt()
        return root.unsqueeze(-1) * Vh[..., :rank, :], U[..., :rank] * root.unsqueeze(-2)


@dataclass(frozen=True)
class Olora(_Principal):
    """OLoRA: B₀ = Q, A₀ = R of the first r columns and rows of W's QR decomposition (arXiv 2406.01775, eq. 4)."""

    name: ClassVar[str] = "olora"

    def parts(self, weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
        Q, R = torch.linalg.qr(weight)
        # As peft has it, the residual is W - scaling · Q R, whatever the scaling.
        return R[..., :rank, :], Q[..., :rank]
