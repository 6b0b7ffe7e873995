"""MAP: W' = alpha W/||W||_F + beta ΔW/||ΔW||_F, with any update ΔW (arXiv 2505.23094; LoMAP where ΔW = BA)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import ops
from ..named import flags
from ..ops.operators import magnitudes
from ..updates import Matrix, Update
from ..updates.base import FactoredUpdate
from .base import SQUARES, Coefficients, Method, Parameters, Settings, drops
from .init import Init


@dataclass(frozen=True)
class Map(Method):
    """Two trained magnitudes, one of the frozen weight's direction and beta of the update's.

    The paper's alpha is trained by its distance from ||W||_F, the parameter `alpha`, from 0: W' = (1 + alpha) W + ...,
    or with `Init(relative=False)` (||W||_F + alpha) W/||W||_F + ... So decay pulls W' towards W, and a half type keeps
    small changes.

    Updates that have factors, BA, run on the fused operators: there nothing of size (m, K) is built.

    Args: train_alpha, train_beta: False freezes the magnitude at its start.
    """

    name: ClassVar[str] = "map"
    roles: ClassVar = {"alpha": "base", "beta": "magnitude"}
    init_options: ClassVar = ("kind", "beta", "gain", "relative", "a_scale")
    train_alpha: bool = True
    train_beta: bool = True

    def __post_init__(self) -> None:
        flags("method 'map'", train_alpha=self.train_alpha, train_beta=self.train_beta)

    def fixed(self) -> tuple[str, ...]:
        return tuple(n for n, train in (("alpha", self.train_alpha), ("beta", self.train_beta)) if not train)

    def norms_of(self, update: Update, dtype: torch.dtype) -> tuple[float, float]:
        """The fused operators take all numbers; the norm of an update without factors is a sum of squares."""
        return super().norms_of(update, dtype) if isinstance(update, FactoredUpdate) else SQUARES[dtype]

    def shapes(self, matrix: Matrix) -> dict[str, tuple[int, ...]]:
        """(1,), never 0-dim, which FSDP2 rejects; (E,) of a stack."""
        count = matrix.stack or (1,)
        return {"alpha": count, "beta": count}

    def default_init(self) -> Init:
        return Init()

    def refuse(self, init: Init) -> None:
        if init.kind == "random" and not self.train_beta:
            raise ValueError(
                'init="random" starts with beta = 0: with train_beta=False the update would stay 0 for ever'
            )

    def form(self, init: Init, rank: int) -> dict[str, float]:
        return {"tau": init.tau, "relative": float(init.relative), "alpha_start": 0.0}  # it was 1, or ||W||_F

    @torch.no_grad()
    def start(self, p: Parameters, weight: Callable[[], Tensor]) -> None:
        p.alpha.zero_()
        p.beta.fill_(p.init.first_beta).mul_(_unit(p, p.weight_norm))

    @torch.no_grad()
    def norm_changed(self, p: Parameters, before: Tensor, weight: Callable[[], Tensor]) -> None:
        """Absolute magnitudes keep their size relative to ||W||_F."""
        if not p.init.relative:
            known = (before != 0) & (p.weight_norm != 0)
            ratio = torch.where(known, p.weight_norm / before, 1)
            p.alpha.mul_(ratio)
            p.beta.mul_(ratio)

    def count_from_base(self, p: Parameters) -> None:
        p.alpha.copy_(p.alpha.double() - _unit(p, p.weight_norm))

    def coefficients(self, p: Parameters, W: Callable[[], Tensor], norm: Tensor) -> Coefficients:
        factors = p.update.factors(p)
        if factors is not None:
            s_w, s_d = ops.map_scales(*factors, p.alpha, p.beta, norm, p.init.tau, p.init.relative)
            return Coefficients(s_w, s_d)
        return Coefficients(*_scales_of(p, norm))

    def scales(self, p: Parameters) -> ops.Scales | None:
        factors = None if p.stacked or drops(p) else p.update.factors(p)
        if factors is None or factors[0].dim() != 2:  # FSDP1 keeps flat pieces outside of a forward
            return None
        numbers = p.alpha, p.beta, p.weight_norm, p.init.tau, p.init.relative
        with ops.full_precision(p.alpha.device.type):
            return torch.ops.mapsurgery.map_scales.default(*factors, *numbers)

    def linear(self, p: Parameters, x: Tensor, bias: Tensor | None, W: Tensor, norm: Tensor) -> Tensor:
        factors = None if p.dropout and p.training else p.update.factors(p)
        if factors is None:
            return super().linear(p, x, bias, W, norm)
        A, B = factors
        own = p._parameters  # see LoraUpdate.factors
        alpha, beta = (own["alpha"], own["beta"]) if "alpha" in own else (p.alpha, p.beta)
        matrix, init, scales = W.t() if p.transposed else W, p.init, p.scales and p.scales.of(p, x, norm)
        return ops.map_linear(x, matrix, bias, A, B, alpha, beta, norm, init.tau, init.relative, scales)

    def conv(
        self, p: Parameters, x: Tensor, bias: Tensor | None, settings: Settings, W: Tensor, norm: Tensor
    ) -> Tensor:
        factors = None if drops(p) else p.update.factors(p)
        if factors is None:
            return super().conv(p, x, bias, settings, W, norm)
        A, B = factors
        init, scales = p.init, p.scales and p.scales.of(p, x, norm)
        return ops.map_conv(x, W, bias, A, B, p.alpha, p.beta, norm, init.tau, init.relative, *settings, scales)

    def recoverable(self, p: Parameters, W: Tensor | None, norm: Tensor) -> bool:
        return bool((p.alpha != -_unit(p, norm)).all())

    def magnitudes(self, p: Parameters, norm: Tensor) -> dict[str, Tensor]:
        unit = _unit(p, norm)
        return {"alpha": 1 + p.alpha.detach() / unit, "beta": p.beta.detach() / unit}


def _unit(p: Parameters, norm: Tensor) -> Tensor:
    """What alpha and beta are divided by for units of ||W||_F, (1,) or (E,); 1 of a zero weight."""
    return torch.where((norm == 0) | p.init.relative, 1, norm)


def _scales_of(p: Parameters, norm: Tensor) -> tuple[Tensor, Tensor]:
    """s_w and s_d of an update without factors, by its norm; differentiable."""
    length = p.update.norm(p)
    acc = length.dtype
    wide = acc if torch.compiler.is_exporting() else torch.float64  # no float64 in an exported graph
    size = p.update.size(p).to(wide) if p.init.tau == 0 else None
    length, alpha, beta, norm = (t.to(wide) for t in (length, p.alpha, p.beta, norm))
    return magnitudes(length.square(), size, alpha, beta, norm, p.init.tau, p.init.relative, acc)[:2]
