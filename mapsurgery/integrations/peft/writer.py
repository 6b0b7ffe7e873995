"""From a model patched with LoRA or DoRA to a PEFT adapter."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..._atomic_write import write_whole
from ..._state_dict import changed_buffers
from ..._tensor_file import content_of
from ...methods import Adapter, Dora, Lora
from ...surgery.adapted import AdaptedLayer
from ...surgery.record import (
    Record,
    Site,
    all_sites,
    find_trained,
    intact_sites,
    moved_names,
    names_of,
    parameters_of,
    trained_names,
)
from ...updates import FactoredUpdate
from .layout import (
    CONFIG_FILE,
    PREFIX,
    WEIGHTS_FILE,
    LayerTensors,
    Layout,
    has_empty_row,
    layout_of,
    meaning_of,
    why_not_by_name,
)

Value = TypeVar("Value")


def save_peft(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    task_type: str | None = None,
) -> None:
    """Write the adapter of a model as a folder that `peft.PeftModel.from_pretrained` loads.

    Two files, `adapter_model.safetensors` and `adapter_config.json`; each appears whole or not at all, in a folder that
    is made if its parent exists. See `to_peft_state_dict` for what they hold. PEFT reads one after the other: whoever
    reads a folder that is being written may get the tensors of one adapter with the alpha of another. `load_peft` sees
    that by a checksum of both.

    Args:
        base_model, task_type: as in `to_peft_config`.

    Raises:
        ValueError: what `to_peft_state_dict` refuses, or NaN in the adapter; nothing is written.
        OSError: the files cannot be written.
    """
    config = to_peft_config(model, base_model=base_model, task_type=task_type)
    tensors = to_peft_state_dict(model)
    diverged = [name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    if diverged:
        raise ValueError(f"what was trained holds NaN or infinite values, nothing was saved: {', '.join(diverged[:5])}")
    folder = os.path.realpath(os.fspath(folder))
    if not os.path.isdir(folder):
        os.mkdir(folder)
    text = json.dumps(config, indent=2, sort_keys=True)
    write_whole(
        {
            os.path.join(folder, WEIGHTS_FILE): content_of(tensors, {"format": "pt"}, beside=meaning_of(config)),
            os.path.join(folder, CONFIG_FILE): [text.encode()],
        }
    )


@torch.no_grad()
def to_peft_state_dict(model: nn.Module, *, prefix: str = PREFIX) -> dict[str, Tensor]:
    """The adapter of a model as `peft.get_peft_model_state_dict` names it and `set_peft_model_state_dict` takes it.

    Every update of the form ΔW = B A becomes a LoRA of its rank R: A and B themselves with update "lora"; with "pissa"
    and "olora", ΔW = B A - B₀ A₀ on the W that they started from, of rank 2r (what PEFT's own conversion of such
    adapters gives); of "adalora", "vera" and "flora" the product of their factors. Modules of which `train` trained
    parameters, or whose buffers changed, are there as a whole (`modules_to_save`). A tied weight's adapter is written
    once for each of its layers: in PEFT they are trained apart.

    Args:
        prefix: what each name begins with; "" for a model that `peft.inject_adapter_in_model` adapted.

    Returns:
        Tensors in the dtype of the adapter; mostly not copies.

    Raises:
        ValueError: the method is not LoRA or DoRA, or a layer's adapter means something else in PEFT, or has no place
            there; the message names the layers.
    """
    layers, modules, root = _converted(model)
    state: dict[str, Tensor] = {}
    for path, (layout, tensors, _) in layers.items():
        state |= {f"{prefix}{path}.{name}": value for name, value in layout.pack(tensors).items()}
    for path in modules:
        saved = _by_path(root)[path].state_dict()
        state |= {f"{prefix}{path}.{name}": value for name, value in saved.items()}
    return state


@torch.no_grad()
def to_peft_config(model: nn.Module, *, base_model: str | None = None, task_type: str | None = None) -> dict[str, Any]:
    """The arguments of the `peft.LoraConfig` that goes with `to_peft_state_dict`, as plain values.

    `lora_alpha` is such that PEFT's scaling, lora_alpha/R (or /sqrt R), is the method's; layers of other ranks stand in
    `rank_pattern`, and in `alpha_pattern` where that takes another alpha.

    Args:
        base_model: name or path of the base model; None: that of a transformers model, if it has one.
        task_type: PEFT's, such as "CAUSAL_LM"; None lets PEFT load any model.

    Raises:
        ValueError: see `to_peft_state_dict`.
    """
    layers, modules, root = _converted(model)
    adapters = [adapter for _, _, adapter in layers.values()]
    method = adapters[0].method
    assert isinstance(method, Lora)
    ranks = {path: tensors.A.shape[0] for path, (_, tensors, _) in layers.items()}
    alphas = {path: _alpha(adapter, ranks[path]) for path, (_, _, adapter) in layers.items()}
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    known = getattr(getattr(root, "config", None), "_name_or_path", None)
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model or known or None,
        "inference_mode": False,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": adapters[0].dropout,
        "target_modules": _targets({*layers}, [*_by_path(root)]),
        "rank_pattern": _pattern(ranks, rank),
        "alpha_pattern": _pattern(alphas, alpha),
        "fan_in_fan_out": any(layout.transposed for layout, _, _ in layers.values()),
        "use_rslora": method.rslora,
        "use_dora": isinstance(method, Dora),
        "modules_to_save": modules or None,
        "bias": "none",
        "init_lora_weights": True,
    }


def _alpha(adapter: Adapter, rank: int) -> float | int:
    """lora_alpha with which PEFT's scaling at this rank is the adapter's."""
    method = adapter.method
    assert isinstance(method, Lora)
    ratio = rank / adapter.rank
    alpha = method.alpha if ratio == 1 else method.alpha * (ratio**0.5 if method.rslora else ratio)
    return int(alpha) if alpha == int(alpha) else alpha


def _most_common(values: Iterable[Value]) -> Value:
    return Counter(values).most_common(1)[0][0]


def _pattern(values: dict[str, Value], default: Value) -> dict[str, Value]:
    """PEFT's pattern, of regular expressions that it matches against the end of a name unless they begin with ^."""
    return {f"^{re.escape(path)}": value for path, value in values.items() if value != default}


