"""Folding the adapters into the weights, and taking them out again: `merge`, `unmerge`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..methods import Adapter
from . import record
from .adapted import AdaptedLayer, attach, detach
from .patch import MERGED, freeze, restore_requires_grad
from .record import Record
from .uninterrupted import uninterrupted

Model = TypeVar("Model", bound=nn.Module)

_MERGED_RECORD = "_mapsurgery_merged_record"


@dataclass
class Merged:
    """What a merged layer keeps: its adapter without the weight and, where there is one, the untouched base weight."""

    adapter: Adapter
    base: nn.Parameter | None


@torch.no_grad()
def merge(model: Model, *, keep_base: bool = False, final: bool = False) -> Model:
    """Fold the adapters into the weights: W <- W', original classes and names, no overhead left.

    Works in place, in float32 (float64 for float64 weights) with one rounding and no second copy of a weight; a weight
    that another module holds too (a tie) gets a copy of its own, and the other holder keeps the base.

    Args:
        keep_base: keep the base weights (one more copy), so that `unmerge` is exact to the bit.
        final: keep nothing to unmerge with. The model then holds no trace of mapsurgery; its pickle loads without it.

    Returns:
        The same model. requires_grad is as before `patch`; what `train` named keeps its trained values.

    Raises:
        ValueError: the model is not patched, an adapter holds NaN or infinity, an adapted layer was replaced since, or
            `keep_base` and `final` are both asked for. Nothing is merged then.

    Should merging fail midway all the same, the model stays patched, and what was merged is taken back as by `unmerge`.
    """
    if keep_base and final:
        raise ValueError("keep_base keeps what unmerge needs, final keeps nothing: choose one of them")
    root, memory = record.find_patched(model)
    layers = record.intact_layers(root, memory)
    for path, layer in layers.items():
        _refuse_unmergeable(path, layer.adapter)
    memory_map = _memory_map(model)
    apart = {
        path: _copy_of(layer)
        for path, layer in layers.items()
        # Multiplied by 0, a weight could not be recovered should a later layer fail.
        if keep_base or _held_elsewhere(layer, memory_map) or not layer.adapter.recoverable()
    }
    with uninterrupted():
        targets = [(layer.adapter, apart.get(path)) for path, layer in layers.items()]
        _in_place(targets, Adapter.merge_into, Adapter.unmerge_from)
        for path, layer in layers.items():
            _become_merged(layer, apart.get(path), final)
        restore_requires_grad(root, memory)
        record.drop(root)
        if not final:
            root.__dict__[_MERGED_RECORD] = memory
    return model


def _in_place(
    targets: list[tuple[Adapter, nn.Parameter | None]],
    operation: Callable[[Adapter, Tensor], None],
    inverse: Callable[[Adapter, Tensor], None],
) -> None:
    """Run an operation on each adapter's weight, or on the copy that is given for it; on failure take it back."""
    done: list[Adapter] = []
    try:
        for adapter, copy in targets:
            getattr(adapter, operation.__name__)((adapter.base_weight if copy is None else copy).detach())
            if copy is None:
                done.append(adapter)
    except BaseException:
        for adapter in done:
            getattr(adapter, inverse.__name__)(adapter.base_weight.detach())
        raise


def _copy_of(layer: AdaptedLayer) -> nn.Parameter:
    base = layer.adapter.base_weight
    return nn.Parameter(base.detach().clone(memory_format=torch.preserve_format), requires_grad=False)


def _become_merged(layer: AdaptedLayer, copy: nn.Parameter | None, final: bool) -> None:
    """The original class again, on the merged weight: the layer's own, or its copy."""
    adapter = layer.adapter
    base = adapter.base_weight
    detach(layer, base if copy is None else copy)
    adapter.register_parameter("base_weight", None)
    if not final:
        layer.__dict__[MERGED] = Merged(adapter, None if copy is None else base)


