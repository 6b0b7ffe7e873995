"""Folding the adapters into the weights, and taking them out again: `merge`, `unmerge`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..methods import Adapter
from ..methods.adapter import DTYPES
from ..progress import progress
from .adapted import AdaptedLayer
from .all_or_nothing import all_or_nothing
from .attach import attach, detach
from .computed import bake, can_bake
from .patch import become_patched, become_plain
from .paths import child_name, site_paths
from .quantised.layer import QuantisedLinear
from .quantised.merged import CHOICES, Replacement, put_in, refuse_infinite, replacement
from .record import Record, Site, adapters_of, all_sites, find_patched, intact_sites, refuse_spread
from .undo import MERGED, Snapshot

Model = TypeVar("Model", bound=nn.Module)

_MERGED_RECORD = "_mapsurgery_merged_record"


@torch.no_grad()
def merge(model: Model, *, keep_base: bool = False, final: bool = False, quantised: str = "refuse") -> Model:
    """Fold the adapters into the weights: W <- W', original classes and names, no overhead left.

    Works in place, in float32 (float64 for float64 weights) with one rounding and no second copy of a weight; a weight
    that another module holds too and that is not adapted there gets a copy of its own, and the other holder keeps the
    base. A parametrised weight (weight_norm, spectral_norm, torch.nn.utils.parametrize) becomes a plain one.

    Args:
        keep_base: keep the base weights (one more copy), so that `unmerge` is exact to the bit.
        final: keep nothing to unmerge with. The model then holds no trace of mapsurgery; its pickle loads without it.
        quantised: what becomes of layers with a quantised weight, which cannot hold W' as it is. "refuse": an error;
            "dequantise": they become nn.Linear, with W' in the dtype that was quantised; "requantise": W' is quantised
            with the settings of the base, whose error it then has anew. With either, all merged weights are held
            beside the quantised ones until all are there, and `unmerge` gives the quantised base back bit for bit.

    Returns:
        The same model. requires_grad is as before `patch`; what `train` named keeps its trained values.

    Raises:
        ValueError: the model is not patched, an adapter holds NaN or infinity, an adapted layer was replaced since, a
            weight is computed by a hook that is not torch's, or is quantised (see `quantised`), W' is infinite in the
            weight's dtype, or `keep_base` and `final` are both asked for. Nothing is merged then.

    Each weight is merged in a copy first, one at a time: should one fail, the model is as it was, to the bit. Writing,
    once begun, goes on to its end. Only if a device refuses that, twice, is what was merged taken back as by `unmerge`.
    """
    if keep_base and final:
        raise ValueError("keep_base keeps what unmerge needs, final keeps nothing: choose one of them")
    if quantised not in CHOICES:
        raise ValueError(f"quantised must be one of {', '.join(map(repr, CHOICES))}, got {quantised!r}")
    root, record = find_patched(model)
    sites = intact_sites(root, record)
    refuse_spread(sites, "merge")
    _refuse_untied(root)
    for site in sites:
        _refuse_unmergeable(site)
    packed = [site for site in sites if isinstance(site.layer, QuantisedLinear)]
    replacements = _replacements(root, packed, quantised)
    layers = layers_by_adapter(root)
    spans = storages_of(model)
    apart: dict[Adapter, nn.Parameter] = {}
    in_place: list[tuple[Adapter, Tensor, Tensor]] = []
    for site in progress(sites, "reading weights"):
        adapter = site.adapter
        if adapter in replacements:
            continue
        base = site.base  # computed here, where a parametrization makes it
        norm = adapter.norm_of(base)
        # Multiplied by 0, a weight could not be recovered.
        recoverable = adapter.method.recoverable(adapter, base, norm)
        if keep_base or adapter.computed or not recoverable or held_elsewhere(base, layers[adapter], spans):
            apart[adapter] = _copy_of(_result(Adapter.merge_into, adapter, base.detach(), norm))
        else:
            in_place.append((adapter, base.detach(), norm))
    _rehearse(Adapter.merge_into, in_place)
    with all_or_nothing(root):
        merged = {site.layer: None for site in all_sites(root)}
        become_plain(root, record)
        for layer in merged:
            _become_merged(layer, apart, replacements, final)
        if not final:
            root.__dict__[_MERGED_RECORD] = record
        _write(Adapter.merge_into, in_place, Adapter.unmerge_from)
    return model


_Operation = Callable[[Adapter, Tensor, Tensor], None]
_Target = tuple[Adapter, Tensor, Tensor]
"""An adapter, a weight, ||W||_F."""


def _result(operation: _Operation, adapter: Adapter, weight: Tensor, norm: Tensor) -> Tensor:
    """What an operation makes of a weight, in a copy.

    Raises:
        ValueError: the weight's dtype cannot hold it.
    """
    made = weight.clone(memory_format=torch.preserve_format)
    operation(adapter, made, norm)
    refuse_infinite(made, adapter.layer_name)
    return made


def _rehearse(operation: _Operation, targets: list[_Target]) -> None:
    """What can fail fails here, on copies that are made one by one and thrown away."""
    for target in progress(targets, "rehearsing on copies"):
        _result(operation, *target)


def _write(operation: _Operation, targets: list[_Target], inverse: _Operation) -> None:
    """Run an operation on each weight, in place, once it was rehearsed.

    A second copy of all weights, by which to undo it bit for bit, is too much to ask for: so it goes on to its end.
    What fails all the same, for want of memory on a device, is tried again in the host's. If that fails too, what was
    written is taken back up to the rounding of the weights.
    """
    done: list[_Target] = []
    try:
        for adapter, weight, norm in progress(targets, "writing weights"):
            try:
                made = _result(operation, adapter, weight, norm)
                weight.copy_(made)
            except Exception:
                made = _result(operation, copy.deepcopy(adapter).cpu(), weight.cpu(), norm.cpu())
                weight.copy_(made)
            done.append((adapter, weight, norm))
    except BaseException:
        for target in done:
            inverse(*target)
        raise


def layers_by_adapter(root: nn.Module) -> dict[Adapter, set[nn.Module]]:
    """The layers of each adapter: several of a tied weight."""
    found: dict[Adapter, set[nn.Module]] = {}
    for site in all_sites(root):
        found.setdefault(site.adapter, set()).add(site.layer)
    return found


def _copy_of(base: Tensor) -> nn.Parameter:
    return nn.Parameter(base.detach().clone(memory_format=torch.preserve_format), requires_grad=False)


def _replacements(root: nn.Module, sites: list[Site], choice: str) -> dict[Adapter, Replacement]:
    """Merged weights for the quantised ones."""
    if sites and choice == "refuse":
        names = ", ".join(site.path for site in sites[:5]) + (f" and {len(sites) - 5} more" if len(sites) > 5 else "")
        raise ValueError(
            f"quantised weights cannot hold what is merged ({names}): keep the adapter beside them, or choose "
            'quantised="dequantise" (they become plain) or quantised="requantise" (they are quantised again, with the '
            "error of that)"
        )
    dtype = _usual_dtype(root)
    return {
        site.adapter: replacement(site.layer, site.path, choice, dtype)  # type: ignore[arg-type]
        for site in progress(sites, "making merged weights")
    }


def _usual_dtype(root: nn.Module) -> torch.dtype:
    """The dtype of most of a model's own floating parameters, in which it hands activations on."""
    sizes: dict[torch.dtype, int] = {}
    for module in root.modules():
        for parameter in [] if isinstance(module, Adapter) else module._parameters.values():
            if type(parameter) is nn.Parameter and parameter.is_floating_point():
                sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


