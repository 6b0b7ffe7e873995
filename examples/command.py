"""How the examples end: what went wrong as a line of text, and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

from packaged import MissingPackageError

import mapsurgery

Prepared = TypeVar("Prepared")


def exit_code(prepare: Callable[[], Prepared], run: Callable[[Prepared], bool]) -> int:
    """0 if ``run`` of what ``prepare`` gives holds; 1 for a failed proof or verification, 2 for a wrong option."""
    try:
        prepared = prepare()
    except (ImportError, MissingPackageError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        return 0 if run(prepared) else 1
    except (mapsurgery.VerificationError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
