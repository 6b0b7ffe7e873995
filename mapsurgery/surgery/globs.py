"""Glob matching of dotted paths: case-sensitive, ``*`` crosses dots, a match on a container takes what it contains."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

ALL_LINEAR = "all-linear"
"""In place of a glob of targets: every linear layer but heads."""


def as_patterns(value: str | Iterable[str], argument: str) -> tuple[str, ...]:
    """A tuple of patterns from one pattern or several.

    Raises:
        TypeError: something in it is not a string; names the argument and the value.
    """
    if not isinstance(value, Iterable):
        raise TypeError(f"{argument} must be a glob string or several, got {value!r}")
    patterns = (value,) if isinstance(value, str) else tuple(value)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument} must be glob strings, got {pattern!r}")
    return patterns


def containers(path: str) -> list[str]:
    """The path itself and every path that contains it: "a.b.c" -> ["a.b.c", "a", "a.b"]."""
    parts = path.split(".")
    return [path, *(".".join(parts[:i]) for i in range(1, len(parts)))]


def matches(path: str, pattern: str) -> bool:
    """Whether a pattern takes this path, by its own name or by that of a module that contains it."""
    if not any(sign in pattern for sign in "*?["):  # a long list of full names is matched without a search
        return path == pattern or path.startswith(f"{pattern}.")
    return any(fnmatchcase(candidate, pattern) for candidate in containers(path))


def first_match(paths: Sequence[str], patterns: Iterable[str]) -> str | None:
    """The first pattern that takes one of the names of a module."""
    return next((pattern for pattern in patterns if any(matches(path, pattern) for path in paths)), None)


def nowhere(argument: str, pattern: str, paths: Iterable[str]) -> str:
    """An error message: a pattern matches no path, and what to write in its place."""
    paths = [path for path in paths if path]
    wild = [path for path in paths if fnmatchcase(path, f"*{pattern}")]
    close = nearest(pattern, paths)
    if pattern.lower().replace("_", "-") == ALL_LINEAR:
        hint = f"write {ALL_LINEAR!r} for every linear layer"
    elif wild:
        hint = f"names are whole paths, such as {wild[0]}: write '*{pattern}', which matches {len(wild)} of them"
    elif close:
        hint = f"the nearest that exist: {', '.join(close)}"
    else:
        hint = f"for example: {', '.join(paths[:6])}"
    return f"{argument} pattern {pattern!r} matches no module of the model; {hint}"


def nearest(pattern: str, paths: Iterable[str], count: int = 5) -> list[str]:
    """Existing paths that look most like a pattern which matched nothing, for an error message."""
    bare = pattern.replace("*", "").strip(".") or pattern
    # Compared with whole paths and with their last names: "atn" should find "blocks.0.attn".
    candidates: dict[str, str] = {}
    for path in paths:
        if path:
            candidates.setdefault(path, path)
            candidates.setdefault(path.rpartition(".")[2], path)
    found = difflib.get_close_matches(bare, candidates, n=3 * count, cutoff=0.4)
    return list(dict.fromkeys(candidates[name] for name in found))[:count]
