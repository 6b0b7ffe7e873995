"""The operation and its undoing: `patch`, `unpatch`, `disabled`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from ..interrupts import undone_by, uninterrupted
from ..methods import Adapter
from ..methods.adapter import frobenius_norms
from ..progress import progress
from . import cut_graphs, originals, resizing, trainers
from .all_or_nothing import Change, Journal, all_or_nothing, make
from .attach import attach, detach
from .config import Config, takes_options
from .layers import padding_of
from .offloaded import at_hand
from .originals import Mark, Originals
from .paths import first_names, module_paths, named_parameters, unwrapped
from .plan import Plan, make_plan
from .planned import PlannedLayer
from .quantised import kinds
from .record import (
    ModuleNames,
    Record,
    adapters_of,
    all_sites,
    drop_record,
    find_patched,
    names_of,
    parameters_of,
    persistent_buffers,
    put_record,
)
from .reducers import refuse_reduced
from .stand_ins import base_tensors
from .undo import MERGED

Model = TypeVar("Model", bound=nn.Module)


@takes_options
def patch(model: Model, config: Config) -> Model:
    """Adapt layers of a model in place with MAP: W' = alpha W/||W||_F + beta BA/||BA||_F (arXiv 2505.23094).

    A layer is a target when its own dotted path or that of a module which contains it matches one of the globs
    (case-sensitive, ``*`` crosses dots). Everything but the adapters and what `train` names is frozen. The weights are
    read once, for ||W||_F, and never copied.

    Args:
        model: any torch model. Layers that can be adapted: nn.Linear, nn.Conv1d/2d/3d and their transposes,
            transformers' Conv1D, nn.Embedding and EmbeddingBag, nn.Bilinear, nn.MultiheadAttention, nn.RNN, LSTM and
            GRU and their cells, and subclasses, parametrised ones included; linear layers with a quantised weight
            (bitsandbytes, torchao, any module that acts like nn.Linear), whose own kernel runs and whose
            ``weight`` keeps reading as the quantised one; `plan` shows the others with the reason.
        targets: globs of layers to adapt. "all-linear" stands for every linear layer (nn.Linear, Conv1D, the packed
            projections of MultiheadAttention, quantised ones) but heads, and may be one of several: docs/layers.md.
        exclude: globs of layers to leave.
        rank: of the update. More than min(out, in) of a layer is reduced to that there, as the plan says.
        rank_pattern: {glob: rank} for some of the layers; the first that matches counts.
        method: how W' is made of W and an update ΔW: "map", "lora" (W + s ΔW), "dora", or an instance with options
            (`mapsurgery.Map`, `Lora`, `Dora`).
        update: what ΔW is: "lora" (BA), "pissa", "olora", "adalora", "vera", "loha", "lokr", "flora", "dense", one of
            your own that was registered, or an instance with options (`mapsurgery.updates`).
        init: the start, "soft", "zero", "random" or an `Init`; None: the method's own, for MAP "soft". Other methods
            have one start, and read `a_scale` alone: another option is an error.
        dropout: probability of dropping an input of the update path in training.
        dtype: of the adapter's parameters; None is float32 (float64 on float64 weights). A half type rounds magnitudes
            in units of W (DoRA's, MAP's with `Init(relative=False)`), and with them the start; float16 is too narrow
            for AdamW, which a warning says.
        train: globs of further parameters to train in full and to save (a new head, norms), matched against the names
            of parameters and of the modules that contain them. A layer whose weight is trained is not adapted.
        parameters: globs of raw parameters to adapt, by their names or those of the modules that contain them: a matrix
            (m, K), or a stack (E, m, K) such as the experts of a mixture, each of which gets an adapter of its own.
        tied: what becomes of a weight that several modules hold (embedding and output of a language model). "share":
            one adapter for all of them, those that no pattern takes included, and the model stays tied; "separate":
            each layer that a pattern takes gets its own, the other holders keep the base weight; "refuse": an error.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError: bad arguments, a pattern that matches nothing (the nearest names are in the message) or
            only what cannot be adapted (the reasons are), a model that is patched already or whose gradients are
            reduced over processes already (DistributedDataParallel, FSDP, DeepSpeed), NaN in a weight, a norm of it
            that cannot be computed with. The model is then as it was.
    """
    refuse_reduced(model)
    root = unwrapped(model)
    plan = make_plan(root, config)
    trainers.warn(root, stacklevel=3)
    if plan.warning:
        warnings.warn(plan.warning, stacklevel=3)
    make(prepared(root, plan))
    return model


def _warn_of_packed(model: nn.Module) -> None:
    packed = [names[0] for module, names in module_paths(model).items() if kinds.is_packed(module)]
    if packed:
        text = f"a forward in eval mode has packed {', '.join(packed[:3])}{' ...' if packed[3:] else ''} for inference"
        text += ": no gradient passes through it to adapters before it. Load the model anew, and patch it before that"
        warnings.warn(text, stacklevel=5)


def prepared(model: nn.Module, plan: Plan, start: bool = True) -> Change:
    """The change that a plan describes, with its adapters. Args: start: False where they are about to be loaded."""
    _warn_of_packed(model)
    adapters: dict[str, Adapter] = {}
    siblings: dict[Any, Any] = {}
    for layer in progress(plan.layers, "making adapters"):
        own = adapters[layer.shares] if layer.shares else build(layer, siblings, start)
        adapters[layer.path] = own
    return Change(model, partial(_attach_all, model, plan, adapters, _remember(model, plan)))


def build(layer: PlannedLayer, siblings: dict[Any, Any], start: bool = True) -> Adapter:
    """The adapter of a planned layer, on its own weight; the layer is not changed.

    Args: siblings: what the adapters of the model share; start: False where the adapter is about to be loaded.
    """
    with at_hand(layer.module):
        weight = layer.weight
        packed = layer.quantisation is not None and layer.weight_norm is None
        adapter = layer.adapter(
            weight,
            dtype=layer.dtype or layer.config.dtype or default_dtype(weight.dtype),
            name=layer.path,
            weight_norm=frobenius_norms(kinds.dequantised(layer.module)) if packed else layer.weight_norm,
            values=partial(kinds.dequantised, layer.module) if layer.quantisation else None,
            siblings=siblings,
            start=start,
        )
        if layer.sketch is not None:
            adapter.sketch = layer.sketch
        return adapter


def default_dtype(weight: torch.dtype) -> torch.dtype:
    """dtype of an adapter's parameters: float32, or float64 on a float64 weight."""
    return torch.float64 if weight == torch.float64 else torch.float32


