"""The dry run: which layers a call of `patch` would adapt, with what rank, at what cost; what it would not, and why."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from ..progress import progress
from ..tables import Table, paragraphs, wrapped
from . import fresh, trainers
from .adapted import AdaptedLayer
from .config import Config, takes_options
from .globs import ALL_LINEAR, first_match, matches, nowhere
from .heads import heads
from .layers import find_type, is_linear, why_not
from .offloaded import brought_in_whole
from .other_adapters import OtherAdapters
from .paths import first_names, module_paths, named_parameters, parameter_paths, site_paths, unwrapped
from .plan_table import layers_table, said, shortened, skipped_table
from .planned import PlannedLayer, SkippedModule, planned_layer
from .quantised import kinds
from .reducers import refuse_reduced
from .ties import resolve_ties


@dataclass(frozen=True, repr=False)
class Plan:
    """What `patch` would do. ``print(plan)`` shows it with similar layers in one row, `table(full=True)` one by one.

    Attributes: warning: what `patch` will warn of.
    """

    config: Config
    layers: tuple[PlannedLayer, ...]
    skipped: tuple[SkippedModule, ...]
    counts: dict[str, int]
    trained: tuple[str, ...]
    trained_parameters: int
    model_parameters: int
    warning: str | None = None
    advice: str | None = None

    @property
    def adapter_parameters(self) -> int:
        """Trained parameters of all adapters."""
        return sum(layer.trainable for layer in self.layers)

    @property
    def trainable_parameters(self) -> int:
        """Adapters and what `train` names."""
        return self.adapter_parameters + self.trained_parameters

    @property
    def trainable_share(self) -> float:
        """Trained parameters as a share of the original model's."""
        return self.trainable_parameters / max(1, self.model_parameters)

    def __str__(self) -> str:
        return self.table()

    def table(self, full: bool = False) -> str:
        """The plan as text; `full` gives every layer a row of its own."""
        return "\n".join([*map(str, self._tables(full)), wrapped(self._totals())])

    def __repr__(self) -> str:
        """In a line; ``print`` shows the table."""
        left = f", {len(self.skipped)} left out" if self.skipped else ""
        return (
            f"Plan({len(self.layers)} layers with {said(self.config)}{left}, {self._share()}; print it for the table)"
        )

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return "".join([*(table.html() for table in self._tables()), paragraphs(self._totals())])

    def _tables(self, full: bool = False) -> list[Table]:
        skipped = [skipped_table(self.skipped, full)] if self.skipped else []
        return [layers_table(self.layers, self.config, full), *skipped]

    def _share(self) -> str:
        return (
            f"trainable: {self.trainable_parameters:,} ({self.adapter_parameters:,} in adapters)"
            f" = {self.trainable_share:.3%} of the model's {self.model_parameters:,} parameters"
        )

    def _totals(self) -> list[str]:
        counts = ", ".join(f"{pattern!r} {count}" for pattern, count in self.counts.items())
        lines = [f"layers per pattern: {counts}"]
        if self.trained:
            lines.append(f"trained in full: {shortened(self.trained)} ({self.trained_parameters:,} parameters)")
        lines.append(self._share())
        return lines + [text for text in (self.warning, self.advice) if text]


@takes_options
def plan(model: nn.Module, config: Config) -> Plan:
    """Dry run of `patch`: the same arguments, the same errors about names, and nothing touched.

    Returns:
        A `Plan`; printing it shows the table.

    Raises:
        TypeError, ValueError: see `patch`. What takes reading the weights (NaN) is found by `patch` alone.
    """
    refuse_reduced(model)
    return make_plan(unwrapped(model), config)


def make_plan(model: nn.Module, config: Config) -> Plan:
    """The plan for checked arguments."""
    modules = module_paths(model)
    _refuse_patched(modules)
    if not any(True for _ in model.parameters()) and not any(map(kinds.kind_of, modules)):
        raise ValueError(f"the model ({type(model).__name__}) has no parameters: there is nothing to adapt")
    all_paths = [path for paths in modules.values() for path in paths]
    parameters = named_parameters(modules)
    trained = _trained_parameters(parameters, config, all_paths)
    whole, others = brought_in_whole(model), OtherAdapters(model)
    linear = _all_linear(model, modules, config)
    layers: list[PlannedLayer] = []
    skipped: list[SkippedModule] = []
    for module, paths in progress(modules.items(), "planning"):
        for name, pattern in _asked_for(module, paths, config, linear).items():
            sites = site_paths(paths, name)
            reason = _reason_to_skip(module, name, paths, config, trained, others)
            if reason is None and pattern == ALL_LINEAR:
                reason = linear[module]
            if reason is None and module in whole:
                reason = "accelerate offloads it with its parent (preload_module_classes): patch before offloading"
            if reason is None:
                layers.append(_planned(module, name, sites, pattern, config))
            else:
                skipped.append(SkippedModule(sites, type(module).__name__, reason, pattern))
    layers, tie_notes = resolve_ties(model, layers, config)
    adapted = {layer.path for layer in layers}
    skipped = [skip for skip in skipped if skip.path not in adapted]  # a tie may bring in a head
    counts = {p: _count(layers, p, linear) for p in (*config.targets, *config.parameters)}
    _refuse_unmatched(config, counts, layers, skipped, all_paths, [*all_paths, *parameters])
    layers = [replace(layer, notes=(*layer.notes, *tie_notes.get(layer.path, ()))) for layer in layers]
    learning = {*trained.values(), *(p for layer in layers for p in _parts(layer.module, layer.parameter))}
    forgotten, certain = fresh.advice(modules, model, learning)
    warnings = [others.frozen_by_patch(set(trained.values())), forgotten if certain else None, _narrow(config)]
    advice = [trainers.advice(model), None if certain else forgotten]
    return Plan(
        config=config,
        layers=tuple(layers),
        skipped=tuple(skipped),
        counts=counts,
        trained=tuple(trained),
        trained_parameters=sum(p.numel() for p in trained.values()),
        model_parameters=count_parameters(model),
        warning="\n".join(filter(None, warnings)) or None,
        advice="\n".join(filter(None, advice)) or None,
    )


