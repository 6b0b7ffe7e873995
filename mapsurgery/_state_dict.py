"""The trained part of a patched model as a dictionary of tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .surgery.record import (
    Record,
    all_sites,
    find_patched,
    intact_sites,
    one_per_adapter,
    persistent_buffers,
    trained_names,
)


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Everything that training changed, and nothing else.

    The adapters' parameters (and frozen tensors that belong to them), other parameters that require a gradient (`train`
    named them, or they were unfrozen or added later), and those persistent buffers (BatchNorm statistics) that are no
    longer what they were at `patch`.

    Returns:
        Tensors (detached, not copied) by their names in the model: "<layer>.adapter.A" ..., "<parameter>", "<buffer>".
        How the adapters' numbers are meant is in its ``_metadata``, as in a module's state_dict.

    Raises:
        ValueError: the model is not patched, an adapted layer was replaced since, or a frozen weight was unfrozen.
    """
    root, record = find_patched(model)
    state: OrderedDict[str, Tensor] = OrderedDict()
    state._metadata = metadata = {}  # type: ignore[attr-defined]
    for site in intact_sites(root, record):
        metadata[site.entry("")] = {"form": site.adapter.form()}
        for name in site.adapter.own_tensors():
            state[site.entry(name)] = getattr(site.adapter, name).detach()
    for name in trained_names(root, record):
        state[name] = root.get_parameter(name).detach()
    state.update({name: root.get_buffer(name) for name in changed_buffers(root, record)})
    return state


def changed_buffers(root: nn.Module, record: Record) -> list[str]:
    """Persistent buffers that differ from what they were at `patch`; unknown ones (from meta) count as changed."""
    changed = []
    for name, buffer in persistent_buffers(root).items():
        before = record.originals.get(name)
        if before is None or before.shape != buffer.shape or not _same(before.to(buffer), buffer):
            changed.append(name)
    return changed


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal, with NaN equal to NaN."""
    return bool(((a == b) | ((a != a) & (b != b))).all())


@torch.no_grad()
def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Put the tensors of `adapter_state_dict` into a model that is patched in the same way.

    Returns:
        The same model.

    Raises:
        ValueError: a name is missing or unknown, a shape differs, or the numbers are meant in another way (tau,
            scaling); the message names them, nothing is changed.
    """
    root, record = find_patched(model)
    places = places_of(root, record)
    required = {name for name, (_, optional) in places.items() if not optional}
    problems = [f"missing: {name}" for name in sorted(required - set(state))]
    problems += [f"unknown: {name}" for name in sorted(set(state) - set(places))]
    problems += [
        problem for name in state if name in places and (problem := _misfit(name, state[name], places[name][0]))
    ]
    metadata = getattr(state, "_metadata", {})
    for site in one_per_adapter(all_sites(root)):
        misfit = site.adapter.misfit(metadata.get(site.entry(""), {}).get("form"))
        problems += [misfit] if misfit else []
    if problems:
        raise ValueError("the adapter does not fit the model: " + "; ".join(problems[:10]))
    for name, tensor in state.items():
        places[name][0].copy_(tensor)
    return model


def _misfit(name: str, value: object, place: Tensor) -> str | None:
    """Why a value cannot be put into its place, or None."""
    if not isinstance(value, Tensor):
        return f"{name} is a {type(value).__name__}, not a tensor"
    if value.shape != place.shape:
        return f"{name} has shape {tuple(value.shape)}, the model's has {tuple(place.shape)}"
    if value.is_floating_point() != place.is_floating_point() or value.is_complex():
        return f"{name} is {value.dtype}, the model's is {place.dtype}"
    if place.is_meta or value.is_meta:
        return f"{name} is on meta: load the model's weights first"
    return None


def places_of(root: nn.Module, record: Record) -> dict[str, tuple[Tensor, bool]]:
    """Tensors of a patched model that an adapter may set, by name, each with whether it may be absent from it."""
    places: dict[str, tuple[Tensor, bool]] = {name: (buffer, True) for name, buffer in persistent_buffers(root).items()}
    for site in one_per_adapter(all_sites(root)):
        for name in site.adapter.own_tensors():
            places[site.entry(name)] = (getattr(site.adapter, name), False)
    return places | {name: (root.get_parameter(name), False) for name in trained_names(root, record)}
