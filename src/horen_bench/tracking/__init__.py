"""A copy of the runs' numbers for a dashboard (Weights & Biases); tables never read from it."""

from horen_bench.tracking.base import NoTracker, Tracker
from horen_bench.tracking.wandb_tracker import WandbTracker

__all__ = ["NoTracker", "Tracker", "WandbTracker"]
