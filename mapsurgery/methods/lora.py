"""LoRA: W' = W + s ΔW (arXiv 2106.09685), with s = alpha/r, or alpha/√r (rsLoRA, arXiv 2312.03732)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..named import flags, positive
from .base import Coefficients, Method, Parameters


@dataclass(frozen=True)
class Lora(Method):
    """W' = W + s ΔW.

    Args:
        alpha: s = alpha/r (the `lora_alpha` of other libraries).
        rslora: s = alpha/√r instead, which keeps the size of activations over ranks.
    """

    name: ClassVar[str] = "lora"
    alpha: float = 16.0
    rslora: bool = False

    def __post_init__(self) -> None:
        positive(f"method {self.name!r}", alpha=self.alpha)
        flags(f"method {self.name!r}", rslora=self.rslora)

    def scaling(self, rank: int) -> float:
        return float(self.alpha / (rank**0.5 if self.rslora else rank))

    def coefficients(self, p: Parameters, W: Callable[[], Tensor], norm: Tensor) -> Coefficients:
        return Coefficients(None, p.scaling)

    def magnitudes(self, p: Parameters, norm: Tensor) -> dict[str, Tensor]:
        unit = torch.where(norm == 0, 1, norm)
        return {"alpha": (norm > 0).to(norm.dtype), "beta": p.scaling * p.update.norm(p).detach() / unit}
