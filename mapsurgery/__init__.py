"""mapsurgery: adapt any pretrained torch model with MAP (arXiv 2505.23094), in place.

    W' = alpha W/||W||_F + beta BA/||BA||_F

Free functions on an ordinary model: `plan`, `patch`, `verify`, `param_groups`, `track`, `save`, `load`, `report`,
`merge`, `unpatch`.
"""

from importlib.metadata import PackageNotFoundError, version

from . import plots
from .export import Exported, export
from .history import History
from .methods import Dora, Init, Lora, Map, Method, register_method
from .native import cmake_prefix_path, native_info
from .optim import param_groups
from .report import Report, report
from .reuse import reuse_norms
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
from .tracking import Tracker, track
from .training import BetaSchedule, RankAllocator, Rebalancing, linear_warmup, orthogonality_loss, rebalance
from .updates import FactoredUpdate, Update, register_update
from .verify import Verification, VerificationError, verify

try:
    __version__ = version("mapsurgery")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "AdaptedLayer",
    "BetaSchedule",
    "Dora",
    "Exported",
    "FactoredUpdate",
    "History",
    "Init",
    "Lora",
    "Map",
    "MapConv1d",
    "MapConv2d",
    "MapConv3d",
    "MapLinear",
    "Method",
    "Plan",
    "RankAllocator",
    "Rebalancing",
    "Report",
    "Tracker",
    "Update",
    "Verification",
    "VerificationError",
    "adapter_state_dict",
    "cmake_prefix_path",
    "disabled",
    "export",
    "linear_warmup",
    "load",
    "load_adapter_state_dict",
    "merge",
    "native_info",
    "orthogonality_loss",
    "param_groups",
    "patch",
    "plan",
    "plots",
    "rebalance",
    "register_method",
    "register_update",
    "report",
    "reuse_norms",
    "save",
    "track",
    "unmerge",
    "unpatch",
    "verify",
]
