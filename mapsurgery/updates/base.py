"""What an update family is: the trained parameters that make up ΔW, and what can be computed of it cheaply."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops


class Parameters(Protocol):
    """What update families read of an adapter (`mapsurgery.methods.Adapter`).

    Its other attributes are the family's and the method's own tensors, by their names, and what methods read.
    """

    update: Update
    roles: dict[str, str]
    rank: int
    scaling: float
    dropout: float
    training: bool
    transposed: bool
    stacked: bool
    shape: torch.Size
    matrix: Matrix
    weight_norm: Tensor

    def unit(self) -> Tensor:
        """(1,) or (E,): ‖W‖_F, by which some families scale ΔW."""

    def entry_size(self) -> Tensor | None:
        """(1,) or (E,): root mean square of the entries of ΔW's first derivative; None: LoRA's own."""

    def __getattr__(self, name: str) -> Any: ...


@dataclass(frozen=True)
class Matrix:
    """A weight as an adapter sees it: one matrix (m, K), or a stack of such.

    Attributes:
        m, K: outputs, and the number of elements of a row.
        stack: (E,) where E such matrices are adapted one by one, else ().
        kernel: sizes of a convolution's kernel, the last part of K; () for a matrix.
        transposed: the layer holds it as (K, m).
    """

    m: int
    K: int
    stack: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    transposed: bool = False

    @classmethod
    def of(cls, shape: Sequence[int], transposed: bool = False, stacked: bool = False) -> Matrix:
        """That of a weight (m, ...), (K, m) if `transposed`, or a stack (E, m, ...) of such."""
        m = shape[1] if transposed or stacked else shape[0]
        stack = (shape[0],) if stacked else ()
        kernel = () if transposed or stacked else tuple(shape[2:])
        return cls(m, math.prod(shape) // (m * math.prod(stack)), stack, kernel, transposed)

    def view(self, weight: Tensor) -> Tensor:
        """The weight (or a tensor of its shape) as (m, K), a stack as (E, m, K): a view where strides allow."""
        return weight.t() if self.transposed else weight.flatten(2 if self.stack else 1)

    @property
    def taps(self) -> int:
        """Elements of the kernel."""
        return math.prod(self.kernel)

    @property
    def channels(self) -> int:
        """K without the kernel."""
        return self.K // self.taps


@dataclass(frozen=True)
class Update:
    """A family of updates ΔW (m, K) of a frozen weight, with options as fields.

    A subclass is a frozen dataclass in a file of its own with a `name`; it says what its parameters are (`roles`,
    `shapes`), how they start (`start`) and what ΔW is: `delta`, or, for a family of low rank, `factors`
    (`FactoredUpdate`), with which everything runs in activation space on the fused operators. What else is defined here
    follows from `delta`; override what the family has a cheaper exact form for. All tensors may have a stack's leading
    dimension. Register it with `mapsurgery.register_update`.

    Attributes:
        roles: own trained parameters -> "down", "up" (what starts at 0, so that ΔW does) or "magnitude":
            `param_groups` tells them apart.
        frozen: names of further tensors that are not trained and travel with the adapter.
        linear_in: groups of tensors such that ΔW is linear in each: factors on the groups whose product is 1 leave ΔW
            (`mapsurgery.contrib.rebalance`). The first of a group is trained. Names that a layer lacks are passed over.
    """

    name: ClassVar[str] = ""
    roles: ClassVar[Mapping[str, str]] = {}
    frozen: ClassVar[tuple[str, ...]] = ()
    linear_in: ClassVar[tuple[tuple[str, ...], ...]] = ()

    # What a subclass defines ------------------------------------------------------------------------------------

    def shapes(self, matrix: Matrix, rank: int) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor in `roles` and `frozen`."""
        raise NotImplementedError

    def start(self, p: Parameters, weight: Callable[[], Tensor], live: bool) -> None:
        """Set the parameters to their start, in place.

        Args:
            weight: gives W as (m, K) or (E, m, K), for families that start from its values.
            live: ΔW is to be random instead of 0 (MAP's start "random", beta = 0).
        """
        raise NotImplementedError

    def delta(self, p: Parameters) -> Tensor:
        """ΔW (m, K), or a stack of it, differentiable, in the dtype of the parameters.

        Matrix products belong into ``with mapsurgery.ops.full_precision(device)``, which keeps autocast off them.
        """
        raise NotImplementedError

    # What a subclass may define ---------------------------------------------------------------------------------

    def limited(self, rank: int, matrix: Matrix) -> int:
        """The rank that a layer allows, of the one asked for."""
        return min(rank, matrix.m, matrix.K)

    def refuse(self, live: bool) -> None:
        """Raises ValueError if the family cannot start so (see `start`)."""

    def form(self) -> dict[str, float]:
        """Numbers, beside the options, that say how the parameters are meant; a file with others is refused."""
        return {}

    def shared(self, matrix: Matrix, rank: int, place: dict[str, Any], siblings: dict[Any, Any]) -> dict[str, Any]:
        """Frozen Parameters that several layers hold, by name, and that no file holds: they can be made again.

        Args: siblings: what the layers patched before have put there; place: device and dtype.
        """
        return {}

    def factors(self, p: Parameters) -> tuple[Tensor, Tensor] | None:
        """A (R, K) and B (m, R) with ΔW = B A where that is the cheaper form, else None; differentiable."""
        return None

    def norm(self, p: Parameters) -> Tensor:
        """‖ΔW‖_F, (1,) or (E,), differentiable, with gradient 0 where it is 0."""
        return frobenius(self.delta(p))

    def size(self, p: Parameters) -> Tensor:
        """A number of the parameters' own size, (1,) or (E,): what ΔW is divided by where it is 0 without softening."""
        own = [widened(getattr(p, name)).detach() for name in self.roles if name in p.roles]
        squares = [t.square().flatten(1 if p.stacked else 0).sum(-1) for t in own]
        return torch.stack(squares).sum(0).sqrt().reshape(-1)

    def apply(self, p: Parameters, x: Tensor, scale: Tensor | float) -> Tensor:
        """scale · x ΔWᵀ; x (..., K), result (..., m)."""
        return F.linear(x * scale, self.delta(p).to(x.dtype))

    def row_products(self, p: Parameters, weight: Tensor) -> tuple[Tensor, Tensor]:
        """⟨W_i, ΔW_i⟩ and ‖ΔW_i‖² of every row, (m,) or (E, m) each; weight as (m, K) or (E, m, K)."""
        delta = widened(self.delta(p))
        return (weight.to(delta.dtype) * delta).sum(-1), delta.square().sum(-1)

    def singular_values(self, p: Parameters) -> Tensor:
        """Singular values of ΔW, (n,) or (E, n), zeros left out or not."""
        return svdvals(widened(self.delta(p)))


