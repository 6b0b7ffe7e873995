"""Other libraries' trainers, pipelines and formats. Nothing of the core imports anything here.

Each module is imported when it is first asked for: ``mapsurgery.integrations.peft``.
"""

import importlib
import pkgutil
from types import ModuleType
from typing import Any

__all__ = [module.name for module in pkgutil.iter_modules(__path__)]


def __getattr__(name: str) -> ModuleType:
    if name not in __all__:
        raise AttributeError(f"{__name__} has no {name!r}; there are: {', '.join(__all__)}")
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:  # what looks for names, as completion does, expects an AttributeError
        cause: Any = error
        while cause.name is None and isinstance(cause.__cause__, ModuleNotFoundError):  # as transformers raises it
            cause = cause.__cause__
        if cause.name is None:
            raise AttributeError(f"{__name__}.{name} cannot be imported: {error}") from error
        package = cause.name.partition(".")[0]
        raise AttributeError(
            f"{__name__}.{name} needs the package {package!r}, which is not installed: pip install {package}"
        ) from error


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
