"""What all figures share: one look, a pen per method and per score, captions, files.

Colours are Okabe and Ito's, told apart by the colour-blind; line styles and markers tell them apart in grey.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from PIL import Image

from horen_bench.results.atomic import replacing

WIDTH = 7.0  # inches, a page's text width
_STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "figure.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "hatch.linewidth": 0.5,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "horen_bench",  # the same rows give the same file
}

_COLOURS = 64  # of a PNG, for a third of its size

_BLACK, _ORANGE, _SKY, _GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
_BLUE, _VERMILION, _PURPLE, _GREY = "#0072B2", "#D55E00", "#CC79A7", "#7F7F7F"
_DASHED, _DOTTED, _DASH_DOT, _LONG = "--", ":", "-.", (0, (5, 1))


@dataclass(frozen=True, slots=True)
class Pen:
    """How one line looks."""

    colour: str
    line: Any = "-"
    marker: str = "o"
    size: float = 4

    def strokes(self) -> dict[str, Any]:
        """As keyword arguments of `Axes.plot`."""
        return {"color": self.colour, "linestyle": self.line, "marker": self.marker, "markersize": self.size}


# By label, as `conf/method/*.yaml` and the paper print it.
_METHODS = {
    "HoReN": Pen(_BLACK, "-", "o", size=6.5),  # seen under those that lie on it
    "GRACE": Pen(_BLUE, _DASHED, "s"),
    "GRACE+Norm": Pen(_SKY, _DASH_DOT, "D"),
    "GRACE+Norm, equal cosine": Pen(_GREEN, _DOTTED, "D"),
    "WISE": Pen(_VERMILION, _DASH_DOT, "^"),
    "REPAIR": Pen(_VERMILION, _DOTTED, "v"),
    "ROME": Pen(_ORANGE, "-", "P"),
    "MEMIT": Pen(_ORANGE, _DASHED, "X"),
    "AlphaEdit": Pen(_PURPLE, _LONG, "d"),
    "UltraEdit": Pen(_GREEN, _LONG, "p"),
    "FT-L": Pen(_GREY, _DOTTED, "<"),
    "FT-M": Pen(_GREY, _DASH_DOT, ">"),
    "UnKE": Pen(_SKY, _DOTTED, "h"),
}
_SERIES = (
    Pen(_BLACK, "-", "o"),
    Pen(_BLUE, _DASHED, "s"),
    Pen(_VERMILION, _DASH_DOT, "^"),
    Pen(_GREEN, _LONG, "D"),
    Pen(_PURPLE, _DOTTED, "v"),
    Pen(_ORANGE, "-", "P"),
)

SCORES = {
    "rel": "Rel",
    "gen": "Gen",
    "loc": "Loc",
    "op": "OP",
    "same_subject": "Loc, same subject",
    "same_relation": "Loc, same relation",
}


def styled() -> AbstractContextManager[None]:
    """The figures' look, within a `with` block."""
    context: AbstractContextManager[None] = mpl.rc_context(_STYLE)
    return context


def method_pen(label: str) -> Pen:
    """The pen of a method, the same in every figure; one of its own for a method that the paper does not have."""
    return _METHODS.get(label, Pen(_GREY, _DASHED, "*"))


def in_order(labels: Iterable[str]) -> list[str]:
    """Labels of methods, variants behind their method, as legends list them and curves are laid on one another."""
    rank = {method: i for i, method in enumerate(_METHODS)}
    return sorted(set(labels), key=lambda label: (rank.get(label.split(",")[0], len(rank)), label))


def series_pens(keys: Sequence[Any]) -> dict[Any, Pen]:
    """A pen for each value of a setting, in their order."""
    return {key: _SERIES[i % len(_SERIES)] for i, key in enumerate(keys)}


def draw_curve(axes: Axes, rows: pd.DataFrame, x: str, score: str, *, pen: Pen, label: str) -> None:
    """A score against the column `x`, in its order, with the 95 % interval; a missing score is a gap."""
    ordered = rows.sort_values(x)
    axes.plot(ordered[x], ordered[score], label=label, **pen.strokes())
    low, high = ordered[f"{score}_low"], ordered[f"{score}_high"]
    axes.fill_between(ordered[x], low, high, color=pen.colour, alpha=0.12, linewidth=0)


