"""What every adapter is: the child module that holds a layer's frozen weight beside its own parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .. import ops
from ..updates import Matrix, Update
from .init import Init

if TYPE_CHECKING:
    from ..reuse import KnownScales
    from .method import Method


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


def matrix_of(shape: Sequence[int], transposed: bool = False, stacked: bool = False) -> Matrix:
    """A weight's shape as update families see it."""
    m, K = matrix_shape(shape, transposed, stacked)
    kernel = () if transposed or stacked else tuple(shape[2:])
    return Matrix(m, K, (shape[0],) if stacked else (), kernel)


def form_values(method: Method, update: Update, init: Init, rank: int) -> dict[str, float]:
    """Numbers that say how an adapter's parameters are meant: adapters that differ in them cannot be exchanged."""
    return {**method.form(init, rank), **update.form()}


def same_form(own: dict[str, float], other: Sequence[float]) -> bool:
    """Whether the numbers of another adapter are one's own, up to the rounding of float32."""
    pairs = zip(own.values(), other, strict=False)
    return len(own) == len(other) and all(abs(a - b) <= 1e-6 * abs(a) for a, b in pairs)


def said_form(own: dict[str, float], values: Sequence[float]) -> str:
    """The numbers of a form by their names, as far as these fit."""
    names = list(own) if len(own) == len(values) else [f"number {i}" for i in range(len(values))]
    return " ".join(f"{name}={value:.6g}" for name, value in zip(names, values, strict=True))


