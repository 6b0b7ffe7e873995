"""The eight tasks of GLUE (arXiv 1804.07461), from its TSV files or the hub's data sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

HUB = "nyu-mll/glue"


@dataclass(frozen=True)
class GlueTask:
    """Where a task's files keep what, and how it is scored."""

    texts: tuple[str, ...]
    """Columns of the TSV files that hold the sentence, or the first and the second one."""
    label: str
    labels: tuple[str, ...]
    """Labels as the files write them, in the order of the classes' numbers; none for a regression."""
    metrics: tuple[str, ...]
    """Names in metrics.METRICS; the first is the score."""
    hub_texts: tuple[str, ...]
    dev: tuple[str, ...] = ("dev",)
    """Files to test on (the labels of GLUE's own test files are not public)."""
    hub_dev: tuple[str, ...] = ("validation",)
    headless: Mapping[str, int] = field(default_factory=dict)
    """Columns by number, for files without a line of names."""
    broken_rows: bool = False
    """Some rows of the published file lack columns, and are skipped."""

    @property
    def outputs(self) -> int:
        """Outputs of the model: one for each class, one for a regression."""
        return len(self.labels) or 1


PAIR = ("sentence1", "sentence2")
YES_NO = ("0", "1")
ENTAILMENT = ("entailment", "not_entailment")
TASKS: Mapping[str, GlueTask] = {
    "cola": GlueTask(
        ("sentence",), "label", YES_NO, ("matthews",), ("sentence",), headless={"label": 1, "sentence": 3}
    ),
    "sst2": GlueTask(
        ("sentence",), "label", YES_NO, ("accuracy",), ("sentence",), headless={"sentence": 0, "label": 1}
    ),
    "mrpc": GlueTask(("#1 String", "#2 String"), "Quality", YES_NO, ("accuracy", "f1"), PAIR),
    "stsb": GlueTask(PAIR, "score", (), ("pearson", "spearman"), PAIR),
    "qqp": GlueTask(
        ("question1", "question2"),
        "is_duplicate",
        YES_NO,
        ("accuracy", "f1"),
        ("question1", "question2"),
        broken_rows=True,
    ),
    "mnli": GlueTask(
        PAIR,
        "gold_label",
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        ("premise", "hypothesis"),
        dev=("dev_matched", "dev_mismatched"),
        hub_dev=("validation_matched", "validation_mismatched"),
    ),
    "qnli": GlueTask(("question", "sentence"), "label", ENTAILMENT, ("accuracy",), ("question", "sentence")),
    "rte": GlueTask(PAIR, "label", ENTAILMENT, ("accuracy",), PAIR),
}


class Split(NamedTuple):
    """Samples of a task."""

    texts: list[tuple[str, ...]]
    """A sentence, or two, of each sample."""
    targets: Tensor
    """Classes, int64 (n,), or values of a regression, float32 (n,)."""


def load_splits(name: str, source: str | Path) -> tuple[Split, dict[str, Split]]:
    """What to train on, and what to test on by the name of its file.

    Args:
        name: of the task, one of `TASKS`.
        source: folder of the task's TSV files, or ``"hub"`` for the hub's data set (needs the package datasets).

    Raises:
        FileNotFoundError, ValueError, ImportError: naming what is missing or wrong.
    """
    if name not in TASKS:
        raise ValueError(f"GLUE has no task {name!r}; choose one of {', '.join(TASKS)}")
    task = TASKS[name]
    if source == "hub":
        return _hub_split(name, "train"), {split: _hub_split(name, split) for split in task.hub_dev}
    folder = Path(source)
    return read_tsv(folder / "train.tsv", task), {split: read_tsv(folder / f"{split}.tsv", task) for split in task.dev}


def read_tsv(path: Path, task: GlueTask) -> Split:
    """Read one of GLUE's files. Quotes are text in them, not syntax.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a column is missing, or a label is unknown; the message names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: give the folder that holds the task's TSV files")
    # Neither read_text() nor splitlines(): sentences hold other characters that they take for ends of lines.
    lines = path.read_bytes().decode("utf-8-sig").rstrip("\n").split("\n")
    columns, first = _columns(path, lines[0].rstrip("\r").split("\t"), task)
    texts, targets = [], []
    for number, line in enumerate(lines[first:], start=first + 1):
        cells = line.rstrip("\r").split("\t")
        if len(cells) <= max(columns.values()):
            if task.broken_rows:
                continue
            raise ValueError(f"{path}:{number}: {len(cells)} columns, {max(columns.values()) + 1} are needed: {line!r}")
        texts.append(tuple(cells[columns[name]].strip() for name in task.texts))
        targets.append(_target(cells[columns[task.label]].strip(), task, f"{path}:{number}"))
    return Split(texts, _as_tensor(targets, task))


def _columns(path: Path, head: list[str], task: GlueTask) -> tuple[dict[str, int], int]:
    """Numbers of the columns that are read, and the first line of data."""
    needed = (*task.texts, task.label)
    names = [name.strip() for name in head]
    if all(name in names for name in needed):
        return {name: names.index(name) for name in needed}, 1
    if task.headless:
        return dict(task.headless), 0
    missing = [name for name in needed if name not in names]
    raise ValueError(f"{path} has no column {', '.join(missing)}; its first line is {names}")


def _target(text: str, task: GlueTask, place: str) -> float:
    if not task.labels:
        try:
            return float(text)
        except ValueError:
            raise ValueError(f"{place}: {text!r} is not a number") from None
    if text not in task.labels:
        raise ValueError(f"{place}: label {text!r} is none of {', '.join(task.labels)}")
    return task.labels.index(text)


def _as_tensor(targets: list[Any], task: GlueTask) -> Tensor:
    return torch.tensor(targets, dtype=torch.int64 if task.labels else torch.float32)


def _hub_split(name: str, split: str) -> Split:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("reading data from the hub needs the package datasets: pip install datasets") from error
    task = TASKS[name]
    table = datasets.load_dataset(HUB, name, split=split)
    texts = list(zip(*(table[column] for column in task.hub_texts), strict=True))
    return Split(texts, _as_tensor(list(table["label"]), task))
