"""The trained part of a patched model as a dictionary of tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .surgery import record
from .surgery.adapted import CHILD
from .surgery.record import Record


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Everything that adapting changed, and nothing else.

    The adapters' parameters, the parameters that `train` named, and those persistent buffers (BatchNorm statistics)
    that are no longer what they were at `patch`.

    Returns:
        Tensors (detached, not copied) by their names in the model: "<layer>.adapter.A" ..., "<parameter>", "<buffer>".

    Raises:
        ValueError: the model is not patched.
    """
    root, memory = record.find_patched(model)
    state: dict[str, Tensor] = {}
    for path, layer in record.adapted_layers(root).items():
        for name, parameter in layer.adapter.own_parameters().items():
            state[entry(path, name)] = parameter.detach()
    for name in memory.trained:
        state[name] = root.get_parameter(name).detach()
    return state | {name: root.get_buffer(name) for name in changed_buffers(root, memory)}


def entry(path: str, name: str) -> str:
    """Name in the model of a parameter of the adapter of the layer at `path`."""
    return ".".join(part for part in (path, CHILD, name) if part)


def changed_buffers(root: nn.Module, memory: Record) -> list[str]:
    """Persistent buffers that differ from what they were at `patch`; unknown ones (from meta) count as changed."""
    changed = []
    for name, buffer in record.persistent_buffers(root).items():
        before = memory.originals.get(name)
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
        ValueError: a name is missing or unknown, or a shape differs; the message names them, nothing is changed.
    """
    root, memory = record.find_patched(model)
    places = places_of(root, memory)
    required = {name for name, (_, optional) in places.items() if not optional}
    problems = [f"missing: {name}" for name in sorted(required - set(state))]
    problems += [f"unknown: {name}" for name in sorted(set(state) - set(places))]
    for name in state.keys() & places.keys():
        expected, found = tuple(places[name][0].shape), tuple(state[name].shape)
        if expected != found:
            problems.append(f"{name} has shape {found}, the model's has {expected}")
    if problems:
        raise ValueError("the adapter does not fit the model: " + "; ".join(problems[:10]))
    for name, tensor in state.items():
        places[name][0].copy_(tensor)
    return model


def places_of(root: nn.Module, memory: Record) -> dict[str, tuple[Tensor, bool]]:
    """Tensors of a patched model that an adapter may set, by name, each with whether it may be absent from it."""
    places: dict[str, tuple[Tensor, bool]] = {
        name: (buffer, True) for name, buffer in record.persistent_buffers(root).items()
    }
    for path, layer in record.adapted_layers(root).items():
        for name, parameter in layer.adapter.own_parameters().items():
            places[entry(path, name)] = (parameter, False)
    return places | {name: (root.get_parameter(name), False) for name in memory.trained}
