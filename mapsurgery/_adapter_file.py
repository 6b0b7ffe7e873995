"""Adapter files: one safetensors file, written whole or not at all, checked before it touches a model."""

from __future__ import annotations

import json
import math
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ._atomic_write import write_whole
from ._base import (
    MOVING,
    Base,
    Surroundings,
    acts_as,
    check_choice,
    check_surroundings,
    judge,
    moves,
    unlike,
)
from ._state_dict import Pairs, adapter_state_dict, all_finite, changed_buffers, fitting, put
from ._tensor_file import CHECKSUM, TensorFile, content_of, opened, refuse_too_large
from .methods.adapter import DTYPES, Adapter, common_row, measured
from .progress import progress
from .surgery import trainers
from .surgery.all_or_nothing import Change, Journal, all_or_nothing, make
from .surgery.config import Config
from .surgery.layers import padding_of, weight_of, why_not
from .surgery.offloaded import at_hand
from .surgery.patch import prepared
from .surgery.paths import entry, module_paths, site_paths, unwrapped
from .surgery.plan import Plan, count_parameters
from .surgery.planned import PlannedLayer, parameter_shapes, planned_layer
from .surgery.quantised import kinds
from .surgery.record import (
    Site,
    all_sites,
    find_trained,
    intact_sites,
    moved_names,
    one_per_adapter,
    parameters_of,
    patched_parts,
    persistent_buffers,
    refuse_frozen,
    refuse_spread,
    trained_names,
)
from .surgery.reducers import refuse_reduced

ADAPTER_NAME = "adapter.safetensors"
"""Of a file in a folder that another tool chose."""

FORMAT = "mapsurgery"
FORMAT_VERSION = 4
_WITHOUT_CHECKSUM = ("1", "2", "3")
_READABLE = (*_WITHOUT_CHECKSUM, "4")
"""1 has one tensor more for each layer, "form", which says what the configuration says as well. In 1 and 2
alpha of MAP and m of DoRA are the magnitudes themselves, since then their distance from the base's. Before 4 there is
no checksum, and of the base nothing but the norms of adapted weights is known."""

Model = TypeVar("Model", bound=nn.Module)
Path = str | os.PathLike[str]


def save(model: nn.Module, path: Path, *, frozen: str = "refuse") -> None:
    """Write what `adapter_state_dict` gives to one safetensors file.

    Args:
        frozen: what becomes of adapters, and of what `train` named, that were frozen after `patch` while others train,
            and so may never have learned: "refuse" is an error, "keep" writes them as they are.

    The metadata holds the format and library versions, the configuration, and for each layer its type, shape, rank and
    ||W||_F of the base. The file is written beside its destination and renamed: a crash leaves the old file or the
    new one.

    Raises:
        ValueError: a layer's weight is still on meta, an adapter holds NaN or infinity, layers were built with
            different methods, updates or starts, something was frozen (see `frozen`), or what `adapter_state_dict`
            refuses.
        OSError: the file cannot be written; an existing one is left as it was.
    """
    root, record = find_trained(model)
    sites = intact_sites(root, record)
    refuse_spread(sites, "save")
    if any(parameter.requires_grad for parameter in root.parameters()):  # else training is over
        refuse_frozen(root, record, frozen, "they would be written without having learned since")
    _refuse_mixed(sites, record.config)
    every = all_sites(root)
    holders: dict[Adapter, list[Site]] = {}
    for site in every:
        holders.setdefault(site.adapter, []).append(site)
    layers = {site.path: _describe(site, holders) for site in progress(sites, "reading norms")}
    tensors = adapter_state_dict(model)
    buffers = changed_buffers(root, record)
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "library_version": _library_version(),
        "config": json.dumps(record.config.to_dict()),
        "layers": json.dumps(layers),
        "trained": json.dumps(list(trained_names(root, record))),
        "moved": json.dumps(list(moved_names(root, record))),
        "buffers": json.dumps(buffers),
        "cut": json.dumps(list(record.cut(root, {path for site in every for path in site.paths})[1])),
        "form": json.dumps(record.config.update.form()),
        "surroundings": json.dumps(tensors._metadata[""]["surroundings"]),  # type: ignore[attr-defined]
    }
    diverged = [name for name, tensor in tensors.items() if name not in buffers and not all_finite(tensor)]
    if diverged:
        raise ValueError(f"what was trained holds NaN or infinite values, nothing was saved: {', '.join(diverged[:5])}")
    write_whole({os.fsdecode(path): content_of(tensors, metadata)})


