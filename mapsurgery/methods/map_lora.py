"""MAP on LoRA's update: W' = alpha W/||W||_F + beta BA/||BA||_F (LoMAP of arXiv 2505.23094)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..ops import reference
from .base import Adapter

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class MapLora(Adapter):
    """Two magnitudes and two low-rank factors on a frozen weight W, seen as the matrix (m, K); arguments of `Adapter`.

    Attributes:
        A: (r, K). B: (m, r). alpha, beta: (1,), never 0-dim because FSDP2 rejects 0-dim parameters.
    """

    ROLES = {"A": "down", "B": "up", "alpha": "magnitude", "beta": "magnitude"}

    def create_parameters(self, m: int, K: int, place: dict[str, Any]) -> None:
        self.A = nn.Parameter(torch.empty(self.rank, K, **place))
        self.B = nn.Parameter(torch.empty(m, self.rank, **place))
        self.alpha = nn.Parameter(torch.empty(1, **place))
        self.beta = nn.Parameter(torch.empty(1, **place))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A uniform, B zero or uniform, alpha and beta by `init`."""
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # standard deviation 1/sqrt(3 K)
        if self.init.a_scale == "weight" and self.weight_norm.item() > 0:
            self.A.mul_(self.weight_norm * (3 / self.B.shape[0]) ** 0.5)  # to that of W, ||W||_F / sqrt(m K)
        if self.init.kind == "random":
            nn.init.kaiming_uniform_(self.B, a=math.sqrt(5))
        else:
            nn.init.zeros_(self.B)
        unit = 1.0 if self.init.relative else (self.weight_norm if self.weight_norm.item() > 0 else 1.0)
        self.alpha.fill_(1.0).mul_(unit)
        self.beta.fill_(self.init.first_beta).mul_(unit)

    @torch.no_grad()
    def norm_changed(self, before: Tensor) -> None:
        """Absolute magnitudes keep their size relative to ||W||_F; alpha = ||W||_F, the start, stays exactly that."""
        if self.init.relative or before.item() == 0 or self.weight_norm.item() == 0:
            return
        started = self.alpha == before.to(self.alpha.dtype)
        ratio = self.weight_norm / before
        self.alpha.copy_(torch.where(started, self.weight_norm, self.alpha * ratio))
        self.beta.mul_(ratio)

    def _factors(self) -> tuple[Any, ...]:
        """The arguments that every operator shares."""
        if self.pending:
            self.weight_arrived()
        return self.A, self.B, self.alpha, self.beta, self.weight_norm, self.init.tau, self.init.relative

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.training and self.dropout > 0:
            s_w, s_d = self._scales(x)
            h = F.linear(F.dropout(x, self.dropout), self.A.to(x.dtype))
            return F.linear(x * s_w, self.matrix(), bias) + F.linear(h * s_d, self.B.to(x.dtype))
        return ops.map_linear(x, self.matrix(), bias, *self._factors())

    def conv(
        self,
        x: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> Tensor:
        if self.training and self.dropout > 0:
            conv = _CONV[len(stride)]
            s_w, s_d = self._scales(x)
            shape = self.base_weight.shape[1:]
            down = self.A.to(x.dtype).reshape(-1, *shape).repeat(groups, *[1] * len(shape))
            up = self.B.to(x.dtype).reshape(*self.B.shape, *[1] * len(stride))
            h = conv(F.dropout(x, self.dropout), down, None, stride, padding, dilation, groups)
            return conv(x * s_w, self.base_weight, bias, stride, padding, dilation, groups) + conv(
                h * s_d, up, groups=groups
            )
        settings = (stride, padding, dilation, groups)
        return ops.map_conv(x, self.base_weight, bias, *self._factors(), *settings)  # type: ignore[call-arg]

    def _scales(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """s_w and s_d, differentiable, in the dtype of x: dropout makes the two paths see different inputs."""
        scales = reference.map_scales(*self._factors())[0].to(x.dtype)
        return scales[reference.S_W], scales[reference.S_D]

    def effective_weight(self) -> Tensor:
        return self.like_weight(ops.effective_weight(self.matrix(), *self._factors()))

    def merge_into(self, weight: Tensor) -> None:
        self._in_place(ops.merge_, weight)

    def unmerge_from(self, weight: Tensor) -> None:
        self._in_place(ops.unmerge_, weight)

    def recoverable(self) -> bool:
        return bool(self.alpha.any())

    @torch.no_grad()
    def _in_place(self, operation: Callable[..., None], weight: Tensor) -> None:
        """Run an in-place operator on the weight as (m, K), its columns in the order in which they lie in memory.

        A channels_last kernel is no (m, K) view in the order of its dimensions, but is one with A's columns permuted.
        """
        A, *others = self._factors()
        if self.transposed:
            return operation(weight.t(), A, *others)
        order = sorted(range(1, weight.dim()), key=weight.stride, reverse=True)
        A = A.reshape(-1, *weight.shape[1:]).permute(0, *order).flatten(1)
        ordered = weight.permute(0, *order)
        matrix = ordered.flatten(1)
        operation(matrix, A, *others)
        if matrix.data_ptr() != weight.data_ptr():  # no view of any order: flatten made a copy
            ordered.copy_(matrix.unflatten(1, ordered.shape[1:]))

    @torch.no_grad()
    def measures(self) -> dict[str, float]:
        """Magnitudes in units of ||W||_F, and how W' differs from W; float64 on the factors, nothing of W's size kept.

        ||W' - W||^2 = (s_w - 1)^2 w^2 + 2 (s_w - 1) s_d <W, BA> + s_d^2 ||BA||^2, <W, BA> = <B^T W, A>.
        """
        A, B = self.A.double(), self.B.double()
        scales, gram_a, gram_b = reference.map_scales(A, B, *self._factors()[2:])
        s_w, s_d = scales[reference.S_W].item(), scales[reference.S_D].item()
        w, p = self.weight_norm.item(), reference.lowrank_norm(A, B)[0].item()
        W = self.matrix()
        inner = ((B.to(torch.float32).t() @ W.to(torch.float32)).double() * A).sum().item()
        change = (s_w - 1) ** 2 * w**2 + 2 * (s_w - 1) * s_d * inner + s_d**2 * p**2
        # Singular values of BA are those of R_B R_A^T (r x r): the rank that is used is exp of their entropy.
        core = torch.linalg.qr(B).R @ torch.linalg.qr(A.t()).R.t()
        singular = torch.linalg.svdvals(core) if core.isfinite().all() else core.diagonal() * float("nan")
        share = singular / singular.sum().clamp_min(torch.finfo(torch.float64).tiny)
        entropy = -(share * share.clamp_min(1e-300).log()).sum().item()
        unit = w or 1.0
        magnitude = 1.0 if self.init.relative else unit
        return {
            "rank": self.rank,
            "weight_norm": w,
            "alpha": self.alpha.item() / magnitude,
            "beta": self.beta.item() / magnitude,
            "update_norm": abs(s_d) * p / unit,
            "change": math.sqrt(change) / unit if change > 0 else change * 0.0,  # NaN stays NaN
            "cosine": inner / (w * p) if w * p != 0 else 0.0,
            "effective_rank": math.exp(entropy) if p != 0 else 0.0,
        }