def _attach_all(model: nn.Module, plan: Plan, adapters: dict[str, Adapter], record: Record, journal: Journal) -> None:
    by_module: dict[nn.Module, dict[str, Adapter]] = {}
    shared: dict[nn.Module, set[str]] = {}
    for planned in plan.layers:
        by_module.setdefault(planned.module, {})[planned.parameter] = adapters[planned.path]
        if planned.shares:
            shared.setdefault(planned.module, set()).add(planned.parameter)
        if planned.parameter in planned.module.__dict__:  # a hook's result, as old as the last forward
            planned.module.__dict__[planned.parameter] = planned.weight
    for module, own in by_module.items():
        attach(module, own, shared.get(module, ()))
    become_patched(model, adapters.values(), record)
    for module in model.modules():
        module.__dict__.pop(MERGED, None)  # an earlier merge can no longer be taken back


def _remember(model: nn.Module, plan: Plan) -> Record:
    paths = module_paths(model)
    parameters = named_parameters(paths)
    changing: dict[str, Tensor] = {name: parameters[name] for name in plan.trained} | persistent_buffers(model)
    adapted = {(layer.module, layer.parameter) for layer in plan.layers}
    still = {
        f"{names[0]}.{key}".lstrip("."): parameter
        for module, names in paths.items()
        for key, parameter in module._parameters.items()
        if parameter is not None and (module, key) not in adapted
    }
    return Record(
        config=plan.config,
        layers=tuple(layer.path for layer in plan.layers),
        trained=plan.trained,
        requires_grad={name: p.requires_grad for name, p in parameters.items()},
        originals=Originals(
            {name: None if _has_no_values(t) else t.detach().clone() for name, t in changing.items()},
            {name: Mark.of(p) for name, p in first_names(still).items() if name not in plan.trained},
        ),
        modules=ModuleNames(paths.items()),
    )


def _has_no_values(tensor: Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, UninitializedParameter | UninitializedBuffer)