def _refuse_mixed(sites: list[Site], config: Config) -> None:
    """Layers that were not made by one `patch` may differ in what a file says once."""
    for site in sites:
        own = site.adapter
        if (own.method, own.update, own.init) != (config.method, config.update, config.init):
            raise ValueError(
                f"{site.path} has {own.method}, {own.update}, {own.init}, but another layer {config.method}, "
                f"{config.update}, {config.init}: a file holds adapters of one kind"
            )


def _library_version() -> str:
    try:
        return version("mapsurgery")
    except PackageNotFoundError:
        return "unknown"


def _describe(site: Site, holders: Mapping[Adapter, list[Site]]) -> dict[str, Any]:
    adapter = site.adapter
    if adapter.weight_norm.is_meta or adapter.pending:
        raise ValueError(f"{site.path}: its weight is not loaded (meta device): there is no adapter to save yet")
    base = Base.of(site)
    norms = base.norms.tolist()
    return {
        "layer": site.layer_path,
        "parameter": site.parameter,
        "tied": [[s.layer_path, s.parameter] for s in holders.get(adapter, ()) if s.path != site.path],
        "type": site.layer.original_class.__name__,
        "shape": list(adapter.shape),
        "dtype": str(base.dtype).removeprefix("torch."),
        "quantised": base.quantised,
        "rank": adapter.rank,
        "acts_as": base.layer,
        "weight_norm": norms if adapter.stacked else norms[0],
        "sketch": None if base.sketch is None else base.sketch.tolist(),
        "kept_row": adapter.kept_row,
    }


@dataclass(frozen=True)
class _File:
    """An adapter file, parsed and checked in itself."""

    path: str
    version: str
    config: Config
    layers: dict[str, dict[str, Any]]
    trained: tuple[str, ...]
    moved: tuple[str, ...]
    buffers: tuple[str, ...]
    cut: tuple[str, ...]
    surroundings: Surroundings | None
    tensors: dict[str, Tensor]


def load(model: Model, path: Path, *, base: str = "refuse") -> Model:
    """Patch a fresh model as the file says, and put the file's adapter into it.

    Args:
        model: the base model that the adapter was trained on, not patched, its weights loaded.
        path: a file that `save` wrote. It is data only: nothing in it is executed or unpickled.
        base: what becomes of an adapter that was trained on another base: "refuse" is an error, "warn" loads it with a
            warning that says what differs, "ignore" loads it and looks at no weight. Compared are, of each adapted
            layer, what it does, and norm and sketch of its weight (`ops.fingerprint`), up to the rounding of a cast
            or a quantisation; of everything else that the file does not hold, up to 64 numbers of each tensor. What is
            promised of that, and what not: docs/reliability.md.

    Returns:
        The same model, patched; layers that `train` named at `patch` are trainable again.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of an unknown version or inconsistent, or does not fit the model: a layer is
            missing, has another shape, or the base is another (see `base`). The message names it, and the model is as
            it was.
    """
    change = loading(model, path, base)
    trainers.warn(change.model, stacklevel=2)
    make(change)
    return model


def loading(model: nn.Module, path: Path, base: str = "refuse") -> Change:
    """What `load` does, ready to be done."""
    check_choice(base)
    refuse_reduced(model)
    root = unwrapped(model)
    with opened(path) as source:
        described = _parsed(source)
        plan = _plan_of(root, described)  # shapes first: then the file is no larger than what the model takes
        file = _filled(described, source)
    if base != "ignore":
        judge(_differences(root, file, plan.layers), base, file.path, stacklevel=3)

    def fill(journal: Journal) -> None:
        put(root, _named_by(root, file), journal)
        _count_from_base(root, file)

    return prepared(root, plan, start=False).then(fill)


def restore(model: nn.Module, path: Path) -> None:
    """Put a file's adapter into a model that is patched already, in the same way and on the same base.

    Every parameter stays the object that an optimiser knows, and takes the file's values. Buffers that the file leaves
    out go back to what they were at `patch`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the model is not patched, or the file does not fit it (see `load`); nothing is changed then.
    """
    restore_each([(model, path)])


