"""How quantised linear layers are found, read and written: one entry in `QUANTISATIONS` for each library.

No optional package is imported here unless one of its layers was met.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ...methods.adapter import DTYPES, Adapter
from ..forwards import ASIDE, SLOTS


@dataclass(frozen=True)
class Quantisation:
    """How one library's quantised linear layers are found, read and written.

    Attributes:
        name: for plans and messages.
        layer: qualified name of the layer's class or of an ancestor; weight: beginning of the qualified name of its
            weight's class, "" for any. Names, so that no optional package has to be imported.
        dequantise: W (m, K) of a layer, in float32 or the dtype that its kernel computes in.
        dtype: dtype of the weight that was quantised, which its surroundings compute in; None if nothing tells.
        problem: why a layer of this kind cannot be adapted as it is now, or None.
        quantise: (layer, W) -> the quantised weight and the attributes of the layer that go with it, with the settings
            of the layer; raises ValueError with the reason where they cannot be known. None: this library cannot.
    """

    name: str
    layer: str
    weight: str
    dequantise: Callable[[nn.Module], Tensor]
    dtype: Callable[[nn.Module], torch.dtype | None]
    problem: Callable[[nn.Module], str | None]
    quantise: Callable[[nn.Module, Tensor], tuple[nn.Parameter, dict[str, Any]]] | None = None

    def describes(self, module: nn.Module) -> bool:
        """Whether a module is of a class, and its weight of one, that this entry names."""
        classes = {f"{c.__module__}.{c.__qualname__}" for c in type(module).__mro__}
        weight = type(module._parameters.get("weight"))
        return self.layer in classes and f"{weight.__module__}.{weight.__qualname__}".startswith(self.weight)


def kind_of(module: nn.Module) -> Quantisation | None:
    """How the weight of a linear layer is quantised; None for any other module."""
    if features(module) is None or hasattr(module, "parametrizations") or isinstance(module, torch.jit.ScriptModule):
        return None
    named = next((kind for kind in QUANTISATIONS if kind.describes(module)), None)
    return named or (PACKED if _is_packed(module) else None)


def features(module: nn.Module) -> tuple[int, int] | None:
    """(m, K) of a module that says so, under the names of nn.Linear or those of AutoGPTQ."""
    for out, inner in (("out_features", "in_features"), ("outfeatures", "infeatures")):
        found = (getattr(module, out, None), getattr(module, inner, None))
        if all(isinstance(size, int) and size > 0 for size in found):
            return found  # type: ignore[return-value]
    return None


def _is_packed(module: nn.Module) -> bool:
    """Whether a module holds no matrix of its own in a plain form, but something in another."""
    if any(p is not None and p.dim() > 1 and not _is_coded(p) for p in module._parameters.values()):
        return False
    children = (child for child in module.children() if not isinstance(child, Adapter))
    if any(True for child in children for _ in child.parameters()):
        return False  # a block of layers
    return hasattr(module, "_packed_params") or any(_is_coded(tensor) for tensor in _tensors(module))


def _is_coded(tensor: Tensor) -> bool:
    """Whether a tensor's elements are not its numbers: codes, or a wrapper around such (a sharded tensor is none)."""
    sharded = type(tensor).__module__.startswith("torch.distributed")
    return tensor.dtype not in DTYPES or (is_traceable_wrapper_subclass(tensor) and not sharded)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from (t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None)


def device_of(module: nn.Module) -> torch.device:
    return next((tensor.device for tensor in _tensors(module)), torch.device("cpu"))


