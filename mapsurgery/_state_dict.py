"""The trained part of a patched model as a dictionary of tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from ._base import Base, check_choice, differing, judge, surroundings_of
from .surgery.all_or_nothing import Journal, all_or_nothing
from .surgery.record import (
    Record,
    Site,
    all_sites,
    find_trained,
    intact_sites,
    moved_names,
    one_per_adapter,
    parameters_of,
    persistent_buffers,
    refuse_pieces,
    trained_names,
)


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Everything that training changed, and nothing else.

    The adapters' parameters (and frozen tensors that belong to them), other parameters that require a gradient (`train`
    named them, or they were unfrozen or added later), those frozen ones that something has moved (averages, codebooks),
    and those persistent buffers (BatchNorm statistics) that are no longer what they were at `patch`. Where something
    trains outside of the part that was patched, it is in there, too.

    Returns:
        Tensors (detached, not copied) by their names in the model: "<layer>.adapter.A" ..., "<parameter>", "<buffer>".
        Names are those of the model without what wraps it or its parts, and those from `patch`. How the adapters'
        numbers are meant, and of which base, is in its ``_metadata``, as in a module's state_dict.

    Raises:
        ValueError: the model is not patched, an adapted layer was replaced since, a frozen weight was unfrozen, or this
            process holds a piece of a parameter (FSDP1, ZeRO-3).
    """
    root, record = find_trained(model)
    state: OrderedDict[str, Tensor] = OrderedDict()
    metadata: dict[str, dict[str, Any]] = {}
    state._metadata = metadata  # type: ignore[attr-defined]
    for site in intact_sites(root, record):
        refuse_pieces(site, "take its state")
        metadata[site.entry("")] = {"form": site.adapter.form()}
        if not site.adapter.pending:
            metadata[site.entry("")]["base"] = asdict(Base.of(site))
        for name in site.adapter.own_tensors():
            state[site.entry(name)] = getattr(site.adapter, name).detach()
    parameters = parameters_of(root)
    for name in (*trained_names(root, record), *moved_names(root, record)):
        original, found = record.originals.tensors.get(name), parameters[name]
        if original is not None and original.dim() > 1 and (found.dim() == 1 or found.numel() == 0):
            raise ValueError(f"{name} has shape {tuple(found.shape)}, a piece of {tuple(original.shape)}: gather it")
        state[name] = parameters[name].detach()
    buffers = persistent_buffers(root)
    state.update({name: buffers[name] for name in changed_buffers(root, record)})
    metadata[""] = {"surroundings": surroundings_of(root, record, state)}
    return state


def changed_buffers(root: nn.Module, record: Record) -> list[str]:
    """Persistent buffers that differ from what they were at `patch`; unknown ones (from meta) count as changed."""
    return [name for name, buffer in persistent_buffers(root).items() if record.originals.changed(name, buffer)]


def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor], *, base: str = "refuse") -> nn.Module:
    """Put the tensors of `adapter_state_dict` into a model that is patched in the same way.

    Whether the base is the one that they were trained on is told by ``state._metadata``; a dictionary without it (a
    plain copy, a file read by others) is taken without that check.

    Args:
        base: what becomes of numbers that were trained on another base: as in `mapsurgery.load`.

    Returns:
        The same model.

    Raises:
        ValueError: a name is missing or unknown, a shape differs, a number is NaN or infinite, here or in the dtype of
            its place, the numbers are meant in another way (tau, scaling), or they were trained on another base; the
            message names them. Whatever is raised, nothing is changed.
    """
    write(fitting(model, state, base))
    return model


Pairs = list[tuple[Tensor, Tensor]]
"""Tensors with their places in a model."""


def fitting(model: nn.Module, state: Mapping[str, Tensor], base: str = "refuse") -> Pairs:
    """The tensors of `adapter_state_dict` with their places in a model.

    Raises:
        ValueError: see `load_adapter_state_dict`.
    """
    root, record = find_trained(model)
    sites = one_per_adapter(all_sites(root))
    metadata = getattr(state, "_metadata", {})
    check_choice(base)
    forms = ((site, metadata.get(site.entry(""), {}).get("form")) for site in sites)
    problems = [misfit for site, form in forms if (misfit := site.adapter.misfit(form))]
    pairs = _fitting(root, record, state, problems)
    if base != "ignore":
        judge(_other_bases(root, record, sites, metadata), base, "the adapter", stacklevel=3)
    return pairs