def score_axis(axes: Axes) -> None:
    """The whole range of a score, with room for the markers at both ends."""
    axes.set_ylim(-0.03, 1.03)
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.5)
    axes.set_axisbelow(True)


def log_axis(axes: Axes, label: str) -> None:
    """A logarithmic x axis whose ticks are plain numbers."""
    axes.set_xscale("log")
    axes.set_xlabel(label)
    plain_decades(axes.xaxis)


def plain_decades(axis: Axis) -> None:
    """Plain numbers at the powers of ten of a logarithmic axis."""
    axis.set_major_locator(LogLocator(10))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def plain_ticks(axes: Axes, ticks: Sequence[float]) -> None:
    """Ticks at the values that were measured, and nowhere else."""
    axes.set_xticks(list(ticks), [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())


def caption(rows: pd.DataFrame) -> str:
    """Model, data, protocol, seed and questioned cases of the rows that are drawn, in one line."""
    facts = [_values(rows, column, prefix) for column, prefix in _CAPTION.items() if column in rows]
    return ", ".join([*facts, _items(rows)])


_CAPTION = {"model_label": "", "dataset_label": "", "protocol": "protocol ", "seed": "seed ", "device": ""}


def _values(rows: pd.DataFrame, column: str, prefix: str) -> str:
    values = rows[column].dropna().unique()
    return prefix + "/".join(f"{value:.0f}" if isinstance(value, float) else str(value) for value in values)


def _items(rows: pd.DataFrame) -> str:
    if (rows["items"] == rows["n"]).all():
        return "all N cases questioned"
    sampled = sorted(rows.loc[rows["items"] < rows["n"], "items"].astype(int).unique())
    where = "" if (rows["items"] < rows["n"]).all() else "at larger N "
    return f"{where}{'/'.join(f'{items:,}' for items in sampled)} cases questioned, a random sample"


def measured(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that have scores; `experiments.collect` gives one for each that is missing, too."""
    return rows[rows["status"] == "finished"]


def without_rows(rows: pd.DataFrame) -> str:
    """Names what was wanted and is missing, e.g. `not run at N = 2,000, 5,000: ROME, WISE`; empty if nothing is."""
    lacking = rows[rows["status"] != "finished"].assign(series=series_names(rows))
    found: dict[tuple[str, str], list[str]] = {}
    for (series, status), part in lacking.groupby(["series", "status"], sort=False):
        places = ", ".join(f"{n:,}" for n in sorted(part["n"].unique()))
        found.setdefault((str(status), places), []).append(str(series))
    return "; ".join(f"{status} at N = {places}: {', '.join(names)}" for (status, places), names in found.items())


def series_names(rows: pd.DataFrame) -> "pd.Series[str]":
    """Method and variant of each row, as a legend has them."""
    return rows["method_label"] + rows["variant"].map(lambda variant: f", {variant}" if variant else "")


def save(figure: Figure, numbers: Mapping[str, pd.DataFrame], stem: Path) -> list[Path]:
    """Write a figure as SVG and PNG, and the numbers that it shows as CSV.

    Args:
        figure: the figure.
        numbers: by what is added to the file's name (`""`: nothing).
        stem: the files' path without suffix.

    Returns:
        The paths.
    """
    pictures = [stem.with_suffix(suffix) for suffix in (".svg", ".png")]
    tables = {stem.with_name(f"{stem.name}{more}.csv"): table for more, table in numbers.items()}
    with styled():
        with replacing(pictures[0]) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
        drawn = BytesIO()
        figure.savefig(drawn, format="png", dpi=150)
        with replacing(pictures[1]) as temporary, Image.open(drawn) as picture:
            picture.convert("RGB").quantize(_COLOURS).save(temporary, format="png", optimize=True)
    for path, table in tables.items():
        with replacing(path) as temporary:
            table.to_csv(temporary, index=False)
    return [*pictures, *tables]
