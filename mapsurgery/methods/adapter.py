"""What every adapter is: the child module of a layer that holds what is new, and is called with the frozen weight."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .. import ops
from ..updates import Matrix, Update
from .base import Method
from .init import Init
from .known_scales import KnownScales
from .sharded import is_shard, shard_of

_TURNING = threading.RLock()

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Those that weights and adapters may have."""


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


def frobenius_norms(weight: Tensor, stacked: bool = False) -> float | list[float]:
    """||W||_F, or one for each matrix of a stack."""
    return [ops.frobenius_norm(matrix) for matrix in weight] if stacked else ops.frobenius_norm(weight)


def measured(weight: Tensor, stacked: bool = False) -> tuple[list[float], Tensor]:
    """||W||_F of each matrix of a weight, and its sketch, (E, 8), float64, on the CPU: one read of W."""
    matrices = weight.unbind() if stacked else [weight]
    found = torch.stack([ops.fingerprint(matrix) for matrix in matrices]).cpu()
    squares = found[:, 0].tolist()
    whole = all(0 < square < float("inf") for square in squares)  # else they are out of float64's range
    norms = [s**0.5 for s in squares] if whole else [ops.frobenius_norm(matrix) for matrix in matrices]
    return norms, found[:, 1:]


def common_row(paddings: Sequence[int | None], rows: int) -> int | None:
    """The row, of so many, that all of these padding_idx name; None if there is none."""
    named = {None if index is None else index % rows for index in paddings}
    return named.pop() if len(named) == 1 else None


