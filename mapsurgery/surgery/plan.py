"""The dry run: which layers a call of `patch` would adapt, with what rank, at what cost; what it would not, and why."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from ..methods import Adapter, Init, find
from ..methods.base import check_dropout, check_rank
from ..tables import render
from .adapted import AdaptedLayer, default_dtype
from .globs import as_patterns, first_match, matches, nearest
from .layers import DTYPES, LayerType, find_type, why_not

Patterns = str | Iterable[str]


@dataclass(frozen=True)
class Config:
    """The arguments of `patch`, checked."""

    targets: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    rank: int = 8
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    method: str = "map"
    update: str = "lora"
    init: Init = field(default_factory=Init)
    dropout: float = 0.0
    dtype: torch.dtype | None = None
    train: tuple[str, ...] = ()

    @classmethod
    def checked(
        cls,
        targets: Patterns,
        exclude: Patterns = (),
        rank: int = 8,
        rank_pattern: Mapping[str, int] | None = None,
        method: str = "map",
        update: str = "lora",
        init: str | Init = "soft",
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
        train: Patterns = (),
    ) -> Config:
        """Normalised and checked arguments.

        Raises:
            TypeError, ValueError: naming the argument and its value.
        """
        ranks = dict(rank_pattern or {})
        as_patterns(ranks, "rank_pattern")
        for name, value in [("rank", rank), *((f"rank_pattern[{key!r}]", value) for key, value in ranks.items())]:
            check_rank(value, name)
        check_dropout(dropout)
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))} or None, got {dtype!r}")
        patterns = as_patterns(targets, "targets")
        if not patterns:
            raise ValueError('targets is empty: name the layers to adapt by glob, such as targets=["*attn*"]')
        find(method, update)
        return cls(
            targets=patterns,
            exclude=as_patterns(exclude, "exclude"),
            rank=rank,
            rank_pattern=ranks,
            method=method,
            update=update,
            init=Init.parse(init),
            dropout=float(dropout),
            dtype=dtype,
            train=as_patterns(train, "train"),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a file's metadata."""
        return {
            "targets": list(self.targets),
            "exclude": list(self.exclude),
            "rank": self.rank,
            "rank_pattern": dict(self.rank_pattern),
            "method": self.method,
            "update": self.update,
            "init": self.init.to_dict(),
            "dropout": self.dropout,
            "dtype": None if self.dtype is None else str(self.dtype).removeprefix("torch."),
            "train": list(self.train),
        }


@dataclass(frozen=True)
class PlannedLayer:
    """One layer to adapt.

    Attributes:
        paths: every name by which the model reaches the module; the first is the one used in files.
        shape: of the weight, as the layer holds it.
        matrix: (m, K), the weight as MAP sees it.
        rank: after the limit min(m, K); requested_rank before.
        pattern: the first target pattern that took it.
        path_kind: "fused", or "weight" where the layer's own forward runs on W'.
        weight_norm, dtype: ||W||_F and the adapter's dtype where a file gives them; else measured and by `Config`.
    """

    module: nn.Module = field(repr=False)
    paths: tuple[str, ...]
    layer_type: LayerType
    shape: tuple[int, ...]
    matrix: tuple[int, int]
    rank: int
    requested_rank: int
    pattern: str
    notes: tuple[str, ...] = ()
    weight_norm: float | None = None
    dtype: torch.dtype | None = None

    @property
    def path(self) -> str:
        return self.paths[0]

    @property
    def type_name(self) -> str:
        return type(self.module).__name__

    @property
    def path_kind(self) -> str:
        return "fused" if self.layer_type.is_standard(type(self.module)) else "weight"

    @property
    def trainable(self) -> int:
        """Trained parameters of the adapter: r (m + K) + 2."""
        return self.rank * sum(self.matrix) + 2


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
        columns = ["layer", "n", "type", "weight", "rank", "trainable", "pattern", "notes"]
        rows = [_row(group) for group in groups]
        parts = [render(f"{len(self.layers)} layers to adapt with {self.config.method}", columns, rows)]
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
        key = i if full else (*alike, tuple(_family(note) for note in layer.notes))
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
    return [name + aliases, len(group), first.type_name, shape, first.rank, trainable, first.pattern, notes]


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
    method: str = "map",
    update: str = "lora",
    init: str | Init = "soft",
    dropout: float = 0.0,
    dtype: torch.dtype | None = None,
    train: Patterns = (),
) -> Plan:
    """Dry run of `patch`: the same arguments, the same errors about names, and nothing touched.

    Returns:
        A `Plan`; printing it shows the table.

    Raises:
        TypeError, ValueError: see `patch`. What takes reading the weights (NaN) is found by `patch` alone.
    """
    from .record import unwrapped  # record.py stores this module's Config

    config = Config.checked(targets, exclude, rank, rank_pattern, method, update, init, dropout, dtype, train)
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
    if not any(True for _ in model.parameters()):
        raise ValueError(f"the model ({type(model).__name__}) has no parameters: there is nothing to adapt")
    all_paths = [path for paths in modules.values() for path in paths]
    trained = _trained_parameters(model, config, all_paths)
    layers: list[PlannedLayer] = []
    skipped: list[SkippedModule] = []
    for module, paths in modules.items():
        pattern = first_match(paths, config.targets)
        if pattern is None or not _has_weights(module):
            continue
        reason = _reason_to_skip(module, paths, config, trained)
        if reason is None:
            layers.append(_planned(module, paths, pattern, config))
        else:
            skipped.append(SkippedModule(paths, type(module).__name__, reason))
    counts = {p: sum(any(matches(path, p) for path in layer.paths) for layer in layers) for p in config.targets}
    _refuse_unmatched(config, counts, layers, skipped, all_paths)
    notes = _tie_notes(model, layers)
    layers = [replace(layer, notes=(*layer.notes, *notes.get(layer.path, ()))) for layer in layers]
    return Plan(
        config=config,
        layers=tuple(layers),
        skipped=tuple(skipped),
        counts=counts,
        trained=tuple(trained),
        trained_parameters=sum(p.numel() for p in trained.values()),
        model_parameters=count_parameters(model),
    )


