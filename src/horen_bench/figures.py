"""Figures made from stored rows; each writes the numbers it shows beside it.

python -m horen_bench.figures RUN_DIRECTORY --out results/figures/stress
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from horen_bench.errors import UserError
from horen_bench.store import RunStore

# Okabe and Ito's colours, told apart by the colour-blind and in grey by their line styles.
_LINES = {
    "op": ("OP", "#000000", "-"),
    "rel": ("Rel", "#0072B2", "--"),
    "gen": ("Gen", "#D55E00", "-."),
    "loc": ("Loc", "#009E73", ":"),
    "same_subject": ("same subject", "#CC79A7", (0, (5, 1))),
    "same_relation": ("same relation", "#E69F00", (0, (3, 1, 1, 1))),
}
_STYLE: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "horen_bench"}


def stream_figure(rows: pd.DataFrame) -> Figure:
    """Scores, edits per second and memory of one run against the number of edits.

    Args:
        rows: checkpoint rows of one run, at least two.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7.0, 3.2), layout="constrained")
        scores, speed, memory = figure.subplots(1, 3, width_ratios=[2, 1, 1])
        _draw_scores(scores, rows)
        edits, seconds = rows["n"].diff().fillna(rows["n"]), rows["edit_seconds"].diff().fillna(rows["edit_seconds"])
        _draw_cost(speed, rows["n"], edits / seconds, "edits per second")
        _draw_cost(memory, rows["n"], rows["peak_memory_bytes"] / 2**20, "peak memory, MiB")
        first = rows.iloc[0]
        figure.suptitle(
            f"{first['method']} on {first['model']}, {first['dataset']}: protocol {first['protocol']}, seed "
            f"{first['seed']}, {rows['items'].max()} cases per point",
            fontsize=9,
        )
    return figure


def save(figure: Figure, rows: pd.DataFrame, stem: Path) -> list[Path]:
    """Write the figure as SVG and PNG, and the rows that it shows as CSV; the paths."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(_STYLE):
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
        figure.savefig(stem.with_suffix(".png"), dpi=150)
    rows.to_csv(stem.with_suffix(".csv"), index=False)
    return [stem.with_suffix(suffix) for suffix in (".svg", ".png", ".csv")]


def _draw_scores(axes: Axes, rows: pd.DataFrame) -> None:
    for name, (label, colour, line) in _LINES.items():
        if name not in rows or rows[name].isna().all():
            continue
        axes.plot(rows["n"], rows[name], color=colour, linestyle=line, label=label, marker=".", markersize=4)
        axes.fill_between(rows["n"], rows[f"{name}_low"], rows[f"{name}_high"], color=colour, alpha=0.12, linewidth=0)
    axes.set(xlabel="edits", ylabel="score, with 95 % interval", ylim=(0, 1.02))
    axes.legend(frameon=False, ncols=2, loc="lower left")


def _draw_cost(axes: Axes, n: "pd.Series[int]", values: "pd.Series[float]", label: str) -> None:
    axes.plot(n, values, color="#000000", marker=".", markersize=4)
    axes.set(xlabel="edits", ylabel=label)
    axes.set_ylim(bottom=0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw one run; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m horen_bench.figures", description="Curves of one stored run.")
    parser.add_argument("run", type=Path, help="a run directory, as the run printed it")
    parser.add_argument("--protocol", default="greedy", help="of the checkpoints to draw (default: greedy)")
    parser.add_argument("--out", type=Path, required=True, help="where to write, without suffix")
    options = parser.parse_args(arguments)
    try:
        stored = RunStore(options.run).checkpoints()
        rows = stored[stored["protocol"] == options.protocol]
        if len(rows) < 2:
            raise UserError(
                f"{options.run} has {len(rows)} checkpoints under protocol {options.protocol}; a curve needs at "
                "least two"
            )
        for path in save(stream_figure(rows), rows, options.out):
            print(path)  # noqa: T201
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
