"""The dry run: which layers a call of `patch` would adapt, with what rank, at what cost; what it would not, and why."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from ..methods import Adapter, Init, Method
from ..methods.base import frobenius_norms, matrix_of
from ..tables import render
from ..updates import Matrix, Update
from . import quantisation
from .adapted import AdaptedLayer, default_dtype
from .config import Config, Patterns
from .globs import first_match, matches, nearest
from .layers import LayerType, find_type, mixin_of, weight_of, why_not
from .quantisation import Quantisation


@dataclass(frozen=True)
class PlannedLayer:
    """One parameter of one layer to adapt: in most layers, their weight.

    Attributes:
        parameter: its name in the layer.
        paths: every name by which the model reaches it, the layer's path for a ``weight`` and the parameter's name for
            others; the first is the one used in files.
        layer_type: entry of the table of layer types; None for a raw parameter of any other module.
        shape: of the parameter, as the layer holds it.
        matrix: its shape as an adapter sees it, (m, K); of each matrix of a stack.
        stacked: it is a stack (E, m, K) of matrices that are adapted one by one.
        rank: after the limit of the update family, in most min(m, K); requested_rank before.
        trainable: number of parameters that the adapter trains; 0 where the adapter is another layer's.
        pattern: the first pattern that took it.
        config: the arguments of the plan.
        replaced: the layer's forward is to be one of ours; else its own runs on W', or on a quantised W.
        groups: of a convolution whose forward is replaced.
        path_kind: how it trains: "fused", on the operators; "beside", with products of W and ΔW in plain torch;
            "weight", on W'; "base", where the layer's own forward runs on a quantised W.
        shares: the name under which the adapter of a tied parameter is built already.
        weight_norm, dtype: ||W||_F and the adapter's dtype where a file gives them; else measured and by `Config`.
    """

    module: nn.Module = field(repr=False)
    parameter: str
    paths: tuple[str, ...]
    layer_type: LayerType | None
    shape: tuple[int, ...]
    matrix: Matrix
    stacked: bool
    rank: int
    requested_rank: int
    pattern: str
    config: Config = field(repr=False, compare=False)
    replaced: bool
    groups: int | None
    trainable: int = 0
    notes: tuple[str, ...] = ()
    shares: str | None = None
    weight_norm: float | tuple[float, ...] | None = None
    dtype: torch.dtype | None = None

    @property
    def path(self) -> str:
        return self.paths[0]

    @property
    def type_name(self) -> str:
        return type(self.module).__name__

    @property
    def transposed(self) -> bool:
        return self.layer_type is not None and self.layer_type.transposed

    @property
    def quantisation(self) -> Quantisation | None:
        """How the weight is quantised, if it is."""
        return quantisation.kind_of(self.module) if self.parameter == "weight" else None

    @property
    def path_kind(self) -> str:
        return self._way(training=True)

    @property
    def path_kind_in_eval(self) -> str:
        """As `path_kind`, in eval mode: without dropout."""
        return self._way(training=False)

    def _way(self, training: bool) -> str:
        if not self.replaced:
            return "weight" if self.quantisation is None else "base"
        if isinstance(self.module, nn.Embedding):  # rows of W and of ΔW: no operator computes these
            return "beside"
        c = self.config
        stand_in = Adapter(
            torch.empty(self.shape, device="meta"),
            method=c.method,
            update=c.update,
            rank=self.rank,
            init=c.init,
            dropout=c.dropout,
            transposed=self.transposed,
        )
        stand_in.train(training and self.drops)
        return c.method.way(stand_in, self.groups)

    @property
    def drops(self) -> bool:
        """Whether dropout applies: where the update has an input of numbers, and the forward is not the layer's."""
        return (self.replaced or self.quantisation is not None) and not isinstance(self.module, nn.Embedding)

    @property
    def matrices(self) -> int:
        return self.shape[0] if self.stacked else 1


@dataclass(frozen=True)
class SkippedModule:
    """A module that a target pattern covers and that is not adapted, with the reason."""

    paths: tuple[str, ...]
    type_name: str
    reason: str

    @property
    def path(self) -> str:
        return self.paths[0]


