"""All entries of the zoo, by family. A family's module is imported when it is asked for."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from fnmatch import fnmatchcase

from .entry import Entry

FAMILIES = {
    "hazard": "hazards",
    "transformers": "transformers_models",
    "diffusers": "diffusers_models",
    "torchvision": "torchvision_models",
    "timm": "timm_models",
}


@functools.cache  # a configuration of each model is made: some seconds
def family(name: str) -> list[Entry]:
    """The entries of one family.

    Raises:
        ValueError: two of them have the same name.
    """
    if name == "diffusers" and importlib.util.find_spec(name) is None:  # requirements-dev.txt: from Python 3.11 on
        return []
    entries = importlib.import_module(f".{FAMILIES[name]}", __package__).entries()
    names = [entry.name for entry in entries]
    if len(names) != len(set(names)):
        raise ValueError(f"names are not unique: {sorted({n for n in names if names.count(n) > 1})}")
    return entries


def find(name: str) -> Entry:
    """The entry of this name, "<family>/<model>"."""
    found = [entry for entry in family(name.partition("/")[0]) if entry.name == name]
    if not found:
        raise ValueError(f"the zoo has no entry {name!r}")
    return found[0]


def names(pattern: str = "*") -> list[str]:
    """Names of all entries that a glob takes."""
    prefix = pattern.partition("/")[0]
    families = [prefix] if prefix in FAMILIES else FAMILIES
    return [entry.name for key in families for entry in family(key) if fnmatchcase(entry.name, pattern)]