def _become_merged(
    layer: AdaptedLayer,
    apart: dict[Adapter, nn.Parameter],
    replacements: dict[Adapter, Replacement],
    final: bool,
) -> None:
    """The original class again, on the merged weights: the layer's own, copies, or what replaces quantised ones."""
    adapters = {name: layer.adapter_of(name) for name in layer.adapted}
    before = Snapshot(adapters, tuple(name for name in adapters if child_name(name) not in layer._modules))
    packed = isinstance(layer, QuantisedLinear)
    detach(layer)
    if packed or any(adapter.computed for adapter in adapters.values()):
        before.quantised = packed
        before.keep(layer)
    for name, adapter in adapters.items():
        if packed:
            put_in(layer, replacements[adapter])
        elif adapter.computed:
            bake(layer, name, apart[adapter])
        elif adapter in apart:
            base = layer._parameters[name]
            assert base is not None
            before.bases[name] = base
            layer._parameters[name] = apart[adapter]
    if not final:
        layer.__dict__[MERGED] = before


@torch.no_grad()
def unmerge(model: Model) -> Model:
    """Take merged adapters out of the weights again: the model is patched as before `merge`.

    Exact to the bit after ``merge(keep_base=True)``, and always for a quantised base. Otherwise W = (W' - s_d BA)/s_w,
    right up to the rounding that merging did: about one unit in the last place of float32, a visible one of bfloat16
    and float16.

    Returns:
        The same model.

    Raises:
        ValueError: the model was not merged by `merge`, was patched again since, or alpha is 0 somewhere.
    """
    root, record = _find_merged(model)
    layers = {paths[0]: m for m, paths in record.names(root).items() if MERGED in m.__dict__}
    _refuse_incomplete(root, record)
    targets: dict[Adapter, tuple[Adapter, Tensor, Tensor]] = {}
    for path, layer in layers.items():
        before: Snapshot = layer.__dict__[MERGED]
        for name, adapter in before.adapters.items():
            weight = layer._parameters[name]
            assert weight is not None
            if adapter.computed or name in before.bases:
                continue
            if not adapter.method.recoverable(adapter, None, adapter.weight_norm):
                raise ValueError(
                    f"{path}: its base was multiplied by 0, so the merged weight holds nothing of it any more"
                )
            adapter.to(weight.device)
            targets[adapter] = (adapter, weight.detach(), adapter.weight_norm)
    _rehearse(Adapter.unmerge_from, list(targets.values()))
    with all_or_nothing(root):
        del root.__dict__[_MERGED_RECORD]
        for layer in layers.values():
            _become_adapted(layer, layer.__dict__.pop(MERGED))
        become_patched(root, adapters_of(root).values(), record)
        _write(Adapter.unmerge_from, list(targets.values()), Adapter.merge_into)
    return model


