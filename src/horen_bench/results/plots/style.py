"""What all figures share: one look, a line style per method and per score, captions, files.

Colours are Okabe and Ito's, distinct for the colour-blind; line styles and markers are distinct in grey.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, Self

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from omegaconf import OmegaConf
from PIL import Image

from horen_bench.config.schema import LineStyle, MethodConfig
from horen_bench.paths import resource
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

_UNKNOWN = LineStyle(colour="#7F7F7F", line="--", marker="*")  # of a method without a style of its own
_LONG_DASHES = (0, (5, 1))
_SERIES = (
    LineStyle(colour="#000000", line="-", marker="o"),
    LineStyle(colour="#0072B2", line="--", marker="s"),
    LineStyle(colour="#D55E00", line="-.", marker="^"),
    LineStyle(colour="#009E73", line="long", marker="D"),
    LineStyle(colour="#CC79A7", line=":", marker="v"),
    LineStyle(colour="#E69F00", line="-", marker="P"),
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


@dataclass(frozen=True, slots=True)
class MethodStyles:
    """How methods look, the same in every figure, by the label that tables and the paper print.

    Attributes:
        styles: of the methods that have one.
        ranks: places in legends, smallest first.
    """

    styles: Mapping[str, LineStyle]
    ranks: Mapping[str, int]

    def of(self, label: str) -> LineStyle:
        """A method's style; a grey one for a method without."""
        return self.styles.get(label, _UNKNOWN)

    def in_order(self, labels: Iterable[str]) -> list[str]:
        """Labels, variants behind their method, as legends list them and curves are laid on one another."""
        return sorted(set(labels), key=lambda label: (self.ranks.get(label.split(",")[0], math.inf), label))

    def joined(self, methods: Iterable[MethodConfig]) -> Self:
        """With methods of other packages, whose files are not in `conf/method`."""
        added = {method.label: method for method in methods}
        styles = {label: method.style for label, method in added.items() if method.style}
        ranks = {label: method.rank for label, method in added.items()}
        return type(self)({**self.styles, **styles}, {**self.ranks, **ranks})


@cache
def method_styles() -> MethodStyles:
    """The styles of `conf/method`."""
    files: list[Any] = [OmegaConf.load(path) for path in sorted((resource("conf") / "method").glob("*.yaml"))]
    looks = {file.label: OmegaConf.to_container(file.style) for file in files if "style" in file}
    styles = {label: LineStyle.model_validate(look) for label, look in looks.items()}
    return MethodStyles(styles, {file.label: file.rank for file in files if "rank" in file})


def strokes(style: LineStyle) -> dict[str, Any]:
    """A style as keyword arguments of `Axes.plot`."""
    line = _LONG_DASHES if style.line == "long" else style.line
    return {"color": style.colour, "linestyle": line, "marker": style.marker, "markersize": style.size}


def series_styles(keys: Sequence[Any]) -> dict[Any, LineStyle]:
    """A style for each value of a setting, in their order."""
    return {key: _SERIES[i % len(_SERIES)] for i, key in enumerate(keys)}


def draw_curve(axes: Axes, rows: pd.DataFrame, x: str, score: str, *, style: LineStyle, label: str) -> None:
    """A score against the column `x`, in its order, with the 95 % interval; a missing score is a gap."""
    ordered = rows.sort_values(x)
    axes.plot(ordered[x], ordered[score], label=label, **strokes(style))
    low, high = ordered[f"{score}_low"], ordered[f"{score}_high"]
    axes.fill_between(ordered[x], low, high, color=style.colour, alpha=0.12, linewidth=0)


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
    """Model, data, protocol, seed and evaluated cases of the rows that are drawn, in one line."""
    facts = [_values(rows, column, prefix) for column, prefix in _CAPTION.items() if column in rows]
    return ", ".join([*facts, _items(rows)])


_CAPTION = {"model_label": "", "dataset_label": "", "protocol": "protocol ", "seed": "seed ", "device": ""}


def _values(rows: pd.DataFrame, column: str, prefix: str) -> str:
    values = rows[column].dropna().unique()
    return prefix + "/".join(f"{value:.0f}" if isinstance(value, float) else str(value) for value in values)


def _items(rows: pd.DataFrame) -> str:
    if (rows["items"] == rows["n"]).all():
        return "all N cases evaluated"
    sampled = sorted(rows.loc[rows["items"] < rows["n"], "items"].astype(int).unique())
    where = "" if (rows["items"] < rows["n"]).all() else "at larger N "
    return f"{where}{'/'.join(f'{items:,}' for items in sampled)} cases evaluated, a random sample"


def measured(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that have scores; `grids.collect` gives one for each that is missing, too."""
    return rows[rows["status"] == "finished"]


def without_rows(rows: pd.DataFrame) -> str:
    """Names the rows that are missing, e.g. `not run at N = 2,000, 5,000: ROME, WISE`; empty if nothing is."""
    lacking = rows[rows["status"] != "finished"].assign(series=series_names(rows))
    missing: dict[tuple[str, str], list[str]] = {}
    for (series, status), part in lacking.groupby(["series", "status"], sort=False):
        places = ", ".join(f"{n:,}" for n in sorted(part["n"].unique()))
        missing.setdefault((str(status), places), []).append(str(series))
    return "; ".join(f"{status} at N = {places}: {', '.join(names)}" for (status, places), names in missing.items())


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
