"""What is still to be run, and what it will take: speeds of stored runs, else rough ones of the embedded model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import pandas as pd
from rich.table import Table

from horen_bench.config.schema import RunConfig
from horen_bench.models.weights import EMBEDDED
from horen_bench.results.store import RunStore
from horen_bench.runner import Checkpoint

# Milliseconds per evaluated case with the embedded model and one thread; ours, measured.
_MS_PER_CASE = {"greedy": 5.0, "teacher_forced": 3.0, "release": 12.0, "text": 60.0}


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """One run directory's share of a plan: cells that are one stream are done together.

    Attributes:
        name: of the cell that goes farthest.
        config: of the same cell.
        store: the directory.
        missing: checkpoints to evaluate, of all the cells.
    """

    name: str
    config: RunConfig
    store: RunStore
    missing: tuple[Checkpoint, ...]

    def joined(self, other: Self) -> Self:
        """Both as one run; of two that go as far, this one gives the name."""
        farthest = max(self, other, key=lambda planned: planned.config.n)
        return replace(farthest, missing=tuple(sorted({*self.missing, *other.missing})))


def estimate(runs: Sequence[PlannedRun]) -> pd.DataFrame:
    """What each planned run will take: `name`, `edits`, `seconds`, `memory` in bytes; NaN is unknown.

    Speeds are those of stored runs of the same model, method and dataset, else the rough ones of the embedded model;
    memory is the most that a stored run of the model took.
    """
    history = {folder: _history(folder) for folder in {planned.config.results_dir for planned in runs}}
    return pd.DataFrame([_estimate(planned, history[planned.config.results_dir]) for planned in runs])


def _history(results_dir: str) -> pd.DataFrame:
    stores = [RunStore(path.parent) for path in Path(results_dir).glob("runs/*/checkpoints.csv")]
    rows = [store.sound_checkpoints() for store in stores]
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()


def _estimate(planned: PlannedRun, history: pd.DataFrame) -> dict[str, Any]:
    config, stored = planned.config, planned.store.sound_checkpoints()["n"]
    first, last = planned.missing[0][0], max(n for n, _ in planned.missing)
    edits = last - int(max((n for n in stored if n <= first), default=0))
    alike, memory = history, float("nan")
    if len(history):
        same = {part: history[part] == name for part, name in config.names().items()}
        alike = history[same["model"] & same["method"] & same["dataset"]]
        memory = history[same["model"]]["peak_memory_bytes"].max()
    per_edit = (alike["edit_seconds"] / alike["n"]).median() if len(alike) else usual_seconds(config, 1)
    evaluation = sum(
        min(n, config.eval_cases or n) * _seconds_per_case(config, protocol, alike) for n, protocol in planned.missing
    )
    return {"name": planned.name, "edits": edits, "seconds": edits * per_edit + evaluation, "memory": memory}


def _seconds_per_case(config: RunConfig, protocol: str, alike: pd.DataFrame) -> float:
    same = alike[alike["protocol"] == protocol] if len(alike) else alike
    if len(same):
        return float((same["eval_seconds"] / same["items"]).median())
    return _MS_PER_CASE.get(protocol, math.nan) / 1000 if _is_embedded(config) else math.nan


def usual_seconds(config: RunConfig, n: int) -> float:
    """Seconds of `n` edits into the embedded model, from the method's rough cost; NaN for other models."""
    known = config.method.ms_per_edit if _is_embedded(config) else None
    return math.nan if known is None else n * known / 1000


def _is_embedded(config: RunConfig) -> bool:
    return config.model.hub_id.startswith(EMBEDDED)


def estimate_table(expected: pd.DataFrame, side_by_side: int) -> Table:
    """The estimate, for people."""
    unknown = int(expected["seconds"].isna().sum())
    total = duration(expected["seconds"].sum() / side_by_side) if unknown < len(expected) else "an unknown time"
    beside = f", {unknown} of them unknown" if 0 < unknown < len(expected) else ""
    table = Table(title=f"{len(expected)} runs to do, {side_by_side} at a time: about {total}{beside}")
    for head in ("run", "edits", "time", "memory"):
        table.add_column(head, justify="left" if head == "run" else "right")
    for row in expected.to_dict("records"):
        memory = "unknown" if pd.isna(row["memory"]) else f"{row['memory'] / 2**30:.1f} GiB"
        table.add_row(row["name"], f"{row['edits']:,}", duration(row["seconds"]), memory)
    return table


def duration(seconds: float) -> str:
    """E.g. `50 s`, `12 min`, `4 h`, or `an unknown time`."""
    if math.isnan(seconds):
        return "an unknown time"
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
