"""The weights that the library is expected to adapt in a model, found without asking it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

_ONE_WEIGHT = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, nn.EmbeddingBag, nn.Bilinear, Conv1D)
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_EXPERTS = re.compile(r"expert|moe", re.IGNORECASE)
_RECURRENT = re.compile(r"weight_(ih|hh|hr)(_l\d+)?(_reverse)?")
_OLD_HOOKS = ("WeightNorm", "SpectralNorm")


@dataclass(frozen=True)
class Site:
    """One weight to adapt: a parameter of a module.

    Attributes:
        path: the first name of the module.
        name: of the parameter.
        raw: a parameter that no layer type owns: it has to be asked for by name.
        stacked: (E, m, ...), one matrix for each of E experts.
        transposed: (in, out).
        computed: by a parametrisation or a hook, from other parameters.
    """

    path: str
    name: str
    raw: bool
    stacked: bool
    transposed: bool
    computed: bool

    @property
    def key(self) -> str:
        return f"{self.path}.{self.name}" if self.path else self.name

    @property
    def child(self) -> str:
        """Name of the adapter among the module's children."""
        return "adapter" if self.name == "weight" else f"adapter_{self.name}"

    def matrix(self, weight: Tensor) -> Tensor:
        """(m, K), or (E, m, K) of a stack."""
        if self.transposed:
            return weight.t()
        return weight.flatten(2) if self.stacked else weight.flatten(1)

    def like(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        return matrix.t() if self.transposed else matrix.reshape(tuple(shape))


def find_sites(model: nn.Module, parameters: Sequence[str] = (), exclude: Sequence[str] = ()) -> dict[str, Site]:
    """Every weight of the model's layers, stacks of experts, and the raw parameters that globs name.

    `exclude` takes paths of modules, exactly.
    """
    found = {}
    for path, module in model.named_modules():
        if path in exclude:
            continue
        layer = _layer_weights(module)
        raw = [name for name in module._parameters if name not in layer and _is_raw(path, module, name, parameters)]
        for name in [*layer, *raw]:
            weight = weight_of(module, name)
            if weight is not None and weight.is_floating_point() and weight.dim() >= 2 and weight.numel() > 0:
                site = Site(
                    path=path,
                    name=name,
                    raw=name in raw,
                    stacked=name in raw and weight.dim() == 3,
                    transposed=isinstance(module, Conv1D),
                    computed=name not in module._parameters,
                )
                found[site.key] = site
    return found


def raw_parameters(model: nn.Module, sites: dict[str, Site]) -> list[str]:
    """Every full name of the parameters that have to be asked for by name."""
    raw = {(id(model.get_submodule(s.path)), s.name) for s in sites.values() if s.raw}
    return [
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(remove_duplicate=False)
        for name in module._parameters
        if (id(module), name) in raw
    ]


def _layer_weights(module: nn.Module) -> list[str]:
    """Names of the weights of a layer of a known type."""
    if isinstance(module, nn.MultiheadAttention):
        return [name for name in _ATTENTION if getattr(module, name, None) is not None]
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        candidates = [*module._parameters, *getattr(module, "parametrizations", {}), *module.__dict__]
        return [name for name in dict.fromkeys(candidates) if _RECURRENT.fullmatch(name)]
    return ["weight"] if isinstance(module, _ONE_WEIGHT) else []


def _is_raw(path: str, module: nn.Module, name: str, globs: Sequence[str]) -> bool:
    parameter = module._parameters[name]
    if parameter is None or parameter.dim() not in (2, 3):
        return False
    key = f"{path}.{name}" if path else name
    if any(fnmatchcase(key, glob) for glob in globs):
        return True
    experts = _EXPERTS.search(type(module).__name__) or _EXPERTS.search(path.rpartition(".")[2])
    return parameter.dim() == 3 and experts is not None


def weight_of(module: nn.Module, name: str) -> Tensor | None:
    """What a weight's name stands for in a plain module; None for what is no tensor with a size."""
    if isinstance(module._parameters.get(name), nn.parameter.UninitializedParameter):
        return None
    hook = _old_hook(module, name)
    if hook is not None:  # the attribute holds what the last forward left there
        quietly = {"do_power_iteration": False} if hasattr(hook, "n_power_iterations") else {}
        with torch.no_grad():
            return hook.compute_weight(module, **quietly)
    value = getattr(module, name, None)
    return value if isinstance(value, Tensor) else None


def _old_hook(module: nn.Module, name: str) -> Any:
    """What torch.nn.utils.weight_norm or spectral_norm of the old kind registered for this weight."""
    hooks = module._forward_pre_hooks.values()
    return next((hook for hook in hooks if type(hook).__name__ in _OLD_HOOKS and hook.name == name), None)


@torch.no_grad()
def overwrite(model: nn.Module, site: Site, weight: Tensor) -> None:
    """Put plain numbers in the place of a weight; what computed it before is removed."""
    module = model.get_submodule(site.path)
    if parametrize.is_parametrized(module, site.name):
        parametrize.remove_parametrizations(module, site.name, leave_parametrized=True)
    elif site.name not in module._parameters:
        _drop_old_hook(module, site.name)
    parameter = getattr(module, site.name)
    parameter.copy_(weight.to(parameter.dtype))


def _drop_old_hook(module: nn.Module, name: str) -> None:
    """Undo torch.nn.utils.weight_norm and spectral_norm of the old kind without their own arithmetic."""
    value = weight_of(module, name)
    hook = _old_hook(module, name)
    for key in [key for key, registered in module._forward_pre_hooks.items() if registered is hook]:
        del module._forward_pre_hooks[key]
    module.__dict__.pop(name)
    module.register_parameter(name, nn.Parameter(value.detach().clone()))


def gradient_of(model: nn.Module, site: Site) -> Tensor | None:
    """The gradient of a plain weight; of a computed one, all that its origins got."""
    module = model.get_submodule(site.path)
    if not site.computed or site.name in module._parameters:
        return _dense(module._parameters[site.name].grad)
    parametrized = parametrize.is_parametrized(module, site.name)
    if parametrized:
        origins = list(module.parametrizations[site.name].parameters())
    else:
        origins = [p for name, p in module._parameters.items() if name.startswith(f"{site.name}_") and p is not None]
    grads = [_dense(p.grad).flatten() for p in origins if p.grad is not None]
    return torch.cat(grads) if grads else None


def _dense(grad: Tensor | None) -> Tensor | None:
    return grad.to_dense() if grad is not None and grad.is_sparse else grad
