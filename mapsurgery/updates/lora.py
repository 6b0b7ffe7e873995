"""LoRA: ΔW = B A (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import FactoredUpdate, Matrix, Parameters, uniform_


@dataclass(frozen=True)
class LoraUpdate(FactoredUpdate):
    """ΔW = B A with A (r, K) and B (m, r), which starts at 0."""

    name: ClassVar[str] = "lora"
    roles: ClassVar = {"A": "down", "B": "up"}
    linear_in: ClassVar = (("A",), ("B",))

    def shapes(self, matrix: Matrix, rank: int) -> dict[str, tuple[int, ...]]:
        return {"A": (*matrix.stack, rank, matrix.K), "B": (*matrix.stack, matrix.m, rank)}

    @torch.no_grad()
    def start(self, p: Parameters, weight: Callable[[], Tensor], live: bool) -> None:
        uniform_(p.A, p.entry_size())
        uniform_(p.B) if live else p.B.zero_()

    def factors(self, p: Parameters) -> tuple[Tensor, Tensor]:
        own = p._parameters  # nn.Module's way to an attribute takes as long as a small product
        return (own["A"], own["B"]) if "A" in own else (p.A, p.B)