def _narrow(config: Config) -> str | None:
    """What to say of adapters in float16."""
    if config.dtype != torch.float16:
        return None
    return (
        "adapters in float16 are NaN after a step of AdamW: its eps, 1e-8, and the squares of small gradients are 0 "
        "there. Leave out dtype (float32 adapters work in a float16 model), or give dtype=torch.bfloat16"
    )


def _all_linear(
    model: nn.Module, modules: dict[nn.Module, tuple[str, ...]], config: Config
) -> dict[nn.Module, str | None]:
    """What "all-linear" stands for, if it is asked for: each linear layer, with the reason to leave it out."""
    if ALL_LINEAR not in config.targets:
        return {}
    left = heads(model)
    return {
        module: f"{left[module]}: {ALL_LINEAR!r} leaves heads out; `targets` may name it too"
        if module in left
        else None
        for module in modules
        if is_linear(module)
    }


def _asked_for(
    module: nn.Module, paths: tuple[str, ...], config: Config, linear: dict[nn.Module, str | None]
) -> dict[str, str]:
    """Parameters of a module that a pattern takes, each with the first pattern that does."""
    if any(".parametrizations." in f".{path}." for path in paths):
        return {}  # the originals of a parametrised weight, which is adapted as a whole
    named = {
        name: pattern
        for name, parameter in module._parameters.items()
        if parameter is not None
        and (pattern := first_match(parameter_paths(paths, name), config.parameters)) is not None
    }
    pattern, kind = first_match(paths, config.targets), find_type(type(module))
    if pattern is None and module in linear:
        pattern = ALL_LINEAR
    if pattern is None or not _has_weights(module) or (named and kind is None):
        return named
    return named | dict.fromkeys(kind.parameters_of(module) if kind is not None else ["weight"], pattern)


def _count(layers: list[PlannedLayer], pattern: str, linear: dict[nn.Module, str | None]) -> int:
    if pattern == ALL_LINEAR:
        return sum(linear.get(layer.module, "none") is None for layer in layers)
    return sum(any(matches(path, pattern) for path in _names(layer.paths, layer.parameter)) for layer in layers)


def _names(sites: tuple[str, ...], parameter: str) -> tuple[str, ...]:
    """What a pattern may call a site: a weight answers to its own name, too."""
    return (*sites, *parameter_paths(sites, "weight")) if parameter == "weight" else sites


def _has_weights(module: nn.Module) -> bool:
    """Whether a module holds numbers of its own; a quantised or parametrised weight is none of its parameters."""
    named = "weight" in module._buffers or hasattr(type(module), "weight")
    return named or bool(module._parameters) or kinds.kind_of(module) is not None


def count_parameters(model: nn.Module) -> int:
    """Number of parameters of a model; those of lazy modules have no size yet."""
    return sum(p.numel() for p in model.parameters() if not isinstance(p, UninitializedParameter))


def _refuse_patched(modules: dict[nn.Module, tuple[str, ...]]) -> None:
    patched = [paths[0] or "the model itself" for module, paths in modules.items() if isinstance(module, AdaptedLayer)]
    if patched:
        raise ValueError(
            f"the model is patched already ({len(patched)} adapted layers: {shortened(tuple(patched), 3)}); "
            "call mapsurgery.unpatch or mapsurgery.merge first"
        )


def _trained_parameters(
    parameters: dict[str, nn.Parameter], config: Config, all_paths: list[str]
) -> dict[str, nn.Parameter]:
    """Parameters that `train` names, by their first name. Args: parameters: a tied one under each of its names."""
    found: dict[str, nn.Parameter] = {}
    for pattern in config.train:
        taken = {name: p for name, p in parameters.items() if matches(name, pattern)}
        if not taken:
            raise ValueError(nowhere("train", pattern, [*all_paths, *parameters]))
        found.update(taken)
    integers = [name for name, parameter in found.items() if not parameter.is_floating_point()]
    if integers:
        raise ValueError(f"train names {integers[0]}, a {found[integers[0]].dtype} parameter, which cannot be trained")
    chosen = set(found.values())
    return {name: p for name, p in first_names(parameters).items() if p in chosen}


