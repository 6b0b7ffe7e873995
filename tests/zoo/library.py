"""How the check drives mapsurgery: patch, find the adapters of the expected weights, move them, define W'."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from definition import defined_weight
from torch import Tensor, nn

import mapsurgery
from mapsurgery.methods import Adapter

from .entry import Entry
from .sites import Site, raw_parameters


class Refused(Exception):
    """The library said what it cannot adapt, and changed nothing."""


def arguments(entry: Entry, model: nn.Module, sites: dict[str, Site]) -> dict[str, Any]:
    """Keyword arguments of `mapsurgery.patch` for an entry."""
    options = entry.options
    found: dict[str, Any] = {"targets": options.targets, "exclude": options.exclude, "rank": options.rank}
    raw = raw_parameters(model, sites)
    if raw and "parameters" in inspect.signature(mapsurgery.patch).parameters:
        found["parameters"] = raw
    return found


def patch(entry: Entry, model: nn.Module, sites: dict[str, Site]) -> dict[str, str]:
    """Adapt what the entry asks for; returns what the plan says it leaves out, with the reasons.

    Raises:
        Refused: with the library's message.
    """
    arguments_ = arguments(entry, model, sites)
    try:
        plan = mapsurgery.plan(model, **arguments_)
        torch.manual_seed(4)
        mapsurgery.patch(model, **arguments_)
    except ValueError as error:
        raise Refused(str(error)) from error
    return {path: skip.reason for skip in plan.skipped for path in skip.paths}


def adapters_of(model: nn.Module, sites: dict[str, Site]) -> dict[str, Adapter]:
    """The adapter of each expected weight that has one."""
    found = {}
    for key, site in sites.items():
        adapter = getattr(model.get_submodule(site.path), site.child, None)  # a tied weight's is another layer's child
        if isinstance(adapter, Adapter):
            found[key] = adapter
    return found


@torch.no_grad()
def to_generic_point(adapters: Iterable[Adapter]) -> None:
    """Move every adapter to where each of its parameters matters, as training would."""
    generator = torch.Generator().manual_seed(5)
    for adapter in dict.fromkeys(adapters):
        for factor in (adapter.A, adapter.B):
            noise = torch.randn(factor.shape, generator=generator, dtype=torch.float64)
            factor.copy_(noise / factor.shape[-1] ** 0.5)
        for magnitude, middle in ((adapter.alpha, -0.1), (adapter.beta, 0.4)):
            noise = torch.rand(magnitude.shape, generator=generator, dtype=torch.float64)
            magnitude.copy_(middle + 0.1 * noise)


def defined(site: Site, weight: Tensor, adapter: Adapter, own: dict[str, Tensor] | None = None) -> Tensor:
    whole = _defined(site, weight, adapter, own)
    row = adapter.kept_row
    return whole if row is None else torch.select_scatter(whole, weight.select(0, row).to(whole), 0, row)


def _defined(site: Site, weight: Tensor, adapter: Adapter, own: dict[str, Tensor] | None = None) -> Tensor:
    """W' of a weight in float64, straight from the definition, in the weight's layout; `own`: parameters to use."""
    own = own or {name: getattr(adapter, name).detach() for name in ("A", "B", "alpha", "beta")}
    init = adapter.init
    tau = init.beta / init.gain if init.kind == "soft" else 0.0
    matrix = site.matrix(weight.detach().double())
    factors = (own["A"], own["B"], own["alpha"], own["beta"])
    if not site.stacked:
        return site.like(defined_weight(matrix, *factors, tau, init.relative), weight.shape)
    each = [defined_weight(*parts, tau, init.relative) for parts in zip(matrix, *factors, strict=True)]
    return site.like(torch.stack(each), weight.shape)
