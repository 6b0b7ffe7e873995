"""From a PEFT adapter to a model patched with LoRA or DoRA."""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..._tensor_file import OtherChecksum, open_file, opened, refuse_too_large
from ...methods import Dora, Lora
from ...surgery.adapted import AdaptedLayer
from ...surgery.all_or_nothing import Change, Journal, make
from ...surgery.config import Config
from ...surgery.layers import padding_of, weight_of, why_not
from ...surgery.patch import prepared
from ...surgery.paths import module_paths, site_paths, unwrapped
from ...surgery.plan import Plan, count_parameters
from ...surgery.planned import PlannedLayer, planned_layer
from ...surgery.quantised import kinds
from ...surgery.record import parameters_of, persistent_buffers
from ...surgery.reducers import refuse_reduced
from ...updates import Matrix
from .layout import (
    CONFIG_FILE,
    PREFIX,
    WEIGHTS_FILE,
    Layout,
    has_empty_row,
    layout_of,
    meaning_of,
    why_not_by_name,
)
from .settings import Settings, read_settings

Model = TypeVar("Model", bound=nn.Module)

_LONGEST_CONFIG = 100_000_000

_KEY = re.compile(
    r"(?:(?P<path>.+)\.)?(?:"
    r"(?P<factor>lora_[AB])(?:\.(?P<name1>.+))?\.weight"
    r"|(?P<embedding>lora_embedding_[AB])(?:\.(?P<name2>.+))?"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.(?P<name3>.+?))?(?:\.weight)?)"
)
"""Names of an adapter's tensors, with the adapter's own name in them or without."""


def load_peft(model: Model, path: str | os.PathLike[str]) -> Model:
    """Patch a fresh model as a PEFT adapter says, and put the adapter into it.

    Args:
        model: the base model, not patched, its weights loaded.
        path: the folder that PEFT's `save_pretrained` (or `save_peft`) wrote, or its `adapter_model.safetensors`, with
            `adapter_config.json` beside it. Data only: nothing in it is executed or unpickled.

    Returns:
        The same model, patched with method "lora" or "dora"; see `from_peft_state_dict`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or what `from_peft_state_dict` refuses. The model is then as it was.
    """
    path = os.fspath(path)
    weights = os.path.join(path, WEIGHTS_FILE) if os.path.isdir(path) else path
    config = os.path.join(os.path.dirname(weights), CONFIG_FILE)
    if not os.path.exists(weights) and os.path.exists(os.path.join(path, "adapter_model.bin")):
        raise ValueError(f"{path} holds adapter_model.bin, a pickle: save it with safetensors (PEFT's default) first")
    for file in (weights, config):
        if not os.path.exists(file):
            raise FileNotFoundError(f"no such file of a PEFT adapter: {file}")
    settings, tensors = _read_pair(config, weights, model)
    return from_peft_state_dict(model, tensors, settings)


