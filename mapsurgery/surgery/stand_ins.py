"""The base's tensors in the places of those that training changed, for the length of a block."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..methods import Adapter
from ..methods.sharded import is_sharded, shard_of
from .interrupts import uninterrupted
from .record import Record, find_patched, moved_names, names_of, outside, showing_base, trained_names


@dataclass(frozen=True)
class _Place:
    """Where a module holds a tensor: in its `_parameters` or `_buffers`."""

    held: dict[str, Tensor | None]
    key: str
    name: str


@contextmanager
def base_tensors(model: nn.Module) -> Iterator[None]:
    """A block in which modules hold what `patch` remembers in place of what was trained, and then these again.

    The trained tensors are not written to: an optimiser and a graph that hold them notice nothing.

    Raises:
        ValueError: see `mapsurgery.disabled`; nothing is changed then.
    """
    root, record = find_patched(model, showing=True)
    if root in showing_base:  # they are there already
        yield
        return
    _refuse_unknown(model, root, record)
    places = _places(root, record)
    made = {key: _stand_in(key, record, place) for key, (place, *_) in places.items()}
    fresh = {key: tensor._version for key, tensor in made.items()}
    before = [(place, place.held[place.key]) for same in places.values() for place in same]
    try:
        with uninterrupted():
            showing_base.add(root)
            for key, same in places.items():
                for place in same:
                    place.held[place.key] = made[key]
        yield
    finally:
        with uninterrupted():
            for place, tensor in before:
                place.held[place.key] = tensor
            showing_base.discard(root)
    parameters = {key: t for key, t in made.items() if isinstance(t, nn.Parameter)}
    written = [places[key][0].name for key, t in parameters.items() if t._version > fresh[key]]
    if written:
        warnings.warn(
            f"{', '.join(written[:5])}: what was written in the block of mapsurgery.disabled(trained=True) is lost, as "
            "it went into the base's tensors, which stood in for the trained ones",
            stacklevel=5,
        )


def _places(root: nn.Module, record: Record) -> dict[int, list[_Place]]:
    """Tensor, by identity -> its places, for all that `patch` remembers; a tied one has several."""
    found: dict[int, list[_Place]] = {}
    for module, paths in names_of(root).items():
        if isinstance(module, Adapter):
            continue
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                names = [f"{path}.{key}".lstrip(".") for path in paths]
                name = next((name for name in names if name in record.originals.tensors), None)
                if tensor is not None and (name is not None or id(tensor) in found):
                    found.setdefault(id(tensor), []).append(_Place(held, key, name or names[0]))  # type: ignore[arg-type]
    return found


@torch.inference_mode(False)  # the writes into it are counted
@torch.no_grad()
def _stand_in(key: int, record: Record, place: _Place) -> Tensor:
    now, original = place.held[place.key], record.originals.tensors[place.name]
    assert now is not None
    if is_sharded(now) or shard_of(now) is not None or (original is not None and original.shape != now.shape):
        raise ValueError(
            f"{place.name} is sharded, or has another shape than at patch: the base's stands in for whole tensors alone"
        )
    if original is None or now.is_meta:
        raise ValueError(f"{place.name} was or is on meta: what the base holds there is not known")
    copied = original.to(now.device, now.dtype, copy=True)
    return nn.Parameter(copied, requires_grad=False) if isinstance(now, nn.Parameter) else copied


def _refuse_unknown(model: nn.Module, root: nn.Module, record: Record) -> None:
    """Raises ValueError where training changed what `patch` has not kept."""
    known = record.originals.tensors
    strange = [name for name in trained_names(root, record) if name not in known]
    strange += [*moved_names(root, record), *outside(model, root)]
    if strange:
        raise ValueError(
            f"{', '.join(strange[:5])} changed or may learn since patch, and what the base holds there is not kept: "
            "name it in `train` at patch, or call disabled(model) without trained=True"
        )