@dataclass(frozen=True)
class FactoredUpdate(Update):
    """A family whose ΔW is a product of two thin factors: a subclass defines `factors` in place of `delta`."""

    def factors(self, p: Parameters) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def delta(self, p: Parameters) -> Tensor:
        A, B = self.factors(p)
        with ops.full_precision(A.device.type):
            return B @ A

    def norm(self, p: Parameters) -> Tensor:
        """‖BA‖_F from the Gram matrices, ⟨BᵀB, AAᵀ⟩."""
        return lowrank_norm(*self.factors(p))

    def size(self, p: Parameters) -> Tensor:
        A, B = (widened(factor).detach().square().sum((-2, -1)) for factor in self.factors(p))
        return (A + B).sqrt().reshape(-1)

    def apply(self, p: Parameters, x: Tensor, scale: Tensor | float) -> Tensor:
        A, B = self.factors(p)
        return F.linear(F.linear(x, A.to(x.dtype)) * scale, B.to(x.dtype))

    def row_products(self, p: Parameters, weight: Tensor) -> tuple[Tensor, Tensor]:
        A, B = self.factors(p)
        acc = ops.accumulate_dtype(torch.promote_types(weight.dtype, A.dtype))
        A, B = A.to(acc), B.to(acc)
        with ops.full_precision(A.device.type):
            return ((weight.to(acc) @ A.mT) * B).sum(-1), ((B @ (A @ A.mT)) * B).sum(-1)

    def singular_values(self, p: Parameters) -> Tensor:
        """Those of R_B R_Aᵀ, as small as the rank, from the QR decompositions of the factors."""
        A, B = (factor.double() for factor in self.factors(p))
        return svdvals(torch.linalg.qr(B).R @ torch.linalg.qr(A.mT).R.mT)


def widened(t: Tensor) -> Tensor:
    """t in the dtype that sums are taken in."""
    return t.to(ops.accumulate_dtype(t.dtype))


def svdvals(t: Tensor) -> Tensor:
    """Singular values; NaN, instead of an error, where there is NaN or infinity."""
    finite = t.isfinite().all()
    return torch.where(finite, torch.linalg.svdvals(torch.where(finite, t, 0)), float("nan"))


def frobenius(delta: Tensor) -> Tensor:
    """‖·‖_F of a matrix (1,) or of each of a stack (E,); gradient 0 at 0."""
    square = widened(delta).square().sum((-2, -1)).reshape(-1)
    return ops.safe_sqrt(square)


def lowrank_norm(A: Tensor, B: Tensor) -> Tensor:
    """‖BA‖_F = sqrt⟨BᵀB, AAᵀ⟩ of factors or stacks of them, (1,) or (E,), differentiable; gradient 0 at 0."""
    A, B = widened(A), widened(B)
    with ops.full_precision(A.device.type):
        square = ((B.mT @ B) * (A @ A.mT)).sum((-2, -1)).clamp_min(0).reshape(-1)
    return ops.safe_sqrt(square)


@torch.no_grad()
def uniform_(factor: Tensor, scale: Tensor | float | None = None) -> None:
    """Uniform entries of root mean square `scale` (a number, or one for each matrix of a stack).

    None: LoRA's start of A, 1/sqrt(3 n), n the length of a row.
    """
    bound = factor.shape[-1] ** -0.5
    factor.uniform_(-bound, bound)
    if isinstance(scale, Tensor):
        scale = stacked_scalars(scale, factor).to(factor.dtype)
    if scale is not None:
        factor.mul_(scale * (3 * factor.shape[-1]) ** 0.5)


def stacked_scalars(scalars: Tensor, like: Tensor) -> Tensor:
    """(1,) or (E,) numbers so that they multiply a matrix or the matrices of a stack."""
    return scalars.reshape(-1, 1, 1) if like.dim() == 3 else scalars