def _reason_to_skip(
    module: nn.Module,
    name: str,
    paths: tuple[str, ...],
    config: Config,
    trained: dict[str, nn.Parameter],
    others: OtherAdapters,
) -> str | None:
    excluded = first_match(paths, config.exclude) or first_match(site_paths(paths, name), config.exclude)
    if excluded is not None:
        return f"excluded by {excluded!r}"
    if any(part is parameter for part in _parts(module, name) for parameter in trained.values()):
        return "trained in full, as `train` asks"
    if (claimed := others.why_not(module, name)) is not None:
        return claimed
    named = first_match(parameter_paths(paths, name), config.parameters) is not None
    reason = why_not(module, name, raw=named)
    scripted = isinstance(module, torch.jit.ScriptModule)
    if reason is not None and find_type(type(module)) is None and not named and not scripted:
        raw = [f"{n} {tuple(p.shape)}" for n, p in module._parameters.items() if p is not None and _is_raw(p)]
        return f"{reason}; name its raw parameters in `parameters`: {', '.join(raw)}" if raw else reason
    return reason


def _is_raw(parameter: nn.Parameter) -> bool:
    return parameter.dim() > 1 and parameter.is_floating_point()


def _parts(module: nn.Module, name: str) -> list[nn.Parameter]:
    """The Parameters that a weight is, or is computed from."""
    if parametrize.is_parametrized(module, name):
        return list(module.parametrizations[name].parameters())  # type: ignore[index, union-attr]
    names = (name, f"{name}_g", f"{name}_v", f"{name}_orig")
    return [parameter for n, parameter in module._parameters.items() if n in names and parameter is not None]


def _planned(module: nn.Module, name: str, sites: tuple[str, ...], pattern: str, config: Config) -> PlannedLayer:
    asked = next((rank for glob, rank in config.rank_pattern.items() if first_match(sites, [glob])), config.rank)
    layer = planned_layer(module, name, sites, pattern, asked, config)
    return replace(layer, notes=_own_notes(layer, config))


def _own_notes(layer: PlannedLayer, config: Config) -> tuple[str, ...]:
    weight, notes = layer.weight, []
    if layer.rank < layer.requested_rank:
        notes.append(f"rank {layer.requested_rank} is more than the layer allows: {layer.rank}")
    if layer.stacked:
        notes.append(f"{layer.matrices} matrices, adapted one by one")
    if layer.quantisation is not None:
        return (*notes, f"quantised ({layer.quantisation.name})")
    if layer.own_forward:
        notes.append("own forward")
    if config.dropout and not layer.drops:
        notes.append("no dropout")
    if not isinstance(weight, nn.Parameter):
        notes.append("parametrised: W is computed for each call")
    if weight.is_meta:
        notes.append("on meta: the norm is taken when the weight arrives")
    elif not isinstance(weight, FakeTensor) and _is_zero(weight.detach()):
        notes.append("zero weight: no base term, beta absolute")
    return tuple(notes)


def _is_zero(weight: torch.Tensor) -> bool:
    """Whether all elements are 0. One look at the first spares reading most weights."""
    return weight[(0,) * weight.dim()].item() == 0 and not weight.any()


def _refuse_unmatched(
    config: Config,
    counts: dict[str, int],
    layers: list[PlannedLayer],
    skipped: list[SkippedModule],
    paths: list[str],
    names: list[str],
) -> None:
    asked = (("targets", config.targets, paths), ("exclude", config.exclude, names))
    for argument, patterns, known in (*asked, ("parameters", config.parameters, names)):
        for pattern in patterns:
            stands_for_layers = pattern == ALL_LINEAR and argument == "targets"
            if not stands_for_layers and not any(matches(path, pattern) for path in known):
                raise ValueError(nowhere(argument, pattern, known))
    for argument, patterns in (("targets", config.targets), ("parameters", config.parameters)):
        for pattern in patterns:
            _refuse_uncounted(argument, pattern, counts[pattern], skipped)
    for pattern in config.rank_pattern:
        if not any(first_match(layer.paths, [pattern]) for layer in layers):
            raise ValueError(nowhere("rank_pattern", pattern, [layer.path for layer in layers]))


def _refuse_uncounted(argument: str, pattern: str, count: int, skipped: list[SkippedModule]) -> None:
    covered = [skip for skip in skipped if skip.pattern == pattern or first_match(skip.paths, [pattern])]
    if count == 0 and covered:
        reasons = "; ".join(f"{s.path or 'the model itself'} ({s.type_name}): {s.reason}" for s in covered[:5])
        raise ValueError(f"{argument} pattern {pattern!r} matches nothing that can be adapted: {reasons}")
    if count == 0 and pattern == ALL_LINEAR:
        raise ValueError(f"{argument} {ALL_LINEAR!r}: the model has no linear layer; name the layers to adapt by glob")
    if count == 0:
        raise ValueError(f"{argument} pattern {pattern!r} matches only modules without parameters of their own")
