"""The paper's figures by their names: drawn from what a grid collected, and from what no run records."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from horen_bench.config.compose import run_config
from horen_bench.config.schema import MethodConfig
from horen_bench.errors import UserError
from horen_bench.paper.grids import Cell, collect, filling, results_dir
from horen_bench.paths import resource
from horen_bench.results.plots.routing import (
    cost_figure,
    distribution_of,
    hopfield_figure,
    ladder_figure,
    pooling_figure,
    routed_of,
)
from horen_bench.results.plots.scale import scale_figure, trajectory_figure
from horen_bench.results.plots.style import SCORES, MethodStyles, measured, method_styles, save
from horen_bench.results.store import RunStore

_EARLY = 500  # first edits followed in Figure 5; ours, the paper names no number
_SIZES = (100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)  # entries in Figure 9; ours

# Columns of a figure's CSV beside its scores.
_FACTS = ["model_label", "method_label", "dataset_label", "variant", "n", "protocol", "seed", "device", "items"]
_STATUS = ["status", "reason"]
_MAIN = ["rel", "gen", "loc", "op"]


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure and the numbers that it shows, by what is added to its file's name."""

    figure: Figure
    numbers: Mapping[str, pd.DataFrame]


# --- Along the stream ------------------------------------------------------------------------------------------


def _scale(grid: Sequence[Cell], protocol: str, score: str) -> Drawing:
    rows = _rows(grid, protocol)
    published = _published("table1", "table4")
    figure = scale_figure(rows, score, published, _styles(grid))
    return Drawing(figure, {"": _shown(rows, [score]), "_paper": published})


def _trajectory(grid: Sequence[Cell], protocol: str) -> Drawing:
    rows = _rows(grid, protocol)
    early = _early(rows)
    numbers = {"": _shown(rows, _MAIN), "_early": _shown(early, _MAIN).assign(first=_EARLY)}
    return Drawing(trajectory_figure(rows, early, _EARLY, _styles(grid)), numbers)


def _early(rows: pd.DataFrame) -> pd.DataFrame:
    """The finished rows of checkpoints past the first edits, with the scores of those alone."""
    finished, at = measured(rows), ["n", "protocol"]
    parts: list[pd.DataFrame] = []
    for run, of_run in finished.groupby("run_dir", sort=False):
        scores = early_scores(RunStore(Path(str(run))).cases(), _EARLY, of_run["seed"].iloc[0])
        parts.append(of_run[[*at, *(name for name in of_run if name not in scores)]].merge(scores, on=at))
    parts = [part for part in parts if len(part)]
    return pd.concat(parts, ignore_index=True) if parts else finished.iloc[:0]


def early_scores(cases: pd.DataFrame, first: int, seed: int) -> pd.DataFrame:
    """Rel, Gen, Loc and OP of the first edits alone, at each later checkpoint and protocol, with their intervals.

    Args:
        cases: per-case rows, as `RunStore.cases` gives them.
        first: how many edits count; a checkpoint before them has no row.
        seed: of the resampling.
    """
    from horen_bench.evaluation.aggregate import summary  # noqa: PLC0415 - imports torch

    early = cases[(cases["n"] >= first) & (cases["position"] < first)]
    rows = [
        {"n": n, "protocol": protocol, "items": len(part), **summary(part, [], seed)}
        for (n, protocol), part in early.groupby(["n", "protocol"], sort=False)
    ]
    return pd.DataFrame(rows, columns=None if rows else ["n", "protocol"])


# --- Routing -----------------------------------------------------------------------------------------------------


def _ladder(grid: Sequence[Cell], protocol: str) -> Drawing:
    from horen_bench.paper.routing import bare_editor, routing_scores  # noqa: PLC0415 - imports torch

    rows = _rows(grid, protocol)
    last = rows[rows["n"] == rows["n"].max()]
    parts: list[pd.DataFrame] = []
    for cell in grid:
        cases = cell.config.dataset.cases(cell.config.n)
        with bare_editor(cell.config) as editor:
            parts.append(routing_scores(editor, cases).assign(method_label=cell.labels["method"]))
    scores = pd.concat(parts, ignore_index=True)
    distribution, routed = distribution_of(scores), routed_of(scores)
    published = _published("table9")
    published = published[published["n"] == rows["n"].max()]
    numbers = {"": _shown(last, _MAIN), "_distribution": distribution, "_routed": routed, "_paper": published}
    return Drawing(ladder_figure(last, distribution, routed, published, _styles(grid)), numbers)


def _cost(grid: Sequence[Cell], _protocol: str) -> Drawing:
    from horen_bench.paper.routing import bare_editor, query_cost  # noqa: PLC0415 - imports torch

    parts: list[pd.DataFrame] = []
    for cell in grid:
        with bare_editor(cell.config) as editor:
            labels = {f"{part}_label": cell.labels[part] for part in ("method", "model")}
            parts.append(query_cost(editor, _SIZES, cell.config.seed).assign(**labels))
    rows = pd.concat(parts, ignore_index=True)
    return Drawing(cost_figure(rows, _styles(grid)), {"": rows})