class Adapter(nn.Module):
    """The parameters that turn a frozen weight W into W'.

    It knows nothing of models or layers, and holds no weight: the layer keeps W, and calls its adapter with it for the
    products with W', which follow from the method (how W and ΔW make W') and the update family (what ΔW is).

    Args:
        weight: (m, ...) with m outputs, or a stack (E, m, ...) of such. Shape, dtype, device and norm are taken of it.
        method, update: how W' is made, and of what.
        rank: r, 1 <= r <= min(m, K), K the number of elements of weight by m.
        init: the start.
        dropout: probability of dropping an input of the update path (not of the base) in training.
        dtype: of the adapter's own parameters; casts of the model widen them, and never make them narrower than this.
        transposed: weight is (in, out), as in transformers' Conv1D, rather than (out, in, ...).
        stacked: weight is a stack, whose matrices are adapted one by one.
        name: the layer's path, for messages.
        weight_norm: ||W||_F where it is known already; measured when None.
        values: gives W's numbers as (m, K) where `weight` has none (a quantised layer).
        siblings: what adapters of one model share; each may put tensors there.
        start: False where the parameters are about to be loaded: they are left at 0.

    Raises:
        ValueError: the weight holds NaN or infinity, its norm is too small or too large to compute with, or the family
            cannot start from it.

    Attributes:
        matrix: the weight as update families see it, and how to view it so.
        weight_norm: (1,) or (E,), ||W||_F in float32 (float64 for a float64 weight); NaN while the weight is on meta.
            No buffer: it is taken of the base, and is in no state_dict.
        sketch: (E, 8), what W is known by beside its norm (`ops.fingerprint`); None where that is not known.
        norm_dtype: of the W that was measured; a cast one may differ by rounding.
        norm_given: ||W||_F came from a file, whose base may be this one quantised, or cast.
        hanging: names of attributes that were set on the Parameter W, which readers of W' look for in compiled code.
        computed: W is the result of a parametrisation or hook, which each call computes anew, norm included.
        roles: own trained parameters -> "down", "up", "magnitude" (of the update) or "base" (magnitude of the base).
        scaling: fixed factor of the update where the method has one, else 1.
        watch: told of calls without autograd, where `surgery.cut_graphs` put one.
        scales: inside `mapsurgery.reuse_norms`, what calls take instead of computing it; else None.
        enabled: False inside `mapsurgery.disabled`: the layer computes with W.
        pending: the weight has not arrived yet (meta device), so that ||W||_F and the start are still to be set.
        paddings: padding_idx of each layer that computes with the adapter, None of those that have none.
        kept_row: the row that all of these pass over: it stays W's in W', as it does where W itself is trained.
    """

    sketch = None  # type: Tensor | None  # TorchScript reads annotations; adapters that were pickled before have none

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
        self.shape, self.matrix = weight.shape, Matrix.of(weight.shape, transposed, stacked)
        self.method, self.update = method, update
        self.rank, self.init, self.dropout = rank, init, dropout
        self.transposed, self.stacked = transposed, stacked
        self.layer_name = name
        self.scaling = method.scaling(rank)
        self.enabled, self._off = True, 0
        self.paddings: tuple[int | None, ...] = ()
        self.kept_row: int | None = None
        self.scales: KnownScales | None = None
        self.watch: Any = None
        self.computed = not isinstance(weight, nn.Parameter)
        self.hanging = tuple(n for n in vars(weight) if n[0] != "_") if type(weight) is nn.Parameter else ()
        self.pending = weight.is_meta
        norm_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.weight_norm = torch.full((self.matrices,), float("nan"), dtype=norm_dtype, device=weight.device)
        self._measured: tuple[Tensor, Tensor | None, _Mark] | None = None
        self.norm_dtype, self.norm_given = weight.dtype, False
        self._numbers: list[float] | None = None
        self._siblings = {} if siblings is None else siblings
        self._dtype = dtype
        self._create({"device": weight.device, "dtype": dtype})
        if not self.pending:
            self.take_norm(weight, weight_norm)
            known = values or (lambda: self.matrix.view(weight.detach()))
            self.method.remember(self, known)
            self._start(known) if start else self._zero()

    def _create(self, place: dict[str, Any]) -> None:
        """Register the adapter's own tensors, not yet set; `place` is their device and dtype."""
        shapes = self.update.shapes(self.matrix, self.rank)
        own_shapes = self.method.shapes(self.matrix)
        self._refuse_taken([*shapes, *own_shapes])
        for name, shape in shapes.items():
            value = torch.empty(shape, **place)
            # Frozen tensors are Parameters too: DDP sends buffers around in each forward.
            self.register_parameter(name, nn.Parameter(value, requires_grad=name not in self.update.frozen))
        for name, shape in own_shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **place)))
        for name, parameter in self.update.shared(self.matrix, self.rank, place, self._siblings).items():
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

    def forward(self, product: str, weight: Tensor | None, *args: Any) -> Tensor:
        """A product with W', "linear", "conv", "embedding" or "around" of `Method`, or "effective_weight", W' itself.

        W' is computed when it is first read, where that is possible (`ops.lazy`).

        Args:
            weight: W in the layer's layout; None where a kernel of the layer's own holds it (around).
            args: the product's other arguments.
        """
        if self.watch is not None and not torch.is_grad_enabled():
            self._tell_watch()
        compute = getattr(self.method, product)
        if weight is None:
            return compute(self, *args, self.weight_norm)
        norm = self.norm_of(weight)
        if product != "effective_weight":
            return compute(self, *args, weight, norm)
        if ops.can_wait(weight):
            own = self.own_parameters()
            if all(isinstance(t, Tensor) for t in own.values()):  # and no proxies of torch.fx
                return self._when_read(weight, norm, own)
        return self._effective_weight(weight, norm)

    def _effective_weight(self, weight: Tensor, norm: Tensor) -> Tensor:
        whole, row = self.method.effective_weight(self, weight, norm), self.kept_row
        return whole if row is None else torch.select_scatter(whole, weight.select(0, row), 0, row)

    def _when_read(self, weight: Tensor, norm: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        # What there is now: a tool may move the adapter's tensors away before W' is read.
        now = self._holding({})

        def compute(weight: Tensor, *values: Tensor) -> Tensor:
            return now._holding(dict(zip(own, values, strict=True)))._effective_weight(weight, norm)

        return ops.when_read(weight, compute, weight, *own.values())

    def _holding(self, tensors: dict[str, Tensor]) -> Adapter:
        """The adapter with other tensors for its parameters: W' is computed of what autograd was given.

        A shallow copy: other threads may be computing with the adapter itself.
        """
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.__dict__["_parameters"] = {n: t for n, t in self._parameters.items() if n not in tensors}
        other.__dict__["_buffers"] = dict(self._buffers)
        other.__dict__.update(tensors)
        return other

    def beside(self, weight: Tensor) -> Adapter:
        """The adapter with its tensors where a copy of the weight is, which torch's DataParallel has made."""
        return self._holding({name: p.to(weight.device) for name, p in self._parameters.items() if p is not None})

    @torch.no_grad()
    def merge_into(self, weight: Tensor, norm: Tensor) -> None:
        """weight, holding W in the layer's layout, becomes W' in place. Args: norm: ||W||_F."""
        self._but_for_kept(self.method.merge_into, weight, norm)

    @torch.no_grad()
    def unmerge_from(self, weight: Tensor, norm: Tensor) -> None:
        """weight, holding W' in the layer's layout, becomes W in place, up to the rounding of merging."""
        self._but_for_kept(self.method.unmerge_from, weight, norm)

    def _but_for_kept(self, operation: Callable[..., None], weight: Tensor, norm: Tensor) -> None:
        """Run an operation that writes into a weight, whose kept row is the same afterwards."""
        before = None if self.kept_row is None else weight[self.kept_row].clone()
        operation(self, weight, norm)
        if before is not None:
            weight[self.kept_row] = before

    def read_by(self, paddings: Sequence[int | None]) -> None:
        """Layers with these padding_idx compute with the adapter.

        A row that only some of them pass over is trained through the others, in the plain model too: it is not kept.
        """
        self.paddings, self.kept_row = tuple(paddings), common_row(paddings, self.shape[0])

    def turn(self, off: bool) -> None:
        """Turn the adapter off, or take that back: it is on when each that turned it off has, in whatever order."""
        with _TURNING:
            self._off += 1 if off else -1
            self.enabled = not self._off

    def padding_changed(self, before: int | None, after: int | None) -> None:
        """One of the layers has got another padding_idx."""
        others = list(self.paddings)
        others.remove(before)
        self.read_by([*others, after])

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

    def own_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of `own_tensors`."""
        shapes = {**self.update.shapes(self.matrix, self.rank), **self.method.shapes(self.matrix)}
        return {name: shapes[name] for name in self.own_tensors() if name in shapes}

    def unit(self) -> Tensor:
        """(1,) or (E,): ||W||_F, by which some families scale ΔW; 1 where it is 0 or the start is not of W's size."""
        if self.init.a_scale != "weight":
            return torch.ones_like(self.weight_norm)
        return torch.where(self.weight_norm > 0, self.weight_norm, 1)

    def entry_size(self) -> Tensor | None:
        """(1,) or (E,): root mean square that the entries of ΔW's first derivative are to have; None: LoRA's own."""
        if self.init.a_scale != "weight":
            return None
        m, K = self.matrix.m, self.matrix.K
        lora = torch.full_like(self.weight_norm, (3 * K) ** -0.5)
        return torch.where(self.weight_norm > 0, self.weight_norm * (m * K) ** -0.5, lora)

    @property
    def is_meta(self) -> bool:
        """Whether its own parameters are on meta."""
        return any(p.is_meta for p in self._parameters.values() if p is not None)

    @property
    def matrices(self) -> int:
        """How many matrices are adapted one by one: 1, or those of a stack."""
        return self.shape[0] if self.stacked else 1

    def _tell_watch(self) -> None:
        """The adapter runs without autograd."""
        if not torch.compiler.is_compiling():
            self.watch.saw(self)

    # The norm of the base ---------------------------------------------------------------------------------------

    def norm_of(self, weight: Tensor) -> Tensor:
        """||W||_F of the W of a call, (1,) or (E,): the one that was measured, as long as W is what it was then.

        That is seen by the Parameter's identity and torch's counter of writes; a graph holds what is known when it is
        made. Where the norm of another Parameter differs by rounding alone (W was moved, cast, gathered), it is kept.
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return _device_norm(weight, self.weight_norm.dtype, self.stacked) if self.computed else self.weight_norm
        measured = self._measured
        if measured is not None and weight is measured[0] and measured[2] == _mark(weight, measured[1]):
            return self.weight_norm
        if self.pending and not weight.is_meta:
            self.weight_arrived(weight)
        if weight.is_meta or isinstance(weight, FakeTensor):  # shapes alone are computed
            norm = self.weight_norm
            return norm if norm.is_meta else weight.new_ones(self.matrices, dtype=norm.dtype)
        if self.computed:
            return _device_norm(weight, self.weight_norm.dtype, self.stacked)
        if type(weight) is not nn.Parameter and _get_current_dispatch_mode() is not None and self._numbers is not None:
            # A tracer, which may take no tensor but its own: its graph holds what is known.
            return torch.tensor(self._numbers, dtype=self.weight_norm.dtype, device=weight.device)
        if type(weight) is nn.Parameter:
            self._measure_again(weight, moved=measured is None or weight is not measured[0])
            return self.weight_norm
        found, known = _device_norm(weight, self.weight_norm.dtype, self.stacked), self.weight_norm.to(weight.device)
        return torch.where((found - known).abs() <= self._rounding(weight) * known, known, found)

    def _rounding(self, weight: Tensor) -> float:
        """Relative change of ||W||_F that a cast may make: n roundings by at most eps/2, each independent."""
        return 1e-6 + 4 * torch.finfo(weight.dtype).eps / (weight.numel() / self.matrices) ** 0.5

    @torch.no_grad()
    def _measure_again(self, weight: Tensor, moved: bool) -> None:
        """W may be another: take its norm; of one that was only moved or cast, keep the norm from before."""
        before, sketch, dtype = self.weight_norm, self.sketch, self.norm_dtype
        self.take_norm(weight)
        if moved and self._is_rounded(weight, before, sketch):
            self.weight_norm, self.norm_dtype = before.to(weight.device), dtype
            self.sketch = self.sketch if sketch is None else sketch

    def _is_rounded(self, weight: Tensor, norm: Tensor, sketch: Tensor | None) -> bool:
        """Whether a weight that was just measured is the one with this norm and sketch, but for a cast."""
        if not torch.allclose(norm.to(self.weight_norm), self.weight_norm, rtol=self._rounding(weight), atol=0):
            return False
        if sketch is None or self.sketch is None:
            return True
        apart = torch.linalg.vector_norm(self.sketch - sketch, dim=1).to(self.weight_norm)
        return bool((apart <= 4 * torch.finfo(weight.dtype).eps * self.weight_norm).all())

    def take_norm(self, weight: Tensor, norm: float | Sequence[float] | None = None) -> None:
        """Set ||W||_F, measured here unless given. Under FakeTensorMode there is nothing to measure.

        Raises:
            ValueError: the weight holds NaN or infinity, or the norm is too small or too large to compute with.
        """
        self.forget()
        if isinstance(weight, FakeTensor) or weight.is_meta:
            return
        self.norm_given, self.sketch = norm is not None, None
        if norm is None:
            norm, self.sketch = measured(weight.detach(), self.stacked)
        norms = torch.tensor(norm, dtype=torch.float64).reshape(-1)
        self._refuse_norms(norms, weight)
        self.weight_norm, self._numbers = norms.to(weight.device, self.weight_norm.dtype), norms.tolist()
        self.norm_dtype = weight.dtype
        if type(weight) is nn.Parameter:
            shard = shard_of(weight)
            self._measured = weight, shard, _mark(weight, shard)

    def _refuse_norms(self, norms: Tensor, weight: Tensor) -> None:
        """Raises ValueError where a ||W||_F is no number that the adapter can compute with."""
        name = f"the weight of {self.layer_name or 'the layer'}"
        low, high = self.method.norms_of(self.update, self.weight_norm.dtype)
        wrong = norms[~((norms == 0) | ((norms >= low) & (norms <= high)))]
        if not len(wrong):
            return
        if not weight.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinite values")
        raise ValueError(
            f"{name} has ||W||_F = {wrong[0].item():.3g}; method {self.method.name!r} with update {self.update.name!r} "
            f"computes with {low:.3g} to {high:.3g}: multiply the weight by a number and what it gives by its inverse, "
            "or exclude the layer"
        )

    def forget(self) -> None:
        """W is another, or is about to be moved: hold it no longer, and look again."""
        self._measured = None

    def base_loaded(self, weight: Tensor, with_adapter: bool) -> None:
        """A checkpoint brought another W; with_adapter: and the adapter's own parameters, which are as they should be.

        A shard is measured when it is gathered.
        """
        if type(weight) not in (nn.Parameter, Tensor):
            self.forget()
        elif weight.is_meta:
            return
        elif self.pending and not with_adapter:
            self.weight_arrived(weight)
        else:
            before = self.weight_norm
            self._measure_again(weight, moved=not self.pending)
            if not with_adapter and self.weight_norm is not before:
                self.method.norm_changed(self, before.to(weight.device), lambda: self.matrix.view(weight.detach()))
            self.method.remember(self, lambda: self.matrix.view(weight.detach()))

    def arrives_in(self, state_dict: Mapping[str, Tensor], prefix: str) -> bool:
        """Whether a state_dict holds numbers for the adapter, and not just its own (torch's set_model_state_dict adds
        what a checkpoint lacks)."""
        own = {f"{prefix}{name}": p for name, p in self._parameters.items() if p is not None}
        return any(_address(state_dict[key]) != _address(p) for key, p in own.items() if key in state_dict)

    @torch.no_grad()
    def weight_arrived(self, weight: Tensor) -> None:
        """The frozen weight is there, on which the start had to wait: take its norm, and start.

        Raises:
            RuntimeError: FSDP2 shards the adapter's own parameters already, so that a start would be lost.
        """
        if any(shard_of(p) is not None or is_shard(p) for p in self._parameters.values() if p is not None):
            raise RuntimeError(
                f"{self.layer_name}: the adapter was made on meta and sharded before it could start from its weight; "
                "load a checkpoint that holds the adapters too, or load the base weights before fully_shard"
            )
        self.take_norm(weight)
        self._materialise(weight.device)
        self.method.remember(self, lambda: self.matrix.view(weight.detach()))
        self._start(lambda: self.matrix.view(weight.detach()))
        self.pending = False

    def _materialise(self, device: torch.device) -> None:
        """Give the adapter's own tensors memory, where they are on meta."""
        place = {"device": device, "dtype": next(iter(self.own_parameters().values())).dtype}
        for name in self.own_tensors():
            tensor = getattr(self, name)
            if tensor.is_meta:
                fresh = torch.empty_like(tensor, device=device)
                setattr(self, name, nn.Parameter(fresh, requires_grad=tensor.requires_grad))
        for name, drawn in self.update.shared(self.matrix, self.rank, place, self._siblings).items():
            setattr(self, name, drawn)  # also where `to_empty` gave it memory: it has no numbers, and is shared no more

    def _apply(self, fn: Any, recurse: bool = True) -> Adapter:
        """A cast of the model moves the adapter, and does not round it: what is trained needs its digits.

        Neither does it round ||W||_F, which keeps its dtype.
        """
        try:
            super()._apply(lambda tensor: self._unrounded(tensor, fn(tensor)), recurse)
            norm, moved = self.weight_norm, fn(self.weight_norm)
        except NotImplementedError:  # torch copies nothing from meta
            if self.pending:
                return self  # it starts where its weight is
            raise
        if norm.is_meta and not moved.is_meta:
            self.weight_norm = torch.full_like(moved, float("nan"), dtype=norm.dtype)
        elif not moved.is_meta:  # else it stays: this W's norm is known
            self.weight_norm = norm.to(moved.device)
        return self

    def _unrounded(self, tensor: Tensor, cast: Tensor) -> Tensor:
        """`cast`, or where that is narrower the tensor in its own dtype, on the device of `cast`.

        `.float()` takes back what `.double()` widened.
        """
        back = (tensor.dtype, cast.dtype) == (torch.float64, torch.float32) and self._dtype != torch.float64
        if _holds(cast.dtype, tensor.dtype) or back:
            return cast
        return torch.empty_like(tensor, device="meta") if cast.is_meta else tensor.to(cast.device)

    def __getstate__(self) -> dict[str, Any]:
        """A copy knows nothing of a block of `mapsurgery.disabled` or `reuse_norms` that is open, nor holds W."""
        return {**self.__dict__, "enabled": True, "_off": 0, "scales": None, "_measured": None}

    def form(self) -> dict[str, float]:
        """Numbers that say how the parameters are meant: adapters that differ in them cannot be exchanged."""
        kept = {} if self.kept_row is None else {"padding_idx": float(self.kept_row)}
        return {**self.method.form(self.init, self.rank), **self.update.form(), **kept}

    def misfit(self, form: Mapping[str, float] | None) -> str | None:
        """Why parameters of an adapter with this form cannot be this one's; None if they can, or if none is known."""
        own = self.form()
        if form is None or (own.keys() == form.keys() and all(_close(form[name], own[name]) for name in own)):
            return None
        hints = {
            "padding_idx": ", on the same padding_idx",
            "alpha_start": ", in the version of mapsurgery that saved it",
        }
        return (
            f"{self.layer_name}: the adapter was trained with {_said(form)}, this one has {_said(own)}; patch with the "
            "same method, update and init"
            + "".join(hint for name, hint in hints.items() if own.get(name) != form.get(name))
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):  # where torch keeps the versions of modules
            destination._metadata.setdefault(prefix[:-1], {})["form"] = self.form()

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
        own = [prefix + name for name in self._parameters]
        misfit = self.misfit(local_metadata.get("form"))
        if misfit is not None:
            error_msgs.append(misfit)
            return
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        if any(key in state_dict for key in own):
            missing_keys.extend(missing)
            self.pending = self.pending and bool(missing)


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether an adapter's numbers in one dtype are numbers of the other, too."""
    if wide == narrow:
        return True
    if wide not in DTYPES:
        return False
    a, b = torch.finfo(wide), torch.finfo(narrow)
    return a.eps <= b.eps and a.max >= b.max


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-6 * abs(b)


def _said(form: Mapping[str, float]) -> str:
    return " ".join(f"{name}={value:.6g}" for name, value in form.items())


def _address(t: Tensor) -> int:
    return getattr(t, "_local_tensor", t).data_ptr()  # of a DTensor


_Mark = tuple[int, int]


def _mark(weight: Tensor, shard: Tensor | None) -> _Mark:
    """What changes when a weight is written to, or gets other memory: torch's counter of writes, and the address.

    Of one that FSDP2 gathers, into other memory each time, the counter of its shard.
    """
    if shard is not None:
        return shard._version, 0
    return 0 if weight.is_inference() else weight._version, weight.data_ptr()


def _device_norm(weight: Tensor, dtype: torch.dtype, stacked: bool) -> Tensor:
    """||W||_F (1,), or of each matrix of a stack (E,), without waiting for the device; at least in `dtype`."""
    rows, dtype = weight.detach(), torch.promote_types(dtype, weight.dtype)
    rows = rows.flatten(1) if stacked else rows.unsqueeze(0)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return torch.linalg.vector_norm(rows.flatten(1), dim=1, dtype=dtype)
    # In float32, torch's sum over a large matrix is off by 1e-3 on a CPU.
    squares = [torch.ops.mapsurgery.squared_norm.default(row) for row in rows]
    return torch.cat(squares).sqrt().to(dtype)
