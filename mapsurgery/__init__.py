"""mapsurgery: adapt any pretrained torch model with MAP (arXiv 2505.23094), in place.

    W' = alpha W/||W||_F + beta BA/||BA||_F

Free functions on an ordinary model: `plan`, `patch`, `verify`, training, `save`, `load`, `report`, `merge`, `unpatch`.
"""

from importlib.metadata import PackageNotFoundError, version

from .export import Exported, export
from .methods import Init
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
from .verify import Verification, VerificationError, verify

try:
    __version__ = version("mapsurgery")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "AdaptedLayer",
    "Exported",
    "Init",
    "MapConv1d",
    "MapConv2d",
    "MapConv3d",
    "MapLinear",
    "Plan",
    "Report",
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
    "report",
    "save",
    "unmerge",
    "unpatch",
    "verify",
]
