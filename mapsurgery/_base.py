"""What is remembered of a frozen weight, by which an adapter's base is told from another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import ops
from .methods.adapter import frobenius_norms
from .surgery.quantised.kinds import kind_of
from .surgery.quantised.layer import QuantisedLinear
from .surgery.record import Site

_SAME_KERNEL, _OTHER_QUANTISATION = 1e-4, 0.03
"""Relative tolerances of ||W||_F: one quantised weight, dequantised on two machines; one weight, quantised or not."""


@dataclass(frozen=True)
class Base:
    """A frozen weight as an adapter was trained on it.

    Attributes:
        norms: ||W||_F, (1,), or (E,) of a stack.
        dtype: of the W that was measured.
        elements: of one matrix.
        quantised: how, "" for not at all.
    """

    norms: Tensor
    dtype: torch.dtype
    elements: int
    quantised: str = ""

    @classmethod
    def of(cls, site: Site) -> Base:
        """The base of an adapted parameter."""
        adapter, kind = site.adapter, kind_of(site.layer) if isinstance(site.layer, QuantisedLinear) else None
        norms, dtype = adapter.weight_norm, adapter.norm_dtype
        if kind is None:
            weight = site.base
            here = type(weight) in (Tensor, nn.Parameter) and not weight.is_meta  # neither sharded nor put away
            norms = adapter.norm_of(weight) if here else norms
            dtype = weight.dtype if here and adapter.computed else adapter.norm_dtype
        else:
            here = not any(t.is_meta for t in (*site.layer.parameters(), *site.layer.buffers()))
        if here and adapter.norm_given:
            norms = _measured(site)
        held = site.layer._parameters.get(site.parameter)
        stored = f"stored as {held.dtype}" if held is not None and held.itemsize == 1 else ""
        elements = adapter.shape.numel() // adapter.matrices
        return cls(norms.detach(), dtype, elements, kind.name if kind else stored)

    def difference(self, trained_on: Base, weight: Callable[[], Tensor]) -> str | None:
        """What to say where this is not the base that an adapter was trained on, as far as ||W||_F tells; else None.

        Args: weight: gives W, (m, ...), or (E, m, ...) of a stack; asked where a cast may explain the difference.
        """
        found, expected = (base.norms.detach().cpu().double().reshape(-1) for base in (self, trained_on))
        off = ~((found - expected).abs() <= self._tolerance(trained_on) * expected)
        if off.any() and self.dtype != trained_on.dtype and not self.quantised and not trained_on.quantised:
            off &= ~self._cast_apart(trained_on, weight().detach().reshape(found.numel(), -1))
        if not off.any():
            return None
        first = int(off.nonzero()[0])
        which = f" (matrix {first})" if found.numel() > 1 else ""
        return f"{which} has ||W||_F = {found[first]:.8g}, the adapter was trained on {expected[first]:.8g}"

    def _cast_apart(self, trained_on: Base, weight: Tensor) -> Tensor:
        """Whether each matrix is the other's but for a cast, also where few elements or few values decide the norm.

        A cast that W went through before training is repeated. One since then moves the norm by about
        eps (‖W‖₄/‖W‖₂)², which is eps/sqrt(n) where all elements are of one size.
        """
        expected = trained_on.norms.detach().cpu().double().reshape(-1)
        again = torch.tensor([ops.frobenius_norm(w) for w in weight.to(trained_on.dtype)], dtype=torch.float64)
        eps = torch.finfo(self.dtype).eps
        if eps <= torch.finfo(trained_on.dtype).eps:
            return (again - expected).abs() <= 1e-6 * expected
        fourth = torch.linalg.vector_norm(weight, 4, dim=1, dtype=torch.float32).double().cpu()
        return (again - expected).abs() <= 4 * eps * (fourth / again) ** 2 * expected

    def _tolerance(self, other: Base) -> float:
        """Relative: float32 rounding of a norm; more where the base was cast from or to a half type, or quantised.

        Rounding n elements, each by at most eps/2 and independently, moves the norm by about eps/sqrt(n).
        """
        if self.quantised or other.quantised:
            return _SAME_KERNEL if self.quantised == other.quantised else _OTHER_QUANTISATION
        if self.dtype == other.dtype:
            return 1e-6
        return 1e-6 + 4 * max(torch.finfo(self.dtype).eps, torch.finfo(other.dtype).eps) / self.elements**0.5


def _measured(site: Site) -> Tensor:
    """||W||_F of the base that is here, which is not that of the adapter's file where one of them is quantised."""
    adapter = site.adapter
    known = adapter.__dict__.get("_base_norms")
    if known is None or known[0] is not adapter.weight_norm:
        norms = torch.tensor(frobenius_norms(site.base.detach(), adapter.stacked), dtype=torch.float64).reshape(-1)
        adapter.__dict__["_base_norms"] = known = adapter.weight_norm, norms
    return known[1]