class Adapter(nn.Module):
    """A frozen weight W and the parameters that turn it into W'.

    It knows nothing of models or layers: it holds the tensors, and computes W' and the products with W' that layers
    need, by its method (how W and ΔW make W') and its update family (what ΔW is).

    Args:
        weight: (m, ...) with m outputs, or a stack (E, m, ...) of such. A Parameter is held, not copied; of any other
            tensor (the result of a parametrisation) only shape and norm are taken, and every call is given its own.
        method, update: how W' is made, and of what.
        rank: r, 1 <= r <= min(m, K), K the number of elements of weight by m.
        init: the start.
        dropout: probability of dropping an input of the update path (not of the base) in training.
        dtype: of the adapter's own parameters.
        transposed: weight is (in, out), as in transformers' Conv1D, rather than (out, in, ...).
        stacked: weight is a stack, whose matrices are adapted one by one.
        name: the layer's path, for messages.
        weight_norm: ||W||_F where it is known already; measured when None.
        values: gives W's numbers as (m, K) where `weight` has none (a quantised layer).
        siblings: what adapters of one model share; each may put tensors there.
        start: False where the parameters are about to be loaded: they are left at 0.

    Raises:
        ValueError: the weight holds NaN or infinity, or the family cannot start from it.

    Attributes:
        base_weight: the frozen weight, in the layer's own layout; None if it is computed anew for each call.
        weight_norm: (1,) or (E,) buffer, ||W||_F in float32 (float64 for a float64 weight); NaN while the weight is on
            meta.
        roles: own trained parameters -> "down", "up", "magnitude" (of the update) or "base" (magnitude of the base).
        scaling: fixed factor of the update where the method has one, else 1.
        watch: told of calls without autograd, where `surgery.gradient_source` put one.
        scales: inside `mapsurgery.reuse_norms`, what calls are handed; else None.
        enabled: False inside `mapsurgery.disabled`: the layer computes with W.
        pending: the weight has not arrived yet (meta device), so that ||W||_F and the start are still to be set.
    """

    def __init__(
        self,
        weight: Tensor,
        *,
        method: Method,
        update: Update,
        rank: int,
        init: Init,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
        transposed: bool = False,
        stacked: bool = False,
        name: str = "",
        weight_norm: float | Sequence[float] | None = None,
        values: Callable[[], Tensor] | None = None,
        siblings: dict[Any, Any] | None = None,
        start: bool = True,
    ) -> None:
        super().__init__()
        self.register_parameter("base_weight", weight if isinstance(weight, nn.Parameter) else None)
        self.base_weight: nn.Parameter | None
        self.shape, self.base_dtype = weight.shape, weight.dtype
        self.method, self.update = method, update
        self.rank, self.init, self.dropout = rank, init, dropout
        self.transposed, self.stacked = transposed, stacked
        self.layer_name = name
        self.scaling = method.scaling(rank)
        self.enabled = True
        self.scales: KnownScales | None = None
        self.watch: Any = None
        self.pending = weight.is_meta
        norm_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        norms = torch.full((self.matrices,), float("nan"), dtype=norm_dtype, device=weight.device)
        self.register_buffer("weight_norm", norms)
        self.weight_norm: Tensor
        # tau, relative and their like change what the parameters mean: a state_dict carries them, so that a mismatch is
        # seen.
        self.register_buffer("form", self._form(weight.device))
        self.form: Tensor
        self._siblings = {} if siblings is None else siblings
        self._create({"device": weight.device, "dtype": dtype})
        if not self.pending:
            self.take_norm(weight_norm, weight)
            known = values or (lambda: self.matrix(weight.detach()))
            self.method.remember(self, known)
            self._start(known) if start else self._zero()

    def _create(self, place: dict[str, Any]) -> None:
        """Register the adapter's own tensors, not yet set; `place` is their device and dtype."""
        shapes = self.update.shapes(self.matrix_shape, self.rank)
        own_shapes = self.method.shapes(self.matrix_shape)
        self._refuse_taken([*shapes, *own_shapes])
        for name, shape in shapes.items():
            value = torch.empty(shape, **place)
            if name in self.update.frozen:
                self.register_buffer(name, value)
            else:
                self.register_parameter(name, nn.Parameter(value))
        for name, shape in own_shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **place)))
        for name, parameter in self.update.shared(self.matrix_shape, self.rank, place, self._siblings).items():
            self.register_parameter(name, parameter)
        own = {**self.update.roles, **self.method.roles}
        self.roles = {name: role for name, role in own.items() if name in self._parameters}

    def _refuse_taken(self, names: Sequence[str]) -> None:
        """Raises ValueError if a tensor is called as another one or as an attribute."""
        for i, name in enumerate(names):
            if name in names[:i] or hasattr(self, name):
                raise ValueError(
                    f"update {self.update.name!r} with method {self.method.name!r}: the name {name!r} of a tensor is "
                    "taken, choose another"
                )

    @torch.no_grad()
    def _start(self, weight: Callable[[], Tensor]) -> None:
        """Set the adapter's own tensors to their start; needs ||W||_F. Args: weight gives W as (m, K) or (E, m, K)."""
        self.update.start(self, weight, self.init.kind == "random")
        self.method.start(self, weight)

    @torch.no_grad()
    def _zero(self) -> None:
        for name in self.own_tensors():
            getattr(self, name).zero_()

    # What layers call -------------------------------------------------------------------------------------------

    def linear(self, x: Tensor, bias: Tensor | None, weight: Tensor | None = None) -> Tensor:
        """x W'^T + bias; x (..., K), result (..., m). weight: W, where each call computes it."""
        return self.method.linear(self, x, bias, *self.base(weight))

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
        return self.method.conv(self, x, bias, (stride, padding, dilation, groups), *self.base(weight))

    def embedding(self, ids: Tensor, padding_idx: int | None, weight: Tensor | None = None) -> Tensor:
        """Rows of W' (m, K); ids (...), result (..., K). No gradient from rows at padding_idx."""
        return self.method.embedding(self, ids, padding_idx, *self.base(weight))

    def around(self, x: Tensor, output: Tensor, bias: Tensor | None, values: Callable[[], Tensor]) -> Tensor:
        """x W'^T + bias, made of output (..., m) = x W^T + bias where a kernel of its own computes that; x (..., K).

        Args: values: gives W (m, K), for methods that need its numbers.
        """
        self.tell_watch()
        return self.method.around(self, x, output, bias, values)

    def effective_weight(self, weight: Tensor | None = None) -> Tensor:
        """W' in the layout and dtype of the weight, differentiable, computed when it is first read."""
        W, norm = self.base(weight)
        if not ops.can_wait(W):
            return self.method.effective_weight(self, W, norm)
        tensors = {name: getattr(self, name) for name in self.roles}

        def compute(W: Tensor, *values: Tensor) -> Tensor:
            return self.method.effective_weight(_holding(self, dict(zip(tensors, values, strict=True))), W, norm)

        return ops.lazy_result(W, compute, W, *tensors.values())

    @torch.no_grad()
    def merge_into(self, weight: Tensor) -> None:
        """weight, holding W in the layer's layout, becomes W' in place."""
        self.method.merge_into(self, weight, self._norm_for(weight))

    @torch.no_grad()
    def unmerge_from(self, weight: Tensor) -> None:
        """weight, holding W' in the layer's layout, becomes W in place, up to the rounding of merging."""
        self.method.unmerge_from(self, weight, self._norm_for(weight))

    def _norm_for(self, weight: Tensor) -> Tensor:
        return self.weight_norm if self.base_weight is not None else self.base(weight)[1]

    def recoverable(self) -> bool:
        """Whether W can be recovered from W'."""
        return self.method.recoverable(self, self.base_weight, self.weight_norm)

    # What all share ---------------------------------------------------------------------------------------------

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters by name: everything but the frozen weight and what adapters share."""
        return {name: getattr(self, name) for name in self.roles}

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Those of its own parameters that its method trains."""
        return {name: p for name, p in self.own_parameters().items() if name not in self.method.fixed()}

    def own_tensors(self) -> tuple[str, ...]:
        """Names of what a file holds of the adapter: its parameters, and frozen tensors of the update family."""
        return (*self.roles, *self.update.frozen)

    @property
    def matrix_shape(self) -> Matrix:
        """The weight's shape as update families see it."""
        return matrix_of(self.shape, self.transposed, self.stacked)

    def unit(self) -> Tensor:
        """(1,) or (E,): ||W||_F, by which some families scale ΔW; 1 where it is 0 or the start is not of W's size."""
        if self.init.a_scale != "weight":
            return torch.ones_like(self.weight_norm)
        return torch.where(self.weight_norm > 0, self.weight_norm, 1)

    def entry_size(self) -> Tensor | None:
        """(1,) or (E,): root mean square that the entries of ΔW's first derivative are to have; None: LoRA's own."""
        if self.init.a_scale != "weight":
            return None
        shape = self.matrix_shape
        lora = torch.full_like(self.weight_norm, (3 * shape.K) ** -0.5)
        return torch.where(self.weight_norm > 0, self.weight_norm * (shape.m * shape.K) ** -0.5, lora)

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
        if self.pending:
            self.weight_arrived()
        self.tell_watch()
        held = self.base_weight
        if held is not None and (weight is None or weight is held):
            return held, self.weight_norm
        assert weight is not None
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
            self.method.norm_changed(self, before, self._held)
        self.method.remember(self, self._held)
        if self.pending:
            self._materialise(device)
            self._start(self._held)
            self.pending = False

    def _held(self) -> Tensor:
        assert self.base_weight is not None
        return self.matrix(self.base_weight.detach())

    def _materialise(self, device: torch.device) -> None:
        """Give the adapter's own tensors memory, where they are on meta."""
        place = {"device": device, "dtype": next(iter(self.own_parameters().values())).dtype}
        for name in self.own_tensors():
            tensor = getattr(self, name)
            if tensor.is_meta:
                fresh = torch.empty_like(tensor, device=device)
                kept = isinstance(tensor, nn.Parameter)
                setattr(self, name, nn.Parameter(fresh, requires_grad=tensor.requires_grad) if kept else fresh)
        for name, drawn in self.update.shared(self.matrix_shape, self.rank, place, self._siblings).items():
            setattr(self, name, drawn)  # also where `to_empty` gave it memory: it has no numbers, and is shared no more

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
        return torch.tensor(list(self.form_values().values()), device=device, dtype=torch.float32)

    def form_values(self) -> dict[str, float]:
        """What `form` holds, by name."""
        return form_values(self.method, self.update, self.init, self.rank)

    def __getstate__(self) -> dict[str, Any]:
        """A copy made inside `mapsurgery.disabled` or `reuse_norms` knows nothing of it: the block's end is not its."""
        return {**self.__dict__, "enabled": True, "scales": None}

    def refuse_other_form(self, form: Tensor) -> None:
        """Raises ValueError unless `form`, of another adapter, is this one's."""
        own, other = self.form_values(), form.flatten().tolist()
        if not same_form(own, other):
            raise ValueError(
                f"{self.layer_name}: the adapter was trained with {said_form(own, other)}, "
                f"this one has {said_form(own, list(own.values()))}; patch with the same method, update and init"
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
        shared = [name for name in self._parameters if name not in self.roles and name != "base_weight"]
        own = [prefix + name for name in (*shared, *self.own_tensors(), "form", "weight_norm")]
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
        if self.base_weight is not None and not self.base_weight.is_meta:
            self.method.remember(self, self._held)


def _holding(adapter: Adapter, tensors: dict[str, Tensor]) -> Adapter:
    """The adapter with other tensors for its parameters: W' is computed of what autograd was given.

    A shallow copy: other threads may be computing with the adapter itself.
    """
    other = object.__new__(type(adapter))
    other.__dict__.update(adapter.__dict__)
    other.__dict__["_parameters"] = {name: t for name, t in adapter._parameters.items() if name not in tensors}
    other.__dict__.update(tensors)
    return other