@dataclass(frozen=True)
class Plan:
    """What `patch` would do. ``print(plan)`` shows it with similar layers in one row, `table(full=True)` one by one."""

    config: Config
    layers: tuple[PlannedLayer, ...]
    skipped: tuple[SkippedModule, ...]
    counts: dict[str, int]
    trained: tuple[str, ...]
    trained_parameters: int
    model_parameters: int

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
        groups = _grouped(self.layers, full)
        columns = ["layer", "n", "type", "weight", "way", "rank", "trainable", "pattern", "notes"]
        rows = [_row(group) for group in groups]
        parts = [render(f"{len(self.layers)} layers to adapt with {_said(self.config)}", columns, rows)]
        if self.skipped:
            rows = [_skipped_row(group) for group in _grouped_skips(self.skipped, full)]
            parts.append(render("not adapted", ["module", "n", "type", "reason"], rows))
        parts.append(self._totals())
        return "\n".join(parts)

    def _totals(self) -> str:
        counts = ", ".join(f"{pattern!r} {count}" for pattern, count in self.counts.items())
        lines = [f"layers per pattern: {counts}"]
        if self.trained:
            lines.append(f"trained in full: {_shortened(self.trained)} ({self.trained_parameters:,} parameters)")
        lines.append(
            f"trainable: {self.trainable_parameters:,} ({self.adapter_parameters:,} in adapters)"
            f" = {self.trainable_share:.3%} of the model's {self.model_parameters:,} parameters"
        )
        return "\n".join(lines)


def _said(config: Config) -> str:
    """The method, and the update family where it is not LoRA's."""
    return config.method.name if config.update.name == "lora" else f"{config.method.name} on {config.update.name}"


