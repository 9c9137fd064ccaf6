"""Scores against the number of edits: Figures 1 and 6 to 8, and the trajectory with its early edits, Figure 5."""

from collections.abc import Iterable

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from horen_bench.results.plots.style import (
    SCORES,
    WIDTH,
    MethodStyles,
    caption,
    draw_curve,
    log_axis,
    measured,
    method_styles,
    score_axis,
    series_names,
    strokes,
    styled,
    without_rows,
)

_EDITS = "edits"


def scale_figure(
    rows: pd.DataFrame, score: str, published: pd.DataFrame, methods: MethodStyles | None = None
) -> Figure:
    """One score of all methods against the number of edits; the paper's numbers in a panel of their own.

    Args:
        rows: what `grids.collect` gives, under one protocol.
        score: `op`, `rel`, `gen` or `loc`.
        published: `model`, `dataset`, `method`, `n` and the score as the paper prints them; may be empty.
        methods: their styles; None: those of `conf/method`.
    """
    methods = methods or method_styles()
    with styled():
        figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
        panels = figure.subplots(1, 1 if published.empty else 2, sharex=True, sharey=True, squeeze=False)[0]
        _draw_methods(panels[0], rows, score, methods)
        panels[0].set(title="measured, with 95 % intervals", ylabel=SCORES[score])
        if not published.empty:
            _draw_published(panels[1], published, score, methods)
        for axes in panels:
            log_axis(axes, _EDITS)
        _legend(figure, panels, methods)
        figure.suptitle(f"{SCORES[score]} against the number of edits\n{_about(rows)}")
    return figure


def trajectory_figure(
    rows: pd.DataFrame, early: pd.DataFrame, first: int, methods: MethodStyles | None = None
) -> Figure:
    """Rel, Gen and Loc of all edits so far, and of the first ones alone, along the stream.

    Args:
        rows: what `grids.collect` gives, under one protocol.
        early: the same columns, scores taken over the evaluated cases among the first `first`.
        first: how many edits count as early.
        methods: their styles; None: those of `conf/method`.
    """
    methods = methods or method_styles()
    scores = ("rel", "gen", "loc")
    with styled():
        figure = Figure(figsize=(WIDTH, 4.8), layout="constrained")
        panels = figure.subplots(2, 3, sharex=True, sharey=True)
        for upper, lower, score in zip(*panels, scores, strict=True):
            _draw_methods(upper, rows, score, methods)
            _draw_methods(lower, early, score, methods)
            upper.set_title(f"{SCORES[score]}, all edits so far")
            lower.set_title(f"{SCORES[score]}, first {first:,} edits")
            log_axis(lower, _EDITS)
        for left in panels[:, 0]:
            left.set_ylabel("score, with 95 % interval")
        _legend(figure, panels.flat, methods)
        figure.suptitle(f"Along the stream, and what becomes of its early edits\n{_about(rows)}")
    return figure


def _about(rows: pd.DataFrame) -> str:
    return "\n".join(line for line in (caption(measured(rows)), without_rows(rows)) if line)


def _draw_methods(axes: Axes, rows: pd.DataFrame, score: str, methods: MethodStyles) -> None:
    """A curve per method and variant, through its checkpoints."""
    score_axis(axes)
    finished = measured(rows)
    names = series_names(finished)
    for name in methods.in_order(names):
        part = finished[names == name]
        draw_curve(axes, part, "n", score, style=methods.of(part["method_label"].iloc[0]), label=name)


def _draw_published(axes: Axes, published: pd.DataFrame, score: str, methods: MethodStyles) -> None:
    """The paper's points, hollow, joined by hairlines."""
    score_axis(axes)
    for method in methods.in_order(published["method"]):
        part = published[published["method"] == method].sort_values("n")
        look = strokes(methods.of(method))
        axes.plot(part["n"], part[score], **look, linewidth=0.6, markerfacecolor="white", label=method)
    models, datasets = (" / ".join(published[column].unique()) for column in ("model", "dataset"))
    axes.set_title(f"as published: {models}, {datasets}")


def _legend(figure: Figure, panels: Iterable[Axes], methods: MethodStyles) -> None:
    """One legend below all panels, methods in one order; a curve stands for a published one."""
    shown: dict[str, Artist] = {}
    for axes in panels:
        shown = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True)) | shown
    ordered = methods.in_order(shown)
    figure.legend([shown[label] for label in ordered], ordered, loc="outside lower center", ncols=6)