def _become_adapted(layer: nn.Module, before: Snapshot) -> None:
    """Undo `_become_merged`, where the layer is now; its own weights hold W again."""
    for name, adapter in before.adapters.items():
        weight = layer._parameters[name]
        assert weight is not None
        adapter.to(weight.device)
        if name in before.bases:
            layer._parameters[name] = _on(before.bases[name], weight)
    if before.layer_class is not None:
        before.put_back(layer)
    attach(layer, before.adapters, before.shared)


def _on(base: nn.Parameter, weight: Tensor) -> nn.Parameter:
    """The kept base where the model has moved or been cast to since; the very Parameter where it has not."""
    same = base.device == weight.device and base.dtype == weight.dtype
    return base if same else nn.Parameter(base.detach().to(weight), requires_grad=False)


def _refuse_unmergeable(site: Site) -> None:
    adapter = site.adapter
    if adapter.weight_norm.is_meta or (not isinstance(site.layer, QuantisedLinear) and site.base.is_meta):
        raise ValueError(f"{site.path}: the weight is on meta; load the model's weights before merging")
    held = site.layer._parameters.get(site.parameter)
    if not isinstance(site.layer, QuantisedLinear) and held is not None and held.dtype not in DTYPES:
        raise ValueError(
            f"{site.path}: its {site.parameter} is stored as {str(held.dtype).removeprefix('torch.')}, which cannot "
            "hold what is merged: merge before it is cast (enable_layerwise_casting), or cast the model back"
        )
    for name, parameter in adapter.own_parameters().items():
        if not parameter.isfinite().all():
            raise ValueError(f"{site.path}: {name} holds NaN or infinite values; nothing was merged")
    if adapter.computed and not isinstance(site.layer, QuantisedLinear) and not can_bake(site.layer, site.parameter):
        raise ValueError(
            f"{site.path}: its {site.parameter} is computed by a hook of its own kind, which would overwrite what is "
            "merged; remove the hook, patch, and merge then"
        )


