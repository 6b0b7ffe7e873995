"""Pictures of a `History`; they need matplotlib (``pip install "mapsurgery[plots]"``) and open no window."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._history import History
from ._measures import MEASURES
from ._track import Tracker
from .surgery.globs import as_patterns, first_match, nearest

if TYPE_CHECKING:
    from collections.abc import Iterable

    from matplotlib.figure import Figure

_MOST_TICKS = 60


def heat_map(
    source: Tracker | History,
    measure: str,
    path: str | os.PathLike[str] | None = None,
    *,
    layers: str | Iterable[str] = "*",
) -> Figure:
    """Layers over recorded steps, coloured by a measure.

    Args:
        measure: a key of `mapsurgery.MEASURES` that was recorded.
        path: file to save the picture to, in a format that matplotlib knows by its ending.
        layers: globs of the layers to show.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: the measure was not recorded, nothing was, or a glob matches no layer.
    """
    history = _chosen(source, (measure,), layers)
    values = history.values[measure].T
    rows = len(history.layers)
    figure = _figure(8, min(3 + 0.16 * rows, 12))
    panel = figure.subplots()
    signed = bool((values < 0).any())
    bound = values.abs().nan_to_num(0).max().item() or 1.0
    limits = {"vmin": -bound, "vmax": bound, "cmap": "RdBu_r"} if signed else {"cmap": "viridis"}
    image = panel.imshow(values.numpy(), aspect="auto", interpolation="nearest", **limits)
    shown = _spread(rows)
    panel.set_yticks(shown, [history.layers[i] for i in shown], fontsize=7)
    shown = _spread(len(history.steps), 10)
    panel.set_xticks(shown, [str(history.steps[i].item()) for i in shown])
    panel.set_xlabel("step")
    figure.colorbar(image, label=measure)
    panel.set_title(MEASURES.get(measure, measure), fontsize=9)
    return _saved(figure, path)


def magnitude_direction(
    source: Tracker | History, path: str | os.PathLike[str] | None = None, *, layers: str | Iterable[str] = "*"
) -> Figure:
    """Change of magnitude over change of direction, a dot for each layer at each recorded step (DoRA, arXiv 2402.09353,
    figure 2), a layer's dots joined by a line; the title gives their correlation over the layers at the last step.

    Args and Raises: as `heat_map`; "magnitude_change" and "direction_change" must have been recorded.
    """
    history = _chosen(source, ("magnitude_change", "direction_change"), layers)
    magnitude, direction = history.values["magnitude_change"], history.values["direction_change"]
    figure = _figure(6, 5)
    panel = figure.subplots()
    panel.plot(direction.numpy(), magnitude.numpy(), color="0.8", linewidth=0.6, zorder=1)
    steps = history.steps[:, None].expand_as(direction)
    dots = panel.scatter(direction.numpy(), magnitude.numpy(), c=steps.numpy(), s=12, cmap="viridis", zorder=2)
    figure.colorbar(dots, label="step")
    panel.set_xlabel("direction_change (dD)")
    panel.set_ylabel("magnitude_change (dM)")
    correlation = _correlation(direction[-1], magnitude[-1])
    panel.set_title(f"{len(history.layers)} layers{correlation}", fontsize=9)
    return _saved(figure, path)


def _correlation(x: Tensor, y: Tensor) -> str:
    """Pearson's, in words; nothing of fewer than three layers or where one of the two is constant."""
    r = torch.corrcoef(torch.stack([x, y]))[0, 1].item() if len(x) > 2 else float("nan")
    return f", correlation at the last step {r:+.2f}" if r == r else ""


def _chosen(source: Tracker | History, measures: tuple[str, ...], layers: str | Iterable[str]) -> History:
    """The history of some layers, with the measures that a plot needs."""
    history = source.history if isinstance(source, Tracker) else source
    for measure in measures:
        if measure not in history.values:
            raise ValueError(f"{measure!r} was not recorded; there are: {', '.join(history.values)}")
    if not len(history.steps):
        raise ValueError("nothing was recorded yet: call the tracker's update in each training step")
    patterns = as_patterns(layers, "layers")
    for pattern in patterns:
        if not any(first_match([path], [pattern]) for path in history.layers):
            close = ", ".join(nearest(pattern, history.layers))
            raise ValueError(f"layers pattern {pattern!r} matches no recorded layer; the nearest: {close}")
    kept = [i for i, path in enumerate(history.layers) if first_match([path], patterns)]
    values = {measure: history.values[measure][:, kept] for measure in measures}
    return History(history.steps, tuple(history.layers[i] for i in kept), values)


def _spread(count: int, most: int = _MOST_TICKS) -> list[int]:
    """Evenly chosen indices of so many ticks."""
    return list(range(0, count, -(-count // most)))


def _figure(width: float, height: float) -> Figure:
    """An empty figure that belongs to no window system."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'plots need matplotlib: pip install matplotlib, or "mapsurgery[plots]"', name=error.name
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _saved(figure: Figure, path: Any) -> Figure:
    if path is not None:
        figure.savefig(path, dpi=90)
    return figure