def own_forward(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The forward of the base, without hooks of torch, of a layer that is adapted or not."""
    original = getattr(type(module), "original_class", None)  # of an adapted layer
    return module.forward if original is None else module.__dict__.get(ASIDE) or partial(original.forward, module)


def why_not(module: nn.Module) -> str | None:
    """Why a quantised layer (`kind_of` gave its kind) cannot be adapted, or None."""
    kind = kind_of(module)
    assert kind is not None
    if any(tensor.is_meta for tensor in _tensors(module)):
        return f"quantised ({kind.name}), on meta: load its weights first"
    reason = kind.problem(module)
    if reason is None:
        return None
    own = (*module._parameters.items(), *module._buffers.items())
    coded = [f"{name} {str(t.dtype).removeprefix('torch.')}" for name, t in own if t is not None and _is_coded(t)]
    return f"quantised ({', '.join([kind.name, *coded])}): {reason}"


def stand_in(module: nn.Module) -> Tensor:
    """A tensor with the shape, dtype and device of W that takes no memory; its values are NaN."""
    size, kind = features(module), kind_of(module)
    assert size is not None and kind is not None
    dtype = kind.dtype(module) or torch.float32
    return torch.full((), float("nan"), dtype=dtype, device=device_of(module)).expand(size)


@torch.no_grad()
def dequantised(module: nn.Module) -> Tensor:
    """W (m, K) of a quantised layer, in float32 or float64; a new tensor."""
    kind = kind_of(module)
    assert kind is not None
    weight = kind.dequantise(module).detach()
    return weight if weight.dtype == torch.float64 else weight.to(torch.float32)


# --- any module that acts like a linear layer ------------------------------------------------------------------------

_TOLERANCE = 0.05  # a kernel that rounds its input to 8 bits is off by 1 or 2 %, a tanh by far more
_IDENTITY_SCALE = 64.0  # a large multiple: adding the bias and taking it off again rounds the weight the less
_PROBE_ELEMENTS = 1 << 22


def _plain_dtype(module: nn.Module) -> torch.dtype | None:
    """What a layer says it computes in, or the dtype of its bias or scales."""
    named = getattr(module, "compute_dtype", None)
    if named in DTYPES:
        return named
    tensors = [t for t in (module._parameters.get("bias"), *_tensors(module)) if t is not None]
    found = next((t.dtype for t in tensors if t.dtype in DTYPES), None)
    return found or (runs_on(module, own_forward(module)) if module.__dict__.keys() & {ASIDE, *SLOTS} else None)


@torch.no_grad()
def runs_on(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> torch.dtype | None:
    """The dtype of inputs that a forward of the object's own takes: it may cast what the layer stores in 8 bits."""
    size = features(module)
    assert size is not None
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.zeros(1, size[1], dtype=dtype, device=device_of(module))
        try:
            with torch.autocast(x.device.type, enabled=False):
                forward(x)
        except Exception:  # of another dtype; where none will do, the plan says so
            continue
        return dtype
    return None


@torch.no_grad()
def _from_identity(module: nn.Module) -> Tensor:
    """W of anything linear: what it makes of the rows of the identity, block by block, less what it makes of 0."""
    size = features(module)
    assert size is not None
    m, K = size
    forward, device, dtype = own_forward(module), device_of(module), _plain_dtype(module) or torch.float32
    step = max(1, _PROBE_ELEMENTS // max(m, K))
    weight = torch.empty(m, K, dtype=torch.promote_types(dtype, torch.float32), device=device)
    for start in range(0, K, step):
        rows = torch.zeros(min(step, K - start) + 1, K, dtype=dtype, device=device)  # the last stays 0
        rows[:-1, start:].fill_diagonal_(_IDENTITY_SCALE)
        with torch.autocast(device.type, enabled=False):
            output = forward(rows).to(weight.dtype)
        weight[:, start : start + step] = ((output[:-1] - output[-1:]) / _IDENTITY_SCALE).t()
    return weight


def _not_linear(module: nn.Module) -> str | None:
    """What shows, on a few random inputs, that a layer does not compute x W^T + bias with a gradient for x."""
    size = features(module)
    assert size is not None
    dtype = _plain_dtype(module) or torch.float32
    x = torch.randn(4, size[1], generator=torch.Generator().manual_seed(0))
    x[2], x[3] = 4 * x[0] - 3 * x[1], 0
    x = x.to(device_of(module), dtype).requires_grad_()
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            y = own_forward(module)(x)
            if not isinstance(y, Tensor) or y.shape != (4, size[0]) or not y.is_floating_point():
                return f"its forward does not make (..., {size[0]}) of (..., {size[1]})"
            product = y.detach() - y[3].detach()
            grad = torch.autograd.grad(y, x, product, allow_unused=True)[0] if y.requires_grad else None
            if grad is None:
                return "its forward passes no gradient to its input"
    except Exception as error:  # of whatever kernel it runs: said in the plan
        return f"its forward and backward fail on a (4, {size[1]}) {dtype} input: {type(error).__name__}: {error}"
    return _mismatch(module, x.detach().double(), y.detach().double(), grad.double())


def _mismatch(module: nn.Module, x: Tensor, y: Tensor, grad: Tensor) -> str | None:
    """How a layer differs from a linear one.

    Args: x (4, K), the rows a, b, 4 a - 3 b and 0; y (4, m), the outputs; grad (4, K) of |y - y(0)|^2 / 2 by x.
    """
    product = y - y[3]
    size = product.norm()
    bias = getattr(module, "bias", None)
    offset = bias.detach().double().flatten() if isinstance(bias, Tensor) and bias.numel() else torch.zeros_like(y[3])
    if offset.shape != y[3].shape or not (y[3] - offset).norm() <= _TOLERANCE * (size + offset.norm()) / 8:
        return "what it gives for an input of 0 is not its `bias`"
    if not (4 * product[0] - 3 * product[1] - product[2]).norm() <= _TOLERANCE * size:
        return "its output is not linear in its input"
    if not ((grad * x).sum() - size.square()).abs() <= _TOLERANCE * size.square():
        return "the gradient that it passes to its input is not that of its output"
    return None


# --- bitsandbytes ----------------------------------------------------------------------------------------------------


def _bitsandbytes(name: str) -> Any:
    return importlib.import_module(f"bitsandbytes.{name}")


def _state_4bit(layer: Any) -> Any:
    return getattr(layer.weight, "quant_state", None) or layer.quant_state


def _problem_4bit(layer: Any) -> str | None:
    state = _state_4bit(layer)
    if state is None:
        return "not quantised yet: move it to its device first"
    if is_packed(layer):
        return "a forward in eval mode packed it for inference on this CPU, where it cannot train; patch it before that"
    return None


_PACKS = "support_avx512bf16_for_cpu"
"""Attribute of a 4-bit layer: whether a forward in eval mode packs its weight for inference, after which no gradient
passes through it. On CPUs with AVX512-BF16 it is True."""

_PACKED_BEFORE = "_mapsurgery_packs"
"""Attribute that holds what it was, while the model is patched."""


def keep_from_packing(module: nn.Module) -> None:
    """Of a patched model no layer packs itself, adapted or not: gradients have to pass."""
    if _PACKS in module.__dict__:
        module.__dict__.setdefault(_PACKED_BEFORE, module.__dict__[_PACKS])
        module.__dict__[_PACKS] = False


def let_pack(module: nn.Module) -> None:
    """Undo `keep_from_packing`."""
    if _PACKED_BEFORE in module.__dict__:
        module.__dict__[_PACKS] = module.__dict__.pop(_PACKED_BEFORE)


def is_packed(module: nn.Module) -> bool:
    """Whether no gradient passes through a layer any more, because it was packed for inference."""
    weight = dict(module._parameters.items()).get("weight")  # of a scripted module they are no dictionary
    return bool(getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False))


def _dequantise_4bit(layer: Any) -> Tensor:
    state = copy.copy(_state_4bit(layer))
    state.dtype = torch.float32  # each code times its scale as they are, not rounded to a half type
    return _bitsandbytes("functional").dequantize_4bit(layer.weight.data, state)


def _quantise_4bit(layer: Any, weight: Tensor) -> tuple[nn.Parameter, dict[str, Any]]:
    state, old = _state_4bit(layer), layer.weight
    new = (
        _bitsandbytes("nn")
        .Params4bit(
            weight.to(state.dtype),
            requires_grad=False,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=old.dtype,
        )
        .to(weight.device)
    )
    return new, {"quant_state": new.quant_state}


def _problem_8bit(layer: Any) -> str | None:
    if layer.state.has_fp16_weights:
        return "its weight is a floating one, quantised anew at each call (has_fp16_weights=True)"
    return None if layer.weight.dtype == torch.int8 else "not quantised yet: move it to its device first"


def _dequantise_8bit(layer: Any) -> Tensor:
    own = getattr(layer.weight, "SCB", None)  # until the first forward, which moves it
    codes, scales = layer.weight.data, layer.state.SCB if own is None else own
    return codes.to(torch.float32) * (scales.to(torch.float32) / 127).unsqueeze(1)


def _quantise_8bit(layer: Any, weight: Tensor) -> tuple[nn.Parameter, dict[str, Any]]:
    codes, scales, _ = _bitsandbytes("functional").int8_vectorwise_quant(weight.to(torch.float16))
    new = _bitsandbytes("nn").Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
    state = copy.copy(layer.state)
    state.reset_grads()  # the layer takes codes and scales from its new weight in the next forward
    return new, {"state": state}


# --- torchao ---------------------------------------------------------------------------------------------------------


def _dequantise_torchao(layer: Any) -> Tensor:
    if getattr(layer.weight, "act_pre_scale", None) is not None:
        return _from_identity(layer)  # the kernel scales the input as well
    return layer.weight.dequantize()


def _quantise_torchao(layer: Any, weight: Tensor) -> tuple[nn.Parameter, dict[str, Any]]:
    old = layer.weight
    cls = type(old)
    symmetric = not old.zero_point.any() if isinstance(getattr(old, "zero_point", None), Tensor) else True
    mapping = importlib.import_module("torchao.quantization").MappingType
    settings: dict[str, Any] = {"mapping_type": mapping.SYMMETRIC if symmetric else mapping.ASYMMETRIC}
    weight = weight.to(old.dtype)
    if cls.__name__ == "Int8Tensor" and all(
        getattr(old, name, None) is None for name in ("act_pre_scale", "act_quant_scale", "act_quant_zero_point")
    ):
        settings |= {"act_quant_kwargs": old.act_quant_kwargs, "reduce_range": old.reduce_range}
        new = cls.from_hp(weight, _granularity(old), **settings)
    elif cls.__name__ == "IntxUnpackedToInt8Tensor":
        settings["activation_quantization"] = old.activation_quantization
        new = cls.from_hp(weight, tuple(old.block_size), old.target_dtype, **settings)
        new.scale = new.scale.to(old.scale.dtype)
    else:
        raise ValueError(f"the settings that made its {cls.__name__} cannot be read off it")
    return nn.Parameter(new, requires_grad=False), {}


def _granularity(weight: Any) -> Any:
    """torchao's name for the blocks that share a scale."""
    granularity = importlib.import_module("torchao.quantization.granularity")
    (rows, columns), (m, K) = weight.block_size, weight.shape
    if (rows, columns) == (m, K):
        return granularity.PerTensor()
    if rows != 1:
        raise ValueError(f"its blocks of {rows} x {columns} are none that can be asked for again")
    return granularity.PerRow() if columns == K else granularity.PerGroup(columns)


QUANTISATIONS: tuple[Quantisation, ...] = (
    Quantisation(
        "bitsandbytes 4-bit",
        layer="bitsandbytes.nn.modules.Linear4bit",
        weight="",
        dequantise=_dequantise_4bit,
        dtype=lambda layer: getattr(_state_4bit(layer), "dtype", None),
        problem=_problem_4bit,
        quantise=_quantise_4bit,
    ),
    Quantisation(
        "bitsandbytes 8-bit",
        layer="bitsandbytes.nn.modules.Linear8bitLt",
        weight="",
        dequantise=_dequantise_8bit,
        dtype=lambda layer: None,  # its bias takes the dtype of every input
        problem=_problem_8bit,
        quantise=_quantise_8bit,
    ),
    Quantisation(
        "torchao",
        layer="torch.nn.modules.linear.Linear",
        weight="torchao.",
        dequantise=_dequantise_torchao,
        dtype=lambda layer: layer._parameters["weight"].dtype,  # type: ignore[union-attr]
        problem=_not_linear,
        quantise=_quantise_torchao,
    ),
)
"""The first that describes a layer counts."""

PACKED = Quantisation("packed", layer="", weight="", dequantise=_from_identity, dtype=_plain_dtype, problem=_not_linear)
"""Any other module that acts like a linear layer."""
