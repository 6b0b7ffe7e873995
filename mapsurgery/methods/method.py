"""What a method is: how W and ΔW make W'."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.fx
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from ..ops import reference
from ..updates import Matrix
from ..updates.base import Parameters, stacked_scalars
from .init import Init

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
Settings = tuple[Sequence[int], Sequence[int], Sequence[int], int]
"""Stride, padding, dilation and groups of a convolution."""


class Coefficients(NamedTuple):
    """W' = diag(rows) (base · W + update · ΔW).

    Attributes:
        base, update: (1,), or (E,) of a stack; None: 1.
        rows: (m,) or (E, m); None: 1.
    """

    base: Tensor | None
    update: Tensor | float
    rows: Tensor | None = None


@dataclass(frozen=True)
class Method:
    """How W' is made of W and ΔW, with options as fields; W' = diag(rows) (base · W + update · ΔW).

    A subclass is a frozen dataclass that names its trained parameters (`roles`, `shapes`, `start`) and gives
    `coefficients`; everything else follows.
    """

    name: ClassVar[str] = ""
    roles: ClassVar[Mapping[str, str]] = {}
    init_options: ClassVar[tuple[str, ...]] = ("a_scale",)
    """The options of `Init` that the method reads; update families read a_scale."""

    # What a subclass defines ------------------------------------------------------------------------------------

    def shapes(self, matrix: Matrix) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters in `roles`."""
        return {}

    def start(self, p: Parameters, weight: Callable[[], Tensor]) -> None:
        """Set the method's own parameters; weight gives W as (m, K) or (E, m, K)."""

    def coefficients(self, p: Parameters, W: Callable[[], Tensor], norm: Tensor) -> Coefficients:
        """The factors of W and ΔW, differentiable. Args: W gives (m, K) or (E, m, K); norm: ||W||_F."""
        raise NotImplementedError

    def form(self, init: Init, rank: int) -> dict[str, float]:
        """Numbers that say how the parameters are meant."""
        return {"scaling": self.scaling(rank)}

    # What a subclass may define ---------------------------------------------------------------------------------

    def refuse(self, init: Init) -> None:
        """Raises ValueError if the method cannot start so."""
        if init.kind == "random":
            raise ValueError(f'init="random" starts away from the base with method {self.name!r}: use the default')

    def default_init(self) -> Init:
        """The start where `patch` is given none."""
        return Init(a_scale="kaiming")

    def fixed(self) -> tuple[str, ...]:
        """Names of own parameters that are not trained."""
        return ()

    def scaling(self, rank: int) -> float:
        """Fixed factor of ΔW."""
        return 1.0

    def remember(self, p: Parameters, weight: Callable[[], Tensor]) -> None:
        """Note what `norm_changed` will need of the W that there is now."""

    def norm_changed(self, p: Parameters, before: Tensor, weight: Callable[[], Tensor]) -> None:
        """||W||_F is no longer `before`: a checkpoint with other weights, W, was loaded under the adapter."""

    def scale_inputs(self, p: Parameters) -> tuple[Any, ...] | None:
        """The arguments of `ops.map_scales`, where the calls of a layer may be given its result; else None."""
        return None

    def recoverable(self, p: Parameters, W: Any, norm: Tensor) -> bool:
        """Whether W can be recovered from W'."""
        return True

    def magnitudes(self, p: Parameters, norm: Tensor) -> dict[str, Tensor]:
        """Magnitudes "alpha" and "beta" for a report, in units of ||W||_F, (1,) or (E,): those known without W."""
        return {}

    # What follows -----------------------------------------------------------------------------------------------

    def init_of(self, value: str | Init | None) -> Init:
        """The start that `patch(init=value)` asks for.

        Raises:
            TypeError, ValueError: it is no start, one that the method cannot have, or sets an option that does nothing.
        """
        if value is None:
            return self.default_init()
        init = Init.parse(value)
        self.refuse(init)
        for name, option in init.to_dict().items():
            if name not in self.init_options and option != getattr(Init, name):
                raise ValueError(
                    f"init {name}={option!r} does nothing with method {self.name!r}, which reads of Init only "
                    f"{', '.join(self.init_options)}: leave {name} out, or use a method that reads it, such as 'map'"
                )
        return init

    def way(self, p: Parameters, groups: int | None = None) -> str:
        """How `linear`, or with `groups` a `conv` of as many, computes in p's mode.

        Returns:
            "fused": on the operators of `mapsurgery.ops`, with thin factors of ΔW; "beside": W and ΔW (or its factors)
            each have products of their own, in plain torch; "weight": on W'.
        """
        if groups is None or drops(p):
            return "beside"
        return "weight" if _on_weight(p.update.factors(p), groups) else "beside"

    def linear(self, p: Parameters, x: Tensor, bias: Tensor | None, W: Tensor, norm: Tensor) -> Tensor:
        """x W'^T + bias."""
        c = self.coefficients(p, lambda: p.matrix(W), norm)
        # The base's factor goes to x: then its gradient needs x, which is kept anyway, and not x W^T.
        scaled = x if c.base is None else x * c.base.to(x.dtype)
        y = F.linear(scaled, p.matrix(W), bias if c.rows is None else None)
        y = y + p.update.apply(p, F.dropout(x, p.dropout, p.training), _cast(c.update, x.dtype))
        if c.rows is None:
            return y
        y = y * c.rows.to(y.dtype)
        return y if bias is None else y + bias.to(y.dtype)

    def conv(
        self, p: Parameters, x: Tensor, bias: Tensor | None, settings: Settings, W: Tensor, norm: Tensor
    ) -> Tensor:
        """Convolution with W', in activation space where that is cheaper."""
        conv = _CONV[len(settings[0])]
        factors = p.update.factors(p)
        if not drops(p) and _on_weight(factors, settings[3]):
            return conv(x, self._computed(p, W, norm).to(W.dtype), bias, *settings)
        c = self.coefficients(p, lambda: p.matrix(W), norm)
        scaled = x if c.base is None else x * c.base.to(x.dtype)
        y = conv(scaled, W, bias if c.rows is None else None, *settings)
        y = y + self._conv_update(p, F.dropout(x, p.dropout, p.training), _cast(c.update, x.dtype), factors, settings)
        if c.rows is None:
            return y
        per_channel = (-1, *[1] * len(settings[0]))
        y = y * c.rows.to(y.dtype).reshape(per_channel)
        return y if bias is None else y + bias.to(y.dtype).reshape(per_channel)

    def _conv_update(
        self, p: Parameters, x: Tensor, scale: Tensor | float, factors: tuple[Tensor, Tensor] | None, settings: Settings
    ) -> Tensor:
        """scale times the convolution of x with ΔW."""
        conv, groups, shape = _CONV[len(settings[0])], settings[3], p.shape[1:]
        if factors is None:
            return conv(x * scale, p.update.delta(p).to(x.dtype).reshape(p.shape), None, *settings)
        A, B = (factor.to(x.dtype) for factor in factors)
        down = A.reshape(-1, *shape)
        down = down if groups == 1 else down.repeat(groups, *[1] * len(shape))
        up = B.reshape(p.shape[0], -1, *[1] * len(settings[0]))
        return conv(conv(x, down, None, *settings) * scale, up, groups=groups)

    def embedding(self, p: Parameters, ids: Tensor, padding_idx: int | None, W: Tensor, norm: Tensor) -> Tensor:
        """Rows of W', in float32 (float64 for float64), rounded once."""
        c = self.coefficients(p, lambda: W, norm)
        rows = p.update.rows(p, ids)
        per_row = None if c.rows is None else F.embedding(ids, c.rows.unsqueeze(-1))
        return combined_rows(ids, padding_idx, W, rows, c.base, c.update, per_row)

    def around(
        self, p: Parameters, x: Tensor, output: Tensor, bias: Tensor | None, values: Callable[[], Tensor], norm: Tensor
    ) -> Tensor:
        """output + (f - 1) (output - bias) + rows · update · x ΔW^T, f = rows · base.

        f - 1 keeps its digits where a half type would round f to 1, and where it is 0 the base's own output is left bit
        for bit.
        """
        c = self.coefficients(p, values, norm)
        update = p.update.apply(p, F.dropout(x, p.dropout, p.training), _cast(c.update, x.dtype))
        if c.rows is not None:
            update = update * c.rows.to(update.dtype)
        factor = c.base if c.rows is None else (c.rows if c.base is None else c.rows * c.base)
        if factor is None:
            return output + update.to(output.dtype)
        product = output if bias is None else output - bias.to(output.dtype)
        return output + ((factor - 1).to(output.dtype) * product + update.to(output.dtype))

    def effective_weight(self, p: Parameters, W: Tensor, norm: Tensor) -> Tensor:
        """W' in the layout and dtype of the weight."""
        return self._computed(p, W, norm).to(W.dtype)

    def _computed(self, p: Parameters, W: Tensor, norm: Tensor) -> Tensor:
        """W' in the layout of the weight, in float32 or wider."""
        matrix = p.matrix(W)
        delta = p.update.delta(p)
        acc = ops.accumulate_dtype(torch.promote_types(W.dtype, delta.dtype))
        c = self.coefficients(p, lambda: matrix, norm)
        base = matrix.to(acc) if c.base is None else stacked_scalars(c.base.to(acc), matrix) * matrix.to(acc)
        scale = c.update if isinstance(c.update, float) else stacked_scalars(c.update.to(acc), matrix)
        result = base + scale * delta.to(acc)
        if c.rows is not None:
            result = result * c.rows.to(acc).unsqueeze(-1)
        return result.t() if p.transposed else result.reshape(W.shape)

    def merge_into(self, p: Parameters, weight: Tensor, norm: Tensor) -> None:
        """W -> W', in place."""
        weight.copy_(self._computed(p, weight, norm))

    def unmerge_from(self, p: Parameters, weight: Tensor, norm: Tensor) -> None:
        """W' -> W, in place; to be overridden where coefficients depend on the numbers of W."""
        put_matrix(p, weight, self._recovered(p, weight, self.coefficients(p, lambda: p.matrix(weight), norm)))

    def _recovered(self, p: Parameters, weight: Tensor, c: Coefficients) -> Tensor:
        """W (m, K) or (E, m, K), in float32 or wider, of a weight that holds W'."""
        matrix, delta = p.matrix(weight), p.update.delta(p)
        acc = ops.accumulate_dtype(torch.promote_types(weight.dtype, delta.dtype))
        scale = c.update if isinstance(c.update, float) else stacked_scalars(c.update.to(acc), matrix)
        result = matrix.to(acc) if c.rows is None else matrix.to(acc) / c.rows.to(acc).unsqueeze(-1)
        result = result - scale * delta.to(acc)
        return result if c.base is None else result / stacked_scalars(c.base.to(acc), matrix)