def _has_weights(module: nn.Module) -> bool:
    """Whether a module holds numbers of its own; a quantised or parametrised weight is none of its parameters."""
    return bool(module._parameters) or "weight" in module._buffers or hasattr(type(module), "weight")


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
    module: nn.Module, paths: tuple[str, ...], config: Config, trained: dict[str, nn.Parameter]
) -> str | None:
    excluded = first_match(paths, config.exclude)
    if excluded is not None:
        return f"excluded by {excluded!r}"
    if any(module._parameters.get("weight") is parameter for parameter in trained.values()):
        return "trained in full, as `train` asks"
    return why_not(module)


def _planned(module: nn.Module, paths: tuple[str, ...], pattern: str, config: Config) -> PlannedLayer:
    asked = next((rank for glob, rank in config.rank_pattern.items() if first_match(paths, [glob])), config.rank)
    layer = planned_layer(module, paths, pattern, asked)
    return replace(layer, notes=_own_notes(layer, config))


def planned_layer(module: nn.Module, paths: tuple[str, ...], pattern: str, asked: int) -> PlannedLayer:
    """The entry of a layer that can be adapted (`why_not` gave no reason), its rank limited to min(m, K)."""
    layer_type = find_type(type(module))
    weight = module._parameters["weight"]
    assert layer_type is not None and weight is not None
    m = weight.shape[1] if layer_type.transposed else weight.shape[0]
    matrix = (m, weight.numel() // m)
    return PlannedLayer(module, paths, layer_type, tuple(weight.shape), matrix, min(asked, *matrix), asked, pattern)


def _own_notes(layer: PlannedLayer, config: Config) -> tuple[str, ...]:
    weight: torch.Tensor = layer.module._parameters["weight"]  # type: ignore[assignment]
    notes = []
    if layer.rank < layer.requested_rank:
        notes.append(f"rank {layer.requested_rank} is more than the layer allows: {layer.rank}")
    if layer.path_kind == "weight":
        notes.append("own forward, runs on W'" + (" (no dropout)" if config.dropout else ""))
    if weight.is_meta:
        notes.append("on meta: the norm is taken when the weight arrives")
    elif _is_zero(weight.detach()):
        notes.append("zero weight: no base term, beta absolute")
    return tuple(notes)


def _is_zero(weight: torch.Tensor) -> bool:
    """Whether all elements are 0. One look at the first spares reading most weights."""
    return weight[(0,) * weight.dim()].item() == 0 and not weight.any()


def _tie_notes(model: nn.Module, layers: list[PlannedLayer]) -> dict[str, tuple[str, ...]]:
    """Layers whose weight another module holds as well."""
    holders: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(f"{path}.{name}" if path else name)
    notes: dict[str, tuple[str, ...]] = {}
    for layer in layers:
        weight = layer.module._parameters["weight"]
        own = {f"{path}.weight" if path else "weight" for path in layer.paths}
        others = [name for name in holders[id(weight)] if name not in own]
        if others:
            notes[layer.path] = (f"tied with {', '.join(others)}, which keeps the base weight",)
    return notes


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
    all_paths: list[str],
) -> None:
    for argument, patterns in (("targets", config.targets), ("exclude", config.exclude)):
        for pattern in patterns:
            if not any(matches(path, pattern) for path in all_paths):
                raise ValueError(_no_match(argument, pattern, all_paths))
    for pattern, count in counts.items():
        covered = [skip for skip in skipped if first_match(skip.paths, [pattern])]
        if count == 0 and covered:
            reasons = "; ".join(f"{s.path or 'the model itself'} ({s.type_name}): {s.reason}" for s in covered[:5])
            raise ValueError(f"targets pattern {pattern!r} matches nothing that can be adapted: {reasons}")
        if count == 0:
            raise ValueError(f"targets pattern {pattern!r} matches only modules without parameters of their own")
    for pattern in config.rank_pattern:
        if not any(first_match(layer.paths, [pattern]) for layer in layers):
            raise ValueError(_no_match("rank_pattern", pattern, [layer.path for layer in layers]))


def build(layer: PlannedLayer, config: Config) -> Adapter:
    """The adapter of a planned layer, on its own weight; the layer is not changed."""
    weight = layer.module._parameters["weight"]
    assert weight is not None
    return find(config.method, config.update)(
        weight,
        rank=layer.rank,
        init=config.init,
        dropout=config.dropout,
        dtype=layer.dtype or config.dtype or default_dtype(weight.dtype),
        transposed=layer.layer_type.transposed,
        name=layer.path,
        weight_norm=layer.weight_norm,
    )
