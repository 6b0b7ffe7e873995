"""What every adapter is: the child module that holds a layer's frozen weight beside its own parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .. import ops
from .init import Init


def check_dropout(dropout: Any) -> None:
    """Raises ValueError unless `dropout` is a probability below 1."""
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"dropout must be a probability in [0, 1), got {dropout!r}")


def check_rank(rank: Any, name: str = "rank", limit: int | None = None) -> None:
    """Raises TypeError or ValueError unless `rank` is an int of at least 1 (and at most `limit`)."""
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"{name} must be an int, got {rank!r} ({type(rank).__name__})")
    if rank < 1:
        raise ValueError(f"{name} must be at least 1, got {rank}")
    if limit is not None and rank > limit:
        raise ValueError(f"{name} must be at most {limit} in this layer, got {rank}")


def matrix_shape(shape: Sequence[int], transposed: bool = False, stacked: bool = False) -> tuple[int, int]:
    """(m, K) of a weight of this shape, or of each matrix of a stack."""
    m = shape[1] if transposed or stacked else shape[0]
    return m, math.prod(shape) // (m * (shape[0] if stacked else 1))


def frobenius_norms(weight: Tensor, stacked: bool = False) -> float | list[float]:
    """||W||_F, or one for each matrix of a stack."""
    return [ops.frobenius_norm(matrix) for matrix in weight] if stacked else ops.frobenius_norm(weight)


class Adapter(nn.Module):
    """A frozen weight W and the parameters that turn it into W'.

    It knows nothing of models or layers: it computes W', and the products with W' that layers need. A subclass adds its
    parameters and says what W' is; a new method or update family is a subclass in a file of its own.

    Args:
        weight: (m, ...) with m outputs, or a stack (E, m, ...) of such. A Parameter is held, not copied; of any other
            tensor (the result of a parametrisation) only shape and norm are taken, and every call is given its own.
        rank: r, 1 <= r <= min(m, K), K the number of elements of weight by m.
        init: the start.
        dropout: probability of dropping an input of the update path (not of the base) in training.
        dtype: of the adapter's own parameters.
        transposed: weight is (in, out), as in transformers' Conv1D, rather than (out, in, ...).
        stacked: weight is a stack, whose matrices are adapted one by one.
        name: the layer's path, for messages.
        weight_norm: ||W||_F where it is known already; measured when None.

    Raises:
        ValueError: the weight holds NaN or infinity.

    Attributes:
        base_weight: the frozen weight, in the layer's own layout; None if it is computed anew for each call.
        weight_norm: (1,) or (E,) buffer, ||W||_F in float32 (float64 for a float64 weight); NaN while the weight is on
            meta.
        watch: told of calls without autograd, where `surgery.gradient_source` put one.
        enabled: False inside `mapsurgery.disabled`: the layer computes with W.
        pending: the weight has not arrived yet (meta device), so that ||W||_F and the start are still to be set.
    """

    ROLES: dict[str, str] = {}
    """Own parameters -> "down", "up" or "magnitude": what `param_groups` tells apart."""

    def __init__(
        self,
        weight: Tensor,
        *,
        rank: int,
        init: Init,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
        transposed: bool = False,
        stacked: bool = False,
        name: str = "",
        weight_norm: float | Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.register_parameter("base_weight", weight if isinstance(weight, nn.Parameter) else None)
        self.base_weight: nn.Parameter | None
        self.shape, self.base_dtype = weight.shape, weight.dtype
        self.rank, self.init, self.dropout = rank, init, dropout
        self.transposed, self.stacked = transposed, stacked
        self.layer_name = name
        self.enabled = True
        self.watch: Any = None
        self.pending = weight.is_meta
        norm_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        norms = torch.full((self.matrices,), float("nan"), dtype=norm_dtype, device=weight.device)
        self.register_buffer("weight_norm", norms)
        self.weight_norm: Tensor
        # tau and relative change what the parameters mean: a state_dict carries them, so that a mismatch is seen.
        self.register_buffer("form", self._form(weight.device))
        self.form: Tensor
        m, K = matrix_shape(self.shape, transposed, stacked)
        self.create_parameters(m, K, {"device": weight.device, "dtype": dtype})
        if not self.pending:
            self.take_norm(weight_norm, weight)
            self.reset_parameters()

    # What a subclass defines ------------------------------------------------------------------------------------

    def create_parameters(self, m: int, K: int, place: dict[str, Any]) -> None:
        """Register the adapter's own parameters, not yet set; `place` is their device and dtype."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Set the adapter's own parameters to their start; needs ||W||_F."""
        raise NotImplementedError

    def norm_changed(self, before: Tensor) -> None:
        """||W||_F is no longer `before` (1,): a checkpoint with other weights was loaded under the adapter."""

    def linear(self, x: Tensor, bias: Tensor | None, weight: Tensor | None = None) -> Tensor:
        """x W'^T + bias; x (..., K), result (..., m). weight: W, where each call computes it."""
        raise NotImplementedError

    def conv(
        self,
        x: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Convolution of x (N, C, *spatial) or (C, *spatial) with W'."""
        raise NotImplementedError

    def embedding(self, ids: Tensor, padding_idx: int | None, weight: Tensor | None = None) -> Tensor:
        """Rows of W' (m, K); ids (...), result (..., K). No gradient from rows at padding_idx."""
        raise NotImplementedError

    def around(self, x: Tensor, output: Tensor, bias: Tensor | None) -> Tensor:
        """x W'^T + bias, made of output (..., m) = x W^T + bias where a kernel of its own computes that; x (..., K)."""
        raise NotImplementedError

    def effective_weight(self, weight: Tensor | None = None) -> Tensor:
        """W' in the layout and dtype of the weight, differentiable."""
        raise NotImplementedError

    def merge_into(self, weight: Tensor) -> None:
        """weight, holding W in the layer's layout, becomes W' in place."""
        raise NotImplementedError

    def unmerge_from(self, weight: Tensor) -> None:
        """weight, holding W' in the layer's layout, becomes W in place, up to the rounding of merging."""
        raise NotImplementedError

    def recoverable(self) -> bool:
        """Whether W can be recovered from W'."""
        raise NotImplementedError

    def measures(self, weight: Tensor | None = None) -> dict[str, float]:
        """Plain numbers for `mapsurgery.report`."""
        raise NotImplementedError

    # What all share ---------------------------------------------------------------------------------------------

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's trained parameters by name: everything but the frozen weight."""
        return {name: getattr(self, name) for name in self.ROLES}

    @property
    def matrices(self) -> int:
        """How many matrices are adapted one by one: 1, or those of a stack."""
        return self.shape[0] if self.stacked else 1

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight (or a tensor of its shape) as (m, K), a stack as (E, m, K): a view where strides allow."""
        return weight.t() if self.transposed else weight.flatten(2 if self.stacked else 1)

    def tell_watch(self) -> None:
        """The adapter runs."""
        if self.watch is not None and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.watch.saw(self)

    def base(self, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """W and ||W||_F: the adapter's own, or those of a W that was computed for this call."""
        self.tell_watch()
        if weight is None or weight is self.base_weight:
            assert self.base_weight is not None
            return self.base_weight, self.weight_norm
        # The model may have been cast since: a norm may be taken in a wider dtype only.
        dtype = torch.promote_types(self.weight_norm.dtype, weight.dtype)
        return weight, torch.linalg.vector_norm(weight.detach(), dtype=dtype).reshape(1)

    def take_norm(self, norm: float | Sequence[float] | None = None, weight: Tensor | None = None) -> None:
        """Set ||W||_F, measured here unless given. Under FakeTensorMode there is nothing to measure.

        Raises:
            ValueError: the weight holds NaN or infinity.
        """
        if isinstance(self.weight_norm, FakeTensor):
            return
        if norm is None:
            weight = self.base_weight if weight is None else weight
            assert weight is not None
            norm = frobenius_norms(weight.detach(), self.stacked)
        norms = torch.tensor(norm, dtype=torch.float64).reshape(-1)
        if not (norms < float("inf")).all():
            raise ValueError(f"the weight of {self.layer_name or 'the layer'} holds NaN or infinite values")
        self.weight_norm.copy_(norms)

    @torch.no_grad()
    def weight_arrived(self) -> None:
        """After the frozen weight was replaced by a checkpoint's: take its norm, finish a start that waited for it."""
        if self.base_weight is None or self.base_weight.is_meta:
            return
        device = self.base_weight.device
        if self.weight_norm.is_meta:
            self.weight_norm = torch.empty_like(self.weight_norm, device=device)
        self.form = self._form(device)
        before = self.weight_norm.clone()
        self.take_norm()
        if not self.pending:
            self.norm_changed(before)
        else:
            for name, parameter in self.own_parameters().items():
                if parameter.is_meta:
                    fresh = torch.empty_like(parameter, device=device)
                    setattr(self, name, nn.Parameter(fresh, requires_grad=parameter.requires_grad))
            self.reset_parameters()
            self.pending = False

    def _apply(self, fn: Any, recurse: bool = True) -> Adapter:
        """`model.half()` must not round ||W||_F, nor tau: these move between devices only."""
        norm = self.weight_norm
        super()._apply(fn, recurse)
        if self.base_weight is not None:
            self.base_dtype = self.base_weight.dtype
        if not norm.is_meta:
            self.weight_norm = norm.to(self.weight_norm.device)
        elif not self.weight_norm.is_meta:
            self.weight_norm = self.weight_norm.to(norm.dtype)
        self.form = self._form(self.form.device)
        return self

    def _form(self, device: torch.device) -> Tensor:
        return torch.tensor([self.init.tau, float(self.init.relative)], device=device)

    def __getstate__(self) -> dict[str, Any]:
        """A copy made inside `mapsurgery.disabled` is not disabled: the block that would enable it again is not its."""
        return {**self.__dict__, "enabled": True}

    def refuse_other_form(self, form: Tensor) -> None:
        """Raises ValueError unless `form` (2,), of another adapter, is this one's tau and relative."""
        tau, relative = (float(value) for value in form.flatten().tolist())
        if not (abs(tau - self.init.tau) <= 1e-6 * abs(self.init.tau) and bool(relative) == self.init.relative):
            raise ValueError(
                f"{self.layer_name}: the adapter was trained with tau={tau:.6g} relative={bool(relative)}, "
                f"this one has tau={self.init.tau:.6g} relative={self.init.relative}; patch with the same init"
            )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """A checkpoint of the original model holds none of the adapter's own entries: then none is missing."""
        own = [prefix + name for name in (*self.ROLES, "form", "weight_norm")]
        missing: list[str] = []
        if own[-2] in state_dict:
            try:
                self.refuse_other_form(state_dict[own[-2]])
            except ValueError as error:
                error_msgs.append(str(error))
                return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        base_only = not any(key in state_dict for key in own)
        missing_keys.extend(key for key in missing if not (base_only and key in own))
        if not base_only and not any(key in missing for key in own):
            self.pending = False
        elif prefix + "base_weight" in state_dict and own[-1] not in state_dict:
            self.weight_arrived()
