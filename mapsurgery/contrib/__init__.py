"""Aids without a measured benefit, to be imported by name: no part of `mapsurgery` itself needs them."""

from .beta_schedule import BetaSchedule, linear_warmup
from .rebalancing import Rebalancing, rebalance

__all__ = ["BetaSchedule", "Rebalancing", "linear_warmup", "rebalance"]
