"""The tasks of the comparison by their names on the command line. Models and data are those of the examples."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from .task import Options, Task

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))


@dataclass(frozen=True)
class Kind:
    """A task before its model and data are loaded."""

    title: str
    measure: str
    module: str

    def load(self, options: Options) -> Task:
        """Import what this task needs, and nothing of the others."""
        return import_module(f".{self.module}", __package__).load(options)


TASKS = {
    "vision": Kind("Images: ViT-S/14 on MNIST", "accuracy", "vision"),
    "text": Kind("Sentences: MiniLM on SST-2", "accuracy", "text"),
    "commonsense": Kind("Commonsense questions: SmolLM2-135M on ARC-Easy", "accuracy", "commonsense"),
    "diffusion": Kind("Subject-driven generation: a small diffusion model of digits", "similarity", "diffusion"),
}
