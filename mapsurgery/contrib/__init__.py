"""Training aids: what may be done to the adapters between the optimiser's steps."""

from .beta_schedule import BetaSchedule, linear_warmup
from .rank_allocator import RankAllocator, orthogonality_loss
from .rebalancing import Rebalancing, rebalance

__all__ = ["BetaSchedule", "RankAllocator", "Rebalancing", "linear_warmup", "orthogonality_loss", "rebalance"]
