"""LoKr: ΔW = C ⊗ D, a Kronecker product (KronA, arXiv 2212.10650; LyCORIS, arXiv 2309.14859)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from .base import Matrix, Parameters, Update, frobenius, lowrank_norm, svdvals, uniform_, widened


@dataclass(frozen=True)
class LoKr(Update):
    """ΔW = C ⊗ D, with C small and D = D_b D_a of rank r where that has fewer parameters than D (LyCORIS, sec. 3.2).

    Args: factor: the most rows and columns of C; -1 splits both sizes into factors that are as equal as they divide.
        A convolution's kernel belongs to D.
    """

    name: ClassVar[str] = "lokr"
    roles: ClassVar = {"C": "down", "D": "up", "D_a": "down", "D_b": "up"}
    linear_in: ClassVar = (("C",), ("D",), ("D_a",), ("D_b",))
    factor: int = -1

    def __post_init__(self) -> None:
        factor = self.factor
        if isinstance(factor, bool) or not isinstance(factor, int) or (factor < 1 and factor != -1):
            raise ValueError(f"factor of update 'lokr' must be -1 or a whole number of at least 1, got {factor!r}")

    def shapes(self, matrix: Matrix, rank: int) -> dict[str, tuple[int, ...]]:
        m1, k1 = self._divisor(matrix.m), self._divisor(matrix.channels)
        m2, k2, stack = matrix.m // m1, matrix.K // k1, matrix.stack
        C = {"C": (*stack, m1, k1)}
        if rank * (m2 + k2) < m2 * k2:
            return C | {"D_a": (*stack, rank, k2), "D_b": (*stack, m2, rank)}
        return C | {"D": (*stack, m2, k2)}

    def _divisor(self, n: int) -> int:
        """The largest divisor of n up to `factor`, or up to its square root."""
        limit = int(n**0.5) if self.factor == -1 else min(self.factor, n)
        return next(d for d in range(limit, 0, -1) if n % d == 0)

    @torch.no_grad()
    def start(self, p: Parameters, weight: Callable[[], Tensor], live: bool) -> None:
        size = p.entry_size()
        zero = p.D if "D" in p.roles else p.D_b
        if "D" in p.roles:
            uniform_(p.C, size)
        else:
            uniform_(p.C, 1.0)
            uniform_(p.D_a, size)
        uniform_(zero) if live else zero.zero_()

    def _right(self, p: Parameters) -> Tensor:
        if "D" in p.roles:
            return p.D
        with ops.full_precision(p.C.device.type):
            return p.D_b @ p.D_a

    def delta(self, p: Parameters) -> Tensor:
        C, D = p.C, self._right(p)
        blocks = C[..., :, None, :, None] * D[..., None, :, None, :]
        return blocks.flatten(-2).flatten(-3, -2)

    def norm(self, p: Parameters) -> Tensor:
        """‖C ⊗ D‖_F = ‖C‖_F ‖D‖_F."""
        right = frobenius(p.D) if "D" in p.roles else lowrank_norm(p.D_a, p.D_b)
        return frobenius(p.C) * right

    def apply(self, p: Parameters, x: Tensor, scale: Tensor | float) -> Tensor:
        """With x as a matrix X (k1, k2) the product is C X Dᵀ."""
        C, X = p.C.to(x.dtype), x.unflatten(-1, (p.C.shape[-1], -1))
        if "D" in p.roles:
            X = F.linear(X * scale, p.D.to(x.dtype))
        else:
            X = F.linear(F.linear(X, p.D_a.to(x.dtype)) * scale, p.D_b.to(x.dtype))
        return F.linear(X.transpose(-1, -2), C).transpose(-1, -2).flatten(-2)

    def singular_values(self, p: Parameters) -> Tensor:
        """The products of those of C with those of D."""
        C, D = (svdvals(widened(t)) for t in (p.C, self._right(p)))
        return (C.unsqueeze(-1) * D.unsqueeze(-2)).flatten(-2)