def restore_each(models: Iterable[tuple[nn.Module, Path]]) -> None:
    """`restore` of several models, each from a file of its own: all of them, or none."""
    files = [(model, _read(path, find_trained(model)[0])) for model, path in models]
    pairs = [pair for model, file in files for pair in _fitting(model, file)]
    with all_or_nothing() as journal:
        for value, place in pairs:
            journal.write(place, value)
        for model, file in files:
            _count_from_base(find_trained(model)[0], file)


def _fitting(model: nn.Module, file: _File) -> Pairs:
    """What `restore` writes, each tensor with its place."""
    root, record = find_trained(model)
    for name in ("method", "update", "init"):
        own, saved = getattr(record.config, name), getattr(file.config, name)
        if own != saved:
            raise ValueError(f"{file.path} was trained with {name} {saved}, the model is patched with {own}")
    sites = intact_sites(root, record)
    refuse_spread(sites, "load")
    holders = _holders(root)
    unknown = [name for name in file.layers if name not in holders]
    if unknown:
        raise ValueError(f"{file.path} adapts layers that the model does not: {', '.join(unknown[:5])}")
    before = record.originals.tensors
    state = OrderedDict((name, t) for name in persistent_buffers(root) if (t := before.get(name)) is not None)
    state.update(_named_by(root, file))
    bases = {holders[name].entry(""): {"base": asdict(_base_of(layer))} for name, layer in file.layers.items()}
    state._metadata = {"": {"surroundings": file.surroundings}, **bases}  # type: ignore[attr-defined]
    return fitting(model, state)


def _holders(model: nn.Module) -> dict[str, Site]:
    """The site that holds the adapter, by every name of every layer that computes with it."""
    sites = all_sites(model)
    first = {id(site.adapter): site for site in one_per_adapter(sites)}
    return {path: first[id(site.adapter)] for site in sites for path in site.paths}


@torch.no_grad()
def _count_from_base(model: nn.Module, file: _File) -> None:
    """Magnitudes of an old file."""
    if file.version in ("1", "2"):
        for site in one_per_adapter(all_sites(model)):
            site.adapter.method.count_from_base(site.adapter)


def _named_by(model: nn.Module, file: _File) -> dict[str, Tensor]:
    """The file's tensors by their names in this model, which may list a layer's several names in another order."""
    holders = _holders(model)
    renamed = {
        _entry(layer, role): holders[name].entry(role)
        for name, layer in file.layers.items()
        for role in _roles(file, layer)
    }
    return {renamed.get(name, name): tensor for name, tensor in file.tensors.items()}


def _read(path: Path, model: nn.Module) -> _File:
    with opened(path) as source:
        refuse_too_large(source, model)
        return _filled(_parsed(source), source)


def _parsed(source: TensorFile) -> _File:
    """A file that is consistent in itself, its tensors on meta."""
    path, metadata = source.path, source.metadata
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is a safetensors file, but not one that mapsurgery.save wrote")
    _check_version(path, metadata.get("format_version"))
    if metadata["format_version"] not in _WITHOUT_CHECKSUM and CHECKSUM not in metadata:
        raise ValueError(f"{path} is damaged: its metadata has no {CHECKSUM!r}")
    file = _File(
        path=path,
        version=metadata["format_version"],
        config=_config(path, _json(path, metadata, "config", dict)),
        layers=_json(path, metadata, "layers", dict),
        trained=_names(path, metadata, "trained"),
        moved=_names(path, {"moved": "[]", **metadata}, "moved"),  # files of 0.1 have none
        buffers=_names(path, metadata, "buffers"),
        cut=_names(path, metadata, "cut") if "cut" in metadata else (),
        surroundings=None if metadata["format_version"] in _WITHOUT_CHECKSUM else _surroundings(path, metadata),
        tensors=dict(source.shapes),
    )
    if metadata["format_version"] == "1":
        for layer in file.layers.values():
            file.tensors.pop(_entry(layer, "form"), None)
    else:
        _check_form(file, _json(path, metadata, "form", dict))
    _check_consistent(file)
    return file


def _filled(file: _File, source: TensorFile) -> _File:
    """The file with its tensors."""
    tensors = source.read()
    diverged = [name for name in file.tensors if name not in file.buffers and not all_finite(tensors[name])]
    if diverged:
        raise ValueError(f"{file.path}: {', '.join(diverged[:5])} holds NaN or infinite values")
    return replace(file, tensors={name: tensors[name] for name in file.tensors})


