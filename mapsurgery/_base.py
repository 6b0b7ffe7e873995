"""What is remembered of a model's frozen tensors, by which an adapter's base is told from another."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from . import ops
from .methods.adapter import measured
from .surgery.originals import sample_of
from .surgery.quantised.kinds import kind_of
from .surgery.quantised.layer import QuantisedLinear
from .surgery.record import Record, Site, parameters_of, persistent_buffers

_SAME_KERNEL, _OTHER_QUANTISATION = 1e-4, 0.03
"""Relative tolerances of ||W||_F: one quantised weight, dequantised on two machines; one weight, quantised or not."""
_SKETCH_SAME_KERNEL, _SKETCH_OTHER_QUANTISATION = 1e-2, 0.4
"""Those of the sketch, relative to ||W||_F: 4-bit numbers are about 0.1 off, and two weights about 1.4 apart."""

DTYPES_BY_NAME = {
    str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if type(dtype) is torch.dtype
}

CHOICES = ("refuse", "warn", "ignore")
"""What becomes of an adapter of another base."""


def judge(differences: Iterable[str], choice: str, what: str, stacklevel: int) -> None:
    """Refuse an adapter, or warn, where the base is not the one that it was trained on.

    Raises:
        ValueError: there is a difference, and the choice is "refuse".
    """
    found = list(differences)
    if not found or choice == "ignore":
        return
    more = f" (and {len(found) - 5} more)" if len(found) > 5 else ""
    message = f"{what} was trained on another base: {'; '.join(found[:5])}{more}"
    if choice == "refuse":
        raise ValueError(f"{message}. Where that is meant, pass base='warn' or base='ignore'")
    warnings.warn(message, stacklevel=stacklevel + 1)


def check_choice(choice: str) -> None:
    """Raises ValueError for what is none of `CHOICES`."""
    if choice not in CHOICES:
        raise ValueError(f"base must be one of {', '.join(map(repr, CHOICES))}, got {choice!r}")


def acts_as(layer: nn.Module) -> str:
    """What a layer does with its parameters: the class whose forward runs, and how a convolution moves."""
    original = getattr(layer, "original_class", type(layer))
    if kind_of(layer) is not None:
        return "Linear"
    owner = next(cls.__name__ for cls in original.__mro__ if "forward" in cls.__dict__)
    if not isinstance(layer, _ConvNd):
        return owner
    options = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "output_padding": 0, "padding_mode": "zeros"}
    found = {name: getattr(layer, name) for name in options}
    told = [f"{n}={v}" for n, v in found.items() if v not in (options[n], (options[n],) * len(layer.kernel_size))]
    return f"{owner}({', '.join(told)})" if told else owner


@dataclass(frozen=True)
class Base:
    """A frozen weight as an adapter was trained on it.

    Attributes:
        norms: ||W||_F, (1,), or (E,) of a stack.
        dtype: of the W that was measured.
        elements: of one matrix.
        quantised: how, "" for not at all.
        sketch: (E, 8) of `ops.fingerprint`; None where it is not known.
        layer: what the layer does with it (`acts_as`); "" where that is not known.
    """

    norms: Tensor
    dtype: torch.dtype
    elements: int
    quantised: str = ""
    sketch: Tensor | None = None
    layer: str = ""

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
        sketch = adapter.sketch
        if here and adapter.norm_given:
            norms, sketch = _measured(site)
        elif here and adapter.computed:
            sketch = measured(site.base.detach(), adapter.stacked)[1]
        held = site.layer._parameters.get(site.parameter)
        stored = f"stored as {held.dtype}" if held is not None and held.itemsize == 1 else ""
        elements = adapter.shape.numel() // adapter.matrices
        quantised = kind.name if kind else stored
        return cls(norms.detach(), dtype, elements, quantised, sketch, acts_as(site.layer))

    def difference(self, trained_on: Base, weight: Callable[[], Tensor]) -> str | None:
        """What to say where this is not the base that an adapter was trained on, as far as can be told; else None.

        Args: weight: gives W, (m, ...), or (E, m, ...) of a stack; asked where a cast may explain the difference.
        """
        if self.layer and trained_on.layer and self.layer != trained_on.layer:
            return f" is a {self.layer}, the adapter was trained on a {trained_on.layer}"
        found, expected = (base.norms.detach().cpu().double().reshape(-1) for base in (self, trained_on))
        off = ~((found - expected).abs() <= self._tolerance(trained_on) * expected)
        if off.any() and self.dtype != trained_on.dtype and not self.quantised and not trained_on.quantised:
            off &= ~self._cast_apart(trained_on, weight().detach().reshape(found.numel(), -1))
        if off.any():
            first = int(off.nonzero()[0])
            return (
                f"{_matrix(first, found)} has ||W||_F = {found[first]:.8g}, the adapter was trained on "
                f"{expected[first]:.8g}"
            )
        if self.sketch is None or trained_on.sketch is None:
            return None
        apart = torch.linalg.vector_norm(self.sketch - trained_on.sketch, dim=1)
        off = ~(apart <= self._sketch_tolerance(trained_on, expected) * expected)
        if not off.any():
            return None
        first = int(off.nonzero()[0])
        return f"{_matrix(first, found)} has another weight of the same norm ({apart[first] / expected[first]:.2g} off)"

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

    def _sketch_tolerance(self, other: Base, norms: Tensor) -> Tensor | float:
        """Relative to ||W||_F. Roundings of a cast are random: together they are about eps ||W||_F / 3 at most."""
        if self.quantised or other.quantised:
            return _SKETCH_SAME_KERNEL if self.quantised == other.quantised else _SKETCH_OTHER_QUANTISATION
        if self.dtype == other.dtype:
            return 1e-6
        coarse = max((torch.finfo(dtype) for dtype in (self.dtype, other.dtype)), key=lambda info: info.eps)
        below = coarse.smallest_normal * coarse.eps * self.elements**0.5  # numbers of float16 may be subnormal
        return 1e-6 + 4 * (coarse.eps + below / norms.clamp_min(1e-300))


def _matrix(index: int, of: Tensor) -> str:
    return f" (matrix {index})" if of.numel() > 1 else ""


def _measured(site: Site) -> tuple[Tensor, Tensor]:
    """||W||_F and sketch of the base that is here, which is not that of the adapter's file where one of them is
    quantised."""
    adapter = site.adapter
    known = adapter.__dict__.get("_base_here")
    if known is None or known[0] is not adapter.weight_norm:
        norms, sketch = measured(site.base.detach(), adapter.stacked)
        adapter.__dict__["_base_here"] = known = adapter.weight_norm, torch.tensor(norms, dtype=torch.float64), sketch
    return known[1], known[2]


# What is not adapted --------------------------------------------------------------------------------------------------

Numbers = dict[str, list[Any]]
"""Name of a tensor -> its dtype, and norm and sketch of some of its elements."""

Surroundings = dict[str, Numbers]
"""What of a model is neither adapted nor trained: "parameters" and "buffers"."""


def surroundings_of(root: nn.Module, record: Record, but: Collection[str] = ()) -> Surroundings:
    """Of a patched model, as it was at `patch`. Args: but: names of what is known by itself."""
    known, marks = record.originals.tensors, record.originals.marks
    marked = {name: mark for name in parameters_of(root) if name not in but and (mark := marks.get(name)) is not None}
    buffers = {name: t for name in persistent_buffers(root) if name not in but and (t := known.get(name)) is not None}
    return {
        "parameters": _described({name: mark.sample for name, mark in marked.items()}),
        "buffers": _described({name: sample_of(t) for name, t in buffers.items() if _plain(t)}),
    }


def unlike(model: nn.Module, expected: Surroundings) -> list[str]:
    """What of a plain model is not as it was around an adapter. A buffer may be missing: versions of a model differ."""
    here: dict[str, dict[str, Tensor]] = {
        "parameters": dict(parameters_of(model)),
        "buffers": persistent_buffers(model),
    }
    missing = expected["parameters"].keys() - here["parameters"].keys()
    found = {
        kind: _described({name: sample_of(t) for name, t in named.items() if name in expected[kind] and _plain(t)})
        for kind, named in here.items()
    }
    return [*(f"{name} is missing" for name in sorted(missing)), *differing(found, expected)]


def differing(found: Surroundings, expected: Surroundings) -> list[str]:
    """Tensors that two models have both, with other numbers."""
    return [
        f"{name}, which is not adapted, holds other numbers"
        for kind, named in found.items()
        for name, numbers in named.items()
        if name in expected[kind] and _apart(numbers, expected[kind][name])
    ]


def _apart(found: list[Any], expected: list[Any]) -> bool:
    dtypes = [DTYPES_BY_NAME.get(numbers[0]) for numbers in (found, expected)]
    eps = [torch.finfo(dtype).eps if dtype is not None and dtype.is_floating_point else None for dtype in dtypes]
    if (eps[0] is None) != (eps[1] is None):
        return False  # one of them is packed
    here, there = (torch.tensor(numbers[1:], dtype=torch.float64) for numbers in (found, expected))
    tolerance = 1e-6 if dtypes[0] == dtypes[1] else 1e-6 + 4 * max(e or 0.0 for e in eps)
    return not torch.linalg.vector_norm(here - there) <= tolerance * there[0]


def _plain(tensor: Tensor) -> bool:
    return type(tensor) in (nn.Parameter, Tensor) and not tensor.is_meta and tensor.numel() > 0


def _described(samples: Mapping[str, Tensor]) -> Numbers:
    if not samples:
        return {}
    numbers = (torch.nan_to_num(t.detach().double(), 0, 1, -1) for t in samples.values())
    found = torch.stack([ops.fingerprint(t.reshape(-1)).cpu() for t in numbers])
    found[:, 0] = found[:, 0].sqrt()
    return {
        name: [str(t.dtype).removeprefix("torch."), *(float(f"{value:.9g}") for value in row)]
        for (name, t), row in zip(samples.items(), found.tolist(), strict=True)
    }
