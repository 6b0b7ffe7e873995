"""An integration without its package says what to install."""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest

import mapsurgery

Path = Sequence[str] | None


class Absent(importlib.abc.MetaPathFinder):
    """A module that is not there, with the error that an import gave."""

    def __init__(self, missing: str, error: ModuleNotFoundError) -> None:
        self.missing, self.error = missing, error

    def find_spec(self, fullname: str, path: Path = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname == self.missing:
            raise self.error
        return None


def nameless(cause: Exception | None) -> ModuleNotFoundError:
    """As transformers raises it where a package of its own is missing."""
    error = ModuleNotFoundError("Could not import module 'Trainer'")
    error.__cause__ = cause
    return error


ERRORS = {
    "package": (ModuleNotFoundError("x", name="accelerate"), "needs the package 'accelerate'.*pip install accelerate$"),
    "submodule": (ModuleNotFoundError("x", name="accelerate.utils"), "the package 'accelerate'.*install accelerate$"),
    "cause": (nameless(ModuleNotFoundError("x", name="accelerate.utils")), "package 'accelerate'.*install accelerate$"),
    "unknown": (nameless(None), "accelerate cannot be imported: Could not import module 'Trainer'$"),
}


@pytest.mark.parametrize(("error", "said"), ERRORS.values(), ids=ERRORS)
def test_it_says_what_to_install(error: ModuleNotFoundError, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "accelerate"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "mapsurgery.integrations.accelerate", raising=False)
    monkeypatch.delitem(vars(mapsurgery.integrations), "accelerate", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Absent("accelerate", error), *sys.meta_path])
    with pytest.raises(AttributeError, match=said) as caught:
        mapsurgery.integrations.accelerate  # noqa: B018
    assert caught.value.__cause__ is error
