"""Names: the paths of modules, of what is adapted in them, and of the adapters' tensors."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

CHILD = "adapter"


def child_name(parameter: str) -> str:
    """Name of the child module that holds the adapter of a layer's parameter."""
    return CHILD if parameter == "weight" else f"{CHILD}_{parameter}"


def entry(layer_path: str, parameter: str, name: str) -> str:
    """Name in the model of a parameter of an adapter: "<layer>.adapter.A"."""
    return ".".join(part for part in (layer_path, child_name(parameter), name) if part)


def module_paths(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """Every module with all of its names, in the order of the first."""
    names: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(path)
    return {module: tuple(paths) for module, paths in names.items()}


def parameter_paths(module_paths: Iterable[str], parameter: str) -> tuple[str, ...]:
    """Names of a parameter of a module that has these."""
    return tuple(f"{path}.{parameter}".lstrip(".") for path in module_paths)


def site_paths(module_paths: Iterable[str], parameter: str) -> tuple[str, ...]:
    """Names of a parameter that is adapted: that of its module for a ``weight``, its own for another."""
    return tuple(module_paths) if parameter == "weight" else parameter_paths(module_paths, parameter)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's wrapper or DataParallel's: names and paths are those of the model itself."""
    while True:
        if "_orig_mod" in model._modules:  # torch.compile's OptimizedModule, without importing the compiler
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model
