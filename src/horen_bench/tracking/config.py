"""Settings of the trackers."""

from typing import ClassVar, Literal

from pydantic import Field

from horen_bench.config.schema import Text, TrackerConfig


class NoTrackerConfig(TrackerConfig):
    """No dashboard; the store keeps every number anyway."""

    tracker: ClassVar[str] = "horen_bench.tracking.base:NoTracker"


class WandbConfig(TrackerConfig):
    """A copy of the run for Weights & Biases."""

    tracker: ClassVar[str] = "horen_bench.tracking.wandb_tracker:WandbTracker"

    project: Text
    """W&B project."""
    entity: Text | None = None
    """W&B user or team; null: the logged-in user's default."""
    mode: Literal["online", "offline"] = "online"
    """`online`, or `offline` for local files to be sent later with `wandb sync`."""
    group: Text | None = None
    """What W&B groups runs by; null: no group."""
    tags: list[str | int | float] = Field(default_factory=list)
    """Labels of the run."""
