"""What planned runs will take."""

from collections.abc import Callable

import pandas as pd
import pytest

from horen_bench.paper.estimate import duration, estimate
from horen_bench.paper.grids import cells, plan

Wrote = Callable[..., None]


def test_an_estimate_takes_the_speed_of_stored_runs_else_the_usual_one(wrote: Wrote) -> None:
    (horen,) = cells("table1", ["method=horen", "protocol=greedy", "checkpoints=[]"])
    (planned,) = plan([horen])
    before = estimate([planned]).iloc[0]
    assert (before["edits"], before["seconds"]) == (1000, pytest.approx(1000 * (0.006 + 0.005)))
    assert pd.isna(before["memory"])
    (other,) = cells("table1", ["method=horen", "seed=7"])
    wrote(cell=other, n=10, edit_seconds=2.0, eval_seconds=1.0, peak_memory_bytes=2**30)
    after = estimate([planned]).iloc[0]
    assert (after["seconds"], after["memory"]) == (pytest.approx(1000 * 0.2 + 1000 * 0.1), 2**30)
    wrote(cell=horen, n=400, edit_seconds=80.0, eval_seconds=40.0, peak_memory_bytes=2**30)
    assert estimate([planned]).iloc[0]["edits"] == 600


def test_a_big_models_time_is_unknown_and_comes_first() -> None:
    grid = [*cells("table1", ["method=horen"]), *cells("table1", ["suite=paper", "model=qwen25_7b", "method=horen"])]
    runs = plan(grid, download=True)
    assert [planned.config.model.label for planned in runs] == ["Qwen2.5 7B", "tiny"]
    assert estimate(runs)["seconds"].isna().tolist() == [True, False]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.2, "3 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (float("nan"), "an unknown time")],
)
def test_durations_are_rough(seconds: float, text: str) -> None:
    assert duration(seconds) == text
