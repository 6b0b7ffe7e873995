"""The numbers of `report`, collected over training: `track`."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ._history import History, joined
from ._measures import MEASURES
from ._report import measurable_sites, measured
from .surgery.paths import child_name

_MOST_ON_DEVICE = 256
"""Records that wait on the device before they are brought to the host unasked."""


class Tracker:
    """Records of a patched model; see `track`.

    Attributes:
        every: steps from one record to the next.
        measures: names of what is recorded.
        layers: paths of the layers.
    """

    def __init__(self, model: nn.Module, every: int, measures: Sequence[str], history: History | None) -> None:
        sites = measurable_sites(model)
        self._adapters = [(site, site.adapter) for site in sites]
        self.every, self.measures = every, tuple(measures)
        self.layers = tuple(site.path for site in sites)
        self._steps: list[int] = []
        self._on_host: list[Tensor] = []
        self._on_device: list[Tensor] = []
        if history is not None:
            self._continue(history)
        self._next = self._steps[-1] + 1 if self._steps else 0

    def __repr__(self) -> str:
        return f"Tracker({len(self._steps)} records, every {self.every} steps, of {len(self.layers)} layers)"

    def _continue(self, history: History) -> None:
        if history.layers != self.layers:
            other = sorted(set(history.layers) ^ set(self.layers)) or history.layers
            raise ValueError(f"the history is of another model: {', '.join(other[:5])} is in one of the two only")
        if set(history.values) != set(self.measures):
            raise ValueError(f"the history holds {', '.join(history.values)}, but measures are {self.measures}")
        self._steps = history.steps.tolist()
        self._on_host = [torch.stack([history.values[name] for name in self.measures], dim=-1)]

    def update(self, step: int | None = None) -> bool:
        """Call once in each training step; every `every`-th is recorded, and in between nothing is done.

        Args: step: its number; None: one more than at the last call, from 0.

        Returns:
            Whether this step was recorded. One that is recorded already is not again.

        Raises:
            ValueError: the step lies before one that is recorded, or a layer is no longer adapted.
        """
        step = self._next if step is None else operator.index(step)
        self._next = step + 1
        if step % self.every:
            return False
        if self._steps and step <= self._steps[-1]:
            if step == self._steps[-1]:
                return False
            raise ValueError(f"step {step} comes after step {self._steps[-1]}, which is recorded: steps must rise")
        self._on_device.append(self._record())
        self._steps.append(step)
        if len(self._on_device) == _MOST_ON_DEVICE:
            self._fetch()
        return True

    def _record(self) -> Tensor:
        """(L, measures) on the device of the first layer; the host waits for nothing."""
        for site, adapter in self._adapters:
            if site.layer._modules.get(child_name(site.parameter)) is not adapter:
                raise ValueError(
                    f"{site.path} is no longer adapted as when tracking began (it was merged, unpatched or patched "
                    "again): call mapsurgery.track on the model as it is now"
                )
        return measured([site for site, _ in self._adapters], self.measures)

    def _fetch(self) -> None:
        """Bring the waiting records to the host, in one transfer."""
        if self._on_device:
            self._on_host.append(torch.stack(self._on_device).cpu())
            self._on_device.clear()

    @property
    def history(self) -> History:
        """All that was recorded."""
        self._fetch()
        return joined(self._steps, self.layers, self.measures, self._on_host)

    def latest(self) -> dict[str, float]:
        """{"<layer>/<measure>": value} of the last record, for TensorBoard's and W&B's loggers; {} before the first."""
        return self.history.at(-1) if self._steps else {}

    def to_dict(self) -> dict[str, list[float]]:
        """{"step": ..., "<layer>/<measure>": values over the steps}."""
        return self.history.to_dict()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the history to a safetensors file, which `History.load` reads."""
        self.history.save(path)


def track(
    model: nn.Module,
    every: int = 100,
    *,
    measures: Sequence[str] = tuple(MEASURES),
    history: History | None = None,
) -> Tracker:
    """Collect the numbers of `report` over training.

    ::

        tracker = mapsurgery.track(model, every=50)
        for step, batch in enumerate(batches):
            ...  # forward, backward, optimiser
            if tracker.update(step):
                writer.log(tracker.latest())
        tracker.save("run.safetensors")

    A record reads each adapted weight once and stays on the device; the host asks for it only in `latest`, `history`,
    `to_dict` and `save`. On a GPU, torch's singular values make the host wait: leave "effective_rank" out of `measures`
    where that matters. "alpha" and "beta" alone read no weight with method "map" or "lora" and are cheap enough for
    every step; a second tracker may collect them. The cost is measured in docs/interpretation.md.

    Args:
        model: patched; torch.compile's wrapper and DataParallel's may be around it.
        every: steps from one record to the next.
        measures: keys of `mapsurgery.MEASURES`; all by default.
        history: of an interrupted run, to be continued.

    Raises:
        ValueError: the model is not patched or a weight is on meta, `every` is below 1, a measure is unknown, or the
            history is of other layers or measures.
        TypeError: `every` is no int, or `measures` is a string.
    """
    if isinstance(every, bool) or not isinstance(every, int):
        raise TypeError(f"every must be an int, got {every!r}")
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    if isinstance(measures, str):
        raise TypeError(f"measures must be several names, got the string {measures!r}: write [{measures!r}]")
    unknown = [name for name in measures if name not in MEASURES]
    if unknown or not measures:
        raise ValueError(f"measures {unknown} are unknown; there are: {', '.join(MEASURES)}")
    return Tracker(model, every, measures, history)
