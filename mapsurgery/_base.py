"""What is remembered of a model's frozen tensors, by which an adapter's base is told from another."""

from __future__ import annotations

import base64
import struct
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from .methods.adapter import measured
from .surgery.fresh import unloaded
from .surgery.originals import sample_of
from .surgery.quantised.kinds import kind_of
from .surgery.quantised.layer import QuantisedLinear
from .surgery.record import Record, Site, names_of, parameters_of, persistent_buffers

_SAME_KERNEL, _OTHER_QUANTISATION = 1e-4, 0.03
"""Relative tolerances of ||W||_F: one quantised weight, dequantised on two machines; one weight, quantised or not."""
_SKETCH_SAME_KERNEL, _SKETCH_OTHER_QUANTISATION = 1e-2, 0.4
"""Those of the sketch, relative to ||W||_F: 4-bit numbers are about 0.1 off, and two weights about 1.4 apart."""

MOVING = "computed with statistics"
"""How a weight is held whose value training moves (spectral_norm): there is no one W."""

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
        raise ValueError(f"{message}. Where that is meant, load it with base='warn' or base='ignore'")
    warnings.warn(message, stacklevel=stacklevel + 1)


def check_choice(choice: str) -> None:
    """Raises ValueError for what is none of `CHOICES`."""
    if choice not in CHOICES:
        raise ValueError(f"base must be one of {', '.join(map(repr, CHOICES))}, got {choice!r}")


_SETTINGS: dict[type[nn.Module], tuple[str, ...]] = {
    _ConvNd: ("stride", "padding", "dilation", "groups", "output_padding", "padding_mode"),
    nn.EmbeddingBag: ("mode",),
    nn.RNNBase: ("mode", "num_layers", "bidirectional", "proj_size", "batch_first"),
    nn.RNNCell: ("nonlinearity",),
    nn.MultiheadAttention: ("num_heads", "batch_first", "add_zero_attn"),
}
"""Of layers of torch: what beside their parameters says what they compute."""


def acts_as(layer: nn.Module) -> str:
    """What a layer does with its parameters: the class whose forward runs, and its settings."""
    if kind_of(layer) is not None:
        return f"Linear(bias={getattr(layer, 'bias', None) is not None})"
    original = getattr(layer, "original_class", type(layer))
    owner = next(cls.__name__ for cls in original.__mro__ if "forward" in cls.__dict__)
    names = next((names for cls, names in _SETTINGS.items() if issubclass(original, cls)), ())
    told = [f"{name}={getattr(layer, name)}" for name in names]
    if "bias" in layer._parameters:
        told.append(f"bias={layer._parameters['bias'] is not None}")
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
        quantised = kind.name if kind else MOVING if moves(site.layer, site.parameter) else stored
        return cls(norms.detach(), dtype, elements, quantised, sketch, acts_as(site.layer))

    def difference(self, trained_on: Base) -> str | None:
        """What to say where this is not the base that an adapter was trained on, as far as can be told; else None."""
        if self.layer and trained_on.layer and self.layer != trained_on.layer:
            return f" is a {self.layer}, the adapter was trained on a {trained_on.layer}"
        if MOVING in (self.quantised, trained_on.quantised):
            return None
        found, expected = (base.norms.detach().cpu().double().reshape(-1) for base in (self, trained_on))
        off = ~((found - expected).abs() <= self._tolerance(trained_on, expected) * expected)
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

    def _tolerance(self, other: Base, norms: Tensor) -> Tensor | float:
        """Relative, of ||W||_F: float32 rounding; that of a cast, which may be the same for all elements; or more."""
        if self.quantised or other.quantised:
            return _SAME_KERNEL if self.quantised == other.quantised else _OTHER_QUANTISATION
        return 1e-6 + _rounding(self.dtype, other.dtype, self.elements, norms)

    def _sketch_tolerance(self, other: Base, norms: Tensor) -> Tensor | float:
        """Relative to ||W||_F. Roundings of a cast are below eps/2 together, their sketch seldom twice as large."""
        if self.quantised or other.quantised:
            return _SKETCH_SAME_KERNEL if self.quantised == other.quantised else _SKETCH_OTHER_QUANTISATION
        return 1e-6 + 1.5 * _rounding(self.dtype, other.dtype, self.elements, norms)


def _rounding(a: torch.dtype, b: torch.dtype, elements: int, norms: Tensor) -> Tensor | float:
    """By how much a cast may move numbers of these norms, relative to them: eps, more where float16 is subnormal."""
    if a == b:
        return 0.0
    coarse = max((torch.finfo(dtype) for dtype in (a, b)), key=lambda info: (info.eps, info.smallest_normal))
    narrow = max(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps for dtype in (a, b))
    return coarse.eps + narrow * elements**0.5 / norms.clamp_min(1e-300)


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


def moves(layer: nn.Module, parameter: str) -> bool:
    """Whether a weight is computed with buffers that training changes."""
    if parameter in layer._parameters:
        return False
    parts = layer.parametrizations.modules() if parametrize.is_parametrized(layer) else [layer]  # type: ignore[union-attr]
    return any(part._buffers for part in parts)


# What is not adapted --------------------------------------------------------------------------------------------------

Numbers = dict[str, list[Any]]
"""Name of a tensor -> its dtype, its shape, and some of its elements: float32, in base 64."""

Surroundings = dict[str, Numbers]
"""What of a model is neither adapted nor trained: "parameters" and "buffers"."""

