"""VeRA: ΔW = diag(b) B diag(d) A with frozen random A, B that all layers share (arXiv 2310.11454)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from .base import FactoredUpdate, Matrix, Parameters, uniform_


@dataclass(frozen=True)
class Vera(FactoredUpdate):
    """ΔW = diag(b) B diag(d) A; trained are b (m), which starts at 0, and d (r) alone (eq. 2).

    A (r, K) and B (m, r) are drawn from `seed`, one of each shape for all layers of one `patch`; no file holds them.
    """

    name: ClassVar[str] = "vera"
    roles: ClassVar = {"b": "up", "d": "down"}
    linear_in: ClassVar = (("b",), ("d",))
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed of update 'vera' must be a whole number from 0 to 2**63 - 1, got {self.seed!r}")

    def shapes(self, matrix: Matrix, rank: int) -> dict[str, tuple[int, ...]]:
        return {"b": (*matrix.stack, matrix.m), "d": (*matrix.stack, rank)}

    def form(self) -> dict[str, float]:
        """A first random number, which changes if a version of torch draws others: then no old file fits."""
        return {"first_random_number": _first(self.seed)}

    def shared(self, matrix: Matrix, rank: int, place: dict[str, Any], siblings: dict[Any, Any]) -> dict[str, Any]:
        shapes = {"A": (rank, matrix.K), "B": (matrix.m, rank)}
        return {name: self._frozen(name, shape, place, siblings) for name, shape in shapes.items()}

    def _frozen(self, name: str, shape: tuple[int, int], place: dict[str, Any], siblings: dict[Any, Any]) -> Any:
        key = (self, name, shape, *place.values())
        if key not in siblings:
            seed = (self.seed * 0x9E3779B1 + (name == "B") + 2 * shape[0] + 0x10001 * shape[1]) % 2**63
            value = (
                torch.empty(shape, **place)
                if torch.device(place["device"]).type == "meta"
                else _drawn(shape, seed).to(**place)
            )
            siblings[key] = nn.Parameter(value, requires_grad=False)
        return siblings[key]

    @torch.no_grad()
    def start(self, p: Parameters, weight: Callable[[], Tensor], live: bool) -> None:
        # So that B diag(d) A has entries of the size asked for; A's and B's have 1/sqrt(3 K) and 1/sqrt(3 r).
        size = p.entry_size()
        d = 0.1 if size is None else 3 * size.reshape(-1, *[1] * (p.d.dim() - 1)) * p.A.shape[-1] ** 0.5
        p.d.fill_(1).mul_(d)
        uniform_(p.b) if live else p.b.zero_()

    def factors(self, p: Parameters) -> tuple[Tensor, Tensor]:
        return p.d.unsqueeze(-1) * p.A, p.b.unsqueeze(-1) * p.B


def _drawn(shape: tuple[int, int], seed: int) -> Tensor:
    """Uniform in ±1/sqrt(row length), on the CPU so that every device has the same."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator, device="cpu", dtype=torch.float32) * 2 - 1) * shape[-1] ** -0.5


@lru_cache
def _first(seed: int) -> float:
    with _disable_current_modes():  # FakeTensorMode has no numbers
        return _drawn((1, 1), seed).item()
