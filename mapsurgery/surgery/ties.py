"""Weights that several modules hold: one adapter for all of them, one for each, or a refusal."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from .config import Config
from .globs import first_match
from .layers import why_not
from .offloaded import identity
from .paths import first_names, module_paths, named_parameters, site_paths
from .planned import PlannedLayer, planned_layer

Notes = dict[str, tuple[str, ...]]


def resolve_ties(model: nn.Module, layers: list[PlannedLayer], config: Config) -> tuple[list[PlannedLayer], Notes]:
    """The planned layers with what `tied` makes of those whose weight another module holds too, and notes on them.

    Raises:
        ValueError: such a weight, with `tied` "refuse"; or with "share" a holder that cannot be adapted alike.
    """
    holders = _holders(model)
    notes = _shared_memory(model, layers, config)
    result: list[PlannedLayer] = []
    built: dict[int, PlannedLayer] = {}
    for layer in layers:
        weight = layer.module._parameters.get(layer.parameter)
        key = 0 if weight is None else identity(layer.module, layer.parameter)
        others = [h for h in holders.get(key, []) if h[:2] != (layer.module, layer.parameter)]
        if weight is None or not others:
            result.append(layer)
            continue
        names = ", ".join(name for *_, name in others)
        if config.tied == "refuse":
            raise ValueError(f'{layer.path} is tied with {names}; tied="share" or tied="separate" adapts it')
        if config.tied == "separate":
            notes[layer.path] = (f"tied with {names}, which keeps the base weight or has an adapter of its own",)
            result.append(layer)
        elif key in built:
            result.append(_shared(layer, built[key], config))
        else:
            built[key] = layer
            notes[layer.path] = (f"tied with {names}: one adapter for all of them",)
            planned = {(one.module, one.parameter) for one in layers}
            missing = [h for h in others if h[:2] not in planned]
            result += [layer, *(_joined(layer, module, name, model, config) for module, name, _ in missing)]
    return result, notes


def _shared_memory(model: nn.Module, layers: list[PlannedLayer], config: Config) -> Notes:
    """Notes on weights whose memory another Parameter uses: no tie that could share an adapter."""
    found: dict[int, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in first_names(named_parameters(module_paths(model))).items():
        if type(parameter) is nn.Parameter and not parameter.is_meta and parameter.numel() > 0:
            found.setdefault(parameter.untyped_storage().data_ptr(), []).append((name, parameter))
    notes: Notes = {}
    for layer in layers:
        weight = layer.module._parameters.get(layer.parameter)
        if type(weight) is nn.Parameter and not weight.is_meta:
            beside = found.get(weight.untyped_storage().data_ptr(), [])
            others = ", ".join(name for name, parameter in beside if parameter is not weight)
            if others and config.tied == "refuse":
                raise ValueError(f"{layer.path} shares memory with {others}, which would keep the base weight")
            if others:
                notes[layer.path] = (f"shares memory with {others}, which keeps the base weight",)
    return notes


def _holders(model: nn.Module) -> dict[int, list[tuple[nn.Module, str, str]]]:
    """Parameter -> the modules that hold it, under what name, and their first full name."""
    found: dict[int, list[tuple[nn.Module, str, str]]] = {}
    for module, (path, *_) in module_paths(model).items():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(identity(module, name), []).append((module, name, f"{path}.{name}".lstrip(".")))
    return found


def _joined(first: PlannedLayer, module: nn.Module, name: str, model: nn.Module, config: Config) -> PlannedLayer:
    """The entry of a holder that no pattern takes."""
    sites = site_paths(module_paths(model)[module], name)
    excluded = first_match(sites, config.exclude)
    reason = why_not(module, name, raw=True) if excluded is None else f"excluded by {excluded!r}"
    if reason is not None:
        raise ValueError(
            f"{first.path} is tied with {sites[0]}, which cannot be adapted with it ({reason}); "
            'tied="separate" adapts one side alone'
        )
    layer = planned_layer(module, name, sites, "(tied)", first.requested_rank, config)
    return _shared(layer, first, config)


def _shared(layer: PlannedLayer, first: PlannedLayer, config: Config) -> PlannedLayer:
    if (layer.transposed, layer.stacked, layer.rank) != (first.transposed, first.stacked, first.rank):
        raise ValueError(
            f"{layer.path} and {first.path} are tied, but differ in rank or in how they read the weight; "
            'tied="separate" gives each an adapter of its own'
        )
    return replace(
        layer, shares=first.path, trainable=0, notes=(*layer.notes, f"tied with {first.path}, shares its adapter")
    )
