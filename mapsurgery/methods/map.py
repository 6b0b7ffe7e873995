"""MAP: W' = alpha W/||W||_F + beta ΔW/||ΔW||_F, with any update ΔW (arXiv 2505.23094; LoMAP where ΔW = BA)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from ..named import flags
from ..ops import reference
from ..updates import Matrix
from ..updates.base import Parameters
from .init import Init
from .method import Coefficients, Method, Settings, combined_rows, drops


@dataclass(frozen=True)
class Map(Method):
    """Two trained magnitudes, alpha of the frozen weight's direction and beta of the update's.

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
        return {"tau": init.tau, "relative": float(init.relative)}

    @torch.no_grad()
    def start(self, p: Parameters, weight: Callable[[], Tensor]) -> None:
        norm = torch.where(p.weight_norm > 0, p.weight_norm, 1)
        unit = 1.0 if p.init.relative else norm
        p.alpha.fill_(1.0).mul_(unit)
        p.beta.fill_(p.init.first_beta).mul_(unit)

    @torch.no_grad()
    def norm_changed(self, p: Parameters, before: Tensor, weight: Callable[[], Tensor]) -> None:
        """Absolute magnitudes keep their size relative to ||W||_F; alpha = ||W||_F, the start, stays exactly that."""
        if p.init.relative:
            return
        known = (before != 0) & (p.weight_norm != 0)
        ratio = torch.where(known, p.weight_norm / before, 1)
        started = known & (p.alpha == before.to(p.alpha.dtype))
        p.alpha.copy_(torch.where(started, p.weight_norm, p.alpha * ratio))
        p.beta.mul_(ratio)

    def coefficients(self, p: Parameters, W: Callable[[], Tensor], norm: Tensor) -> Coefficients:
        factors = p.update.factors(p)
        if factors is not None and not p.stacked:
            scales = ops.map_scales(*factors, *self._numbers(p, norm))[0]
            return Coefficients(scales[reference.S_W], scales[reference.S_D])
        length = p.update.norm(p)
        size = length if p.init.tau > 0 else p.update.size(p)  # softened, the norm is never 0
        return Coefficients(*ops.magnitudes(length, size, *self._numbers(p, norm)))

    def _numbers(self, p: Parameters, norm: Tensor) -> tuple[Any, ...]:
        """The arguments that every operator shares, after the factors."""
        return p.alpha, p.beta, norm, p.init.tau, p.init.relative

    def way(self, p: Parameters, groups: int | None = None) -> str:
        return super().way(p, groups) if self._fused_factors(p) is None else "fused"

    def _fused_factors(self, p: Parameters) -> tuple[Tensor, Tensor] | None:
        """The factors that the operators take, which know no dropout."""
        return None if drops(p) else p.update.factors(p)

    def scale_inputs(self, p: Parameters) -> tuple[Any, ...] | None:
        factors = None if p.stacked else self._fused_factors(p)
        return None if factors is None else (*factors, *self._numbers(p, p.weight_norm))

    def linear(self, p: Parameters, x: Tensor, bias: Tensor | None, W: Tensor, norm: Tensor) -> Tensor:
        factors = self._fused_factors(p)
        if factors is None:
            return super().linear(p, x, bias, W, norm)
        numbers = (*self._numbers(p, norm), _given(p, x, norm))
        return ops.map_linear(x, p.matrix(W), bias, *factors, *numbers)

    def conv(
        self, p: Parameters, x: Tensor, bias: Tensor | None, settings: Settings, W: Tensor, norm: Tensor
    ) -> Tensor:
        factors = self._fused_factors(p)
        if factors is None:
            return super().conv(p, x, bias, settings, W, norm)
        numbers = (*self._numbers(p, norm), *settings, _given(p, x, norm))
        return ops.map_conv(x, W, bias, *factors, *numbers)

    def embedding(self, p: Parameters, ids: Tensor, padding_idx: int | None, W: Tensor, norm: Tensor) -> Tensor:
        factors = p.update.factors(p)
        if factors is None:
            return super().embedding(p, ids, padding_idx, W, norm)
        return _adapted_rows(ids, padding_idx, W, *factors, *self._numbers(p, norm))

    def effective_weight(self, p: Parameters, W: Tensor, norm: Tensor) -> Tensor:
        factors = p.update.factors(p)
        if factors is None:
            return super().effective_weight(p, W, norm)
        matrix, inputs = p.matrix(W), (*factors, *self._numbers(p, norm))
        if p.stacked:
            return ops.stacked_weight(matrix, *inputs).reshape(W.shape)
        result = ops.effective_weight(matrix, *inputs)
        return result.t() if p.transposed else result.reshape(W.shape)

    def merge_into(self, p: Parameters, weight: Tensor, norm: Tensor) -> None:
        self._in_place(ops.merge_, super().merge_into, p, weight, norm)

    def unmerge_from(self, p: Parameters, weight: Tensor, norm: Tensor) -> None:
        self._in_place(ops.unmerge_, super().unmerge_from, p, weight, norm)

    def _in_place(
        self, operation: Callable[..., None], general: Callable[..., None], p: Parameters, weight: Tensor, norm: Tensor
    ) -> None:
        """Run an in-place operator on the weight, matrix by matrix."""
        factors = p.update.factors(p)
        if factors is None:
            return general(p, weight, norm)
        A, B = factors
        alpha, beta, norm, *rest = self._numbers(p, norm)
        if not p.stacked:
            return _one_in_place(operation, weight, p.transposed, A, B, alpha, beta, norm, *rest)
        for e in range(p.matrices):
            scalars = (t[e : e + 1] for t in (alpha, beta, norm))
            _one_in_place(operation, weight[e], False, A[e], B[e], *scalars, *rest)

    def recoverable(self, p: Parameters, W: Any, norm: Tensor) -> bool:
        return bool(p.alpha.all())

    def magnitudes(self, p: Parameters, norm: Tensor) -> dict[str, Tensor]:
        numbers = {name: getattr(p, name).detach() for name in self.roles}
        if p.init.relative:
            return numbers
        unit = torch.where(norm == 0, 1, norm)
        return {name: value / unit for name, value in numbers.items()}