def _hopfield(grid: Sequence[Cell], protocol: str) -> Drawing:
    rows = _rows(grid, protocol, lambda method: {key: method["hopfield"][key] for key in ("steps", "alpha")})
    return Drawing(hopfield_figure(rows), {"": _shown(rows, list(SCORES), "steps", "alpha")})


def _pooling(grid: Sequence[Cell], protocol: str) -> Drawing:
    swept = "method.pooling_ratio"
    rows = _rows(grid, protocol, lambda method: {"pooling_ratio": method["pooling_ratio"]})
    usual = run_config([override for override in grid[0].overrides if not override.startswith(f"{swept}=")])
    figure = pooling_figure(rows, float(usual.method["pooling_ratio"]))
    return Drawing(figure, {"": _shown(rows, list(SCORES), "pooling_ratio")})


# --- Rows ----------------------------------------------------------------------------------------------------------


def _rows(
    grid: Sequence[Cell], protocol: str, settings: Callable[[MethodConfig], dict[str, Any]] = lambda _: {}
) -> pd.DataFrame:
    """The grid's rows under one protocol, finished or not, with what `settings` reads from a cell's method.

    Raises:
        UserError: no row is finished.
    """
    parts = [collect([cell]).assign(**({} if cell.problem else settings(cell.config.method))) for cell in grid]
    rows = pd.concat(parts, ignore_index=True)
    rows = rows[rows["protocol"] == protocol]
    if not (rows["status"] == "finished").any():
        reasons = " ".join(rows["reason"].unique())
        raise UserError(f"there is nothing to draw under protocol {protocol}: {reasons or 'the grid has no such rows'}")
    return rows


def _shown(rows: pd.DataFrame, scores: Sequence[str], *settings: str) -> pd.DataFrame:
    """The columns that a figure shows, without paths."""
    columns = [f"{score}{end}" for score in scores for end in ("", "_low", "_high", "_items")]
    return rows[[name for name in [*_FACTS, *settings, *columns, *_STATUS] if name in rows]]


def _styles(grid: Sequence[Cell]) -> MethodStyles:
    return method_styles().joined(cell.config.method for cell in grid if not cell.problem)


def _published(*tables: str) -> pd.DataFrame:
    """The paper's numbers for the backbone that its figures are about."""
    folder = resource("baselines") / "paper"
    rows = pd.concat([pd.read_csv(folder / f"{table}.csv") for table in tables], ignore_index=True)
    rows["method"] = rows["method"].str.rstrip(".")  # of an abbreviated name
    rows["dataset"] = rows["dataset"].replace("zsre", "ZsRE")
    return rows[rows["model"] == "LLaMA-3.1 8B"]


# --- By name -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FigureSpec:
    """How a figure is made.

    Attributes:
        grid: file of `conf/experiment` whose cells it is about.
        draw: makes it from the cells, under a protocol.
        runs: whether it shows runs.
        models: whether it needs the cells' models.
    """

    grid: str
    draw: Callable[[Sequence[Cell], str], Drawing]
    runs: bool = True
    models: bool = False


FIGURES = {
    "figure1": FigureSpec("figure1", partial(_scale, score="op")),
    "figure4": FigureSpec("figure4", _ladder, models=True),
    "figure5": FigureSpec("figure1", _trajectory),
    "figure6": FigureSpec("figure1", partial(_scale, score="rel")),
    "figure7": FigureSpec("figure1", partial(_scale, score="gen")),
    "figure8": FigureSpec("figure1", partial(_scale, score="loc")),
    "figure9": FigureSpec("figure9", _cost, runs=False, models=True),
    "figure10": FigureSpec("figure10", _hopfield),
    "figure11": FigureSpec("figure11", _pooling),
}


def draw(name: str, grid: Sequence[Cell], protocol: str, download: bool = False) -> list[Path]:
    """Draw a figure from what is stored and write it below the grid's `results_dir`; the paths.

    Args:
        name: `figure1` ...
        grid: the runs of its grid, on one model and one dataset.
        protocol: of the rows.
        download: whether a model that the figure needs may be fetched.

    Raises:
        UserError: the grid has several models or datasets, none of its rows is there, or a model that it needs is not.
    """
    spec = FIGURES[name]
    for part in ("model", "dataset"):
        labels = sorted({cell.labels[part] for cell in grid})
        if len(labels) > 1:
            raise UserError(
                f"{name} is about one {part}, and the grid has {', '.join(labels)}; choose one with {part}="
            )
    if spec.models and not (download or grid[0].at_hand()):
        hub_id = grid[0].config.model.hub_id
        raise UserError(f"the weights of {hub_id} are not on this machine; `{filling(grid[0])}` fetches them")
    drawing = spec.draw(grid, protocol)
    return save(drawing.figure, drawing.numbers, results_dir(grid) / "figures" / name)
