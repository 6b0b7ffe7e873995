"""MAP on LoRA's update: W' = alpha W/||W||_F + beta BA/||BA||_F (LoMAP of arXiv 2505.23094)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..ops import reference
from .base import Adapter

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class MapLora(Adapter):
    """Two magnitudes and two low-rank factors on a frozen weight W, seen as the matrix (m, K); arguments of `Adapter`.

    Attributes:
        A: (r, K). B: (m, r). alpha, beta: (1,), never 0-dim because FSDP2 rejects 0-dim parameters. Of a stack of E
            matrices: A (E, r, K), B (E, m, r), alpha, beta (E,).
    """

    ROLES = {"A": "down", "B": "up", "alpha": "magnitude", "beta": "magnitude"}

    def create_parameters(self, m: int, K: int, place: dict[str, Any]) -> None:
        stack = (self.matrices,) if self.stacked else ()
        self.A = nn.Parameter(torch.empty(*stack, self.rank, K, **place))
        self.B = nn.Parameter(torch.empty(*stack, m, self.rank, **place))
        self.alpha = nn.Parameter(torch.empty(self.matrices, **place))
        self.beta = nn.Parameter(torch.empty(self.matrices, **place))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A uniform, B zero or uniform, alpha and beta by `init`."""
        _uniform_(self.A)
        norm = torch.where(self.weight_norm > 0, self.weight_norm, 1)
        if self.init.a_scale == "weight":  # to the size of W's entries, ||W||_F / sqrt(m K), unless W is 0
            scale = torch.where(self.weight_norm > 0, norm * (3 / self.B.shape[-2]) ** 0.5, 1)
            self.A.mul_(scale.reshape(-1, 1, 1) if self.stacked else scale)
        if self.init.kind == "random":
            _uniform_(self.B)
        else:
            nn.init.zeros_(self.B)
        unit = 1.0 if self.init.relative else norm
        self.alpha.fill_(1.0).mul_(unit)
        self.beta.fill_(self.init.first_beta).mul_(unit)

    @torch.no_grad()
    def norm_changed(self, before: Tensor) -> None:
        """Absolute magnitudes keep their size relative to ||W||_F; alpha = ||W||_F, the start, stays exactly that."""
        if self.init.relative:
            return
        known = (before != 0) & (self.weight_norm != 0)
        ratio = torch.where(known, self.weight_norm / before, 1)
        started = known & (self.alpha == before.to(self.alpha.dtype))
        self.alpha.copy_(torch.where(started, self.weight_norm, self.alpha * ratio))
        self.beta.mul_(ratio)

    def _factors(self, norm: Tensor) -> tuple[Any, ...]:
        """The arguments that every operator shares."""
        return self.A, self.B, self.alpha, self.beta, norm, self.init.tau, self.init.relative

    def base(self, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.pending:
            self.weight_arrived()
        return super().base(weight)

    def linear(self, x: Tensor, bias: Tensor | None, weight: Tensor | None = None) -> Tensor:
        W, norm = self.base(weight)
        if self.training and self.dropout > 0:
            s_w, s_d = self._scales(norm, x.dtype)
            h = F.linear(F.dropout(x, self.dropout), self.A.to(x.dtype))
            return F.linear(x * s_w, self.matrix(W), bias) + F.linear(h * s_d, self.B.to(x.dtype))
        return ops.map_linear(x, self.matrix(W), bias, *self._factors(norm))

    def conv(
        self,
        x: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        weight: Tensor | None = None,
    ) -> Tensor:
        W, norm = self.base(weight)
        if self.training and self.dropout > 0:
            conv = _CONV[len(stride)]
            s_w, s_d = self._scales(norm, x.dtype)
            shape = self.shape[1:]
            down = self.A.to(x.dtype).reshape(-1, *shape).repeat(groups, *[1] * len(shape))
            up = self.B.to(x.dtype).reshape(self.shape[0], -1, *[1] * len(stride))
            h = conv(F.dropout(x, self.dropout), down, None, stride, padding, dilation, groups)
            return conv(x * s_w, W, bias, stride, padding, dilation, groups) + conv(h * s_d, up, groups=groups)
        settings = (stride, padding, dilation, groups)
        return ops.map_conv(x, W, bias, *self._factors(norm), *settings)  # type: ignore[call-arg]

    def embedding(self, ids: Tensor, padding_idx: int | None, weight: Tensor | None = None) -> Tensor:
        """s_w W[ids] + s_d B[ids] A, in float32 (float64 for float64), rounded once: no (m, K) matrix is built."""
        W, norm = self.base(weight)
        return _adapted_rows(ids, padding_idx, W, *self._factors(norm))

    def around(self, x: Tensor, output: Tensor, bias: Tensor | None) -> Tensor:
        """output + (s_w - 1) (output - bias) + s_d (x A^T) B^T.

        s_w - 1 keeps its digits where a half type would round s_w to 1, and where it is 0 the base's own output is left
        bit for bit.
        """
        self.tell_watch()
        scales = ops.map_scales(*self._factors(self.weight_norm))[0]
        h = F.linear(F.dropout(x, self.dropout, self.training), self.A.to(x.dtype))
        update = F.linear(h * scales[reference.S_D].to(h.dtype), self.B.to(h.dtype)).to(output.dtype)
        product = output if bias is None else output - bias.to(output.dtype)
        return output + ((scales[reference.S_W] - 1).to(output.dtype) * product + update)

    def _scales(self, norm: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """s_w and s_d, differentiable, where no operator computes them on the way."""
        scales = ops.map_scales(*self._factors(norm))[0].to(dtype)
        return scales[reference.S_W], scales[reference.S_D]

    def effective_weight(self, weight: Tensor | None = None) -> Tensor:
        W, norm = self.base(weight)
        matrix, factors = self.matrix(W), self._factors(norm)
        if ops.can_wait(W):
            return ops.lazy_weight(W, self.transposed, self.stacked, matrix, *factors)
        if self.stacked:
            return ops.stacked_weight(matrix, *factors).reshape(W.shape)
        result = ops.effective_weight(matrix, *factors)
        return result.t() if self.transposed else result.reshape(W.shape)

    def merge_into(self, weight: Tensor) -> None:
        self._in_place(ops.merge_, weight)

    def unmerge_from(self, weight: Tensor) -> None:
        self._in_place(ops.unmerge_, weight)

    def recoverable(self) -> bool:
        return bool(self.alpha.all())

    @torch.no_grad()
    def _in_place(self, operation: Callable[..., None], weight: Tensor) -> None:
        """Run an in-place operator on the weight, matrix by matrix."""
        norm = self.weight_norm if self.base_weight is not None else self.base(weight)[1]
        A, B, alpha, beta, norm, tau, relative = self._factors(norm)
        if not self.stacked:
            return self._one_in_place(operation, weight, A, B, alpha, beta, norm, tau, relative)
        for e in range(self.matrices):
            scalars = (t[e : e + 1] for t in (alpha, beta, norm))
            self._one_in_place(operation, weight[e], A[e], B[e], *scalars, tau, relative)

    def _one_in_place(self, operation: Callable[..., None], weight: Tensor, A: Tensor, *others: Any) -> None:
        """The weight as (m, K), its columns in the order in which they lie in memory.

        A channels_last kernel is no (m, K) view in the order of its dimensions, but is one with A's columns permuted.
        """
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
    def measures(self, weight: Tensor | None = None) -> dict[str, float]:
        """Magnitudes in units of ||W||_F, and how W' differs from W; means over a stack."""
        W, norm = self.base(weight)
        matrices = self.matrix(W) if self.stacked else self.matrix(W)[None]
        A, B = (t if self.stacked else t[None] for t in (self.A, self.B))
        tau, relative = self.init.tau, self.init.relative
        found = [
            _measures(w, a, b, alpha, beta, n, tau, relative)
            for w, a, b, alpha, beta, n in zip(matrices, A, B, self.alpha, self.beta, norm, strict=True)
        ]
        return {"rank": self.rank} | {key: sum(one[key] for one in found) / len(found) for key in found[0]}


@torch.fx.wrap  # one node of a symbolic trace: a trace cannot see the dtypes that it depends on
def _adapted_rows(ids: Tensor, padding_idx: int | None, W: Tensor, *factors: Any) -> Tensor:
    """Rows of W', see `MapLora.embedding`; factors as `reference.map_scales` takes them."""
    A, B = factors[:2]
    acc = reference.accumulate_dtype(torch.promote_types(W.dtype, A.dtype))
    scales = ops.map_scales(*factors)[0].to(acc)
    update = F.embedding(ids, B).to(acc) @ A.to(acc)
    rows = (scales[reference.S_W] * F.embedding(ids, W).to(acc) + scales[reference.S_D] * update).to(W.dtype)
    if padding_idx is None:
        return rows
    return torch.where((ids == padding_idx).unsqueeze(-1), rows.detach(), rows)


def _uniform_(factor: Tensor) -> None:
    """LoRA's start of A: uniform with standard deviation 1/sqrt(3 n), n the length of a row."""
    bound = factor.shape[-1] ** -0.5
    factor.uniform_(-bound, bound)


def _measures(
    W: Tensor, A: Tensor, B: Tensor, alpha: Tensor, beta: Tensor, norm: Tensor, tau: float, relative: bool
) -> dict[str, float]:
    """Numbers of one matrix W (m, K); float64 on the factors, nothing of W's size kept.

    ||W' - W||^2 = (s_w - 1)^2 w^2 + 2 (s_w - 1) s_d <W, BA> + s_d^2 ||BA||^2, <W, BA> = <B^T W, A>.
    """
    A, B = A.double(), B.double()
    scales, _, _ = reference.map_scales(A, B, alpha, beta, norm, tau, relative)
    s_w, s_d = scales[reference.S_W].item(), scales[reference.S_D].item()
    w, p = norm.item(), reference.lowrank_norm(A, B)[0].item()
    inner = ((B.to(torch.float32).t() @ W.to(torch.float32)).double() * A).sum().item()
    change = (s_w - 1) ** 2 * w**2 + 2 * (s_w - 1) * s_d * inner + s_d**2 * p**2
    # Singular values of BA are those of R_B R_A^T (r x r): the rank that is used is exp of their entropy.
    core = torch.linalg.qr(B).R @ torch.linalg.qr(A.t()).R.t()
    singular = torch.linalg.svdvals(core) if core.isfinite().all() else core.diagonal() * float("nan")
    share = singular / singular.sum().clamp_min(torch.finfo(torch.float64).tiny)
    entropy = -(share * share.clamp_min(1e-300).log()).sum().item()
    unit = w or 1.0
    magnitude = 1.0 if relative else unit
    return {
        "weight_norm": w,
        "alpha": alpha.item() / magnitude,
        "beta": beta.item() / magnitude,
        "update_norm": abs(s_d) * p / unit,
        "change": math.sqrt(change) / unit if change > 0 else change * 0.0,  # NaN stays NaN
        "cosine": inner / (w * p) if w * p != 0 else 0.0,
        "effective_rank": math.exp(entropy) if p != 0 else 0.0,
    }