def _refuse_untied(root: nn.Module) -> None:
    """One adapter over two Parameters: only one of them would be merged."""
    first: dict[Adapter, Site] = {}
    for site in all_sites(root):
        other = first.setdefault(site.adapter, site)
        held = site.layer._parameters.get(site.parameter)
        if held is not other.layer._parameters.get(other.parameter):
            raise ValueError(
                f"{site.path} and {other.path} share an adapter, but no longer their weight (loading with assign=True "
                "unties it): tie them again (tie_weights()), and merge then"
            )


def is_merged(model: nn.Module) -> bool:
    """Whether there is something for `unmerge`."""
    return any(_MERGED_RECORD in module.__dict__ for module in model.modules())


def _find_merged(model: nn.Module) -> tuple[nn.Module, Record]:
    for module in model.modules():
        if _MERGED_RECORD in module.__dict__:
            if any(MERGED in m.__dict__ for m in module.modules()):
                return module, module.__dict__[_MERGED_RECORD]
            raise ValueError("the model was patched again after the merge, which can no longer be taken back")
    raise ValueError(f"the model ({type(model).__name__}) holds nothing that mapsurgery.merge merged")


def _refuse_incomplete(root: nn.Module, record: Record) -> None:
    """A part that was patched again, or replaced, since the merge would stay as it is, without a word."""
    there = {
        path
        for module, paths in record.names(root).items()
        if MERGED in module.__dict__
        for name in module.__dict__[MERGED].adapters
        for path in site_paths(paths, name)
    }
    gone, _ = record.cut(root, there)
    if gone:
        raise ValueError(
            f"merged layers were patched again or replaced since: {', '.join(gone[:5])}; they must be undone"
        )


def _span(tensor: Tensor) -> tuple[int, int]:
    """First and one-past-last byte that a tensor may touch."""
    start = tensor.data_ptr()
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (reach + 1) * tensor.element_size()


def storages_of(model: nn.Module) -> dict[int, list[tuple[int, int, nn.Module]]]:
    """Storage -> the spans of it that parameters and buffers use, with the module that holds each."""
    spans: dict[int, list[tuple[int, int, nn.Module]]] = {}
    for module in model.modules():
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            if tensor is not None and _has_storage(tensor):
                spans.setdefault(tensor.untyped_storage().data_ptr(), []).append((*_span(tensor), module))
    return spans


def _has_storage(tensor: Tensor) -> bool:
    """Whether a tensor has a storage of its own; wrappers (torchao's) hold other tensors instead."""
    strided = not tensor.is_meta and tensor.layout == torch.strided and tensor.numel() > 0
    return strided and not is_traceable_wrapper_subclass(tensor)


def held_elsewhere(
    weight: Tensor, layers: Collection[nn.Module], spans: dict[int, list[tuple[int, int, nn.Module]]]
) -> bool:
    """Whether writing to a weight would change a tensor of a module that is none of these layers."""
    start, stop = _span(weight)
    held = spans[weight.untyped_storage().data_ptr()]
    return any(owner not in layers and first < stop and start < last for first, last, owner in held)