def _targets(names: set[str], every: list[str]) -> list[str] | str:
    """Names as PEFT's target_modules; a regular expression where another module's name ends in one of them."""
    endings = {path: [path[i + 1 :] for i, sign in enumerate(path) if sign == "."] for path in every}
    if any(ending in names for path in every if path not in names for ending in endings[path]):
        return "|".join(re.escape(name) for name in sorted(names))
    return sorted(names)


_Converted = tuple[Layout, LayerTensors, Adapter]


def _converted(model: nn.Module) -> tuple[dict[str, _Converted], list[str], nn.Module]:
    """The adapted layers by their names in PEFT, the modules to be saved as a whole, and the patched module.

    Raises:
        ValueError: naming everything that does not convert.
    """
    root, record = find_trained(model)
    _refuse_method({type(site.adapter.method): site.adapter for site in intact_sites(root, record)})
    layers: dict[str, _Converted] = {}
    problems: list[str] = []
    for site in all_sites(root):
        found = _of_site(site)
        if isinstance(found, str):
            problems.append(found)
        else:
            layers[site.path] = found
    problems += _uneven({adapter.dropout for _, _, adapter in layers.values()}, "dropout")
    problems += _uneven({getattr(adapter.method, "rslora", False) for _, _, adapter in layers.values()}, "rslora")
    modules, unsaved = _modules_to_save(root, record)
    problems += unsaved
    if problems:
        more = f" (and {len(problems) - 8} more)" if len(problems) > 8 else ""
        raise ValueError("the adapter cannot be a PEFT adapter: " + "; ".join(problems[:8]) + more)
    return layers, modules, root


def _refuse_method(methods: dict[type, Adapter]) -> None:
    for cls, adapter in methods.items():
        if cls not in (Lora, Dora):
            raise ValueError(
                f"method {adapter.method.name!r} has no counterpart in PEFT, which has LoRA and DoRA: merge the model "
                "(mapsurgery.merge) and save its weights, or keep the adapter with mapsurgery.save"
            )
    if len(methods) > 1:
        raise ValueError("some layers have method 'lora', others 'dora': a PEFT adapter has one for all of them")


def _uneven(values: set[Any], name: str) -> list[str]:
    return [f"layers differ in {name} ({', '.join(map(str, sorted(values)))})"] if len(values) > 1 else []


def _of_site(site: Site) -> _Converted | str:
    """A layer's layout, tensors and adapter, or what does not convert."""
    adapter = site.adapter
    if adapter.pending or adapter.weight_norm.is_meta:
        return f"layer {site.path!r}: its weight is not loaded (meta device), there is no adapter yet"
    method = adapter.method
    dora = isinstance(method, Dora)
    layout = why_not_by_name(site.paths) or layout_of(site.layer, site.parameter, dora)
    if isinstance(layout, str):
        return f"layer {site.path!r} {layout}"
    if not isinstance(adapter.update, FactoredUpdate):
        return f"layer {site.path!r} has update {adapter.update.name!r}, which is no product B A of low rank: merge it"
    W = adapter.matrix.view(site.base)
    if dora and has_empty_row(W):
        return f"layer {site.path!r} has a weight with a row of zeros, by whose length PEFT's DoRA divides"
    A, B = adapter.update.factors(adapter)
    if adapter.kept_row is not None:
        B = B.index_fill(0, torch.tensor(adapter.kept_row, device=B.device), 0)
    magnitude = method.lengths(adapter, W) if isinstance(method, Dora) else None
    return layout, LayerTensors(A.detach(), B.detach(), magnitude), adapter


def _by_path(root: nn.Module) -> dict[str, nn.Module]:
    """Modules by each of their names; of one and what wraps it, the outer."""
    found: dict[str, nn.Module] = {}
    for module, paths in names_of(root).items():
        for path in paths:
            found.setdefault(path, module)
    return found


def _modules_to_save(root: nn.Module, record: Record) -> tuple[list[str], list[str]]:
    """Names of the modules with trained parameters or changed buffers, and what PEFT cannot save of these."""
    names = [*trained_names(root, record), *moved_names(root, record), *changed_buffers(root, record)]
    holders = dict.fromkeys(name.rpartition(".")[0] for name in names)
    modules = [path for path in holders if not any(path.startswith(f"{other}.") for other in holders if other)]
    problems = [f"{name!r} is trained, and belongs to the model itself" for name in names if "." not in name]
    counts = Counter(map(id, parameters_of(root).values()))
    by_path = _by_path(root)
    for path in filter(None, modules):
        module = by_path[path]
        clash = next((other for other in by_path if other.endswith(path) and other != path), None)
        if any(isinstance(part, AdaptedLayer) for part in module.modules()):
            own = next(name for name in names if name.startswith(f"{path}."))
            problems.append(
                f"{own!r} is trained beside an adapter in {path!r}: PEFT trains modules as a whole or adapts"
            )
        elif any(counts[id(p)] > 1 for p in module.parameters()):
            problems.append(f"{path!r} is trained and tied with another module: PEFT would train a copy")
        elif clash is not None:
            problems.append(f"{path!r} is trained, and PEFT would take {clash!r} by that name too")
    return [path for path in modules if path], problems
