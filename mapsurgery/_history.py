"""Numbers of layers over training steps, as `track` collects them; plain data with a file format."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from ._atomic_write import write_whole
from ._tensor_file import content_of, opened

FORMAT = "mapsurgery-history"


@dataclass(frozen=True, eq=False, repr=False)  # tensors have no one truth value
class History:
    """What was recorded.

    Attributes:
        steps: (n,) int64, rising.
        layers: paths of the L layers.
        values: measure (a key of `mapsurgery.MEASURES`) -> (n, L) float64, on the CPU.
    """

    steps: Tensor
    layers: tuple[str, ...]
    values: dict[str, Tensor]

    def __repr__(self) -> str:
        steps = f"{len(self.steps)} steps" + (f", {self.steps[0]} to {self.steps[-1]}" if len(self.steps) else "")
        return f"History({steps}; {len(self.layers)} layers; {', '.join(self.values)})"

    def at(self, index: int = -1) -> dict[str, float]:
        """{"<layer>/<measure>": value} of one recorded step, which TensorBoard's and W&B's loggers take.

        Raises:
            IndexError: nothing is recorded at this index.
        """
        rows = {measure: values[index].tolist() for measure, values in self.values.items()}
        return {f"{path}/{measure}": row[i] for i, path in enumerate(self.layers) for measure, row in rows.items()}

    def to_dict(self) -> dict[str, list[float]]:
        """{"<layer>/<measure>": values over the steps}, and "step": a table for pandas or W&B."""
        columns = {
            f"{path}/{measure}": values[:, i].tolist()
            for i, path in enumerate(self.layers)
            for measure, values in self.values.items()
        }
        return {"step": self.steps.tolist(), **columns}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file: "steps", and a tensor (n, L) for each measure; the layers are its metadata.

        Raises:
            OSError: the file cannot be written; an existing one is left as it was.
        """
        metadata = {"format": FORMAT, "layers": json.dumps(self.layers)}
        tensors = {"steps": self.steps} | self.values
        write_whole({os.fsdecode(path): content_of(tensors, metadata)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> History:
        """Read what `save` wrote.

        Raises:
            OSError, ValueError: there is no such file, or it is another kind of file.
        """
        with opened(path) as file:
            if file.metadata.get("format") != FORMAT:
                raise ValueError(f"{file.path} is a safetensors file, but not one that a history was saved to")
            values = file.read()
        if "steps" not in values or "layers" not in file.metadata:
            raise ValueError(f"{file.path} is damaged: it has no steps, or does not name its layers")
        return cls(values.pop("steps"), tuple(json.loads(file.metadata["layers"])), values)


def joined(steps: list[int], layers: tuple[str, ...], measures: tuple[str, ...], records: list[Tensor]) -> History:
    """A history of records (n, L, measures), whose n add up to the number of steps."""
    empty = torch.empty(0, len(layers), len(measures), dtype=torch.float64)
    values = torch.cat([empty, *records])
    return History(torch.tensor(steps, dtype=torch.int64), layers, dict(zip(measures, values.unbind(-1), strict=True)))
