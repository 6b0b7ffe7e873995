"""The curves of score over learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .adapters import FROZEN
from .summary import Summary


def draw(summaries: Sequence[Summary], title: str, measure: str, path: Path) -> None:
    """Score over the learning rate on the left, over the learning rate as a multiple of the chosen one on the right.

    Lines are means over the seeds on the test data, bands one standard deviation, stars what validation chose.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)  # no window system is asked for
    panels = figure.subplots(1, 2, sharey=True)
    for panel, relative in zip(panels, (False, True), strict=True):
        for summary in summaries:
            _draw_method(panel, summary, relative)
        panel.set_xscale("log")
        panel.set_xlabel("learning rate / the method's chosen one" if relative else "learning rate of the adapter")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(f"{measure}, test data")
    panels[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def _draw_method(panel: Any, summary: Summary, relative: bool) -> None:
    if summary.method == FROZEN:
        panel.axhline(summary.best.mean, color="tab:gray", linestyle="--", label=FROZEN)
        return
    unit = summary.best.lr if relative else 1.0
    x = [point.lr / unit for point in summary.points]
    mean = [point.mean for point in summary.points]
    spread = [point.spread if len(point.test) > 1 else 0.0 for point in summary.points]
    (line,) = panel.plot(x, mean, marker="o", markersize=3, label=summary.method)
    low = [value - width for value, width in zip(mean, spread, strict=True)]
    high = [value + width for value, width in zip(mean, spread, strict=True)]
    panel.fill_between(x, low, high, alpha=0.15, linewidth=0, color=line.get_color())
    panel.plot(summary.best.lr / unit, summary.best.mean, marker="*", markersize=11, color=line.get_color())
