"""What a method is: how W and ΔW make W'."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
import torch.fx
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from ..updates import Matrix, Update
from ..updates import base as updates_base
from ..updates.base import stacked_scalars
from .init import Init
from .known_scales import KnownScales

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
Settings = tuple[Sequence[int], Sequence[int], Sequence[int], int]
"""Stride, padding, dilation and groups of a convolution."""


SQUARES = {torch.float32: (1e-15, 1e15), torch.float64: (1e-150, 1e150)}
"""Norms of which squares, those of parts of the matrix too, are numbers of the dtype."""


class Way(str, Enum):
    """How a layer computes with W'; in tables and in docs/layers.md, too."""

    FUSED = "fused"
    """A forward of ours, on the operators of `mapsurgery.ops` with thin factors of ΔW; W' is not built."""
    BESIDE = "beside"
    """A forward of ours, in which W and ΔW (or its factors) have products of their own, in plain torch."""
    EFFECTIVE = "effective"
    """The layer's own forward, which reads the effective weight, W'; or a convolution of ours with W'."""
    AROUND = "around"
    """The layer's own forward on its own (quantised) weight; what it gives is corrected (`Method.around`)."""

    def __str__(self) -> str:
        return self.value


class Parameters(updates_base.Parameters, Protocol):
    """What methods read of an adapter (`mapsurgery.methods.Adapter`)."""

    method: Method
    init: Init
    scales: KnownScales | None
    kept_row: int | None


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

    def norms_of(self, update: Update, dtype: torch.dtype) -> tuple[float, float]:
        """The smallest and the largest ||W||_F, other than 0, that the method computes with in this dtype."""
        return torch.finfo(dtype).tiny, torch.finfo(dtype).max

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

    def count_from_base(self, p: Parameters) -> None:
        """Turn parameters of a file before version 3, whose magnitudes count from 0, into what they are here."""

    def scales(self, p: Parameters) -> ops.Scales | None:
        """What the operator map_scales gives for a layer, where its calls may be handed that; else None."""
        return None

    def recoverable(self, p: Parameters, W: Tensor | None, norm: Tensor) -> bool:
        """Whether W can be recovered from W'. Args: W in the layout of the layer, None once it is merged."""
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

    def way(self, p: Parameters, convolution: bool = False) -> Way:
        """How `linear`, or `conv`, computes in p's mode."""
        if drops(p):
            return Way.BESIDE
        if p.update.factors(p) is not None:
            return Way.FUSED
        return Way.EFFECTIVE if convolution else Way.BESIDE

    def linear(self, p: Parameters, x: Tensor, bias: Tensor | None, W: Tensor, norm: Tensor) -> Tensor:
        """x W'^T + bias."""
        matrix = W.t() if p.transposed else W
        c = self.coefficients(p, lambda: matrix, norm)
        inner = bias if c.rows is None else None
        factors = None if p.dropout and p.training else p.update.factors(p)
        if factors is not None:
            y = ops.lowrank_linear(x, matrix, inner, *factors, 1.0 if c.base is None else c.base, c.update)
        else:
            # The base's factor goes to x: then its gradient needs x, which is kept anyway, and not x W^T.
            y = F.linear(x if c.base is None else x * c.base.to(x.dtype), matrix, inner)
            y = y + p.update.apply(p, F.dropout(x, p.dropout, p.training), _cast(c.update, x.dtype))
        if c.rows is None:
            return y
        y = y * c.rows.to(y.dtype)
        return y if bias is None else y + bias.to(y.dtype)

    def conv(
        self, p: Parameters, x: Tensor, bias: Tensor | None, settings: Settings, W: Tensor, norm: Tensor
    ) -> Tensor:
        """Convolution with W'."""
        conv = _CONV[len(settings[0])]
        factors = p.update.factors(p)
        if factors is None and not drops(p):
            return conv(x, self.effective_weight(p, W, norm), bias, *settings)
        c = self.coefficients(p, lambda: p.matrix.view(W), norm)
        inner = bias if c.rows is None else None
        if factors is not None and not drops(p):
            A, B = factors
            y = ops.lowrank_conv(x, W, inner, A, B, _or_1(c.base), c.update, *settings)
        else:
            y = conv(x if c.base is None else x * c.base.to(x.dtype), W, inner, *settings)
            dropped = F.dropout(x, p.dropout, p.training)
            y = y + self._conv_update(p, dropped, _cast(c.update, x.dtype), factors, settings)
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
        """Rows of W', in float32 (float64 for float64), rounded once; none but W's own at `p.kept_row`."""
        if padding_idx is not None:
            padding_idx %= p.shape[0]  # -1 is the last
        c = self.coefficients(p, lambda: W, norm)
        factors = p.update.factors(p)
        update = p.update.delta(p) if factors is None else factors
        return _adapted_rows(ids, padding_idx, p.kept_row, W, update, c.base, c.update, c.rows)

    def around(
        self,
        p: Parameters,
        x: Tensor,
        output: Tensor,
        bias: Tensor | None,
        values: Callable[[], Tensor],
        norm: Tensor,
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
        """W' in the layout and dtype of the weight, differentiable."""
        matrix = self._effective_matrix(p, p.matrix.view(W), norm)
        return matrix.t() if p.transposed else matrix.reshape(W.shape)

    def _effective_matrix(self, p: Parameters, W: Tensor, norm: Tensor) -> Tensor:
        """W' of W (m, K) or (E, m, K), rounded once."""
        c = self.coefficients(p, lambda: W, norm)
        factors = p.update.factors(p)
        if factors is not None and c.rows is None:
            return ops.effective_weight(W, *factors, _or_1(c.base), c.update)
        if factors is not None:
            acc = ops.accumulate_dtype(torch.promote_types(W.dtype, factors[0].dtype))
            result = ops.effective_weight(W, *factors, _or_1(c.base), c.update, acc)
        else:
            delta = p.update.delta(p)
            acc = ops.accumulate_dtype(torch.promote_types(W.dtype, delta.dtype))
            base = W.to(acc) if c.base is None else stacked_scalars(c.base.to(acc), W) * W.to(acc)
            result = base + _each(c.update, W, acc) * delta.to(acc)
        return (result if c.rows is None else result * c.rows.to(acc).unsqueeze(-1)).to(W.dtype)

    def merge_into(self, p: Parameters, weight: Tensor, norm: Tensor) -> None:
        """W -> W', in place."""
        c = self.coefficients(p, lambda: p.matrix.view(weight), norm)
        factors = p.update.factors(p)
        if factors is not None and c.rows is None:
            _in_place(ops.merge_, p, weight, *factors, _or_1(c.base), c.update)
        else:
            put_matrix(p, weight, self._effective_matrix(p, p.matrix.view(weight), norm))

    def unmerge_from(self, p: Parameters, weight: Tensor, norm: Tensor) -> None:
        """W' -> W, in place; to be overridden where coefficients depend on the numbers of W."""
        c = self.coefficients(p, lambda: p.matrix.view(weight), norm)
        factors = p.update.factors(p)
        if factors is not None and c.rows is None:
            _in_place(ops.unmerge_, p, weight, *factors, _or_1(c.base), c.update)
        else:
            put_matrix(p, weight, self._recovered(p, weight, c))

    def _recovered(self, p: Parameters, weight: Tensor, c: Coefficients) -> Tensor:
        """W (m, K) or (E, m, K), in float32 or wider, of a weight that holds W'."""
        matrix, delta = p.matrix.view(weight), p.update.delta(p)
        acc = ops.accumulate_dtype(torch.promote_types(weight.dtype, delta.dtype))
        result = matrix.to(acc) if c.rows is None else matrix.to(acc) / c.rows.to(acc).unsqueeze(-1)
        result = result - _each(c.update, matrix, acc) * delta.to(acc)
        return result if c.base is None else result / stacked_scalars(c.base.to(acc), matrix)


def put_matrix(p: Parameters, weight: Tensor, matrix: Tensor) -> None:
    """Copy a matrix, or a stack, into a weight in the layer's layout."""
    weight.copy_(matrix.t() if p.transposed else matrix.reshape(weight.shape))


def _in_place(
    operation: Callable[..., None],
    p: Parameters,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    s_w: Tensor | float,
    s_d: Tensor | float,
) -> None:
    """Run an in-place operator on a weight in the layer's layout, matrix by matrix."""
    if not p.stacked:
        return _one_in_place(operation, weight.t() if p.transposed else weight, A, B, s_w, s_d)
    for e, matrix in enumerate(weight):
        scalars = (s[e : e + 1] if isinstance(s, Tensor) else s for s in (s_w, s_d))
        _one_in_place(operation, matrix, A[e], B[e], *scalars)


def _one_in_place(operation: Callable[..., None], weight: Tensor, A: Tensor, *others: Any) -> None:
    """The weight as (m, K), its columns in the order in which they lie in memory.

    A channels_last kernel is no (m, K) view in the order of its dimensions, but is one with A's columns permuted.
    """
    order = sorted(range(1, weight.dim()), key=weight.stride, reverse=True)
    A = A.reshape(-1, *weight.shape[1:]).permute(0, *order).flatten(1)
    ordered = weight.permute(0, *order)
    matrix = ordered.flatten(1)
    operation(matrix, A, *others)
    if matrix.data_ptr() != weight.data_ptr():  # no view of any order: flatten made a copy
        ordered.copy_(matrix.unflatten(1, ordered.shape[1:]))


def drops(p: Parameters) -> bool:
    """Whether inputs of the update path are dropped now."""
    return p.training and p.dropout > 0


def _or_1(scalar: Tensor | None) -> Tensor | float:
    return 1.0 if scalar is None else scalar


def _cast(scale: Tensor | float, dtype: torch.dtype) -> Tensor | float:
    return scale.to(dtype) if isinstance(scale, Tensor) else scale


def _each(scale: Tensor | float, matrices: Tensor, dtype: torch.dtype) -> Tensor | float:
    """A number for all matrices of a stack, or one for each."""
    return stacked_scalars(scale.to(dtype), matrices) if isinstance(scale, Tensor) else scale


@torch.fx.wrap  # one node of a symbolic trace: a trace cannot see the dtypes that it depends on
def _adapted_rows(
    ids: Tensor,
    padding_idx: int | None,
    kept_row: int | None,
    W: Tensor,
    update: Tensor | tuple[Tensor, Tensor],
    base: Tensor | None,
    scale: Tensor | float,
    rows: Tensor | None,
) -> Tensor:
    """rows[ids] (base W[ids] + scale ΔW[ids]) in the dtype of W, and W's own at kept_row.

    Rows at padding_idx have no gradient. Args: update: ΔW, or its factors A and B, of which no (m, K) matrix is built.
    """
    if isinstance(update, Tensor):
        delta = F.embedding(ids, update)
        acc = ops.accumulate_dtype(torch.promote_types(W.dtype, delta.dtype))
    else:
        A, B = update
        acc = ops.accumulate_dtype(torch.promote_types(W.dtype, A.dtype))
        with ops.full_precision(A.device.type):
            delta = F.embedding(ids, B).to(acc) @ A.to(acc)
    own = F.embedding(ids, W)
    result = own.to(acc)
    result = (result if base is None else base.to(acc) * result) + _cast(scale, acc) * delta.to(acc)
    if rows is not None:
        result = result * F.embedding(ids, rows.unsqueeze(-1)).to(acc)
    result = result.to(W.dtype)
    if kept_row is not None:
        result = torch.where((ids == kept_row).unsqueeze(-1), own, result)
    if padding_idx is None or padding_idx == kept_row:
        return result
    return torch.where((ids == padding_idx).unsqueeze(-1), result.detach(), result)
