"""Which layers can be adapted, and how. A new layer type is one new entry in `LAYER_TYPES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import UninitializedParameter
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ..methods.adapter import DTYPES
from .adapted import (
    AdaptedLayer,
    AdaptedRaw,
    AdaptedRecurrent,
    FusedConv,
    FusedConv1D,
    FusedEmbedding,
    FusedLinear,
)
from .computed import computed_now
from .forwards import carried_forward
from .paths import child_name
from .probe import NotTried, found_out
from .quantised import kinds
from .writes import written_in_source


@dataclass(frozen=True)
class LayerType:
    """One kind of adaptable layer.

    Attributes:
        qualified_name: of the class; a name, so that no optional package has to be imported.
        fused: mixin with a forward of ours (activation space), for classes whose forward is the original one; None:
            the original forward always runs, and reads W'.
        methods: what a subclass must not override for `fused` to compute the same as it does.
        transposed: the weight is (in, out).
        parameters: names of the parameters that are adapted; a name that ends with "*" stands for all that begin so.
        always: mixin for classes whose forward is not the original one.
        linear: `targets="all-linear"` takes it.
        inputs: forms of input that its forward takes, the usual one first, of a layer, a dtype and a device.
    """

    qualified_name: str
    fused: type[AdaptedLayer] | None = None
    methods: tuple[str, ...] = ("forward",)
    transposed: bool = False
    parameters: tuple[str, ...] = ("weight",)
    always: type[AdaptedLayer] = AdaptedLayer
    linear: bool = False
    inputs: tuple[Callable[[Any, torch.dtype, torch.device], tuple[Tensor, ...]], ...] = ()

    def find_in(self, cls: type) -> type | None:
        """This class among the ancestors of `cls`."""
        return next((c for c in cls.__mro__ if f"{c.__module__}.{c.__qualname__}" == self.qualified_name), None)

    def is_standard(self, cls: type) -> bool:
        """Whether `cls` computes exactly what this class computes, so that `fused` may do it."""
        own = self.find_in(cls)
        if own is None or self.fused is None:
            return False
        return all(getattr(cls, name) is getattr(own, name) for name in self.methods)

    def is_known(self, cls: type) -> bool:
        """Whether what `cls` runs is torch's code, or that of the package that the table names."""
        home = self.qualified_name.rpartition(".")[0].rpartition(".")[0]
        owners = [next(c for c in cls.__mro__ if name in vars(c)) for name in self.methods]
        return all(owner.__module__.startswith(home) for owner in owners)

    def parameters_of(self, module: nn.Module) -> list[str]:
        """Names of the parameters of this module that are adapted, whether they can be or not."""
        found: list[str] = []
        for name in self.parameters:
            if name.endswith("*"):  # torch's recurrent layers list their names, those that a hook computes included
                every = getattr(module, "_flat_weights_names", module._parameters)
                found += [n for n in every if n.startswith(name[:-1]) and weight_of(module, n) is not None]
            elif name == "weight" or weight_of(module, name) is not None:
                found.append(name)
        return found


_CONV_METHODS = ("forward", "_conv_forward")
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def _of_sizes(*sizes: str, lead: tuple[int, ...] = (2,)) -> Any:
    """Inputs whose last dimensions are attributes of the layer."""
    return lambda layer, dtype, device: tuple(
        torch.ones(*lead, getattr(layer, size), dtype=dtype, device=device) for size in sizes
    )


def _rows(*lead: int, size: int) -> Any:
    """Inputs whose last dimension is one of the weight's."""
    return lambda layer, dtype, device: (
        torch.ones(*lead, layer._parameters["weight"].shape[size], dtype=dtype, device=device),
    )