def freeze(model: nn.Module, adapters: Iterable[Adapter], trained: Iterable[str]) -> None:
    """Leave requires_grad to what the adapters train and to what `train` named."""
    for parameter in model.parameters():
        parameter.requires_grad = False  # not requires_grad_(): lazy parameters refuse the method
    for adapter in adapters:
        for parameter in adapter.trained_parameters().values():
            parameter.requires_grad_(True)
    parameters = parameters_of(model)
    for name in trained:
        if name in parameters:  # another stage of a pipeline may hold it
            parameters[name].requires_grad_(True)


def become_patched(model: nn.Module, adapters: Iterable[Adapter], record: Record) -> None:
    """What a model is besides its layers, once these are adapted."""
    adapters = list(adapters)
    put_record(model, record)  # first: it holds the names
    freeze(model, adapters, record.trained)
    _keep_padding(model)
    cut_graphs.install(model, adapters)
    resizing.install(model)
    originals.install(names_of(model), record.originals)
    for module in model.modules():
        kinds.keep_from_packing(module)


def _keep_padding(model: nn.Module) -> None:
    """Tell each adapter what rows the layers that compute with it pass over."""
    paddings: dict[Adapter, list[int | None]] = {}
    for site in all_sites(model):
        paddings.setdefault(site.adapter, []).append(padding_of(site.layer))
    for adapter, of_layers in paddings.items():
        adapter.read_by(of_layers)


def become_plain(model: nn.Module, record: Record) -> None:
    """Undo `become_patched`."""
    cut_graphs.uninstall(model)
    resizing.uninstall(model)
    originals.uninstall(model)
    for module in model.modules():
        kinds.let_pack(module)
    _restore_requires_grad(model, record)
    drop_record(model)


def _restore_requires_grad(model: nn.Module, record: Record) -> None:
    """requires_grad of every parameter as before the patch; parameters that came later keep theirs."""
    for name, parameter in parameters_of(model).items():
        if name in record.requires_grad:
            parameter.requires_grad = record.requires_grad[name]


@torch.no_grad()
def unpatch(model: Model) -> Model:
    """Remove the adapters: the original classes, names and bits, requires_grad included.

    Trained parameters (`train`) and persistent buffers (BatchNorm statistics) go back to what they were at `patch` as
    well; save them first if they are wanted.

    Returns:
        The same model.

    Raises:
        ValueError: the model is not patched.
    """
    root, record = find_patched(model)
    layers = {site.layer: None for site in all_sites(root)}
    tensors: dict[str, Tensor] = parameters_of(root) | persistent_buffers(root)
    with all_or_nothing(root) as journal:
        for name, original in record.originals.tensors.items():
            if original is not None and name in tensors and tensors[name].shape == original.shape:
                journal.write(tensors[name], original)
        become_plain(root, record)
        for layer in layers:
            detach(layer)
    return model


@contextmanager
def disabled(model: Model, *, trained: bool = False) -> Iterator[Model]:
    """Within the block the model computes with its frozen weights, as if no layer were adapted.

    Blocks may be nested, and those of several threads may overlap: the adapters are on again when the last one ends. It
    is a switch of the model, not of the thread: other threads that run the model meanwhile compute with the base too.
    The output is bitwise the base's, as long as the same parameters of the base require a gradient.

    Args:
        trained: also what `train` names (heads, norms) and persistent buffers (BatchNorm statistics) are in the block
            what they were at `patch` or `load`: the model as it was, which trains nothing. The trained tensors are left
            alone and come back after it, the very same Parameters; copies of the base's stand in for them. What the
            block writes to these is lost, statistics without a word; saving, merging and the like raise there, and
            copies of the model keep the base's. False: they keep their trained values.

    Raises:
        ValueError: the model is not patched; with `trained` also where that cannot be the base: another parameter was
            unfrozen or moved since, or one is sharded, or was on meta at `patch`.
    """
    with base_tensors(model) if trained else nullcontext(), turned_off(adapters_of(model).values()):
        yield model


@contextmanager
def turned_off(adapters: Iterable[Adapter]) -> Iterator[None]:
    """A block in which these adapters do nothing."""
    off: list[Adapter] = []

    def turn_on() -> None:
        while off:
            off.pop().turn(off=False)

    with undone_by(turn_on):
        with uninterrupted():
            for adapter in adapters:
                adapter.turn(off=True)
                off.append(adapter)
        yield
