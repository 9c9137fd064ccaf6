"""What the stream tells of a run while it is at work, and the tracker that keeps quiet."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from horen_bench.tracking.config import NoTrackerConfig


class Tracker(Protocol):
    """A copy of a run's numbers for a dashboard; the store stays the source of every table."""

    problem: str | None  # why tracking stopped before the run did, to be shown beside the result

    def start(self, run_dir: Path, run_id: str, config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
        """Open the tracked run, or go on with it.

        Args:
            run_dir: the run's directory in the store; it must exist.
            run_id: the run's identity in the store.
            config: the resolved configuration, with `name` in each of `method`, `model`, `dataset`.
            rows: checkpoint rows that an earlier, interrupted process stored; those that it did not
                log are logged now, never twice.

        Raises:
            UserError: the dashboard cannot be reached or does not know the user.
        """

    def log(self, row: Mapping[str, Any]) -> None:
        """Log one checkpoint row (keys as in checkpoints.csv; None and NaN mean missing)."""

    def finish(self, cases: pd.DataFrame) -> None:
        """Write the summary, upload the per-case table, close."""

    def abort(self) -> None:
        """Close after an error or an interruption, without marking the run finished."""


class NoTracker:
    """Tracks nothing."""

    problem: str | None = None

    def __init__(self, config: NoTrackerConfig | None = None) -> None:
        """There is nothing to set."""

    def start(self, run_dir: Path, run_id: str, config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
        """Do nothing."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Do nothing."""

    def finish(self, cases: pd.DataFrame) -> None:
        """Do nothing."""

    def abort(self) -> None:
        """Do nothing."""
