"""Text that Python itself carries: what its documentation says of functions."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable


def documented(modules: Iterable[str]) -> list[tuple[str, str]]:
    """Functions and methods of some modules, such as ``math.comb``, each with the first sentence of its docstring."""
    found: dict[str, str] = {}
    for name in modules:
        module = importlib.import_module(name)
        members = [(f"{name}.{key}", member) for key, member in inspect.getmembers(module, callable) if key[0] != "_"]
        for path, kind in list(filter(lambda pair: inspect.isclass(pair[1]), members)):
            members += [(f"{path}.{key}", one) for key, one in inspect.getmembers(kind, callable) if key[0] != "_"]
        for path, member in members:
            text = (inspect.getdoc(member) or "").split("\n\n")[0]
            sentence = " ".join(text.split(". ")[0].split())
            if len(sentence.split()) > 3:
                found.setdefault(sentence, path)  # what a method inherits is said once
    return sorted((path, sentence) for sentence, path in found.items())
