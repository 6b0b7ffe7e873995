"""One norm for many calls: `reuse_norms`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from . import ops
from .methods import Adapter
from .methods.given import GivenScales, is_plain, tensors_of
from .surgery import record
from .surgery.adapted import FusedConv, FusedLinear

Model = TypeVar("Model", bound=nn.Module)
_Held = list[tuple[Adapter, GivenScales]]

_LOCK = threading.Lock()  # of all that opening and closing blocks changes; calls only read it


@contextmanager
def reuse_norms(model: Model, *, check: bool | None = None) -> Iterator[Model]:
    """Within the block MAP computes ||BA||_F of each layer once, not in every call: parameters may not change there.

        for batch in loader:
            with mapsurgery.reuse_norms(model):  # one step of the optimiser: micro-batches, recomputed activations
                for micro in batch:
                    loss(model(micro)).backward()
            optimizer.step()

    The norm depends on the parameters alone, and takes longer the larger the rank: all norms are computed on entry, by
    one operator. Outputs and gradients are those outside of the block. It concerns layers that run on the fused
    operators, Linear and Conv with method "map" and an update that has factors, without dropout; all others, and
    readers of ``layer.weight``, compute as ever. It is a switch of the model, not of the thread. Blocks may be nested:
    the inner ones reuse the outer one's norms. Nothing of it is copied, pickled, exported or in a state_dict.

    A step of an optimiser is refused. That no parameter changed is checked at each call and at the end, by torch's
    counters of writes (compiled code: at the end only). They do not see writes through ``parameter.data`` or by a
    replayed CUDA graph: `check` does.

    Args:
        check: keep a copy of the adapters, and compare at the end. None: of those on the CPU only, since a GPU would
            have to be waited for. False saves copy and comparison where nothing writes past torch's counters.

    Raises:
        RuntimeError: a parameter of an adapter was changed inside the block; it names the layer.
        ValueError: the model has no adapted layers.
    """
    if check is not None and not isinstance(check, bool):
        raise TypeError(f"check must be True, False or None, got {check!r} ({type(check).__name__})")
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "mapsurgery.reuse_norms inside of what torch.compile compiles: open the block around the call"
        )
    adapters = _reusing(model)
    held: _Held = []
    try:
        _enter(adapters, held)
        copies = _copies(held, check)
        with register_optimizer_step_pre_hook(_refusing_steps(held)):
            yield model
    finally:
        _leave(held)
    _refuse_changed(held)
    _compare(held, copies)


def _reusing(model: nn.Module) -> dict[Adapter, tuple[Any, ...]]:
    """The adapters whose layers' calls take given scales, with the arguments of `ops.map_scales`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    adapters = {m.adapter_of("weight"): None for m in model.modules() if isinstance(m, FusedLinear | FusedConv)}
    if not adapters:
        record.all_sites(model)  # raises where nothing is adapted
    with torch.no_grad():
        inputs = {adapter: _inputs(adapter) for adapter in adapters}
    return {adapter: found for adapter, found in inputs.items() if found is not None}


def _inputs(adapter: Adapter) -> tuple[Any, ...] | None:
    """The arguments of `ops.map_scales`; None where a call computes its own."""
    if adapter.pending or adapter.base_weight is None or not all(map(is_plain, tensors_of(adapter).values())):
        return None
    inputs = adapter.method.scale_inputs(adapter)
    # FSDP1 keeps flat pieces outside of a forward.
    return inputs if inputs is not None and inputs[0].dim() == inputs[1].dim() == 2 else None


def _enter(adapters: dict[Adapter, tuple[Any, ...]], held: _Held) -> None:
    """Give each adapter its scales, or take those of a block that is open; `held` is what has to be left again."""
    with _LOCK:
        for adapter in adapters:
            if adapter.given is not None:
                adapter.given.refuse_changed()
        missing = [adapter for adapter in adapters if adapter.given is None]
        values = ops.map_scales_many([adapters[adapter] for adapter in missing])
        made = {adapter: GivenScales(adapter, value) for adapter, value in zip(missing, values, strict=True)}
        for adapter in adapters:
            given = adapter.given or made[adapter]
            held.append((adapter, given))
            given.users += 1
            adapter.given = given


def _leave(held: _Held) -> None:
    """Close a block; what no other block uses is forgotten."""
    with _LOCK:
        for adapter, given in held:
            given.users -= 1
            if given.users == 0 and adapter.given is given:
                adapter.given = None


def _refusing_steps(held: _Held) -> Callable[..., None]:
    """A hook that runs before the step of any optimiser: fused ones write past torch's counters."""
    owners = {tensor: (given, name) for _, given in held for name, tensor in given.tensors.items()}

    def refuse(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter in owners:
                    given, name = owners[parameter]
                    raise given.error(name, f"is to be changed by {type(optimizer).__name__}.step")

    return refuse


def _refuse_changed(held: _Held) -> None:
    for adapter, given in held:
        name = given.replaced(adapter)
        if name is not None:
            raise given.error(name, "was replaced")
        given.refuse_changed()


@torch.no_grad()
def _copies(held: _Held, check: bool | None) -> dict[Tensor, Tensor]:
    """Each tensor that is to be compared at the end, once however many adapters share it, with a copy."""
    tensors = dict.fromkeys(tensor for _, given in held for tensor in given.tensors.values())
    return {t: t.clone() for t in tensors if check or (check is None and t.is_cpu)}


def _compare(held: _Held, copies: dict[Tensor, Tensor]) -> None:
    for _, given in held:
        for name, tensor in given.tensors.items():
            if tensor in copies and not _same(tensor, copies[tensor]):
                raise given.error(name, "was changed, unseen by torch's counters (a write through .data),")


def _same(tensor: Tensor, copy: Tensor) -> bool:
    """Whether two tensors are equal, NaN to itself."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return torch.equal(tensor, copy) or torch.equal(tensor.detach().view(bits), copy.view(bits))
