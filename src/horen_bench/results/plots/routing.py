"""How routing works: the two-step ladder (Figure 4), what a query costs (9), and what its settings do (10, 11)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from horen_bench.config.schema import LineStyle
from horen_bench.results.plots.style import (
    SCORES,
    WIDTH,
    MethodStyles,
    caption,
    draw_curve,
    log_axis,
    measured,
    method_styles,
    plain_decades,
    plain_ticks,
    score_axis,
    series_styles,
    strokes,
    styled,
    without_rows,
)

_BINS = 50
_KINDS = {
    "paraphrase": ("paraphrase, to its own key", "#D55E00", "////"),
    "unrelated": ("unrelated, to the nearest key", "#0072B2", "----"),
}
_HATCHES = ("----", "////", "\\\\\\\\", "")  # of lines: a pattern of dots makes an SVG of half a megabyte


# --- Figure 4 ----------------------------------------------------------------------------------------------


def ladder_figure(
    rows: pd.DataFrame,
    distribution: pd.DataFrame,
    routed: pd.DataFrame,
    published: pd.DataFrame,
    methods: MethodStyles | None = None,
) -> Figure:
    """What each ingredient of routing gives: scores, and how far paraphrases lie from unrelated prompts.

    Args:
        rows: one checkpoint row per method, in the ladder's order.
        distribution: what `distribution_of` gives.
        routed: what `routed_of` gives.
        published: `method`, `rel`, `gen`, `loc` as the paper prints them at this N, with `model` and `dataset`; may be
            empty.
        methods: their styles; None: those of `conf/method`.
    """
    with styled():
        figure = Figure(figsize=(WIDTH, 5.2), layout="constrained")
        upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=[1, 1.05])[:, 0]
        bars = upper.subplots()
        _draw_ladder(bars, rows, published, methods or method_styles())
        bars.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        by_method = [table.groupby("method_label", sort=False) for table in (routed, distribution)]
        panels = lower.subplots(1, len(by_method[0]), sharey=True, squeeze=False)[0]
        for axes, (_, shares), (_, bins) in zip(panels, *by_method, strict=True):
            _draw_stage(axes, bins, shares)
        panels[0].set_ylabel("share of prompts per bin")
        handles, labels = panels[0].get_legend_handles_labels()
        title = "above each panel: paraphrases on which their own entry acts | unrelated prompts on which one acts"
        lower.legend(handles, labels, loc="outside lower center", ncols=3, title=title)
        about = f"{caption(measured(rows))}, N = {rows['n'].max():,}"
        first, last = rows["method_label"].iloc[[0, -1]]
        lines = [f"Step by step from {first} to {last}", about, without_rows(rows)]
        figure.suptitle("\n".join(line for line in lines if line))
    return figure


def distribution_of(scores: pd.DataFrame) -> pd.DataFrame:
    """Scores as shares of the prompts in equal bins, both kinds of a method on the same ones.

    Args:
        scores: one row per prompt: `method_label`, `kind` (`paraphrase` or `unrelated`), `score`, `threshold`.

    Returns:
        `method_label`, `kind`, `left`, `right`, `share`.
    """
    parts: list[pd.DataFrame] = []
    for method, group in scores.groupby("method_label", sort=False):
        borders = np.histogram_bin_edges(np.append(group["score"], group["threshold"].iloc[0]), _BINS)
        for kind, prompts in group.groupby("kind", sort=False):
            counts, _ = np.histogram(prompts["score"], borders)
            shares = {"left": borders[:-1], "right": borders[1:], "share": counts / len(prompts)}
            parts.append(pd.DataFrame({"method_label": method, "kind": kind, **shares}))
    return pd.concat(parts, ignore_index=True)


def routed_of(scores: pd.DataFrame) -> pd.DataFrame:
    """Per method and kind: number of prompts, and the share that an entry acts on (a paraphrase's own).

    Args:
        scores: one row per prompt: `method_label`, `stage`, `measure`, `threshold`, `kind`, `routed`.
    """
    by = ["method_label", "stage", "measure", "threshold", "kind"]
    return scores.groupby(by, sort=False)["routed"].agg(prompts="size", routed="mean").reset_index()


def _draw_ladder(axes: Axes, rows: pd.DataFrame, published: pd.DataFrame, styles: MethodStyles) -> None:
    """Three groups of bars, Rel, Gen and Loc, a bar per method; the paper's numbers as hollow diamonds."""
    score_axis(axes)
    axes.set(ylim=(0, 1.08), ylabel="score, with 95 % interval")
    scores, methods = ("rel", "gen", "loc"), list(rows["method_label"].unique())
    width, places = 0.8 / len(methods), np.arange(len(scores))
    printed = published.set_index("method") if len(published) else published
    for i, method in enumerate(methods):
        centres = places + (i - (len(methods) - 1) / 2) * width
        row = rows[rows["method_label"] == method].iloc[0]
        if row["status"] == "finished":
            look = (styles.of(method).colour, _HATCHES[i % len(_HATCHES)])
            _draw_bars(axes, centres, row, scores, width=width, look=look)
        reading_of = method.split(",")[0]
        if reading_of in printed.index:
            values = printed.loc[reading_of, list(scores)].to_numpy(float)
            label = f"paper: {published['model'].iloc[0]}, {published['dataset'].iloc[0]}" if i == 0 else None
            axes.plot(centres, values, "D", color="black", markerfacecolor="white", markersize=4, label=label)
    axes.set_xticks(places, [SCORES[score] for score in scores])


def _draw_bars(
    axes: Axes, centres: Any, row: Any, scores: Sequence[str], *, width: float, look: tuple[str, str]
) -> None:
    """Bars with their intervals; `look` is colour and hatch."""
    values = [row[score] for score in scores]
    spread = [[row[s] - row[f"{s}_low"] for s in scores], [row[f"{s}_high"] - row[s] for s in scores]]
    colour, hatch = look
    axes.bar(
        centres,
        values,
        width * 0.92,
        yerr=spread,
        label=row["method_label"],
        facecolor="white" if hatch else colour,
        edgecolor=colour,
        hatch=hatch,
        error_kw={"elinewidth": 0.8, "capsize": 2, "ecolor": "#7F7F7F"},
    )


def _draw_stage(axes: Axes, distribution: pd.DataFrame, routed: pd.DataFrame) -> None:
    """Both kinds' histograms, and the threshold that an entry acts from."""
    for kind, part in distribution.groupby("kind", sort=False):
        label, colour, hatch = _KINDS[str(kind)]
        edges = np.append(part["left"], part["right"].iloc[-1])
        axes.stairs(part["share"], edges, fill=False, color=colour, hatch=hatch, label=label)
    first = routed.iloc[0]
    axes.axvline(first["threshold"], color="black", linestyle="--", linewidth=1, label="threshold, of a new entry")
    shares = [f"{routed.loc[routed['kind'] == kind, 'routed'].iloc[0]:.1%}" for kind in _KINDS]
    axes.set_title("\n".join([*first["method_label"].split(", "), first["stage"], " | ".join(shares)]))
    axes.set_xlabel("Euclidean distance" if first["measure"] == "distance" else "cosine")


# --- Figure 9 ----------------------------------------------------------------------------------------------


def cost_figure(rows: pd.DataFrame, methods: MethodStyles | None = None) -> Figure:
    """Milliseconds to route one query against the size of the codebook.

    Args:
        rows: what `paper.routing.query_cost` gives.
        methods: their styles; None: those of `conf/method`.
    """
    styles = methods or method_styles()
    with styled():
        figure = Figure(figsize=(WIDTH * 0.6, 3.2), layout="constrained")
        axes = figure.subplots()
        for method, part in rows.groupby("method_label", sort=False):
            ordered, style = part.sort_values("entries"), styles.of(str(method))
            label = f"{method}, {ordered['rule'].iloc[0]}"
            axes.plot(ordered["entries"], ordered["ms"], label=label, **strokes(style))
            axes.fill_between(
                ordered["entries"], ordered["ms_low"], ordered["ms_high"], color=style.colour, alpha=0.15, linewidth=0
            )
        log_axis(axes, "entries in the codebook")
        axes.set_yscale("log")
        plain_decades(axes.yaxis)
        axes.set_ylabel("ms per query, median and quartiles")
        axes.grid(color="#E5E5E5", linewidth=0.5)
        axes.legend()
        first = rows.iloc[0]
        figure.suptitle(
            f"Routing one query: keys of size {first['key_size']} of {first['model_label']}, {first['dtype']}\n"
            f"{first['device']}, {first['threads']} thread(s), random keys, seed {first['seed']}"
        )
    return figure


# --- Figures 10 and 11 -------------------------------------------------------------------------------------


def hopfield_figure(rows: pd.DataFrame) -> Figure:
    """Scores against the number of Hopfield steps, a line per damping.

    Args:
        rows: checkpoint rows of one N with the columns `steps` and `alpha`.
    """
    figure = _sweep(rows, x="steps", by="alpha", symbol="α", title="Hopfield steps T and damping α")
    for axes in figure.axes:
        axes.set_xscale("symlog", base=2, linthresh=1)
        plain_ticks(axes, sorted(rows["steps"].unique()))
    return figure


def pooling_figure(rows: pd.DataFrame, usual: float) -> Figure:
    """Scores against the share of prompt tokens that make a query, a line per N.

    Args:
        rows: checkpoint rows with the column `pooling_ratio`.
        usual: the model's own ratio, which is marked.
    """
    figure = _sweep(
        rows, x="pooling_ratio", by="n", symbol="N", title="Share ρ of the prompt, from its end, in a query"
    )
    for axes in figure.axes:
        axes.axvline(usual, color="#7F7F7F", linewidth=0.8, linestyle=":")
        plain_ticks(axes, [0.2, 0.4, 0.6, 0.8, 1.0])
    return figure


_AXES = {"steps": "steps T", "pooling_ratio": "pooling ratio ρ"}


def _sweep(rows: pd.DataFrame, *, x: str, by: str, symbol: str, title: str) -> Figure:
    """A panel per score that has a value, a line per value of `by`."""
    finished = measured(rows)
    shown = [score for score in SCORES if score in finished and finished[score].notna().any()]
    with styled():
        figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
        panels = figure.subplots(2, (len(shown) + 1) // 2, sharex=True, sharey=True, squeeze=False).ravel()
        styles = series_styles(sorted(finished[by].unique()))
        for axes, score in zip(panels, shown, strict=False):
            _draw_lines(axes, finished, score, x=x, by=by, symbol=symbol, styles=styles)
            axes.set(title=SCORES[score], xlabel=_AXES[x])
            axes.label_outer()
        for axes in panels[len(shown) :]:
            axes.remove()
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=6)
        lines = [title, _sweep_caption(finished, by), without_rows(rows)]
        figure.suptitle("\n".join(line for line in lines if line))
    return figure


def _sweep_caption(rows: pd.DataFrame, by: str) -> str:
    method = rows["method_label"].iloc[0]
    n = "" if by == "n" else f", N = {rows['n'].max():,}"
    return f"{method} on {caption(rows)}{n}"


def _draw_lines(
    axes: Axes, rows: pd.DataFrame, score: str, *, x: str, by: str, symbol: str, styles: dict[Any, LineStyle]
) -> None:
    score_axis(axes)
    for key, part in rows.groupby(by):
        draw_curve(axes, part, x, score, style=styles[key], label=f"{symbol} = {key:,g}")
