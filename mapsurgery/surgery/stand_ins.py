"""The base's tensors in the places of those that training changed, for the length of a block."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..interrupts import undone_by, uninterrupted
from ..methods import Adapter
from ..methods.sharded import is_sharded, shard_of
from .originals import same_numbers
from .record import Record, find_patched, moved_names, names_of, outside, showing_base, trained_names


@dataclass(frozen=True)
class _Place:
    """Where a module holds a tensor: in its `_parameters` or `_buffers`."""

    held: dict[str, Tensor | None]
    key: str
    name: str


@dataclass
class _Shown:
    """A model that shows the base. `blocks`: how many want it; the last that ends puts what was trained back."""

    before: list[tuple[_Place, Tensor | None]]
    made: list[tuple[str, nn.Parameter, Tensor]]
    """Parameters that stand in, with their names and what the base holds there."""
    blocks: int = 0


_SHOWING = threading.RLock()


@contextmanager
def base_tensors(model: nn.Module) -> Iterator[None]:
    """A block in which modules hold what `patch` remembers in place of what was trained, and then these again.

    The trained tensors are not written to: an optimiser and a graph that hold them notice nothing. Blocks of one model
    may overlap in any order, as those of two threads do.

    Raises:
        ValueError: see `mapsurgery.disabled`; nothing is changed then.
    """
    root, record = find_patched(model, showing=True)
    open_blocks: list[_Shown] = []
    written: list[str] = []

    def end() -> None:
        with _SHOWING:
            while open_blocks:
                shown = open_blocks.pop()
                shown.blocks -= 1
                written.extend(_put_back(root, shown) if shown.blocks == 0 else [])

    with undone_by(end):
        with uninterrupted(), _SHOWING:
            shown = showing_base.get(root) or _show(model, root, record)
            shown.blocks += 1
            open_blocks.append(shown)
        yield
    if written:
        warnings.warn(
            f"{', '.join(written[:5])}: what was written in the block of mapsurgery.disabled(trained=True) is lost, as "
            "it went into the base's tensors, which stood in for the trained ones",
            stacklevel=5,
        )


def _show(model: nn.Module, root: nn.Module, record: Record) -> _Shown:
    _refuse_unknown(model, root, record)
    places = _places(root, record)
    made = {key: _stand_in(key, record, place) for key, (place, *_) in places.items()}
    bases = [(places[key][0].name, t) for key, t in made.items() if isinstance(t, nn.Parameter)]
    originals = record.originals.tensors
    shown = _Shown(
        before=[(place, place.held[place.key]) for same in places.values() for place in same],
        made=[(name, t, base) for name, t in bases if (base := originals[name]) is not None],
    )
    showing_base[root] = shown
    for key, same in places.items():
        for place in same:
            place.held[place.key] = made[key]
    return shown


def _put_back(root: nn.Module, shown: _Shown) -> list[str]:
    """Returns: names of the parameters that the blocks have changed."""
    for place, tensor in shown.before:
        place.held[place.key] = tensor
    del showing_base[root]
    # Numbers, and not torch's counter of writes: fused optimisers and `.data` do not count.
    return [name for name, t, base in shown.made if not same_numbers(t.detach(), base.to(t.device, t.dtype))]


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


@torch.inference_mode(False)  # autograd may meet it after the block
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