def _shortened(names: tuple[str, ...], limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _family(path: str) -> str:
    return re.sub(r"\d+", "#", path)


def _span(paths: list[str]) -> str:
    """One name for similar paths: "blocks.{0..11}.attn.qkv" where a single number differs."""
    if len(paths) == 1:
        return paths[0]
    numbers = [re.findall(r"\d+", path) for path in paths]
    varying = [i for i in range(len(numbers[0])) if len({n[i] for n in numbers}) > 1]
    if len(varying) != 1:
        return f"{paths[0]} .. {paths[-1]}"
    at, pieces = varying[0], re.split(r"\d+", paths[0])
    values = [int(n[at]) for n in numbers]
    texts = list(numbers[0])
    whole = values == list(range(values[0], values[0] + len(values)))
    texts[at] = f"{{{values[0]}..{values[-1]}}}" if whole else f"{{{','.join(map(str, values))}}}"
    return "".join(piece + text for piece, text in zip(pieces, [*texts, ""], strict=True))


def _grouped(layers: tuple[PlannedLayer, ...], full: bool) -> list[list[PlannedLayer]]:
    groups: dict[Any, list[PlannedLayer]] = {}
    for i, layer in enumerate(layers):
        alike = (_family(layer.path), layer.type_name, layer.shape, layer.rank, layer.pattern, len(layer.paths))
        notes = (layer.shares is None, layer.groups, tuple(_family(note) for note in layer.notes))
        key = i if full else (*alike, *notes)
        groups.setdefault(key, []).append(layer)
    return list(groups.values())


def _row(group: list[PlannedLayer]) -> list[object]:
    first = group[0]
    name = _span([layer.path for layer in group])
    aliases = "".join(f" = {alias}" for alias in first.paths[1:]) if len(group) == 1 else ""
    also = [f"each under {len(first.paths)} names"] if len(first.paths) > 1 and not aliases else []
    notes = "; ".join([*also, *first.notes])
    shape = "x".join(map(str, first.shape))
    trainable = sum(layer.trainable for layer in group)
    way, in_eval = _WAYS[first.path_kind], _WAYS[first.path_kind_in_eval]
    way = way if way == in_eval else f"{way}, in eval mode {in_eval}"
    return [name + aliases, len(group), first.type_name, shape, way, first.rank, trainable, first.pattern, notes]


_WAYS = {"fused": "fused", "beside": "beside W", "weight": "on W'", "base": "own kernel"}
"""How a layer is computed, as docs/layers.md calls it."""


def _grouped_skips(skipped: tuple[SkippedModule, ...], full: bool) -> list[list[SkippedModule]]:
    groups: dict[Any, list[SkippedModule]] = {}
    for i, skip in enumerate(skipped):
        groups.setdefault(i if full else (_family(skip.path), skip.type_name, skip.reason), []).append(skip)
    return list(groups.values())


def _skipped_row(group: list[SkippedModule]) -> list[object]:
    return [_span([skip.path for skip in group]), len(group), group[0].type_name, group[0].reason]


def plan(
    model: nn.Module,
    targets: Patterns,
    *,
    exclude: Patterns = (),
    rank: int = 8,
    rank_pattern: Mapping[str, int] | None = None,
    method: str | Method = "map",
    update: str | Update = "lora",
    init: str | Init | None = None,
    dropout: float = 0.0,
    dtype: torch.dtype | None = None,
    train: Patterns = (),
    parameters: Patterns = (),
    tied: str = "share",
) -> Plan:
    """Dry run of `patch`: the same arguments, the same errors about names, and nothing touched.

    Returns:
        A `Plan`; printing it shows the table.

    Raises:
        TypeError, ValueError: see `patch`. What takes reading the weights (NaN) is found by `patch` alone.
    """
    from .record import unwrapped  # record.py stores this module's Config

    config = Config.checked(
        targets,
        exclude=exclude,
        rank=rank,
        rank_pattern=rank_pattern,
        method=method,
        update=update,
        init=init,
        dropout=dropout,
        dtype=dtype,
        train=train,
        parameters=parameters,
        tied=tied,
    )
    return make_plan(unwrapped(model) if isinstance(model, nn.Module) else model, config)


def module_paths(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """Every module with all of its names, in the order of the first."""
    names: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(path)
    return {module: tuple(paths) for module, paths in names.items()}


def make_plan(model: nn.Module, config: Config) -> Plan:
    """The plan for checked arguments."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    modules = module_paths(model)
    _refuse_patched(modules)
    if not any(True for _ in model.parameters()) and not any(map(quantisation.kind_of, modules)):
        raise ValueError(f"the model ({type(model).__name__}) has no parameters: there is nothing to adapt")
    all_paths = [path for paths in modules.values() for path in paths]
    trained = _trained_parameters(model, config, all_paths)
    layers: list[PlannedLayer] = []
    skipped: list[SkippedModule] = []
    for module, paths in modules.items():
        for name, pattern in _asked_for(module, paths, config).items():
            sites = site_paths(paths, name)
            reason = _reason_to_skip(module, name, paths, config, trained)
            if reason is None:
                layers.append(_planned(module, name, sites, pattern, config))
            else:
                skipped.append(SkippedModule(sites, type(module).__name__, reason))
    from .ties import resolve_ties  # which plans further holders of a tied weight

    layers, tie_notes = resolve_ties(model, layers, config)
    counts = {p: _count(layers, p) for p in (*config.targets, *config.parameters)}
    _refuse_unmatched(config, counts, layers, skipped, model)
    layers = [replace(layer, notes=(*layer.notes, *tie_notes.get(layer.path, ()))) for layer in layers]
    return Plan(
        config=config,
        layers=tuple(layers),
        skipped=tuple(skipped),
        counts=counts,
        trained=tuple(trained),
        trained_parameters=sum(p.numel() for p in trained.values()),
        model_parameters=count_parameters(model),
    )


def site_paths(module_paths: Iterable[str], parameter: str) -> tuple[str, ...]:
    """Names of a parameter that is adapted: that of its module for a ``weight``, its own for another."""
    return tuple(p if parameter == "weight" else f"{p}.{parameter}".lstrip(".") for p in module_paths)


def _asked_for(module: nn.Module, paths: tuple[str, ...], config: Config) -> dict[str, str]:
    """Parameters of a module that a pattern takes, each with the first pattern that does."""
    if any(f".{path}.".find(".parametrizations.") >= 0 for path in paths):
        return {}  # the originals of a parametrised weight, which is adapted as a whole
    named = {
        name: pattern
        for name, parameter in module._parameters.items()
        if parameter is not None
        and (pattern := first_match([f"{path}.{name}".lstrip(".") for path in paths], config.parameters)) is not None
    }
    pattern, kind = first_match(paths, config.targets), find_type(type(module))
    if pattern is None or not _has_weights(module) or (named and kind is None):
        return named
    return named | dict.fromkeys(kind.parameters_of(module) if kind is not None else ["weight"], pattern)


def _count(layers: list[PlannedLayer], pattern: str) -> int:
    return sum(any(matches(path, pattern) for path in _names(layer.paths, layer.parameter)) for layer in layers)


def _names(sites: tuple[str, ...], parameter: str) -> tuple[str, ...]:
    """What a pattern may call a site: a weight answers to its own name, too."""
    return (*sites, *(f"{site}.weight".lstrip(".") for site in sites)) if parameter == "weight" else sites


def _has_weights(module: nn.Module) -> bool:
    """Whether a module holds numbers of its own; a quantised or parametrised weight is none of its parameters."""
    named = "weight" in module._buffers or hasattr(type(module), "weight")
    return named or bool(module._parameters) or quantisation.kind_of(module) is not None


def count_parameters(model: nn.Module) -> int:
    """Number of parameters of a model; those of lazy modules have no size yet."""
    return sum(p.numel() for p in model.parameters() if not isinstance(p, UninitializedParameter))


def _refuse_patched(modules: dict[nn.Module, tuple[str, ...]]) -> None:
    patched = [paths[0] or "the model itself" for module, paths in modules.items() if isinstance(module, AdaptedLayer)]
    if patched:
        raise ValueError(
            f"the model is patched already ({len(patched)} adapted layers: {_shortened(tuple(patched), 3)}); "
            "call mapsurgery.unpatch or mapsurgery.merge first"
        )


def _trained_parameters(model: nn.Module, config: Config, all_paths: list[str]) -> dict[str, nn.Parameter]:
    """Parameters that `train` names, by their first name."""
    found: dict[str, nn.Parameter] = {}
    named = list(model.named_parameters(remove_duplicate=False))  # a tied parameter answers to each of its names
    for pattern in config.train:
        taken = {name: p for name, p in named if matches(name, pattern)}
        if not taken:
            raise ValueError(_no_match("train", pattern, [*all_paths, *(name for name, _ in named)]))
        found.update(taken)
    integers = [name for name, parameter in found.items() if not parameter.is_floating_point()]
    if integers:
        raise ValueError(f"train names {integers[0]}, a {found[integers[0]].dtype} parameter, which cannot be trained")
    chosen = set(found.values())
    return {name: p for name, p in model.named_parameters() if p in chosen}


def _reason_to_skip(
    module: nn.Module, name: str, paths: tuple[str, ...], config: Config, trained: dict[str, nn.Parameter]
) -> str | None:
    excluded = first_match(paths, config.exclude) or first_match(site_paths(paths, name), config.exclude)
    if excluded is not None:
        return f"excluded by {excluded!r}"
    if any(part is parameter for part in _parts(module, name) for parameter in trained.values()):
        return "trained in full, as `train` asks"
    named = first_match([f"{path}.{name}".lstrip(".") for path in paths], config.parameters) is not None
    reason = why_not(module, name, raw=named)
    if reason is not None and find_type(type(module)) is None and not named:
        raw = [f"{n} {tuple(p.shape)}" for n, p in module._parameters.items() if p is not None and _is_raw(p)]
        return f"{reason}; name its raw parameters in `parameters`: {', '.join(raw)}" if raw else reason
    return reason


def _is_raw(parameter: nn.Parameter) -> bool:
    return parameter.dim() > 1 and parameter.is_floating_point()


def _parts(module: nn.Module, name: str) -> list[nn.Parameter]:
    """The Parameters that a weight is, or is computed from."""
    if parametrize.is_parametrized(module, name):
        return list(module.parametrizations[name].parameters())  # type: ignore[index, union-attr]
    own = [module._parameters.get(n) for n in (name, f"{name}_g", f"{name}_v", f"{name}_orig")]
    return [parameter for parameter in own if parameter is not None]


def _planned(module: nn.Module, name: str, sites: tuple[str, ...], pattern: str, config: Config) -> PlannedLayer:
    asked = next((rank for glob, rank in config.rank_pattern.items() if first_match(sites, [glob])), config.rank)
    layer = planned_layer(module, name, sites, pattern, asked, config)
    return replace(layer, notes=_own_notes(layer, config))


def planned_layer(
    module: nn.Module, name: str, sites: tuple[str, ...], pattern: str, asked: int, config: Config
) -> PlannedLayer:
    """The entry of a parameter that can be adapted (`why_not` gave no reason), its rank limited to what is possible."""
    layer_type = find_type(type(module))
    if layer_type is not None and name not in layer_type.parameters_of(module):
        layer_type = None
    weight = weight_of(module, name)
    assert weight is not None
    stacked = layer_type is None and weight.dim() == 3
    matrix = matrix_of(weight.shape, layer_type is not None and layer_type.transposed, stacked)
    rank = config.update.limited(asked, matrix)
    shapes = parameter_shapes(config, matrix, rank)
    trainable = sum(math.prod(shape) for n, shape in shapes.items() if n not in config.method.fixed())
    shape = tuple(weight.shape)
    replaced = _is_replaced(module, name, layer_type)
    groups = module.groups if replaced and isinstance(module, _ConvNd) else None
    own = (layer_type, shape, matrix, stacked, rank, asked, pattern, config, replaced, groups, trainable)
    return PlannedLayer(module, name, sites, *own)


def _is_replaced(module: nn.Module, name: str, layer_type: LayerType | None) -> bool:
    """Whether the forward of a layer is to be one of ours."""
    if layer_type is None or (name == "weight" and quantisation.kind_of(module) is not None):
        return False
    fused = mixin_of(type(module), (name,)) is layer_type.fused
    return fused and not getattr(module, "scale_grad_by_freq", False)


def parameter_shapes(config: Config, matrix: Matrix, rank: int, frozen: bool = False) -> dict[str, tuple[int, ...]]:
    """Shapes of an adapter's own parameters; with `frozen` of all that a file holds of it."""
    of_update = config.update.shapes(matrix, rank)
    kept = {name: shape for name, shape in of_update.items() if frozen or name not in config.update.frozen}
    return kept | config.method.shapes(matrix)


def _own_notes(layer: PlannedLayer, config: Config) -> tuple[str, ...]:
    weight = weight_of(layer.module, layer.parameter)
    assert weight is not None
    notes = []
    if layer.rank < layer.requested_rank:
        notes.append(f"rank {layer.requested_rank} is more than the layer allows: {layer.rank}")
    if layer.stacked:
        notes.append(f"{layer.matrices} matrices, adapted one by one")
    if layer.quantisation is not None:
        return (*notes, f"quantised ({layer.quantisation.name}): runs on its own kernel")
    if not layer.replaced:
        notes.append("own forward, runs on W'")
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


def _no_match(argument: str, pattern: str, paths: list[str]) -> str:
    close = nearest(pattern, paths)
    hint = (
        f"the nearest that exist: {', '.join(close)}"
        if close
        else f"for example: {', '.join(p for p in paths[:6] if p)}"
    )
    return f"{argument} pattern {pattern!r} matches no module of the model; {hint}"


def _refuse_unmatched(
    config: Config,
    counts: dict[str, int],
    layers: list[PlannedLayer],
    skipped: list[SkippedModule],
    model: nn.Module,
) -> None:
    paths = [path for path, _ in model.named_modules(remove_duplicate=False)]
    names = [*paths, *(name for name, _ in model.named_parameters(remove_duplicate=False))]
    asked = (("targets", config.targets, paths), ("exclude", config.exclude, names))
    for argument, patterns, known in (*asked, ("parameters", config.parameters, names)):
        for pattern in patterns:
            if not any(matches(path, pattern) for path in known):
                raise ValueError(_no_match(argument, pattern, known))
    for argument, patterns in (("targets", config.targets), ("parameters", config.parameters)):
        for pattern in patterns:
            _refuse_uncounted(argument, pattern, counts[pattern], skipped)
    for pattern in config.rank_pattern:
        if not any(first_match(layer.paths, [pattern]) for layer in layers):
            raise ValueError(_no_match("rank_pattern", pattern, [layer.path for layer in layers]))


def _refuse_uncounted(argument: str, pattern: str, count: int, skipped: list[SkippedModule]) -> None:
    covered = [skip for skip in skipped if first_match(skip.paths, [pattern])]
    if count == 0 and covered:
        reasons = "; ".join(f"{s.path or 'the model itself'} ({s.type_name}): {s.reason}" for s in covered[:5])
        raise ValueError(f"{argument} pattern {pattern!r} matches nothing that can be adapted: {reasons}")
    if count == 0:
        raise ValueError(f"{argument} pattern {pattern!r} matches only modules without parameters of their own")


def build(layer: PlannedLayer, config: Config, siblings: dict[Any, Any], start: bool = True) -> Adapter:
    """The adapter of a planned layer, on its own weight; the layer is not changed.

    Args: siblings: what the adapters of the model share; start: False where the adapter is about to be loaded.
    """
    weight = weight_of(layer.module, layer.parameter)
    assert weight is not None
    return Adapter(
        weight,
        method=config.method,
        update=config.update,
        rank=layer.rank,
        init=config.init,
        dropout=config.dropout,
        dtype=layer.dtype or config.dtype or default_dtype(weight.dtype),
        transposed=layer.transposed,
        stacked=layer.stacked,
        name=layer.path,
        weight_norm=norm_of(layer) if layer.weight_norm is None and layer.quantisation else layer.weight_norm,
        values=partial(quantisation.dequantised, layer.module) if layer.quantisation else None,
        siblings=siblings,
        start=start,
    )


def norm_of(layer: PlannedLayer) -> float | list[float]:
    """||W||_F of a planned layer, or one for each matrix of a stack; a quantised weight is dequantised for it."""
    if layer.quantisation is not None:
        return frobenius_norms(quantisation.dequantised(layer.module))
    weight = weight_of(layer.module, layer.parameter)
    assert weight is not None
    return frobenius_norms(weight.detach(), layer.stacked)
