"""Numbers that say what training did to a weight, for `mapsurgery.report` and `mapsurgery.track`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .updates.base import Parameters

MEASURES = {
    "weight_norm": "||W||_F",
    "alpha": "magnitude of the base term, in units of ||W||_F",
    "beta": "magnitude of the update term, in units of ||W||_F: of MAP the trained one, of others its norm",
    "update_norm": "norm of the update term, in units of ||W||_F",
    "change": "||W' - W||_F / ||W||_F",
    "scaling": "share of ||W' - W||_F^2 that lies along W: what a factor on W would do",
    "direction": "the rest of that share: what turns W",
    "magnitude_change": "mean over the rows of | ||W'_i|| - ||W_i|| |, in units of the mean ||W_i|| (DoRA's dM)",
    "direction_change": "mean over the rows of 1 - cos(W'_i, W_i) (DoRA's dD)",
    "cosine": "of W and ΔW",
    "effective_rank": "of ΔW: exp of the entropy of its singular values",
}
"""Each number, of a matrix W; of a stack the mean. A zero weight has the unit 1. dM and dD: DoRA (arXiv 2402.09353,
section 3.2), where the columns are the outputs, and dM is not relative."""


@torch.no_grad()
def measure(p: Parameters, W: Tensor, norm: Tensor, names: Sequence[str] = tuple(MEASURES)) -> list[Tensor]:
    """The numbers of MEASURES that are named, in that order, (1,) each, on the device of the adapter.

    W is read once, or not at all where the method knows what is asked for without it.

    Args: p: the adapter; W, norm: its weight, in the layer's layout, and ||W||_F.
    """
    known = {**p.method.magnitudes(p, norm), "weight_norm": norm}
    numbers = known if known.keys() >= set(names) else {**_of_matrix(p, W, norm), **known}
    if "effective_rank" in names:  # its decomposition makes a GPU's host wait
        numbers["effective_rank"] = _effective_rank(p.update.singular_values(p).reshape(norm.numel(), -1).double())
    chosen = [numbers[name].reshape(-1) for name in names]
    return chosen if norm.numel() == 1 else [t.double().mean(0, keepdim=True) for t in chosen]


def _of_matrix(p: Parameters, W: Tensor, norm: Tensor) -> dict[str, Tensor]:
    """All numbers, (E,), but the effective rank."""
    matrix = p.matrix.view(W)
    c = p.method.coefficients(p, lambda: matrix, norm)
    inner, update_squares = (t.double() for t in p.update.row_products(p, matrix))  # <W_i, ΔW_i>, ||ΔW_i||^2
    own = torch.linalg.vector_norm(matrix, dim=-1, dtype=torch.float64)
    stack = own.dim() == 2
    if not stack:
        own, inner, update_squares = own[None], inner[None], update_squares[None]
    rows = torch.ones_like(own) if c.rows is None else c.rows.double().reshape(own.shape)
    a = rows if c.base is None else rows * c.base.double().reshape(-1, 1)
    d = rows * (c.update.double().reshape(-1, 1) if isinstance(c.update, Tensor) else c.update)
    if p.kept_row is not None:
        kept = torch.arange(own.shape[1], device=own.device) == p.kept_row
        a, d = torch.where(kept, 1, a), torch.where(kept, 0, d)
    numbers = _of_rows(own, inner, update_squares, a, d)
    alpha = (rows * own).square().sum(-1).sqrt() * (1.0 if c.base is None else c.base.double().reshape(-1))
    return numbers | {"alpha": alpha / _or_one(norm.double().reshape(-1)), "beta": numbers["update_norm"]}


def _or_one(t: Tensor) -> Tensor:
    return torch.where(t == 0, 1, t)


def _of_rows(w: Tensor, q: Tensor, squares: Tensor, a: Tensor, d: Tensor) -> dict[str, Tensor]:
    """What follows from rows W'_i = a_i W_i + d_i ΔW_i with w = ||W_i||, q = <W_i, ΔW_i>, squares = ||ΔW_i||^2.

    All are (E, m), and the results (E,).
    Differences are written out, so that a small change of a large weight keeps its digits.
    """
    norm = _or_one(w.square().sum(-1).sqrt())
    change = ((a - 1) ** 2 * w**2 + 2 * (a - 1) * d * q + d**2 * squares).sum(-1)
    along = ((a - 1) * w**2 + d * q).sum(-1) / norm  # <W' - W, W> / ||W||
    share = along**2 / _or_one(change)
    after = (a**2 * w**2 + 2 * a * d * q + d**2 * squares).clamp_min(0).sqrt()
    lengths = _or_one(after * w)
    inner = a * w**2 + d * q  # <W'_i, W_i>
    # (||W'|| ||W||)^2 - <W', W>^2 = d^2 (||W||^2 ||ΔW||^2 - <W, ΔW>^2): no cancellation of numbers near 1.
    turned = d**2 * (w**2 * squares - q**2).clamp_min(0) / (lengths * _or_one(lengths + inner))
    turned = torch.where(inner < 0, 1 - inner / lengths, turned)  # nor near -1
    update = squares.sum(-1).sqrt()
    return {
        "update_norm": (d**2 * squares).sum(-1).sqrt() / norm,
        "change": torch.where(change > 0, change, change * 0).sqrt() / norm,  # NaN stays NaN
        "scaling": share.clamp_max(1),
        "direction": torch.where(change > 0, 1 - share.clamp_max(1), change * 0),
        "magnitude_change": (after - w).abs().mean(-1) / _or_one(w.mean(-1)),
        "direction_change": turned.mean(-1),
        "cosine": q.sum(-1) / _or_one(norm * update),
    }


def _effective_rank(singular: Tensor) -> Tensor:
    """exp of the entropy of the shares of the singular values (E, n); 0 where all are 0."""
    total = singular.sum(-1, keepdim=True)
    share = singular / _or_one(total)
    entropy = -(share * share.clamp_min(1e-300).log()).sum(-1)
    return torch.where(total.squeeze(-1) == 0, 0, entropy.exp())
