"""DoRA: the rows of W + s ΔW, each scaled to a trained length (Liu et al., arXiv 2402.09353)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import ops
from ..named import flags
from ..updates import Matrix
from .base import Coefficients, Parameters, put_matrix
from .lora import Lora


@dataclass(frozen=True)
class Dora(Lora):
    """W' = diag(m / ‖W + s ΔW‖_row) (W + s ΔW); the paper's "columns" are the outputs, rows of torch's (out, in).

    m (out,) starts at the lengths of W's rows. A row of W that is 0 has no direction: its factor is 1 + m, m = 0.

    Args:
        alpha, rslora: as in `Lora`.
        exact: the gradient passes through the lengths too. By default they count as constants, as the paper proposes in
            section 4.3 and other libraries do.
    """

    name: ClassVar[str] = "dora"
    roles: ClassVar = {"m": "base"}
    exact: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        flags("method 'dora'", exact=self.exact)

    def shapes(self, matrix: Matrix) -> dict[str, tuple[int, ...]]:
        return {"m": (*matrix.stack, matrix.m)}

    @torch.no_grad()
    def start(self, p: Parameters, weight: Callable[[], Tensor]) -> None:
        p.m.copy_(p.__dict__["_row_lengths"])

    def remember(self, p: Parameters, weight: Callable[[], Tensor]) -> None:
        p.__dict__["_row_lengths"] = _lengths(weight())

    @torch.no_grad()
    def norm_changed(self, p: Parameters, before: Tensor, weight: Callable[[], Tensor]) -> None:
        """Magnitudes keep their size relative to the rows of W; those that training did not move are the rows'."""
        new, old = _lengths(weight()), p.__dict__["_row_lengths"].to(p.m.device)
        ratio = torch.where(old > 0, new / torch.where(old > 0, old, 1), 1)
        started = p.m == old.to(p.m.dtype)
        p.m.copy_(torch.where(started, new, p.m * ratio))

    def coefficients(self, p: Parameters, W: Callable[[], Tensor], norm: Tensor) -> Coefficients:
        with torch.set_grad_enabled(self.exact and torch.is_grad_enabled()):
            lengths, empty = self._row_lengths(p, W())
        m = p.m.to(lengths.dtype)
        return Coefficients(None, p.scaling, torch.where(empty, 1 + m, m / torch.where(lengths == 0, 1, lengths)))

    def _row_lengths(self, p: Parameters, W: Tensor) -> tuple[Tensor, Tensor]:
        """‖W_i + s ΔW_i‖, and whether W_i is 0, without a matrix of W's size where ΔW has factors."""
        along, squares = p.update.row_products(p, W)
        own = _lengths(W).to(along.dtype)
        square = (own.square() + 2 * p.scaling * along + p.scaling**2 * squares).clamp_min(0)
        return ops.safe_sqrt(square), own == 0

    def merge_into(self, p: Parameters, weight: Tensor, norm: Tensor) -> None:
        matrix = p.matrix.view(weight)
        rows, empty = self.coefficients(p, lambda: matrix, norm).rows, _lengths(matrix) == 0
        super().merge_into(p, weight, norm)
        p.__dict__["_merged_rows"] = rows, empty  # neither can be told from W'

    def unmerge_from(self, p: Parameters, weight: Tensor, norm: Tensor) -> None:
        rows, empty = (t.to(weight.device) for t in p.__dict__["_merged_rows"])
        recovered = self._recovered(p, weight, Coefficients(None, p.scaling, rows))
        put_matrix(p, weight, recovered.masked_fill_(empty.unsqueeze(-1), 0))  # a rest of rounding would be a direction

    def recoverable(self, p: Parameters, W: Tensor | None, norm: Tensor) -> bool:
        if W is None:
            return bool(p.__dict__["_merged_rows"][0].all())
        rows = self.coefficients(p, lambda: p.matrix.view(W), norm).rows
        return rows is not None and bool(rows.all())

    def magnitudes(self, p: Parameters, norm: Tensor) -> dict[str, Tensor]:
        size = torch.linalg.vector_norm(p.m.detach(), dim=-1).reshape(-1)
        return {"alpha": size / torch.where(norm == 0, 1, norm)}


def _lengths(W: Tensor) -> Tensor:
    """Length of every row, (m,) or (E, m)."""
    return torch.linalg.vector_norm(W, dim=-1, dtype=ops.accumulate_dtype(W.dtype))
