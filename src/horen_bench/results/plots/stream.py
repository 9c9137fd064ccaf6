"""Curves of one run: scores, speed and memory against the number of edits."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from horen_bench.results.plots.style import SCORES, WIDTH, caption, draw_curve, score_axis, series_styles, styled

_EDITS = "edits"


def stream_figure(rows: pd.DataFrame) -> Figure:
    """Scores, edits per second and memory of one run against the number of edits.

    Args:
        rows: checkpoint rows of one run under one protocol, at least two.
    """
    with styled():
        figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
        scores, speed, memory = figure.subplots(1, 3, width_ratios=[2, 1, 1])
        _draw_scores(scores, rows)
        edits, seconds = rows["n"].diff().fillna(rows["n"]), rows["edit_seconds"].diff().fillna(rows["edit_seconds"])
        _draw_cost(speed, rows["n"], edits / seconds, "edits per second")
        _draw_cost(memory, rows["n"], rows["peak_memory_bytes"] / 2**20, "peak memory, MiB")
        named = rows.rename(columns={"model": "model_label", "dataset": "dataset_label"})
        figure.suptitle(f"{rows['method'].iloc[0]} on {caption(named)}")
    return figure


def _draw_scores(axes: Axes, rows: pd.DataFrame) -> None:
    score_axis(axes)
    styles = series_styles(list(SCORES))
    for score, label in SCORES.items():
        if score in rows and rows[score].notna().any():
            draw_curve(axes, rows, "n", score, style=styles[score], label=label)
    axes.set(xlabel=_EDITS, ylabel="score, with 95 % interval")
    axes.legend(ncols=2, loc="lower left")


def _draw_cost(axes: Axes, n: "pd.Series[int]", values: "pd.Series[float]", label: str) -> None:
    axes.plot(n, values, color="#000000", marker=".", markersize=4)
    axes.set(xlabel=_EDITS, ylabel=label)
    axes.set_ylim(bottom=0)
