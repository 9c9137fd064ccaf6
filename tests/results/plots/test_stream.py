"""Curves of one run, and the numbers written beside them."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

from horen_bench.results.plots.__main__ import main
from horen_bench.results.plots.stream import stream_figure
from horen_bench.results.store import RunStore


def row(n: int, seconds: float, loc: float | None = 1.0) -> dict[str, object]:
    scores = {"rel": 0.9, "gen": 0.8, "loc": loc, "op": 0.89}
    intervals = {f"{k}_{end}": v for k, v in scores.items() for end in ("low", "high")}
    labels = {"method": "horen", "model": "tiny", "dataset": "facts", "protocol": "greedy", "seed": 1}
    cost = {"edit_seconds": seconds, "peak_memory_bytes": 2**20, "items": 5}
    return {"n": n, **labels, **scores, **intervals, **cost}


def heights(axes: Axes) -> list[float]:
    heights: list[float] = np.asarray(axes.lines[0].get_ydata()).tolist()
    return heights


def test_speed_is_that_of_the_edits_since_the_last_checkpoint() -> None:
    _, speed, memory = stream_figure(pd.DataFrame([row(100, 10.0), row(300, 20.0)])).axes
    assert heights(speed) == [10.0, 20.0]
    assert heights(memory) == [1.0, 1.0]


def test_a_score_that_no_row_has_is_not_drawn() -> None:
    figure = stream_figure(pd.DataFrame([row(100, 10.0, None), row(300, 20.0, None)]))
    legend = figure.axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["Rel", "Gen", "OP"]


def test_figure_and_numbers_are_written_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = RunStore(tmp_path / "run")
    for n, seconds in ((100, 10.0), (300, 20.0)):
        store.add_checkpoint(row(n, seconds), pd.DataFrame({"n": [n]}))
    assert main([str(store.path), "--out", str(tmp_path / "figures" / "stress")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        str(tmp_path / "figures" / f"stress{suffix}") for suffix in (".svg", ".png", ".csv")
    ]
    assert pd.read_csv(tmp_path / "figures" / "stress.csv")["n"].tolist() == [100, 300]
    first = (tmp_path / "figures" / "stress.svg").read_bytes()
    assert main([str(store.path), "--out", str(tmp_path / "figures" / "stress")]) == 0
    assert (tmp_path / "figures" / "stress.svg").read_bytes() == first, "the same rows give the same file"


def test_a_run_with_one_checkpoint_has_no_curve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = RunStore(tmp_path / "run")
    store.add_checkpoint(row(100, 10.0), pd.DataFrame({"n": [100]}))
    assert main([str(store.path), "--out", str(tmp_path / "x")]) == 2
    assert (
        capsys.readouterr().err
        == f"error: {store.path} has 1 checkpoints under protocol greedy; a curve needs at least two\n"
    )