def _image(layer: Any, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    spatial = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    return (torch.ones(2, layer.in_channels, *spatial, dtype=dtype, device=device),)


def _ids(layer: Any, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    return (torch.arange(6, device=device).reshape(2, 3) % len(layer._parameters["weight"]),)


_LINEAR = (_rows(2, 3, size=1), _rows(2, size=1))
_ATTENDED = (_of_sizes("embed_dim", "kdim", "vdim", lead=(2, 2)),)
_RECURRENT, _CELL = (_of_sizes("input_size", lead=(2, 2)),), (_of_sizes("input_size"),)

LAYER_TYPES: tuple[LayerType, ...] = (
    LayerType("torch.nn.modules.linear.Linear", FusedLinear, linear=True, inputs=_LINEAR),
    LayerType("torch.nn.modules.conv.Conv1d", FusedConv, _CONV_METHODS, inputs=(_image,)),
    LayerType("torch.nn.modules.conv.Conv2d", FusedConv, _CONV_METHODS, inputs=(_image,)),
    LayerType("torch.nn.modules.conv.Conv3d", FusedConv, _CONV_METHODS, inputs=(_image,)),
    LayerType(
        "transformers.pytorch_utils.Conv1D",
        FusedConv1D,
        transposed=True,
        linear=True,
        inputs=(_rows(2, 3, size=0), _rows(2, size=0)),
    ),
    LayerType("torch.nn.modules.sparse.Embedding", FusedEmbedding, inputs=(_ids,)),
    LayerType("torch.nn.modules.sparse.EmbeddingBag", inputs=(_ids,)),
    LayerType("torch.nn.modules.conv.ConvTranspose1d", inputs=(_image,)),
    LayerType("torch.nn.modules.conv.ConvTranspose2d", inputs=(_image,)),
    LayerType("torch.nn.modules.conv.ConvTranspose3d", inputs=(_image,)),
    LayerType("torch.nn.modules.linear.Bilinear", inputs=(_of_sizes("in1_features", "in2_features"),)),
    LayerType("torch.nn.modules.activation.MultiheadAttention", parameters=_ATTENTION, linear=True, inputs=_ATTENDED),
    LayerType("torch.nn.modules.rnn.RNNBase", parameters=("weight_*",), always=AdaptedRecurrent, inputs=_RECURRENT),
    LayerType("torch.nn.modules.rnn.RNNCellBase", parameters=("weight_ih", "weight_hh"), inputs=_CELL),
)


def find_type(cls: type) -> LayerType | None:
    """The entry of the table that a class belongs to."""
    return next((entry for entry in LAYER_TYPES if entry.find_in(cls) is not None), None)


def is_linear(module: nn.Module) -> bool:
    """Whether `targets="all-linear"` takes a layer: nn.Linear, Conv1D, packed projections, quantised linear layers."""
    entry = find_type(type(module))
    return kinds.kind_of(module) is not None or (entry is not None and entry.linear)


def mixin_of(cls: type, parameters: tuple[str, ...]) -> type[AdaptedLayer]:
    """The mixin that adapts these parameters of a class."""
    entry = find_type(cls)
    if entry is None:
        return AdaptedRaw
    if parameters == ("weight",) and entry.fused is not None and entry.is_standard(cls):
        return entry.fused
    return entry.always


def padding_of(module: nn.Module) -> int | None:
    """The row of an embedding's weight that its own training passes over."""
    return module.padding_idx if isinstance(module, nn.Embedding | nn.EmbeddingBag) else None


def weight_of(module: nn.Module, name: str) -> Tensor | None:
    """What a parameter's name stands for: the Parameter, or the tensor that a parametrisation or hook computes.

    Of a quantised linear layer, a tensor of W's shape and dtype without its values.
    """
    if name == "weight" and kinds.kind_of(module) is not None:
        return kinds.stand_in(module)
    held = module._parameters.get(name)
    if held is not None:
        return held
    fresh = computed_now(module, name)
    left = module.__dict__.get(name) if fresh is None else fresh
    return left if isinstance(left, Tensor) else None


def _adapted_already(module: nn.Module, name: str) -> str | None:
    return "already adapted" if isinstance(module, AdaptedLayer) else None


def _wrong_type(module: nn.Module, name: str) -> str | None:
    return None if find_type(type(module)) else f"{type(module).__name__} is not an adaptable layer type"


def _uninitialised(module: nn.Module, name: str) -> str | None:
    lazy = isinstance(module._parameters.get(name), UninitializedParameter)
    return "lazy module without a shape yet: run one forward first" if lazy else None


def _no_weight(module: nn.Module, name: str) -> str | None:
    if weight_of(module, name) is None:
        return f"its {name} is neither a Parameter nor computed from one (a quantised layer)"
    return None


def _special_weight(module: nn.Module, name: str) -> str | None:
    weight = weight_of(module, name)
    assert weight is not None
    if isinstance(weight, FakeTensor):
        if weight.fake_mode not in _get_current_dispatch_mode_stack():
            return f"its {name} is a FakeTensor: patch inside the FakeTensorMode that made it"
    elif type(weight) not in (nn.Parameter, Tensor):
        return f"its {name} is a {type(weight).__name__} (quantised or sharded)"
    if weight.dtype not in DTYPES:
        return f"its {name} is {str(weight.dtype).removeprefix('torch.')}, not a floating dtype that MAP computes in"
    if weight.layout != torch.strided:
        return f"its {name} is {weight.layout}"
    if weight.dim() < 2:
        return f"its {name} has shape {tuple(weight.shape)}: no matrix"
    if any(stride == 0 and size > 1 for stride, size in zip(weight.stride(), weight.shape, strict=True)):
        return f"its {name} is expanded: several of its elements share one place in memory"
    return f"its {name} is empty" if weight.numel() == 0 else None


def _renormalised(module: nn.Module, name: str) -> str | None:
    if getattr(module, "max_norm", None) is not None and isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return f"its forward changes the weight itself (max_norm={module.max_norm})"
    return None


def _is_container(module: nn.Module, name: str) -> str | None:
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return f"a {type(module).__name__} takes every child for one of its own, and the adapter is one"
    return None


def _name_taken(module: nn.Module, name: str) -> str | None:
    child = child_name(name)
    return f"it has an attribute named `{child}` already" if hasattr(module, child) else None


def _own_forward(module: nn.Module, name: str) -> str | None:
    """What is wrong with a forward of the object's or its class's own."""
    entry = find_type(type(module))
    if entry is not None and carried_forward(module) is None and entry.is_known(type(module)):
        return None
    line = written_in_source(module, name)
    if line is not None:
        return f"its forward changes the {name} itself (`{line}`)"
    if entry is None or name not in entry.parameters_of(module):
        return None
    try:
        return found_out(module, name, entry.always, [partial(form, module) for form in entry.inputs])
    except NotTried:  # the first call of an object's own forward shows whether it acts
        return None


_CHECKS: tuple[Callable[[nn.Module, str], str | None], ...] = (
    _adapted_already,
    _uninitialised,
    _no_weight,
    _special_weight,
    _renormalised,
    _is_container,
    _name_taken,
    _own_forward,
)


def why_not(module: nn.Module, name: str = "weight", raw: bool = False) -> str | None:
    """Why this parameter of a module cannot be adapted, or None if it can.

    Args: raw: the parameter was named by itself, so that the module may be of any type.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by TorchScript, so that its class cannot be changed: patch the module that it was made of"
    if name == "weight" and kinds.kind_of(module) is not None:
        return _adapted_already(module, name) or _name_taken(module, name) or kinds.why_not(module)
    checks = _CHECKS if raw else (_wrong_type, *_CHECKS)
    return next((reason for check in checks if (reason := check(module, name)) is not None), None)
