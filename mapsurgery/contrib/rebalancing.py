"""Factors of one size again, with the same W': `rebalance`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..methods import Adapter
from ..surgery.all_or_nothing import Journal, all_or_nothing
from ..surgery.record import find_patched, intact_sites

_POWERS = {
    "step": 0,
    "mu_product": 0,  # NAdam
    "exp_avg": -1,
    "momentum_buffer": -1,
    "grad_avg": -1,  # RMSprop
    "exp_inf": -1,  # Adamax
    "exp_avg_sq": -2,
    "max_exp_avg_sq": -2,
    "square_avg": -2,  # RMSprop, Adadelta
    "sum": -2,  # Adagrad
    "row_var": -2,  # Adafactor
    "col_var": -2,
    "variance": -2,
    "acc_delta": 0,  # Adadelta: of steps, whose size does not depend on the gradient's
}
"""Entry of the state of a torch optimiser -> the power of c by which it scales where the parameter scales by c, and its
gradient so by 1/c."""

Groups = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Rebalancing:
    """What `rebalance` did.

    Attributes:
        exponents: layer -> {tensor: [k]}: it was multiplied by 2^k; a k for each matrix of a stack.
        skipped: layer -> why nothing was done there.
    """

    exponents: dict[str, dict[str, list[int]]]
    skipped: dict[str, str]


@torch.no_grad()
def rebalance(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Rebalancing:
    """Multiply the factors of each update by powers of two that make their norms equal, to a factor of 2; W' stays.

    Nothing opposes the growth of ‖A‖_F and ‖B‖_F under MAP, where W' does not depend on their size, and the larger a
    factor, the less of it an optimiser's step moves. A ← 2^k A, B ← 2^-k B is exact in floating point: W' is the same
    bit for bit, by any method. Call it between two training steps, every few hundred.

    Families: "lora", "loha", "lokr", "vera" and "flora", all factors to one size; "pissa" and "olora", A with A₀ and B
    with B₀. Left alone are "adalora", whose P and Q are to stay orthonormal, and "dense", which has one factor; and
    layers with a factor that is 0 (at the start) or not finite, that is frozen, or an entry of which 2^k would round.

    Args:
        optimizer: its moments of these parameters are scaled along, as if all gradients had been those of the new
            factors; one of torch.optim. Without it they go on as they are.

    Returns:
        What was done where, and why not elsewhere.

    Raises:
        ValueError: the model is not patched, no layer has a family that can be rebalanced, or the optimiser keeps state
            that is not known here. Nothing is changed then.
    """
    root, record = find_patched(model)
    adapters = {site.path: site.adapter for site in intact_sites(root, record)}
    groups = {path: _groups(adapter) for path, adapter in adapters.items()}
    if not any(groups.values()):
        families = ", ".join(sorted({adapter.update.name for adapter in adapters.values()}))
        raise ValueError(f"nothing can be rebalanced: the update {families} has no factors to be scaled")
    if optimizer is not None:
        _refuse_unknown_state(optimizer, adapters)
    norms = _norms(adapters, groups)
    result = Rebalancing({}, {})
    with all_or_nothing() as journal:
        for path, adapter in adapters.items():
            exponents = [_exponents(sizes) for sizes in norms[path]]  # by matrix, then by group
            reason = _why_not(adapter, groups[path], norms[path])
            reason = reason or _scale(adapter, groups[path], exponents, optimizer, journal)
            if reason:
                result.skipped[path] = reason
            else:
                by_group = zip(groups[path], zip(*exponents, strict=True), strict=True)
                result.exponents[path] = {name: list(powers) for group, powers in by_group for name in group}
    return result


def _groups(adapter: Adapter) -> Groups:
    """The tensors that are scaled together, of those that the layer has; () where it has fewer than two groups."""
    own = adapter.own_tensors()
    found = tuple(tuple(name for name in group if name in own) for group in adapter.update.linear_in)
    found = tuple(group for group in found if group)
    return found if len(found) > 1 else ()


def _refuse_unknown_state(optimizer: torch.optim.Optimizer, adapters: Mapping[str, Adapter]) -> None:
    for path, adapter in adapters.items():
        for name, parameter in adapter.own_parameters().items():
            unknown = [key for key in optimizer.state.get(parameter, {}) if key not in _POWERS]
            if unknown:
                raise ValueError(
                    f"{type(optimizer).__name__} keeps {unknown[0]!r} of {path}'s {name}: it is not known how that "
                    "scales with the parameter; rebalance without the optimizer, whose moments then go on as they are"
                )


def _norms(adapters: Mapping[str, Adapter], groups: Mapping[str, Groups]) -> dict[str, list[list[float]]]:
    """Norm of the trained tensor of each group: layer -> matrix -> group. One transfer for all layers."""
    tensors = []
    for path, adapter in adapters.items():
        for group in groups[path]:
            factor = getattr(adapter, group[0]).detach().reshape(adapter.matrices, -1)
            tensors.append(torch.linalg.vector_norm(factor, dim=-1, dtype=torch.float64))
    device = tensors[0].device
    numbers = iter(torch.cat([t.to(device) for t in tensors]).tolist())
    found = {}
    for path, adapter in adapters.items():
        by_group = [[next(numbers) for _ in range(adapter.matrices)] for _ in groups[path]]
        found[path] = [list(sizes) for sizes in zip(*by_group, strict=True)]
    return found


def _usable(sizes: Sequence[float]) -> bool:
    return all(0 < size < float("inf") for size in sizes)


def _exponents(sizes: Sequence[float]) -> list[int]:
    """Whole numbers with sum 0 that bring sizes s 2^k together; 0 where a size is 0 or not finite."""
    if not _usable(sizes):
        return [0] * len(sizes)
    logs = [math.log2(size) for size in sizes]
    mean = sum(logs) / len(logs)
    edges = [round(sum(mean - log for log in logs[: i + 1])) for i in range(len(logs))]  # the last is 0
    return [edge - before for edge, before in zip(edges, [0, *edges], strict=False)]


def _why_not(adapter: Adapter, groups: Groups, norms: Sequence[Sequence[float]]) -> str:
    """Why a layer is left alone, or ""."""
    if not groups:
        return f"update {adapter.update.name} has no factors to be scaled"
    frozen = [group[0] for group in groups if not getattr(adapter, group[0]).requires_grad]
    if frozen:
        return f"{frozen[0]} is frozen"
    if not any(_usable(sizes) for sizes in norms):
        return "a factor is 0 or not finite"
    return ""


def _scale(
    adapter: Adapter,
    groups: Groups,
    exponents: Sequence[Sequence[int]],
    optimizer: torch.optim.Optimizer | None,
    journal: Journal,
) -> str:
    """Multiply every tensor of group g and matrix e by 2^exponents[e][g], or say why not."""
    factors, scaled = {}, {}
    for group, powers in zip(groups, zip(*exponents, strict=True), strict=True):
        for name in group:
            tensor = getattr(adapter, name)
            factors[name] = torch.tensor([2.0**k for k in powers], dtype=torch.float64).to(tensor)
            scaled[name] = tensor * _beside(factors[name], tensor)
            if not (scaled[name] / _beside(factors[name], tensor)).equal(tensor):
                return f"{name} cannot be scaled without rounding in {tensor.dtype}"
    for name, factor in factors.items():
        tensor = getattr(adapter, name)
        journal.write(tensor, scaled[name])
        if tensor.grad is not None:
            journal.write(tensor.grad, tensor.grad / _beside(factor, tensor))
        if optimizer is not None:
            _scale_state(optimizer.state.get(tensor, {}), factor, journal)
    return ""


def _scale_state(state: Mapping[str, Any], factor: Tensor, journal: Journal) -> None:
    for key, value in state.items():
        power = _POWERS[key]
        if key == "momentum_buffer" and "square_avg" in state:  # RMSprop's, of gradients that are normalised already
            power = 0
        if power and isinstance(value, Tensor):
            journal.write(value, value * _beside(factor, value) ** power)


def _beside(factor: Tensor, tensor: Tensor) -> Tensor:
    """A factor, or one for each matrix of a stack, in a shape that multiplies a tensor."""
    return factor.to(tensor.dtype).reshape(-1, *[1] * (tensor.dim() - 1))