def _read_pair(config: str, weights: str, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Both files of one adapter. Where another is just being written over it, they are read again."""
    for pause in (0.01, 0.1, 1.0, None):
        settings = _read_config(config)
        try:
            with opened(weights) as file:
                refuse_too_large(file, model)
                return settings, file.read(beside=meaning_of(settings))
        except OtherChecksum:
            if pause is None:
                raise
            time.sleep(pause)
    raise AssertionError("not reached")


def _read_config(path: str) -> dict[str, Any]:
    with open_file(path) as file:
        text = file.read(_LONGEST_CONFIG + 1)
    if len(text) > _LONGEST_CONFIG:
        raise ValueError(f"{path} has more than {_LONGEST_CONFIG} bytes, which no configuration has")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def from_peft_state_dict(model: Model, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Model:
    """Patch a fresh model as a PEFT adapter in memory says, and put the adapter into it.

    The layers are those that have tensors, the ranks those of the shapes; `modules_to_save` become parameters that are
    trained in full. The method's alpha is the one that most layers have: where `alpha_pattern` gives a layer another,
    its B is multiplied by the ratio (W' is the same; an optimiser's step on that B weighs accordingly). An adapter with
    init_lora_weights "pissa" or "olora" is of W less its own start, as PEFT makes it when it loads, and becomes that
    update. Layers whose weights are tied get an adapter each (`tied="separate"`), as in PEFT. Parameters are float32,
    float64 on a float64 weight.

    Args:
        state: what `peft.get_peft_model_state_dict` gives; names with "base_model.model." or without.
        config: `LoraConfig.to_dict()`, or the content of adapter_config.json.

    Returns:
        The same model, patched with method "lora" or "dora".

    Raises:
        ValueError: the configuration asks for what there is no counterpart of, a tensor has no place, a layer is
            missing or of another shape, or means something else here; the message names them, and the model is as it
            was.
    """
    make(loading(model, state, config))
    return model


def loading(model: nn.Module, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Change:
    """What `from_peft_state_dict` does, ready to be done."""
    settings = read_settings(config)
    content = _sorted(state)
    root = unwrapped(model)
    plan, layouts = _plan_of(root, content, settings)
    fill = partial(_fill, root, plan, layouts, content, settings)
    return prepared(root, plan, start=settings.update != "lora").then(fill)


@dataclass(frozen=True)
class _Content:
    """The tensors of an adapter: those of each layer by the layer's name in PEFT, and all others."""

    layers: dict[str, dict[str, Tensor]]
    others: dict[str, Tensor]


def _sorted(state: Mapping[str, Tensor]) -> _Content:
    """Raises ValueError for what is no finite tensor of numbers, and for several adapters in one dictionary."""
    wrong = [name for name, t in state.items() if not isinstance(t, Tensor) or t.is_meta]
    wrong += [n for n, t in state.items() if n not in wrong and t.is_floating_point() and not t.isfinite().all()]
    if wrong:
        raise ValueError(f"the PEFT adapter has what is no tensor of finite numbers: {', '.join(map(str, wrong[:5]))}")
    prefixed = all(name.startswith(PREFIX) for name in state)
    content, adapters = _Content({}, {}), set()
    for full, tensor in state.items():
        name = full.removeprefix(PREFIX) if prefixed else full
        match = _KEY.fullmatch(name)
        if match is None:
            content.others[name] = tensor
            continue
        adapters.add(match["name1"] or match["name2"] or match["name3"])
        part = f"{match['factor']}.weight" if match["factor"] else match["embedding"] or match["magnitude"]
        content.layers.setdefault(match["path"] or "", {})[part] = tensor
    if not content.layers:
        raise ValueError(f"the PEFT adapter has no LoRA tensors; there are: {', '.join([*state][:5]) or 'none'}")
    if len(adapters) > 1:
        raise ValueError(f"the tensors are of several adapters ({', '.join(map(str, adapters))}): give those of one")
    return content


def _plan_of(model: nn.Module, content: _Content, settings: Settings) -> tuple[Plan, dict[str, Layout]]:
    """The plan that the adapter describes, and the layouts of its layers, all checked against the model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if any(isinstance(module, AdaptedLayer) for module in model.modules()):
        raise ValueError("the model is patched already: unpatch it first")
    refuse_reduced(model)
    modules = {path: (module, paths) for module, paths in module_paths(model).items() for path in paths}
    trained, problems = _trained(model, content, settings)
    config = _config(content, settings, trained, model)
    layers, layouts = [], {}
    for path, tensors in content.layers.items():
        found = _planned(modules.get(path), path, tensors, settings, config)
        if isinstance(found, str):
            problems.append(f"layer {path!r} {found}")
        else:
            layers.append(found[0])
            layouts[path] = found[1]
    if problems:
        more = f" (and {len(problems) - 8} more)" if len(problems) > 8 else ""
        raise ValueError("the PEFT adapter does not fit this model: " + "; ".join(problems[:8]) + more)
    parameters = parameters_of(model)
    of_parameters = tuple(name for name in trained if name in parameters)
    plan = Plan(
        config=config,
        layers=tuple(layers),
        skipped=(),
        counts={},
        trained=of_parameters,
        trained_parameters=sum(parameters[name].numel() for name in of_parameters),
        model_parameters=count_parameters(model),
    )
    return plan, layouts


def _rank(tensors: Mapping[str, Tensor]) -> int:
    A = next((t for name, t in tensors.items() if name in ("lora_A.weight", "lora_embedding_A")), None)
    return A.shape[0] if A is not None and A.dim() > 1 else 0


def _config(content: _Content, settings: Settings, trained: list[str], model: nn.Module) -> Config:
    ranks = {path: _rank(tensors) for path, tensors in content.layers.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(map(settings.alpha_of, content.layers)).most_common(1)[0][0]
    parameters = parameters_of(model)
    return Config(
        list(ranks),
        rank=max(rank, 1),
        rank_pattern={path: r for path, r in ranks.items() if r not in (0, rank)},
        method=(Dora if settings.dora else Lora)(alpha=alpha, rslora=settings.rslora),
        update=settings.update,
        dropout=settings.dropout,
        train=[name for name in trained if name in parameters],
        tied="separate",
    )


def _planned(
    place: tuple[nn.Module, tuple[str, ...]] | None,
    path: str,
    tensors: Mapping[str, Tensor],
    settings: Settings,
    config: Config,
) -> tuple[PlannedLayer, Layout] | str:
    """The plan's entry of a layer and its layout, or what does not fit."""
    if place is None:
        return "is missing"
    module, paths = place
    parameter = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
    reason = why_not(module, parameter)
    if reason is not None:
        return f"cannot be adapted here: {reason}"
    layout = why_not_by_name(paths) or layout_of(module, parameter, settings.dora)
    if isinstance(layout, str):
        return layout
    rank, expected = _rank(tensors), settings.rank_of(path)
    shapes = layout.shapes(rank, settings.dora)
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if found != shapes or rank != expected:
        return f"needs tensors {layout.shapes(expected, settings.dora)} for rank {expected}, the adapter has {found}"
    weight = weight_of(module, parameter)
    assert weight is not None
    if weight.is_meta:
        return "is on meta: load the model's weights first"
    if settings.update == "olora" and layout.transposed:
        return "is a Conv1D, where PEFT's OLoRA takes the transpose of its start out of the base"
    if settings.dora and has_empty_row(_matrix(module, weight, layout)):
        return "has a weight with a row of zeros, by whose length PEFT's DoRA divides"
    row = padding_of(module)
    if row is not None and layout.unpack(tensors).B[row].any():
        return f"changes row {row} of its weight, its padding_idx, which an adapter leaves as it is here"
    layer = planned_layer(module, parameter, site_paths(paths, parameter), "(PEFT)", rank, config)
    if layer.rank < rank:
        return f"has rank {rank}, which is more than its weight allows here ({layer.rank})"
    return layer, layout


def _matrix(module: nn.Module, weight: Tensor, layout: Layout) -> Tensor:
    if kinds.kind_of(module) is not None:
        return kinds.dequantised(module)
    return Matrix.of(weight.shape, layout.transposed).view(weight)


def _trained(model: nn.Module, content: _Content, settings: Settings) -> tuple[list[str], list[str]]:
    """Names of what `modules_to_save` trains, parameters and buffers, and what is wrong with the other tensors."""
    paths = [
        path for names in module_paths(model).values() for path in names if path.endswith(settings.modules_to_save)
    ]
    parameters = parameters_of(model)
    own: dict[str, Tensor] = parameters | persistent_buffers(model)
    names = [name for name in own if any(name.startswith(f"{path}.") for path in paths)]
    counts = Counter(map(id, parameters.values()))
    problems = []
    for name in names:
        if name not in content.others:
            problems.append(f"{name!r} of modules_to_save is missing")
        elif content.others[name].shape != own[name].shape:
            found, shape = tuple(content.others[name].shape), tuple(own[name].shape)
            problems.append(f"{name!r} has shape {found}, the model's has {shape}")
        elif counts[id(own[name])] > 1:
            problems.append(f"{name!r} is tied with another module, of which PEFT's modules_to_save makes a copy")
    problems += [f"{path!r} is adapted and in modules_to_save" for path in content.layers if f"{path}.weight" in names]
    for name, tensor in content.others.items():
        if name not in names and not _is_base(name, tensor, own):
            problems.append(f"tensor {name!r} has no place here, or is another than the base model's")
    return names, problems


def _is_base(name: str, tensor: Tensor, own: Mapping[str, Tensor]) -> bool:
    """Whether a tensor is one of the base model's, as it is: PEFT saves embeddings that are adapted or were resized."""
    found = own.get(name.replace(".base_layer.", "."))
    return (
        found is not None and found.shape == tensor.shape and torch.equal(found.detach().cpu(), tensor.to(found).cpu())
    )


@torch.no_grad()
def _fill(
    model: nn.Module,
    plan: Plan,
    layouts: dict[str, Layout],
    content: _Content,
    settings: Settings,
    journal: Journal,
) -> None:
    """Put the tensors into the patched model."""
    for layer, (path, layout) in zip(plan.layers, layouts.items(), strict=True):
        assert isinstance(layer.module, AdaptedLayer)
        adapter = layer.module.adapter_of(layer.parameter)
        tensors = layout.unpack(content.layers[path])
        method = adapter.method
        assert isinstance(method, Lora)
        alpha = settings.alpha_of(path)
        own = adapter.own_parameters()
        own["A"].copy_(tensors.A)
        own["B"].copy_(tensors.B)
        if alpha != method.alpha:
            own["B"].mul_(alpha / method.alpha)
            if settings.update == "olora":  # whose start, unlike PiSSA's, is the same whatever the scaling
                adapter.get_parameter("B0").mul_(alpha / method.alpha)
        if tensors.magnitude is not None:
            own["m"].copy_(tensors.magnitude)
            method.count_from_base(adapter)
    places: dict[str, Tensor] = parameters_of(model) | persistent_buffers(model)
    for name in content.others.keys() & places.keys():
        journal.write(places[name], content.others[name])
