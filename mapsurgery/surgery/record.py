"""What a patched model remembers of itself, so that it can be undone, saved and merged."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from ..methods import Adapter
from ..methods.sharded import is_sharded, shard_of
from .adapted import AdaptedLayer
from .config import Config
from .originals import Originals
from .paths import child_name, entry, first_names, module_paths, named_parameters, site_paths, unwrapped

_ATTRIBUTE = "_mapsurgery"

showing_base: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
"""Patched models in blocks of `disabled(trained=True)`: what they hold is the base's, not what was trained. The values
are `stand_ins`'."""


class ModuleNames:
    """Modules with the names that they had in a model. They are not kept alive: a stage of a pipeline drops most."""

    def __init__(
        self, named: Iterable[tuple[nn.Module, tuple[str, ...]]] = (), of_gone: Iterable[tuple[str, ...]] = ()
    ) -> None:
        self._named = [(weakref.ref(module), names) for module, names in named]
        self._of_gone = list(of_gone)

    def alive(self) -> list[tuple[nn.Module, tuple[str, ...]]]:
        return [(module, names) for ref, names in self._named if (module := ref()) is not None]

    def all_names(self) -> set[str]:
        """Of modules that are gone, too."""
        return {name for names in (*self._of_gone, *(names for _, names in self._named)) for name in names}

    def below(self, path: str) -> ModuleNames:
        def put(names: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(f"{path}.{name}".rstrip(".") for name in names)

        return ModuleNames([(m, put(names)) for m, names in self.alive()], map(put, self._gone()))

    def _gone(self) -> list[tuple[str, ...]]:
        return [*self._of_gone, *(names for ref, names in self._named if ref() is None)]

    def __reduce__(self) -> Any:
        return ModuleNames, (self.alive(), self._gone())


@dataclass
class Record:
    """Kept as a plain attribute of the patched model: it travels with deepcopy and pickle, and is in no state_dict.

    Attributes:
        config: the checked arguments of `patch`.
        layers: names of the adapted parameters: the layer's path for a ``weight``, else the parameter's own name.
        trained: names of the parameters that `train` asked for.
        requires_grad: of every parameter before the patch, by its original name.
        originals: what is not adapted, as it was.
        modules: the modules of the model with their names in it, whatever is put between them later.
    """

    config: Config
    layers: tuple[str, ...]
    trained: tuple[str, ...]
    requires_grad: dict[str, bool]
    originals: Originals = field(default_factory=Originals)
    modules: ModuleNames = field(default_factory=ModuleNames)

    def names(self, root: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
        """The modules of the patched model with their names: those from `patch`, and of later ones their paths."""
        paths = module_paths(root)
        return paths | {module: names for module, names in self.modules.alive() if module in paths}

    def below(self, path: str) -> Record:
        """The same with the names that things have in a model that holds this one as `path`."""
        return replace(
            self,
            layers=tuple(f"{path}.{name}" for name in self.layers),
            trained=tuple(f"{path}.{name}" for name in self.trained),
            requires_grad={f"{path}.{name}": value for name, value in self.requires_grad.items()},
            originals=self.originals.below(path),
            modules=self.modules.below(path),
        )

    def cut(self, root: nn.Module, there: Collection[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the adapted parameters that are no longer in the model.

        Returns: those in whose place there is something else, and those in whose place there is nothing: a stage of a
        pipeline, which has the model's other layers in other processes.

        Args: there: the names of those that are there.
        """
        known, modules = {module for module, _ in self.modules.alive()}, self.modules.all_names()
        names = self.names(root)
        now = {name for of_module in names.values() for name in of_module}
        strange = {name for module, of_module in names.items() if module not in known for name in of_module}
        gone: tuple[list[str], list[str]] = [], []
        for name in self.layers:
            parts = name.split(".")
            home = name if name in modules else name.rpartition(".")[0]
            replaced = home in now or any(".".join(parts[: i + 1]) in strange for i in range(len(parts)))
            if name not in there:
                gone[not replaced].append(name)
        return tuple(gone[0]), tuple(gone[1])


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
        return self.layer.base_now(self.parameter)

    def entry(self, name: str) -> str:
        """Name in the model of one of the adapter's parameters or buffers."""
        return entry(self.layer_path, self.parameter, name)


def names_of(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """Every module of a model with its names. Those of a patched part are the names that it had at `patch`.

    A module stays what it is when others are put around it: files speak of the model that was patched.
    """
    paths = module_paths(model)
    for module, prefixes in list(paths.items()):
        record = record_of(module)
        own = {} if record is None else record.names(module)
        paths |= {
            m: tuple(f"{prefix}.{n}".strip(".") for prefix in prefixes for n in names) for m, names in own.items()
        }
    return paths


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model by each of their names, those of adapters included."""
    return named_parameters(names_of(model))


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that a state_dict of the model holds, by name; those of adapters left out."""
    return {
        f"{paths[0]}.{name}".lstrip("."): buffer
        for module, paths in names_of(model).items()
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


def patched_parts(model: nn.Module) -> dict[str, nn.Module]:
    """What `patch` was called on within a model, by path; "" is the model itself."""
    return {paths[0]: module for module, paths in module_paths(model).items() if record_of(module) is not None}


def find_patched(model: nn.Module, showing: bool = False) -> tuple[nn.Module, Record]:
    """The module that `patch` was called on, and its record, inside whatever wraps it (DataParallel, torch.compile).

    Args: showing: it may show the base (`showing_base`).

    Raises:
        ValueError: nothing in the model is patched, several parts were patched on their own, or it shows the base.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = patched_parts(model)
    if not found and any(isinstance(module, AdaptedLayer) for module in model.modules()):
        raise ValueError(f"the {type(model).__name__} is a part of a patched model: call this on the model itself")
    if not found:
        raise ValueError(f"the model ({type(model).__name__}) is not patched: call mapsurgery.patch first")
    if len(found) > 1:
        names = ", ".join(path or "the model itself" for path in found)
        raise ValueError(f"parts of the model were patched one by one ({names}): call this on each of them")
    (root,) = found.values()
    record = record_of(root)
    assert record is not None
    if root in showing_base and not showing:
        raise ValueError(
            "the model is in a block of mapsurgery.disabled(trained=True), and holds the base's numbers: call this "
            "outside of the block"
        )
    return root, record


def find_trained(model: nn.Module) -> tuple[nn.Module, Record]:
    """What training a model changes: the module that `patch` was called on, and its record.

    Where something is trained outside of that module, or keeps statistics, the model that was given, with the record in
    its names.

    Raises:
        ValueError: see `find_patched`.
    """
    root, record = find_patched(model)
    inner = set(root.modules())
    statistics = any("running_mean" in module._buffers for module in model.modules() if module not in inner)
    if not statistics and not outside(model, root):
        return root, record
    whole = unwrapped(model)
    return whole, record.below(module_paths(whole)[root][0])


def outside(model: nn.Module, root: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of a model, by first name, that are trained and lie outside of the patched part of it."""
    inner = set(root.parameters())
    parameters = first_names(parameters_of(unwrapped(model)))
    return {name: p for name, p in parameters.items() if p.requires_grad and p not in inner}


def intact_sites(root: nn.Module, record: Record) -> list[Site]:
    """One site for each adapter, all of those that `patch` made, but for layers that the model was cut off from, and
    with their base frozen.

    Raises:
        ValueError: one was replaced since (a new head over an adapted one), or its base weight was unfrozen.
    """
    sites = all_sites(root)
    lost, _ = record.cut(root, {path for site in sites for path in site.paths})
    if lost:
        raise ValueError(f"adapted layers were replaced after patch, their adapters are gone: {', '.join(lost)}")
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
        refuse_pieces(site, action)
        refuse_put_away(site, action)


def refuse_put_away(site: Site, action: str) -> None:
    """Raises ValueError where accelerate has offloaded an adapter, with its layer."""
    if not site.adapter.pending and site.adapter.is_meta:
        raise ValueError(
            f"{site.path}: its adapter is on meta, put away by accelerate: {action} once it is back "
            "(accelerate.hooks.remove_hook_from_submodules)"
        )


def refuse_disabled(sites: list[Site], action: str) -> None:
    """Raises ValueError within `mapsurgery.disabled`, where adapters do nothing and have no gradient."""
    if not all(site.adapter.enabled for site in sites):
        raise ValueError(f"adapters are disabled: {action} the model outside of mapsurgery.disabled")


def refuse_pieces(site: Site, action: str) -> None:
    """Raises ValueError where a process holds a piece of an adapter as a plain tensor, as FSDP1 and ZeRO-3 do."""
    for name, shape in site.adapter.own_shapes().items():
        found = getattr(site.adapter, name).shape
        if found != shape:
            raise ValueError(
                f"{site.path}: {name} of its adapter has shape {tuple(found)} here, a piece of {tuple(shape)}: "
                f"{action} where it is gathered (FullyShardedDataParallel.summon_full_params, "
                "deepspeed.zero.GatheredParameters)"
            )


FROZEN = ("refuse", "keep")


def refuse_frozen(model: nn.Module, record: Record, frozen: str, action: str) -> None:
    """Raises ValueError where an adapter, or what `train` named, was frozen after `patch`, unless that may be."""
    if frozen not in FROZEN:
        raise ValueError(f"frozen must be one of {', '.join(map(repr, FROZEN))}, got {frozen!r}")
    if frozen == "keep":
        return
    names = []
    for site in one_per_adapter(all_sites(model)):
        trained = site.adapter.trained_parameters().values()
        if trained and not any(parameter.requires_grad for parameter in trained):
            names.append(site.path)
    parameters = parameters_of(model)
    names += [name for name in record.trained if name in parameters and not parameters[name].requires_grad]
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise ValueError(
            f"frozen after patch: {', '.join(names[:5])}{more}: {action}. Call "
            "requires_grad_(True) on what is to learn (an adapter is `layer.adapter`), or pass "
            "frozen='keep' where that is meant"
        )


def trained_names(root: nn.Module, record: Record) -> tuple[str, ...]:
    """Parameters beside the adapters that are trained: what `train` named, and what was unfrozen or added since."""
    found = dict.fromkeys(record.trained)
    names = names_of(root)
    own = named_parameters({module: paths[:1] for module, paths in names.items() if not isinstance(module, Adapter)})
    found.update((name, None) for name, parameter in own.items() if parameter.requires_grad)
    present = first_names(named_parameters(names))
    return tuple(name for name in found if name in present)


def moved_names(root: nn.Module, record: Record) -> tuple[str, ...]:
    """Frozen parameters, not adapted, that something has moved since `patch` (averages, codebooks)."""
    present = parameters_of(root)
    still = {name: p for name, p in present.items() if not p.requires_grad}
    return tuple(name for name in record.originals.marks if name in still and record.originals.moved(name, still[name]))


def all_sites(model: nn.Module) -> list[Site]:
    """Every adapted parameter of a model, in the order of their layers; tied ones share an adapter.

    Raises:
        ValueError: there are none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    sites = [
        Site(module, name, site_paths(paths, name), paths[0])
        for module, paths in names_of(model).items()
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
