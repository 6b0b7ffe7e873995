"""What training did to each layer: `report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ._measures import MEASURES, measure
from .progress import progress
from .surgery.paths import unwrapped
from .surgery.record import Site, all_sites, one_per_adapter, refuse_spread
from .tables import Table

_COLUMNS = {  # of the table: the measures that say most, under short heads
    "rank": "rank",
    "alpha": "alpha",
    "beta": "beta",
    "change": "change",
    "scaling": "scaling",
    "direction": "direction",
    "magnitude_change": "dM",
    "direction_change": "dD",
    "cosine": "cosine",
    "effective_rank": "effective_rank",
}


@dataclass(frozen=True, repr=False)
class Report:
    """Numbers per layer. ``print(report)`` shows the table.

    Attributes:
        layers: path -> {"rank", and the numbers of `mapsurgery.MEASURES`}: "weight_norm" is ||W||_F;
            "alpha" and "beta" are the magnitudes of the base and the update, "update_norm" and "change" the norms of
            the update term and of W' - W, all in units of ||W||_F (1 for a zero weight); "scaling" and "direction" the
            shares of ||W' - W||_F^2 along W and across it; "magnitude_change" and "direction_change" the means over
            the rows of what DoRA's analysis plots; "cosine" of W and ΔW; "effective_rank" of ΔW. Means of a stack.
    """

    layers: dict[str, dict[str, float]]

    def __str__(self) -> str:
        return str(self._table())

    def __repr__(self) -> str:
        """In a line; ``print`` shows the table."""
        changes = [values["change"] for values in self.layers.values()]
        said = f", change {min(changes):.4g} to {max(changes):.4g} of ||W||" if changes else ""
        return f"Report({len(changes)} layers{said}; print it for the table)"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return self._table().html()

    def _table(self) -> Table:
        rows = [[path, *(values[name] for name in _COLUMNS)] for path, values in self.layers.items()]
        return Table("adapters, in units of ||W||", ["layer", *_COLUMNS.values()], rows)

    def to_dict(self) -> dict[str, float]:
        """{"<layer>/<number>": value}: what TensorBoard's and W&B's loggers take."""
        return {f"{path}/{name}": value for path, layer in self.layers.items() for name, value in layer.items()}


def report(model: nn.Module) -> Report:
    """Per layer: magnitudes, size and direction of the change, rank used. Reads each adapted weight once.

    The numbers of all layers are brought to the host together.

    Raises:
        ValueError: the model is not patched, or a weight is still on meta.
    """
    sites = measurable_sites(model)
    values = measured(sites).tolist()
    return Report(
        {
            site.path: {"rank": site.adapter.rank} | dict(zip(MEASURES, numbers, strict=True))
            for site, numbers in zip(sites, values, strict=True)
        }
    )


def measurable_sites(model: nn.Module) -> list[Site]:
    """One site for each adapter, under the names of the model itself, whatever wraps it.

    Raises:
        ValueError: the model is not patched, or a weight is still on meta.
    """
    model = unwrapped(model) if isinstance(model, nn.Module) else model
    sites = one_per_adapter(all_sites(model))
    refuse_spread(sites, "measure")
    for site in sites:
        held = site.layer._parameters.get(site.parameter)
        if site.adapter.weight_norm.is_meta or (held is not None and held.is_meta):
            raise ValueError(f"{site.path}: its weight is not loaded (meta device)")
    return sites


@torch.no_grad()
def measured(sites: Sequence[Site], names: Sequence[str] = tuple(MEASURES)) -> Tensor:
    """(sites, names) numbers of MEASURES, float64, on the first site's device."""
    device = sites[0].adapter.weight_norm.device
    numbers = [
        number.to(device, non_blocking=True)
        for site in progress(sites, "measuring")
        for base in (site.base,)
        for number in measure(site.adapter, base, site.adapter.norm_of(base), names)
    ]
    return torch.cat(numbers).double().reshape(len(sites), len(names))