_LARGEST, _LARGEST_IN_HALF = 1e30, 6e4
"""Masks hold the largest number of a dtype, or infinity: each is the first, where float16 is compared the second."""


def surroundings_of(root: nn.Module, record: Record, but: Collection[str] = ()) -> Surroundings:
    """Of a patched model, as it was at `patch`. Layers that a checkpoint did not hold are random in each process.

    Args: but: names of what is known by itself.
    """
    known, marks, paths = record.originals.tensors, record.originals.marks, names_of(root)
    random = _random(paths)
    names = {name for name, p in parameters_of(root).items() if id(p) not in random and name not in but}
    buffers = {name: known.get(name) for name in persistent_buffers(root) if name not in but}
    return {
        "parameters": _described({n: (m.sample, m.shape) for n, m in marks.items() if n in names and m is not None}),
        "buffers": _described({n: (sample_of(t), t.shape) for n, t in buffers.items() if t is not None and _plain(t)}),
    }


def _random(paths: Mapping[nn.Module, tuple[str, ...]]) -> set[int]:
    """The parameters, by identity, that a checkpoint did not hold."""
    return {id(p) for module in unloaded(paths) for p in module._parameters.values()}


def unlike(model: nn.Module, expected: Surroundings) -> list[str]:
    """What of a plain model is not as it was around an adapter. A buffer may be missing: versions of a model differ."""
    paths = names_of(model)
    parameters: dict[str, Tensor] = dict(parameters_of(model))
    here = {"parameters": parameters, "buffers": persistent_buffers(model)}
    modules = {name: module for module, names in paths.items() for name in names}
    missing = expected["parameters"].keys() - here["parameters"].keys()
    gone = sorted(name for name in missing if not _held_otherwise(modules, *name.rpartition(".")[::2]))
    random = _random(paths)
    found = {
        kind: _described(
            {
                name: (sample_of(t), t.shape)
                for name, t in named.items()
                if name in expected[kind] and _plain(t) and id(t) not in random
            }
        )
        for kind, named in here.items()
    }
    return [*(f"{name} is missing" for name in gone), *differing(found, expected)]


def _held_otherwise(modules: Mapping[str, nn.Module], path: str, parameter: str) -> bool:
    """Whether a layer has a parameter's numbers in another way: quantised, computed from others, in a part of it."""
    layer = modules.get(path)
    if layer is None:
        return False
    if kind_of(layer) is not None and parameter == "weight":
        return True
    tensors = (*layer.named_parameters(), *layer.named_buffers())
    return any(part.startswith(parameter) for name, _ in tensors for part in name.split("."))


def differing(found: Surroundings, expected: Surroundings) -> list[str]:
    """Tensors that two models have both, with other numbers."""
    return [
        f"{name}, which is not adapted, holds other numbers"
        for kind, named in found.items()
        for name, numbers in named.items()
        if name in expected[kind] and _apart(numbers, expected[kind][name])
    ]


def _apart(found: list[Any], expected: list[Any]) -> bool:
    """Whether more than a few elements differ by more than a cast: of an embedding, a row may have been added since."""
    dtypes = [DTYPES_BY_NAME.get(numbers[0]) for numbers in (found, expected)]
    infos = [torch.finfo(d) if d is not None and d.is_floating_point else None for d in dtypes]
    if (infos[0] is None) != (infos[1] is None):
        return False  # packed
    if found[1] != expected[1]:
        return found[1][1:] != expected[1][1:]  # else rows were added, or left out
    here, there = (_numbers(numbers[2]) for numbers in (found, expected))
    if len(here) != len(there):
        return True
    relative, absolute = 1e-6, 0.0
    if dtypes[0] != dtypes[1]:
        if torch.float16 in dtypes:
            here, there = (numbers.clamp(-_LARGEST_IN_HALF, _LARGEST_IN_HALF) for numbers in (here, there))
        known = [info for info in infos if info is not None]
        relative += max(info.eps for info in known)
        absolute = max(info.smallest_normal * info.eps for info in known)
    off = (here - there).abs() > relative * there.abs() + absolute
    return int(off.sum()) > len(here) // 16


def _plain(tensor: Tensor) -> bool:
    plain = type(tensor) in (nn.Parameter, Tensor) and tensor.layout == torch.strided
    return plain and not tensor.is_meta and tensor.numel() > 0 and not tensor.is_complex()


def _described(samples: Mapping[str, tuple[Tensor, torch.Size]]) -> Numbers:
    described: Numbers = {}
    for name, (sample, shape) in samples.items():
        numbers = torch.nan_to_num(sample.detach().double(), 0).clamp(-_LARGEST, _LARGEST).reshape(-1).tolist()
        text = base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()
        described[name] = [str(sample.dtype).removeprefix("torch."), [*shape], text]
    return described


def _numbers(text: str) -> Tensor:
    """Raises ValueError for what is no numbers in base 64."""
    content = base64.b64decode(text, validate=True)
    return torch.tensor([number for (number,) in struct.iter_unpack("<f", content)], dtype=torch.float64)


def check_surroundings(value: dict[str, Any]) -> bool:
    """Whether what was read is of this form."""
    kinds = [value.get("parameters"), value.get("buffers")]
    return all(isinstance(kind, dict) and all(map(_is_entry, kind.values())) for kind in kinds)


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, list) or [*map(type, entry)] != [str, list, str] or entry[0] not in DTYPES_BY_NAME:
        return False
    try:
        _numbers(entry[2])
    except (ValueError, struct.error):
        return False
    return all(type(size) is int for size in entry[1])
