"""mapsurgery: adapt any pretrained torch model with MAP (arXiv 2505.23094), in place.

    W' = alpha W/||W||_F + beta BA/||BA||_F

Free functions on an ordinary model: `plan`, `patch`, `verify`, training, `save`, `load`, `report`, `merge`, `unpatch`.
"""

from importlib.metadata import PackageNotFoundError, version

from .export import Exported, export
from .methods import Dora, Init, Lora, Map, Method, register_method
from .native import cmake_prefix_path, native_info
from .optim import param_groups
from .report import Report, report
from .state import adapter_state_dict, load_adapter_state_dict
from .storage import load, save
from .surgery import (
    AdaptedLayer,
    MapConv1d,
    MapConv2d,
    MapConv3d,
    MapLinear,
    Plan,
    disabled,
    merge,
    patch,
    plan,
    unmerge,
    unpatch,
)
from .updates import FactoredUpdate, Update, register_update
from .verify import Verification, VerificationError, verify

try:
    __version__ = version("mapsurgery")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "AdaptedLayer",
    "Dora",
    "Exported",
    "FactoredUpdate",
    "Init",
    "Lora",
    "Map",
    "MapConv1d",
    "MapConv2d",
    "MapConv3d",
    "MapLinear",
    "Method",
    "Plan",
    "Report",
    "Update",
    "Verification",
    "VerificationError",
    "adapter_state_dict",
    "cmake_prefix_path",
    "disabled",
    "export",
    "load",
    "load_adapter_state_dict",
    "merge",
    "native_info",
    "param_groups",
    "patch",
    "plan",
    "register_method",
    "register_update",
    "report",
    "save",
    "unmerge",
    "unpatch",
    "verify",
]
