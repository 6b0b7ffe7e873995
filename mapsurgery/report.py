"""What training did to each layer: `report`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .surgery import record
from .tables import render

_COLUMNS = ("rank", "alpha", "beta", "update_norm", "change", "cosine", "effective_rank")


@dataclass(frozen=True)
class Report:
    """Numbers per layer. ``print(report)`` shows the table.

    Attributes:
        layers: path -> {"rank", "weight_norm" (||W||_F), "alpha" and "beta" in units of ||W||_F, "update_norm" = norm
            of the update term / ||W||_F, "change" = ||W' - W||_F / ||W||_F, "cosine" of W and BA, "effective_rank" =
            exp of the entropy of the singular values of BA}. For a zero weight the unit is 1.
    """

    layers: dict[str, dict[str, float]]

    def __str__(self) -> str:
        rows = [[path, *(values[name] for name in _COLUMNS)] for path, values in self.layers.items()]
        return render("adapters, in units of ||W||", ["layer", *_COLUMNS], rows)


def report(model: nn.Module) -> Report:
    """Per layer: magnitudes, size and direction of the change, rank used. Reads each adapted weight once.

    Raises:
        ValueError: the model is not patched, or a weight is still on meta.
    """
    sites = record.one_per_adapter(record.all_sites(model))
    for site in sites:
        if site.layer.base_of(site.parameter).is_meta:
            raise ValueError(f"{site.path}: its weight is not loaded (meta device)")
    return Report({site.path: site.adapter.measures(site.layer.given_base(site.parameter)) for site in sites})
