"""The entries of a plan: what becomes of one parameter of one layer, or why nothing does."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..methods import Adapter, Way
from ..updates import Matrix
from .config import Config
from .forwards import carried_forward
from .layers import LayerType, find_type, mixin_of, weight_of
from .quantised import kinds
from .quantised.kinds import Quantisation


@dataclass(frozen=True)
class PlannedLayer:
    """One parameter of one layer to adapt: in most layers, their weight.

    Attributes:
        parameter: its name in the layer.
        paths: every name by which the model reaches it, the layer's path for a ``weight`` and the parameter's name for
            others; the first is the one used in files.
        shape: of the parameter, as the layer holds it.
        matrix: as an adapter sees it, (m, K), or a stack of such that are adapted one by one.
        rank: after the limit of the update family, in most min(m, K); requested_rank before.
        trainable: number of parameters that the adapter trains; 0 where the adapter is another layer's.
        pattern: the first pattern that took it.
        config: the arguments of the plan.
        own_forward: the layer's own forward runs, on W' or on a quantised W; else one of ours does.
        shares: the name under which the adapter of a tied parameter is built already.
        weight_norm, sketch, dtype: of W, and the adapter's dtype, where a file gives them; else measured and by
            `Config`.
    """

    module: nn.Module = field(repr=False)
    parameter: str
    paths: tuple[str, ...]
    shape: tuple[int, ...]
    matrix: Matrix
    rank: int
    requested_rank: int
    pattern: str
    config: Config = field(repr=False, compare=False)
    own_forward: bool
    trainable: int = 0
    notes: tuple[str, ...] = ()
    shares: str | None = None
    weight_norm: float | tuple[float, ...] | None = None
    sketch: Tensor | None = field(default=None, repr=False, compare=False)
    dtype: torch.dtype | None = None

    @property
    def path(self) -> str:
        return self.paths[0]

    @property
    def type_name(self) -> str:
        return type(self.module).__name__

    @property
    def weight(self) -> Tensor:
        """The Parameter itself, or the tensor that is computed in its place (`weight_of`)."""
        weight = weight_of(self.module, self.parameter)
        assert weight is not None
        return weight

    @property
    def transposed(self) -> bool:
        return self.matrix.transposed

    @property
    def stacked(self) -> bool:
        return bool(self.matrix.stack)

    @property
    def quantisation(self) -> Quantisation | None:
        """How the weight is quantised, if it is."""
        return kinds.kind_of(self.module) if self.parameter == "weight" else None

    @property
    def way(self) -> Way:
        """How it computes in training."""
        return self._way(training=True)

    @property
    def way_in_eval(self) -> Way:
        """How it computes in eval mode, where nothing is dropped."""
        return self._way(training=False)

    def _way(self, training: bool) -> Way:
        if self.own_forward:
            return Way.EFFECTIVE if self.quantisation is None else Way.AROUND
        if isinstance(self.module, nn.Embedding):  # rows of W and of ΔW: no operator computes these
            return Way.BESIDE
        stand_in = self.adapter(torch.empty(self.shape, device="meta"))
        stand_in.train(training and self.drops)
        return self.config.method.way(stand_in, convolution=isinstance(self.module, _ConvNd))

    def adapter(self, weight: Tensor, **others: Any) -> Adapter:
        """A new adapter of a weight as planned. Args: others: further arguments of `Adapter`."""
        c = self.config
        return Adapter(
            weight,
            method=c.method,
            update=c.update,
            rank=self.rank,
            init=c.init,
            dropout=c.dropout,
            transposed=self.transposed,
            stacked=self.stacked,
            **others,
        )

    @property
    def drops(self) -> bool:
        """Whether dropout applies: where the update has an input of numbers, and the forward is not the layer's."""
        return (not self.own_forward or self.quantisation is not None) and not isinstance(self.module, nn.Embedding)

    @property
    def matrices(self) -> int:
        return math.prod(self.matrix.stack)


@dataclass(frozen=True)
class SkippedModule:
    """A module that a target pattern covers and that is not adapted, with the reason."""

    paths: tuple[str, ...]
    type_name: str
    reason: str
    pattern: str = ""

    @property
    def path(self) -> str:
        return self.paths[0]


def planned_layer(
    module: nn.Module, name: str, sites: tuple[str, ...], pattern: str, asked: int, config: Config
) -> PlannedLayer:
    """The entry of a parameter that can be adapted (`why_not` gave no reason), its rank limited to what is possible."""
    layer_type = find_type(type(module))
    if layer_type is not None and name not in layer_type.parameters_of(module):
        layer_type = None
    weight = weight_of(module, name)
    assert weight is not None
    stacked = layer_type is None and weight.dim() == 3
    matrix = Matrix.of(weight.shape, layer_type is not None and layer_type.transposed, stacked)
    rank = config.update.limited(asked, matrix)
    shapes = parameter_shapes(config, matrix, rank)
    return PlannedLayer(
        module=module,
        parameter=name,
        paths=sites,
        shape=tuple(weight.shape),
        matrix=matrix,
        rank=rank,
        requested_rank=asked,
        pattern=pattern,
        config=config,
        own_forward=_runs_own_forward(module, name, layer_type),
        trainable=sum(math.prod(shape) for n, shape in shapes.items() if n not in config.method.fixed()),
    )


def _runs_own_forward(module: nn.Module, name: str, layer_type: LayerType | None) -> bool:
    """Whether a layer keeps its own forward while it is adapted."""
    if layer_type is None or (name == "weight" and kinds.kind_of(module) is not None):
        return True
    own = mixin_of(type(module), (name,)) is not layer_type.fused or carried_forward(module) is not None
    return own or bool(getattr(module, "scale_grad_by_freq", False))


def parameter_shapes(config: Config, matrix: Matrix, rank: int, frozen: bool = False) -> dict[str, tuple[int, ...]]:
    """Shapes of an adapter's own parameters; with `frozen` of all that a file holds of it."""
    of_update = config.update.shapes(matrix, rank)
    kept = {name: shape for name, shape in of_update.items() if frozen or name not in config.update.frozen}
    return kept | config.method.shapes(matrix)
