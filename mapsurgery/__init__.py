"""mapsurgery: adapt any pretrained torch model with MAP (arXiv 2505.23094), in place.

    W' = alpha W/||W||_F + beta BA/||BA||_F

Free functions on an ordinary model: `plan`, `patch`, `verify`, `param_groups`, `track`, `save`, `load`, `report`,
`merge`, `unpatch`.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from . import contrib, methods, ops, plots, updates
from ._adapter_file import load, save
from ._export import Exported, export
from ._history import History
from ._measures import MEASURES
from ._native import cmake_prefix_path, native_info
from ._optim import param_groups
from ._rank_allocator import RankAllocator, orthogonality_loss
from ._report import Report, report
from ._state_dict import adapter_state_dict, load_adapter_state_dict
from ._track import Tracker, track
from ._verify import Verification, VerificationError, verify
from .methods import Dora, Init, Lora, Map, Method, register_method
from .reuse import reuse_norms
from .surgery.adapted import AdaptedLayer
from .surgery.merge import merge, unmerge
from .surgery.patch import disabled, patch, unpatch
from .surgery.plan import Plan, plan
from .updates import FactoredUpdate, Update, register_update

try:
    __version__ = version("mapsurgery")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "MEASURES",
    "AdaptedLayer",
    "Dora",
    "Exported",
    "FactoredUpdate",
    "History",
    "Init",
    "Lora",
    "Map",
    "Method",
    "Plan",
    "RankAllocator",
    "Report",
    "Tracker",
    "Update",
    "Verification",
    "VerificationError",
    "adapter_state_dict",
    "cmake_prefix_path",
    "contrib",
    "disabled",
    "export",
    "integrations",
    "load",
    "load_adapter_state_dict",
    "merge",
    "methods",
    "native_info",
    "ops",
    "orthogonality_loss",
    "param_groups",
    "patch",
    "plan",
    "plots",
    "register_method",
    "register_update",
    "report",
    "reuse_norms",
    "save",
    "track",
    "unmerge",
    "unpatch",
    "updates",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "integrations":
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """What is meant to be used, which completion shows; helpers are found where they are."""
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