def _check_form(file: _File, found: dict[str, float]) -> None:
    own = file.config.update.form()
    if found.keys() != own.keys() or not all(abs(own[name] - found[name]) <= 1e-6 * abs(own[name]) for name in own):
        raise ValueError(
            f"{file.path}: update {file.config.update.name!r} was trained with {found}, and has {own} here"
        )


def _check_version(path: str, found: str | None) -> None:
    if found not in _READABLE:
        raise ValueError(f"{path} has format version {found!r}; this mapsurgery reads {' and '.join(_READABLE)}")


def _json(path: str, metadata: Mapping[str, str], key: str, kind: type) -> Any:
    try:
        value = json.loads(metadata[key])
    except KeyError:
        raise ValueError(f"{path}: its metadata has no {key!r}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {key!r} in its metadata is not valid JSON: {error}") from None
    if not isinstance(value, kind):
        raise ValueError(f"{path}: {key!r} in its metadata must be a {kind.__name__}, got {type(value).__name__}")
    return value


def _names(path: str, metadata: Mapping[str, str], key: str) -> tuple[str, ...]:
    names = _json(path, metadata, key, list)
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: {key!r} in its metadata must be a list of names")
    return tuple(names)


def _config(path: str, value: dict[str, Any]) -> Config:
    try:
        return Config.from_dict(value)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path}: the configuration in its metadata is not valid: {error}") from error


_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
_LAYER_FIELDS: dict[str, type | tuple[type, ...]] = {
    "layer": str,
    "parameter": str,
    "tied": list,
    "type": str,
    "shape": list,
    "dtype": str,
    "rank": int,
    "weight_norm": (int, float, list),
}


def _norms(layer: dict[str, Any]) -> list[float]:
    """||W||_F of a layer in a file; several for a stack."""
    norms = layer["weight_norm"]
    return norms if isinstance(norms, list) else [norms]


def _sketch(layer: dict[str, Any]) -> Tensor | None:
    numbers = layer.get("sketch")
    return None if numbers is None else torch.tensor(numbers, dtype=torch.float64)


def _surroundings(path: str, metadata: Mapping[str, str]) -> Surroundings:
    value = _json(path, metadata, "surroundings", dict)
    if not check_surroundings(value):
        raise ValueError(f"{path}: 'surroundings' in its metadata is not what mapsurgery.save writes")
    return value


def _is_sketch(rows: Any, matrices: int) -> bool:
    if rows is None:
        return True
    if not isinstance(rows, list) or len(rows) != matrices or not all(isinstance(row, list) for row in rows):
        return False
    return all(len(row) == 8 and all(type(x) in (int, float) and abs(x) < 1e300 for x in row) for row in rows)