def _given(p: Parameters, x: Tensor, norm: Tensor) -> None:
    return None


def _one_in_place(operation: Callable[..., None], weight: Tensor, transposed: bool, A: Tensor, *others: Any) -> None:
    """The weight as (m, K), its columns in the order in which they lie in memory.

    A channels_last kernel is no (m, K) view in the order of its dimensions, but is one with A's columns permuted.
    """
    if transposed:
        return operation(weight.t(), A, *others)
    order = sorted(range(1, weight.dim()), key=weight.stride, reverse=True)
    A = A.reshape(-1, *weight.shape[1:]).permute(0, *order).flatten(1)
    ordered = weight.permute(0, *order)
    matrix = ordered.flatten(1)
    operation(matrix, A, *others)
    if matrix.data_ptr() != weight.data_ptr():  # no view of any order: flatten made a copy
        ordered.copy_(matrix.unflatten(1, ordered.shape[1:]))


@torch.fx.wrap  # one node of a symbolic trace: a trace cannot see the dtypes that it depends on
def _adapted_rows(ids: Tensor, padding_idx: int | None, W: Tensor, *factors: Any) -> Tensor:
    """s_w W[ids] + s_d B[ids] A: no (m, K) matrix is built; factors as `reference.map_scales` takes them."""
    A, B = factors[:2]
    acc = reference.accumulate_dtype(torch.promote_types(W.dtype, A.dtype))
    scales = ops.map_scales(*factors)[0].to(acc)
    with ops.full_precision(A.device.type):
        update = F.embedding(ids, B).to(acc) @ A.to(acc)
    return combined_rows(ids, padding_idx, W, update, scales[reference.S_W], scales[reference.S_D], None)
