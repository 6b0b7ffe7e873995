"""Names: the paths of modules, of what is adapted in them, and of the adapters' tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import nn

CHILD = "adapter"


def child_name(parameter: str) -> str:
    """Name of the child module that holds the adapter of a layer's parameter."""
    return CHILD if parameter == "weight" else f"{CHILD}_{parameter}"


def entry(layer_path: str, parameter: str, name: str) -> str:
    """Name in the model of a parameter of an adapter: "<layer>.adapter.A"."""
    return ".".join(part for part in (layer_path, child_name(parameter), name) if part)


def module_paths(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """Every module with all of its names, in the order of the first.

    They are those of the plain model: what wraps a module (`wrapped`) has the name of that, and adds none.
    """
    names: dict[nn.Module, list[str]] = {}
    for path, module in _named_modules(model, ""):
        names.setdefault(module, []).append(path)
    return {module: tuple(dict.fromkeys(paths)) for module, paths in names.items()}


def _named_modules(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    yield path, module
    inside = _inside(module)
    for name, child in module._modules.items():
        if child is not None:
            yield from _named_modules(child, path if name == inside else f"{path}.{name}".lstrip("."))


def named_parameters(paths: Mapping[nn.Module, tuple[str, ...]]) -> dict[str, nn.Parameter]:
    """The parameters of modules that have these names, by each name of theirs."""
    return {
        name: parameter
        for module, names in paths.items()
        for key, parameter in module._parameters.items()
        if parameter is not None
        for name in parameter_paths(names, key)
    }


def first_names(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Each parameter under the first of its names alone."""
    names: dict[nn.Parameter, str] = {}
    for name, parameter in parameters.items():
        names.setdefault(parameter, name)
    return {name: parameter for parameter, name in names.items()}


def parameter_paths(module_paths: Iterable[str], parameter: str) -> tuple[str, ...]:
    """Names of a parameter of a module that has these."""
    return tuple(f"{path}.{parameter}".lstrip(".") for path in module_paths)


def site_paths(module_paths: Iterable[str], parameter: str) -> tuple[str, ...]:
    """Names of a parameter that is adapted: that of its module for a ``weight``, its own for another."""
    return tuple(module_paths) if parameter == "weight" else parameter_paths(module_paths, parameter)


_CHILDREN = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Names under which torch.compile, activation checkpointing and FSDP1 keep the module that they wrap."""

_HOLDERS = (
    "torch.nn.parallel.data_parallel.DataParallel",
    "torch.nn.parallel.distributed.DistributedDataParallel",
    "deepspeed.runtime.engine.DeepSpeedEngine",
)
"""Classes, by name, that keep the model that they wrap as ``module``."""


def _inside(module: nn.Module) -> str | None:
    """Name of the child that a wrapper wraps; None for any other module."""
    found = next((name for name in _CHILDREN if name in module._modules), None)
    if found is None and "module" in module._modules:
        classes = {f"{c.__module__}.{c.__qualname__}" for c in type(module).__mro__}
        found = "module" if classes.intersection(_HOLDERS) else None
    return found


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what wraps it (torch.compile, DataParallel, FSDP, checkpointing): names are those of the model.

    Anything that is no module is returned as it is.
    """
    while isinstance(model, nn.Module) and (name := _inside(model)) is not None:
        model = model._modules[name]  # type: ignore[assignment]
    return model