def _tensor(numbers: float | list[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)  # whatever torch's default dtype is


def _entry(layer: dict[str, Any], role: str) -> str:
    """Name of a tensor of a layer's adapter."""
    return entry(layer["layer"], layer["parameter"], role)


def _roles(file: _File, layer: dict[str, Any]) -> tuple[str, ...]:
    """Names of the tensors of a layer's adapter. Which there are may depend on the weight's shape and on the rank."""
    known = {*file.config.update.roles, *file.config.update.frozen, *file.config.method.roles}
    return tuple(sorted(role for role in known if _entry(layer, role) in file.tensors))


def _check_consistent(file: _File) -> None:
    """The tensors are those that the metadata announces, of dtypes that adapters have."""
    expected = {*file.trained, *file.moved, *file.buffers}
    if not file.layers:
        raise ValueError(f"{file.path}: its metadata names no layers")
    for name, layer in file.layers.items():
        if not isinstance(layer, dict):
            raise ValueError(f"{file.path}: the entry of layer {name} is not a dictionary")
        for key, kind in _LAYER_FIELDS.items():
            if not isinstance(layer.get(key), kind) or isinstance(layer[key], bool):
                raise ValueError(f"{file.path}: layer {name} has {key} = {layer.get(key)!r} in the metadata")
        if not all(isinstance(norm, int | float) and 0 <= norm < 1e300 for norm in _norms(layer)):
            raise ValueError(f"{file.path}: layer {name} has weight_norm = {layer['weight_norm']}")
        if not _is_sketch(layer.get("sketch"), len(_norms(layer))) or not isinstance(layer.get("acts_as", ""), str):
            raise ValueError(f"{file.path}: layer {name} has a sketch or acts_as that mapsurgery.save does not write")
        places = [[layer["layer"], layer["parameter"]], *layer["tied"]]
        if not all(isinstance(place, list) and [type(part) for part in place] == [str, str] for place in places):
            raise ValueError(f"{file.path}: layer {name} is tied with {layer['tied']!r}, expected pairs of names")
        if site_paths([layer["layer"]], layer["parameter"]) != (name,):
            raise ValueError(f"{file.path}: layer {name} is {layer['layer']} {layer['parameter']} in its own entry")
        if layer["dtype"] not in _DTYPES:
            raise ValueError(f"{file.path}: layer {name} has dtype = {layer['dtype']!r}, expected one of {[*_DTYPES]}")
        expected |= {_entry(layer, role) for role in _roles(file, layer)}
    missing, unknown = sorted(expected - set(file.tensors)), sorted(set(file.tensors) - expected)
    if missing or unknown:
        raise ValueError(f"{file.path}: tensors missing: {missing[:5]}, tensors that nothing announces: {unknown[:5]}")
    for name in expected - {*file.buffers}:
        tensor = file.tensors[name]
        if str(tensor.dtype).removeprefix("torch.") not in _DTYPES:
            raise ValueError(f"{file.path}: {name} is {tensor.dtype}, expected one of {[*_DTYPES]}")


def _plan_of(model: nn.Module, file: _File) -> Plan:
    """The plan that the file describes, every layer checked against the model, before anything is touched."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if patched_parts(model):
        raise ValueError("the model is patched already: unpatch it, or load_adapter_state_dict into it")
    modules = {path: (module, paths) for module, paths in module_paths(model).items() for path in paths}
    problems: list[str] = []
    layers: list[PlannedLayer] = []
    taken: set[tuple[nn.Module, str]] = set()
    for name, described in file.layers.items():
        found = _planned_by_file(modules, name, described, file)
        if isinstance(found, list) and any((layer.module, layer.parameter) in taken for layer in found):
            found = "is a layer that the file names twice"
        if isinstance(found, list):
            layers += found
            taken |= {(layer.module, layer.parameter) for layer in found}
        else:
            problems.append(f"layer {name!r} {found}")
    problems += _problems_with_extras(model, file)
    places = {*modules, *parameters_of(model)}
    problems += [
        f"layer {name!r} is none of the file's, which a stage of a pipeline wrote; docs/training.md has how to put the "
        "stages together"
        for name in file.cut
        if name in places
    ]
    if problems:
        more = f" (and {len(problems) - 8} more)" if len(problems) > 8 else ""
        raise ValueError(f"{file.path} does not fit this model: " + "; ".join(problems[:8]) + more)
    parameters = parameters_of(model)
    return Plan(
        config=file.config,
        layers=tuple(layers),
        skipped=(),
        counts={},
        trained=file.trained,
        trained_parameters=sum(parameters[name].numel() for name in file.trained),
        model_parameters=count_parameters(model),
    )


def _planned_by_file(
    modules: dict[str, tuple[nn.Module, tuple[str, ...]]], name: str, described: dict[str, Any], file: _File
) -> list[PlannedLayer] | str:
    """The entries of a layer and of those that share its adapter, or what does not fit."""
    found: list[PlannedLayer] = []
    for path, parameter in [(described["layer"], described["parameter"]), *described["tied"]]:
        module, paths = modules.get(path, (None, ()))
        problem, rank = _problem_with(module, parameter, described), described["rank"]
        if problem is not None or module is None:
            return f"{problem} ({path})" if found else str(problem)
        layer = planned_layer(module, parameter, site_paths(paths, parameter), "(file)", rank, file.config)
        problem = _problem_with_factors(layer, described, file)
        if problem is not None:
            return problem
        if found and module._parameters.get(parameter) is not found[0].module._parameters.get(found[0].parameter):
            return f"is tied with {layer.path} in the file, but not in this model"
        norms = tuple(float(norm) for norm in _norms(described))
        dtype = file.tensors[_entry(described, _roles(file, described)[0])].dtype
        shares = found[0].path if found else None
        # Under the name that the file gives it: this model may list the names of one module in another order.
        layer = replace(layer, paths=tuple(dict.fromkeys((*site_paths([path], parameter), *layer.paths))))
        known = _sketch(described)
        found.append(
            replace(layer, weight_norm=norms if layer.stacked else norms[0], sketch=known, dtype=dtype, shares=shares)
        )
    kept = common_row([padding_of(layer.module) for layer in found], found[0].shape[0])
    if described.get("kept_row", kept) != kept:
        return f"has padding_idx {described['kept_row']} in the file, whose row stays the base's, and {kept} here"
    return found


def _problem_with(module: nn.Module | None, parameter: str, described: dict[str, Any]) -> str | None:
    if module is None:
        return "is missing"
    reason = why_not(module, parameter, raw=True)
    if reason is not None:
        return f"cannot be adapted here: {reason}"
    with at_hand(module):
        weight = weight_of(module, parameter)
    assert weight is not None
    if list(weight.shape) != described["shape"]:
        return f"has shape {tuple(weight.shape)}, the file's was {tuple(described['shape'])}"
    return "is on meta: load the model's weights first" if weight.is_meta else None


def _problem_with_factors(layer: PlannedLayer, described: dict[str, Any], file: _File) -> str | None:
    rank = described["rank"]
    if rank < 1 or rank != layer.rank:
        return f"has rank {rank} in the file, this layer allows 1 to {file.config.update.limited(rank, layer.matrix)}"
    if len(_norms(described)) != layer.matrices:
        return f"is {layer.matrices} matrices here, the file has {len(_norms(described))}"
    shapes = parameter_shapes(file.config, layer.matrix, rank, frozen=True)
    unknown = sorted({*_roles(file, described)} - {*shapes})
    if unknown:
        return f"has tensors that rank {rank} does not have here: {', '.join(unknown)}"
    for role, shape in shapes.items():
        tensor = file.tensors.get(_entry(described, role))
        if tensor is None:
            return f"needs {role} of shape {shape} for rank {rank}, the file has no tensor {_entry(described, role)}"
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            return f"needs {role} of shape {shape} for rank {rank}, the file's is {tuple(tensor.shape)} {tensor.dtype}"
    return None


def _problems_with_extras(model: nn.Module, file: _File) -> list[str]:
    """Trained parameters and buffers that the model lacks or has in another shape."""
    problems = []
    adapted = {".".join(filter(None, (layer["layer"], layer["parameter"]))) for layer in file.layers.values()}
    problems += [f"{name!r} is adapted and trained at once" for name in (*file.trained, *file.moved) if name in adapted]
    parameters: dict[str, Tensor] = dict(parameters_of(model))
    buffers = persistent_buffers(model)
    extras = (
        ("trained parameter", file.trained, parameters),
        ("moved parameter", file.moved, parameters),
        ("buffer", file.buffers, buffers),
    )
    for kind, names, own in extras:
        for name in names:
            found = tuple(file.tensors[name].shape)
            if name not in own:
                problems.append(f"{kind} {name!r} is missing")
            elif tuple(own[name].shape) != found:
                problems.append(f"{kind} {name!r} has shape {tuple(own[name].shape)}, the file's is {found}")
    return problems


def _base_of(layer: dict[str, Any]) -> Base:
    """The base that a layer's adapter in a file was trained on."""
    norms = _norms(layer)
    elements = math.prod(layer["shape"]) // len(norms)
    quantised, acts = layer.get("quantised", ""), layer.get("acts_as", "")
    return Base(_tensor(norms), _DTYPES[layer["dtype"]], elements, quantised, _sketch(layer), acts)


def _difference(layer: PlannedLayer, described: dict[str, Any]) -> str | None:
    """How a layer's weight is not the file's; None if it is."""
    there = _base_of(described)
    with at_hand(layer.module):
        quantised = layer.quantisation.name if layer.quantisation else ""
        quantised = quantised or (MOVING if moves(layer.module, layer.parameter) else "")
        weight = layer.weight if layer.quantisation is None else kinds.dequantised(layer.module)
        norms, sketch = measured(weight.detach(), layer.stacked)
        acts = acts_as(layer.module)
        here = Base(_tensor(norms), layer.weight.dtype, there.elements, quantised, sketch, acts)
        return here.difference(there)


def _differences(model: nn.Module, file: _File, layers: Iterable[PlannedLayer]) -> list[str]:
    """In what the model is not the base that the adapter was trained on."""
    own = [layer for layer in layers if not layer.shares]
    found = [(layer.path, _difference(layer, file.layers[layer.path])) for layer in progress(own, "comparing the base")]
    differences = [f"{path}{difference}" for path, difference in found if difference]
    if file.surroundings is not None:
        differences += unlike(model, file.surroundings)
    return differences