def _other_bases(
    root: nn.Module, record: Record, sites: Iterable[Site], metadata: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """What of a patched model is not as `_metadata` describes it."""
    found = [text for site in sites for text in _other_base(site, metadata.get(site.entry(""), {}).get("base"))]
    expected = metadata.get("", {}).get("surroundings")
    return found if expected is None else [*found, *differing(surroundings_of(root, record), expected)]


def _other_base(site: Site, described: Mapping[str, Any] | None) -> list[str]:
    """Why an adapter of a base that was described so is none for this site's."""
    if described is None or site.adapter.pending:
        return []
    difference = Base.of(site).difference(Base(**described))
    return [f"{site.path}{difference}"] if difference else []


def put(model: nn.Module, state: Mapping[str, Tensor], journal: Journal) -> None:
    """Put tensors into their places in a patched model, whatever the base.

    Raises:
        ValueError: see `load_adapter_state_dict`.
    """
    for value, place in _fitting(*find_trained(model), state):
        journal.write(place, value)


def _fitting(root: nn.Module, record: Record, state: Mapping[str, Tensor], problems: Iterable[str] = ()) -> Pairs:
    """Args: problems: what else is wrong with the tensors."""
    places = places_of(root, record)
    required = {name for name, (_, optional) in places.items() if not optional}
    found = [*problems, *(f"missing: {name}" for name in sorted(required - set(state)))]
    found += [f"unknown: {name}" for name in sorted(set(state) - set(places))]
    known = {name: (value, places[name][0]) for name, value in state.items() if name in places}
    found += [problem for name, (value, place) in known.items() if (problem := _misfit(name, value, place))]
    buffers = persistent_buffers(root)
    if not found:
        found += [p for name, pair in known.items() if (p := _not_finite(name, *pair, mask=name in buffers))]
    if found:
        raise ValueError("the adapter does not fit the model: " + "; ".join(found[:10]))
    return list(known.values())


def write(pairs: Pairs) -> None:
    """Write tensors into their places: all of them, or none."""
    with all_or_nothing() as journal:
        for value, place in pairs:
            journal.write(place, value)


def _not_finite(name: str, value: Tensor, place: Tensor, mask: bool) -> str | None:
    """Why a tensor cannot hold these numbers, or None. Args: mask: it may be one, which holds -inf."""
    if not value.is_floating_point() or value.numel() == 0:
        return None
    wide = value if value.itemsize > 1 else value.float()  # few operations know 8 bits
    if mask:
        wide = torch.where(wide.isfinite(), wide, 0)
    ends = torch.stack(wide.aminmax())  # one read of it; NaN if there is one
    if not ends.isfinite().all():
        return f"{name} holds NaN or infinite values"
    if not ends.to(place.dtype).double().isfinite().all():
        return f"{name} holds values that are infinite in {place.dtype}, as the model's is"
    return None


def all_finite(tensor: Tensor) -> bool:
    """In one read, without a second tensor."""
    return _not_finite("", tensor, tensor, mask=False) is None


def _misfit(name: str, value: object, place: Tensor) -> str | None:
    """Why a value cannot be put into its place, or None."""
    if not isinstance(value, Tensor):
        return f"{name} is a {type(value).__name__}, not a tensor"
    if value.shape != place.shape:
        return f"{name} has shape {tuple(value.shape)}, the model's has {tuple(place.shape)}"
    if (value.is_floating_point(), value.is_complex()) != (place.is_floating_point(), place.is_complex()):
        return f"{name} is {value.dtype}, the model's is {place.dtype}"
    if place.is_meta or value.is_meta:
        return f"{name} is on meta: load the model's weights first"
    return None


def places_of(root: nn.Module, record: Record) -> dict[str, tuple[Tensor, bool]]:
    """Tensors of a patched model that an adapter may set, by name, each with whether it may be absent from it."""
    parameters, buffers = parameters_of(root), persistent_buffers(root)
    places: dict[str, tuple[Tensor, bool]] = {name: (parameters[name], True) for name in record.originals.marks}
    places |= {name: (buffer, True) for name, buffer in buffers.items()}
    for site in one_per_adapter(all_sites(root)):
        for name in site.adapter.own_tensors():
            places[site.entry(name)] = (getattr(site.adapter, name), False)
    return places | {name: (parameters[name], False) for name in trained_names(root, record)}
