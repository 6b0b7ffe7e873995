"""How PEFT lays out the LoRA of a layer, and in which layers both libraries mean the same by it (PEFT 0.21).

PEFT computes base(x) + s B A x, or DoRA's diag(m / ‖W + s BA‖_row) (W + s BA), with A a layer of the base's type.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ...surgery.adapted import AdaptedLayer, FusedConv, FusedEmbedding, FusedLinear
from ...surgery.layers import find_type, mixin_of, weight_of
from ...surgery.quantised import kinds
from ...updates import Matrix

PREFIX = "base_model.model."
"""What the names of a PeftModel's parameters begin with."""

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"


_MEANING = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out")


def meaning_of(config: Mapping[str, Any]) -> str:
    """What of a configuration says how the tensors are meant, as a text."""
    return json.dumps({name: config.get(name) for name in _MEANING}, sort_keys=True)


class LayerTensors(NamedTuple):
    """ΔW = s B A of one layer: A (r, K), B (m, r), and DoRA's magnitudes (m,), None with LoRA."""

    A: Tensor
    B: Tensor
    magnitude: Tensor | None = None


@dataclass(frozen=True)
class Layout:
    """How the tensors of one layer are called and shaped in PEFT.

    Attributes:
        A, B: names below the layer's own.
        shape: of the weight as the layer holds it; transposed: it is (K, m).
        embedding: PEFT holds (B A)ᵀ: its A is Bᵀ (r, m), its B is Aᵀ (K, r).
    """

    A: str
    B: str
    shape: tuple[int, ...]
    transposed: bool = False
    embedding: bool = False

    def shapes(self, rank: int, dora: bool) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by its name below the layer's."""
        matrix = Matrix.of(self.shape, self.transposed)
        m, K, kernel = matrix.m, matrix.K, matrix.kernel
        if self.embedding:
            return {self.A: (rank, m), self.B: (K, rank)}
        ones = (1,) * len(kernel)
        shapes = {self.A: (rank, matrix.channels, *kernel), self.B: (m, rank, *ones)}
        return shapes | ({"lora_magnitude_vector": (1, m, *ones) if kernel else (m,)} if dora else {})

    def pack(self, tensors: LayerTensors) -> dict[str, Tensor]:
        """The layer's tensors as PEFT has them."""
        shapes = self.shapes(tensors.A.shape[0], tensors.magnitude is not None)
        A, B = (tensors.B.t(), tensors.A.t()) if self.embedding else (tensors.A, tensors.B)
        packed = {self.A: A.reshape(shapes[self.A]), self.B: B.reshape(shapes[self.B])}
        if tensors.magnitude is not None:
            packed["lora_magnitude_vector"] = tensors.magnitude.reshape(shapes["lora_magnitude_vector"])
        return packed

    def unpack(self, packed: Mapping[str, Tensor]) -> LayerTensors:
        """The reverse of `pack`; the shapes are those of `shapes`."""
        A, B, magnitude = packed[self.A], packed[self.B], packed.get("lora_magnitude_vector")
        if self.embedding:
            return LayerTensors(B.t(), A.t())
        return LayerTensors(A.flatten(1), B.flatten(1), None if magnitude is None else magnitude.flatten())


def layout_of(module: nn.Module, parameter: str, dora: bool) -> Layout | str:
    """The layout of a parameter of a layer, adapted or not; or, as what follows its name, why there is none."""
    cls = module.original_class if isinstance(module, AdaptedLayer) else type(module)
    if parameter == "weight" and kinds.kind_of(module) is not None:
        return _linear(kinds.stand_in(module).shape)
    if isinstance(module, nn.MultiheadAttention | NonDynamicallyQuantizableLinear):  # the latter is its out_proj
        return "is of an nn.MultiheadAttention, to whose out_proj PEFT 0.21 adds the update twice"
    mixin = mixin_of(cls, (parameter,))
    weight = module.base_of(parameter) if isinstance(module, AdaptedLayer) else weight_of(module, parameter)
    if weight is None or not issubclass(mixin, FusedLinear | FusedConv | FusedEmbedding):
        what = f"the parameter {parameter} of a {cls.__name__}" if parameter != "weight" else f"a {cls.__name__}"
        return f"is {what}, which PEFT has no adapter for, or one that means something else"
    if issubclass(mixin, FusedConv):
        return _of_convolution(module, weight)
    if issubclass(mixin, FusedEmbedding):
        if dora:
            return "is an Embedding, of which DoRA has a magnitude for each column in PEFT and for each row here"
        return Layout("lora_embedding_A", "lora_embedding_B", tuple(weight.shape), embedding=True)
    kind = find_type(cls)
    return _linear(weight.shape, kind is not None and kind.transposed)


def _linear(shape: torch.Size, transposed: bool = False) -> Layout:
    return Layout("lora_A.weight", "lora_B.weight", tuple(shape), transposed)


def _of_convolution(module: nn.Module, weight: Tensor) -> Layout | str:
    """PEFT's A is a convolution without groups, dilation and padding mode, whatever those of the base are."""
    if module.groups != 1:
        return f"is a convolution in {module.groups} groups, which PEFT's factors mix"
    if any(step != 1 for step in module.dilation):  # type: ignore[union-attr]
        return f"is a convolution with dilation {module.dilation}, which PEFT's factors do not have"
    if module.padding_mode != "zeros":
        return f"is a convolution with padding mode {module.padding_mode!r}, where PEFT's factors pad with zeros"
    return Layout("lora_A.weight", "lora_B.weight", tuple(weight.shape))


def has_empty_row(W: Tensor) -> bool:
    """Whether a row of W (m, K) is 0: DoRA divides by its length in PEFT, and gives it no direction here."""
    return not bool(W.any(dim=-1).all())


def why_not_by_name(paths: tuple[str, ...]) -> str | None:
    """Why PEFT cannot adapt a module with these names, as what follows the first of them, or None."""
    if not paths[0]:
        return "is the whole model, of which PEFT adapts the layers"
    if len(paths) > 1:
        return f"is also {', '.join(map(repr, paths[1:]))}, and PEFT would adapt it under its first name only"
    return None
