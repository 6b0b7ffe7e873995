"""Operating on models: walking, matching, planning, changing classes, undoing."""

from .adapted import AdaptedLayer, MapConv1d, MapConv2d, MapConv3d, MapLinear
from .merge import merge, unmerge
from .patch import disabled, patch, unpatch
from .plan import Plan, plan

__all__ = [
    "AdaptedLayer",
    "MapConv1d",
    "MapConv2d",
    "MapConv3d",
    "MapLinear",
    "Plan",
    "disabled",
    "merge",
    "patch",
    "plan",
    "unmerge",
    "unpatch",
]
