"""A progress bar (tqdm's, where it is installed) over work that takes long, for a person who looks on."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Collection, Iterator
from importlib.util import find_spec
from typing import Any, TypeVar

Item = TypeVar("Item")

SWITCH = "MAPSURGERY_PROGRESS"
"""Environment variable: "0" shows no bar."""

_PATIENCE = 1.5
"""Seconds that work may take without a bar."""


def progress(items: Collection[Item], what: str) -> Iterator[Item]:
    """The items one by one; a bar on stderr counts them once they take long, and goes when they are done.

    There is none in files and pipes, in other processes of a distributed run than the first, and where the environment
    says MAPSURGERY_PROGRESS=0.
    """
    return _counted(items, what) if _somebody_looks() else iter(items)


def _counted(items: Collection[Item], what: str) -> Iterator[Item]:
    start, bar = time.monotonic(), None
    try:
        for done, item in enumerate(items):
            if bar is not None:
                bar.update()
            elif time.monotonic() - start > _PATIENCE:
                bar = _bar(what, len(items), done)
            yield item
    finally:  # an exception of whoever takes the items comes here as well
        if bar is not None:
            bar.close()


def _bar(what: str, total: int, done: int) -> Any:
    from tqdm import tqdm

    return tqdm(desc=f"mapsurgery: {what}", total=total, initial=done, leave=False, file=sys.stderr, dynamic_ncols=True)


def _somebody_looks() -> bool:
    """Whether stderr leads to a terminal or a notebook's page."""
    if os.environ.get(SWITCH) == "0" or os.environ.get("RANK", "0") != "0" or sys.stderr is None:
        return False
    return (sys.stderr.isatty() or "ipykernel" in sys.modules) and find_spec("tqdm") is not None