def put_matrix(p: Parameters, weight: Tensor, matrix: Tensor) -> None:
    """Copy a matrix, or a stack, into a weight in the layer's layout."""
    weight.copy_(matrix.t() if p.transposed else matrix.reshape(weight.shape))


def drops(p: Parameters) -> bool:
    """Whether inputs of the update path are dropped now."""
    return p.training and p.dropout > 0


def _on_weight(factors: tuple[Tensor, Tensor] | None, groups: int) -> bool:
    """Whether a convolution runs on W': without thin factors, or where that is cheaper than they are."""
    if factors is None:
        return True
    A, B = factors
    return reference.conv_weight_space(B.shape[0], A.shape[1], A.shape[0], groups)


def _cast(scale: Tensor | float, dtype: torch.dtype) -> Tensor | float:
    return scale.to(dtype) if isinstance(scale, Tensor) else scale


def _holding(p: Parameters, tensors: dict[str, Tensor]) -> Parameters:
    """The adapter with other tensors for its parameters: W' is computed of what autograd was given.

    A shallow copy: other threads may be computing with the adapter itself.
    """
    other = object.__new__(type(p))
    other.__dict__.update(p.__dict__)
    other.__dict__["_parameters"] = {name: t for name, t in p._parameters.items() if name not in tensors}
    other.__dict__.update(tensors)
    return other


@torch.fx.wrap  # one node of a symbolic trace: a trace cannot see the dtypes that it depends on
def combined_rows(
    ids: Tensor,
    padding_idx: int | None,
    W: Tensor,
    update_rows: Tensor,
    base: Tensor | None,
    update: Tensor | float,
    per_row: Tensor | None,
) -> Tensor:
    """per_row (base W[ids] + update ΔW[ids]) in the dtype of W; no gradient from rows at padding_idx."""
    acc = ops.accumulate_dtype(torch.promote_types(W.dtype, update_rows.dtype))
    rows = F.embedding(ids, W).to(acc)
    rows = (rows if base is None else base.to(acc) * rows) + _cast(update, acc) * update_rows.to(acc)
    rows = (rows if per_row is None else rows * per_row.to(acc)).to(W.dtype)
    if padding_idx is None:
        return rows
    return torch.where((ids == padding_idx).unsqueeze(-1), rows.detach(), rows)
