"""What a patched model remembers of itself, so that it can be undone, saved and merged."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from ..methods import Adapter
from ..methods.sharded import is_sharded, shard_of
from .adapted import AdaptedLayer
from .config import Config
from .paths import child_name, entry, module_paths, site_paths

_ATTRIBUTE = "_mapsurgery"


@dataclass
class Record:
    """Kept as a plain attribute of the patched model: it travels with deepcopy and pickle, and is in no state_dict.

    Attributes:
        config: the checked arguments of `patch`.
        layers: names of the adapted parameters: the layer's path for a ``weight``, else the parameter's own name.
        trained: names of the parameters that `train` asked for.
        requires_grad: of every parameter before the patch, by its original name.
        originals: copies of the trained parameters and persistent buffers as they were, by name; training changes
            these, and `unpatch` gives them back. None for a tensor on meta.
    """

    config: Config
    layers: tuple[str, ...]
    trained: tuple[str, ...]
    requires_grad: dict[str, bool]
    originals: dict[str, Tensor | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Site:
    """One adapted parameter of one layer.

    Attributes:
        layer: the adapted layer; parameter: the parameter's name in it.
        paths: every name of the site, as in `PlannedLayer.paths`.
        layer_path: the layer's first name.
    """

    layer: AdaptedLayer
    parameter: str
    paths: tuple[str, ...]
    layer_path: str

    @property
    def path(self) -> str:
        return self.paths[0]

    @property
    def adapter(self) -> Adapter:
        return self.layer.adapter_of(self.parameter)

    @property
    def holds_adapter(self) -> bool:
        """Whether the adapter is this layer's child; that of a tied weight is in one of its layers."""
        return child_name(self.parameter) in self.layer._modules

    @property
    def base(self) -> Tensor:
        """The frozen W, in the layer's layout."""
        return self.layer.base_of(self.parameter)

    def entry(self, name: str) -> str:
        """Name in the model of one of the adapter's parameters or buffers."""
        return entry(self.layer_path, self.parameter, name)


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that a state_dict of the model holds, by name; those of adapters left out."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, module in model.named_modules()
        if not isinstance(module, Adapter)
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def put_record(model: nn.Module, record: Record) -> None:
    setattr(model, _ATTRIBUTE, record)


def drop_record(model: nn.Module) -> None:
    model.__dict__.pop(_ATTRIBUTE, None)  # a patch that failed has put none


def record_of(model: nn.Module) -> Record | None:
    """The record of this very module."""
    return model.__dict__.get(_ATTRIBUTE)


def find_patched(model: nn.Module) -> tuple[nn.Module, Record]:
    """The module that `patch` was called on, and its record, inside whatever wraps it (DataParallel, torch.compile).

    Raises:
        ValueError: nothing in the model is patched, or several parts were patched on their own.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = [(path, module) for path, module in model.named_modules() if record_of(module) is not None]
    if not found and any(isinstance(module, AdaptedLayer) for module in model.modules()):
        raise ValueError(f"the {type(model).__name__} is a part of a patched model: call this on the model itself")
    if not found:
        raise ValueError(f"the model ({type(model).__name__}) is not patched: call mapsurgery.patch first")
    if len(found) > 1:
        names = ", ".join(path or "the model itself" for path, _ in found)
        raise ValueError(f"parts of the model were patched one by one ({names}): call this on each of them")
    record = record_of(found[0][1])
    assert record is not None
    return found[0][1], record


def intact_sites(root: nn.Module, record: Record) -> list[Site]:
    """One site for each adapter, all of those that `patch` made and with their base frozen.

    Raises:
        ValueError: one was replaced since (a new head over an adapted one), or its base weight was unfrozen.
    """
    sites = all_sites(root)
    every = {path for site in sites for path in site.paths}
    lost = tuple(path for path in record.layers if path not in every)
    if lost:
        raise ValueError(
            f"adapted layers were replaced or removed after patch, their adapters are gone: {', '.join(lost)}"
        )
    thawed = [site.path for site in sites if site.layer.base_learns(site.parameter)]
    if thawed:
        raise ValueError(
            f"the base weight of an adapted layer requires a gradient: {', '.join(thawed[:5])}; an adapter cannot hold "
            "what it would learn. Freeze it (requires_grad_(False)), or name the layer in `train` instead of `targets`"
        )
    return one_per_adapter(sites)


def refuse_spread(sites: list[Site], action: str) -> None:
    """Raises ValueError where an adapter or its weight is not here as a whole."""
    for site in sites:
        held = site.layer._parameters.get(site.parameter)
        own = [*site.adapter._parameters.values(), held]
        if any(t is not None and (is_sharded(t) or shard_of(t) is not None) for t in own):
            raise ValueError(
                f"{site.path} is sharded (FSDP2 or a DTensor): {action} before fully_shard, or in one process, on a "
                "model that takes this one's full state (torch.distributed.checkpoint.state_dict.get_model_state_dict)"
            )
        if not site.adapter.pending and site.adapter.is_meta:
            raise ValueError(
                f"{site.path}: its adapter is on meta, put away by accelerate: {action} once it is back "
                "(accelerate.hooks.remove_hook_from_submodules)"
            )


def trained_names(root: nn.Module, record: Record) -> tuple[str, ...]:
    """Parameters beside the adapters that are trained: what `train` named, and what was unfrozen or added since."""
    found = dict.fromkeys(record.trained)
    for path, module in root.named_modules():
        if not isinstance(module, Adapter):
            own = module.named_parameters(prefix=path, recurse=False)
            found.update((name, None) for name, parameter in own if parameter.requires_grad)
    present = dict(root.named_parameters())
    return tuple(name for name in found if name in present)


def all_sites(model: nn.Module) -> list[Site]:
    """Every adapted parameter of a model, in the order of their layers; tied ones share an adapter.

    Raises:
        ValueError: there are none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    sites = [
        Site(module, name, site_paths(paths, name), paths[0])
        for module, paths in module_paths(model).items()
        if isinstance(module, AdaptedLayer)
        for name in module.adapted
    ]
    if not sites:
        raise ValueError(f"the model ({type(model).__name__}) has no adapted layers: call mapsurgery.patch first")
    return sites


def one_per_adapter(sites: list[Site]) -> list[Site]:
    """The site of each adapter whose layer holds it, by whose path it goes."""
    return [site for site in sites if site.holds_adapter]


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """The adapters of a model by the first name of what they adapt."""
    return {site.path: site.adapter for site in one_per_adapter(all_sites(model))}