@torch.no_grad()
def unmerge(model: Model) -> Model:
    """Take merged adapters out of the weights again: the model is patched as before `merge`.

    Exact to the bit after ``merge(keep_base=True)``. Otherwise W = (W' - s_d BA)/s_w, right up to the rounding that
    merging did: about one unit in the last place of float32, a visible one of bfloat16 and float16.

    Returns:
        The same model.

    Raises:
        ValueError: the model was not merged by `merge`, was patched again since, or alpha is 0 somewhere.
    """
    root, memory = _find_merged(model)
    layers = {path: m for path, m in root.named_modules() if MERGED in m.__dict__}
    for path, layer in layers.items():
        kept: Merged = layer.__dict__[MERGED]
        if kept.base is None and not kept.adapter.recoverable():
            raise ValueError(f"{path}: its base was multiplied by 0, so the merged weight holds nothing of it any more")
    with uninterrupted():
        for layer in layers.values():
            _give_weight_back(layer, layer.__dict__[MERGED])
        kept_of: list[Merged] = [layer.__dict__[MERGED] for layer in layers.values()]
        _in_place([(m.adapter, None) for m in kept_of if m.base is None], Adapter.unmerge_from, Adapter.merge_into)
        for layer in layers.values():
            attach(layer, layer.__dict__.pop(MERGED).adapter)
        del root.__dict__[_MERGED_RECORD]
        record.put(root, memory)
        freeze(root, [layer.adapter for layer in record.adapted_layers(root).values()], memory.trained)
    return model


def _give_weight_back(layer: nn.Module, kept: Merged) -> None:
    """The adapter holds its weight again, where the model is now; the layer's own is not changed yet."""
    weight: nn.Parameter = layer._parameters["weight"]  # type: ignore[assignment]
    kept.adapter.base_weight = None  # type: ignore[assignment]
    kept.adapter.to(weight.device)
    kept.adapter.base_weight = weight if kept.base is None else _on(kept.base, weight)


def _on(base: nn.Parameter, weight: Tensor) -> nn.Parameter:
    """The kept base where the model has moved or been cast to since; the very Parameter where it has not."""
    same = base.device == weight.device and base.dtype == weight.dtype
    return base if same else nn.Parameter(base.detach().to(weight), requires_grad=False)


def _refuse_unmergeable(path: str, adapter: Adapter) -> None:
    if adapter.base_weight.is_meta:
        raise ValueError(f"{path}: the weight is on meta; load the model's weights before merging")
    for name, parameter in adapter.own_parameters().items():
        if not parameter.isfinite().all():
            raise ValueError(f"{path}: {name} holds NaN or infinite values; nothing was merged")


def _find_merged(model: nn.Module) -> tuple[nn.Module, Record]:
    for module in model.modules():
        if _MERGED_RECORD in module.__dict__:
            if any(MERGED in m.__dict__ for m in module.modules()):
                return module, module.__dict__[_MERGED_RECORD]
            raise ValueError("the model was patched again after the merge, which can no longer be taken back")
    raise ValueError(f"the model ({type(model).__name__}) holds nothing that mapsurgery.merge merged")


def _span(tensor: Tensor) -> tuple[int, int]:
    """First and one-past-last byte that a tensor may touch."""
    start = tensor.data_ptr()
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (reach + 1) * tensor.element_size()


def _memory_map(model: nn.Module) -> dict[int, list[tuple[int, int, nn.Module]]]:
    """Storage -> the spans of it that parameters and buffers use, with the module that holds each."""
    spans: dict[int, list[tuple[int, int, nn.Module]]] = {}
    for module in model.modules():
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            if tensor is not None and not tensor.is_meta and tensor.layout == torch.strided and tensor.numel() > 0:
                spans.setdefault(tensor.untyped_storage().data_ptr(), []).append((*_span(tensor), module))
    return spans


def _held_elsewhere(layer: AdaptedLayer, memory_map: dict[int, list[tuple[int, int, nn.Module]]]) -> bool:
    """Whether writing to the layer's weight would change a tensor of another module."""
    adapter = layer.adapter
    start, stop = _span(adapter.base_weight)
    held = memory_map[adapter.base_weight.untyped_storage().data_ptr()]
    return any(owner is not adapter and first < stop and start < last for first, last, owner in held)
