"""DoRA: the rows of W + s ΔW, each scaled to a trained length (Liu et al., arXiv 2402.09353)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import ops
from ..named import flags
from ..updates import Matrix, Update
from .base import SQUARES, Coefficients, Parameters, put_matrix
from .init import Init
from .lora import Lora


@dataclass(frozen=True)
class Dora(Lora):
    """W' = diag(m / ‖W + s ΔW‖_row) (W + s ΔW); the paper's "columns" are the outputs, rows of torch's (out, in).

    The paper's m (out,) is trained by its distance from the lengths of W's rows, the parameter `m`, from 0: so decay
    pulls W' towards W, and a half type keeps small changes. A row of W that is 0 has no direction: its factor is 1 + m.

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

    def norms_of(self, update: Update, dtype: torch.dtype) -> tuple[float, float]:
        return SQUARES[dtype]

    def shapes(self, matrix: Matrix) -> dict[str, tuple[int, ...]]:
        return {"m": (*matrix.stack, matrix.m)}

    @torch.no_grad()
    def start(self, p: Parameters, weight: Callable[[], Tensor]) -> None:
        p.m.zero_()

    def remember(self, p: Parameters, weight: Callable[[], Tensor]) -> None:
        p.__dict__["_row_lengths"] = _lengths(weight())

    @torch.no_grad()
    def norm_changed(self, p: Parameters, before: Tensor, weight: Callable[[], Tensor]) -> None:
        """Magnitudes keep their size relative to the rows of W."""
        new, old = _lengths(weight()), p.__dict__["_row_lengths"].to(p.m.device)
        p.m.mul_(torch.where(old > 0, new / torch.where(old > 0, old, 1), 1))

    def count_from_base(self, p: Parameters) -> None:
        lengths = p.__dict__["_row_lengths"].to(p.m.device)
        p.m.copy_(p.m.to(lengths.dtype) - lengths)

    def form(self, init: Init, rank: int) -> dict[str, float]:
        return {**super().form(init, rank), "m_start": 0.0}  # it was the rows' lengths

    def coefficients(self, p: Parameters, W: Callable[[], Tensor], norm: Tensor) -> Coefficients:
        # In a graph no region without gradients: torch.distributed.pipelining cuts through it.
        learn = torch.is_grad_enabled() and (self.exact or torch.compiler.is_compiling())
        with torch.set_grad_enabled(learn):
            lengths, own = self._row_lengths(p, W())
        lengths = lengths if self.exact else lengths.detach()
        m = p.m.to(lengths.dtype)
        rows = (own + m) / torch.where(lengths == 0, 1, lengths)
        return Coefficients(None, p.scaling, torch.where(own == 0, 1 + m, rows))

    def _row_lengths(self, p: Parameters, W: Tensor) -> tuple[Tensor, Tensor]:
        """‖W_i + s ΔW_i‖ and ‖W_i‖, without a matrix of W's size where ΔW has factors."""
        along, squares = p.update.row_products(p, W)
        own = _lengths(W).to(along.dtype)
        square = (own.square() + 2 * p.scaling * along + p.scaling**2 * squares).clamp_min(0)
        return ops.safe_sqrt(square), own

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

    @torch.no_grad()
    def lengths(self, p: Parameters, W: Tensor) -> Tensor:
        """The paper's m, (out,) or (E, out), of W (out, K) or (E, out, K)."""
        return _lengths(W) + p.m

    def magnitudes(self, p: Parameters, norm: Tensor) -> dict[str, Tensor]:
        size = torch.linalg.vector_norm(p.__dict__["_row_lengths"].to(p.m.device) + p.m.detach(), dim=-1).reshape(-1)
        return {"alpha": size / torch.where(norm == 0, 1, norm)}


def _lengths(W: Tensor) -> Tensor:
    """Length of every row, (m,) or (E, m)."""
    return torch.linalg.vector_norm(W, dim=-1, dtype=ops.accumulate_dtype(W.dtype))
