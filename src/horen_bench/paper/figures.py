"""A figure of the paper by its name: runs what is missing, measures what no run records, draws.

python -m horen_bench.paper.figures figure1 [suite=paper] [--jobs 2]
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from rich.console import Console

from horen_bench.config.compose import build
from horen_bench.config.settings import build_editor
from horen_bench.editors.codebook.editor import CodebookEditor
from horen_bench.errors import UserError
from horen_bench.models.loading import default_device, load_model
from horen_bench.paper.experiments import INTERRUPTED, Cell, at_hand, cells, collect, suite_of
from horen_bench.paper.experiments import main as run_grids
from horen_bench.paper.routing import early_scores, query_cost, routing_scores
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
from horen_bench.results.plots.style import SCORES, measured, save
from horen_bench.results.store import RunStore

_ERROR = 2
_EARLY = 500  # first edits followed in Figure 5; ours, the paper names no number
_SIZES = (100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)  # entries in Figure 9; ours

_LADDER = ("grace", "grace_norm", "grace_norm_cosine", "horen")
_TIMED = ("grace", "horen")

# Columns of a figure's CSV beside its scores.
_FACTS = ["model_label", "method_label", "dataset_label", "variant", "n", "protocol", "seed", "device", "items"]
_STATUS = ["status", "reason"]
_MAIN = ["rel", "gen", "loc", "op"]


@dataclass(frozen=True, slots=True)
class Plate:
    """A figure and the numbers that it shows, by what is added to its file's name."""

    figure: Figure
    numbers: Mapping[str, pd.DataFrame]


# --- Along the stream ------------------------------------------------------------------------------------------


def _scale(grid: Sequence[Cell], protocol: str, score: str) -> Plate:
    rows = _rows(grid, protocol)
    published = _published("table1", "table4")
    return Plate(scale_figure(rows, score, published), {"": _shown(rows, [score]), "_paper": published})


def _trajectory(grid: Sequence[Cell], protocol: str) -> Plate:
    rows = _rows(grid, protocol)
    early = _early(rows)
    numbers = {"": _shown(rows, _MAIN), "_early": _shown(early, _MAIN).assign(first=_EARLY)}
    return Plate(trajectory_figure(rows, early, _EARLY), numbers)


def _early(rows: pd.DataFrame) -> pd.DataFrame:
    """The finished rows of checkpoints past the first edits, with the scores of those alone."""
    finished, at = measured(rows), ["n", "protocol"]
    parts: list[pd.DataFrame] = []
    for run, of_run in finished.groupby("run_dir", sort=False):
        scores = early_scores(RunStore(Path(str(run))).cases(), _EARLY, of_run["seed"].iloc[0])
        parts.append(of_run[[*at, *(name for name in of_run if name not in scores)]].merge(scores, on=at))
    found = [part for part in parts if len(part)]
    return pd.concat(found, ignore_index=True) if found else finished.iloc[:0]


# --- Routing -----------------------------------------------------------------------------------------------------


def _ladder(grid: Sequence[Cell], protocol: str) -> Plate:
    steps = _cells_of(_LADDER, grid)
    rows = _rows(steps, protocol)
    last = rows[rows["n"] == rows["n"].max()]
    scores = pd.concat([_routing_scores(cell) for cell in steps], ignore_index=True)
    distribution, routed = distribution_of(scores), routed_of(scores)
    published = _published("table9")
    published = published[published["n"] == rows["n"].max()]
    numbers = {"": _shown(last, _MAIN), "_distribution": distribution, "_routed": routed, "_paper": published}
    return Plate(ladder_figure(last, distribution, routed, published), numbers)


def _routing_scores(cell: Cell) -> pd.DataFrame:
    cases = build(cell.config["dataset"], "dataset").cases(cell.config["n"])
    with _bare_editor(cell) as editor:
        return routing_scores(editor, cases).assign(method_label=cell.labels["method"])


def _cost(grid: Sequence[Cell], _protocol: str) -> Plate:
    parts: list[pd.DataFrame] = []
    for cell in _cells_of(_TIMED, grid):
        with _bare_editor(cell) as editor:
            labels = {f"{part}_label": cell.labels[part] for part in ("method", "model")}
            parts.append(query_cost(editor, _SIZES, cell.config["seed"]).assign(**labels))
    rows = pd.concat(parts, ignore_index=True)
    return Plate(cost_figure(rows), {"": rows})


def _hopfield(grid: Sequence[Cell], protocol: str) -> Plate:
    rows = _rows(grid, protocol, lambda method: {key: method["hopfield"][key] for key in ("steps", "alpha")})
    return Plate(hopfield_figure(rows), {"": _shown(rows, list(SCORES), "steps", "alpha")})


def _pooling(grid: Sequence[Cell], protocol: str) -> Plate:
    rows = _rows(grid, protocol, lambda method: {"pooling_ratio": method["pooling_ratio"]})
    chosen = float(grid[0].config["model"]["horen"]["pooling_ratio"])
    return Plate(pooling_figure(rows, chosen), {"": _shown(rows, list(SCORES), "pooling_ratio")})


def _cells_of(methods: Sequence[str], grid: Sequence[Cell]) -> list[Cell]:
    """The cells of these methods, in their order.

    Raises:
        UserError: there is none.
    """
    found = [cell for method in methods for cell in grid if cell.config["method"]["name"] == method]
    if not found:
        raise UserError(f"this figure is about method={','.join(methods)}; leave method= out")
    return found


@contextmanager
def _bare_editor(cell: Cell) -> Iterator[CodebookEditor]:
    """The cell's method on its model, with nothing written.

    Raises:
        UserError: the cell cannot be run, or its model would have to be downloaded first.
    """
    if cell.problem:
        raise UserError(cell.problem)
    spec, device = cell.config["model"], cell.config["device"] or default_device()
    if not at_hand(cell):
        raise UserError(
            f"the weights of {spec['hub_id']} are not on this machine; `python -m horen_bench.paper.experiments table9 "
            f"model={spec['name']}` fetches them"
        )
    if cell.config["threads"]:
        torch.set_num_threads(cell.config["threads"])
    loaded = load_model(
        spec["hub_id"], dtype=spec["dtype"], device=device, device_map=spec["device_map"], revision=spec["revision"]
    )
    editor = build_editor(cell.config, loaded.model, loaded.tokenizer)
    assert isinstance(editor, CodebookEditor)
    yield editor
    editor.detach()


# --- Rows ----------------------------------------------------------------------------------------------------------


def _rows(
    grid: Sequence[Cell], protocol: str, settings: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda _: {}
) -> pd.DataFrame:
    """The grid's rows under one protocol, finished or not, with what `settings` reads from a cell's method.

    Raises:
        UserError: no row is finished.
    """
    parts = [collect([cell]).assign(**settings(cell.config["method"])) for cell in grid]
    rows = pd.concat(parts, ignore_index=True)
    rows = rows[rows["protocol"] == protocol]
    if not (rows["status"] == "finished").any():
        reasons = " ".join(rows["reason"].unique())
        raise UserError(f"there is nothing to draw under protocol {protocol}: {reasons or 'the grid does not ask so'}")
    return rows


def _shown(rows: pd.DataFrame, scores: Sequence[str], *settings: str) -> pd.DataFrame:
    """The columns that a figure shows, without paths."""
    columns = [f"{score}{end}" for score in scores for end in ("", "_low", "_high", "_items")]
    return rows[[name for name in [*_FACTS, *settings, *columns, *_STATUS] if name in rows]]


def _published(*tables: str) -> pd.DataFrame:
    """The paper's numbers for the backbone that its figures are about."""
    folder = resource("baselines") / "paper"
    rows = pd.concat([pd.read_csv(folder / f"{table}.csv") for table in tables], ignore_index=True)
    rows["method"] = rows["method"].str.rstrip(".")  # "GRACE+Norm."
    rows["dataset"] = rows["dataset"].replace("zsre", "ZsRE")
    return rows[rows["model"] == "LLaMA-3.1 8B"]


# --- By name -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a figure is made.

    Attributes:
        grid: file of `conf/experiment` whose cells it is about.
        draw: makes it from the cells, under a protocol.
        runs: whether it shows runs; else it only needs the cells' models and methods.
    """

    grid: str
    draw: Callable[[Sequence[Cell], str], Plate]
    runs: bool = True


FIGURES = {
    "figure1": Recipe("figure1", partial(_scale, score="op")),
    "figure4": Recipe("table9", _ladder),
    "figure5": Recipe("figure1", _trajectory),
    "figure6": Recipe("figure1", partial(_scale, score="rel")),
    "figure7": Recipe("figure1", partial(_scale, score="gen")),
    "figure8": Recipe("figure1", partial(_scale, score="loc")),
    "figure9": Recipe("table9", _cost, runs=False),
    "figure10": Recipe("figure10", _hopfield),
    "figure11": Recipe("figure11", _pooling),
}


def draw(name: str, grid: Sequence[Cell], protocol: str) -> list[Path]:
    """Draw a figure from what is stored and write it below the grid's `results_dir`; the paths.

    Args:
        name: `figure1` ...
        grid: the runs of its grid, on one model and one dataset.
        protocol: of the rows.

    Raises:
        UserError: the grid has several models or datasets, or none of its rows is there.
    """
    for part in ("model", "dataset"):
        found = sorted({cell.labels[part] for cell in grid})
        if len(found) > 1:
            raise UserError(f"{name} is about one {part}, and the grid has {', '.join(found)}; choose one with {part}=")
    plate = FIGURES[name].draw(grid, protocol)
    return save(plate.figure, plate.numbers, Path(grid[0].config["results_dir"]) / "figures" / name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing and draw; 2 if a run failed or a figure cannot be drawn, 130 after an interruption."""
    parser = argparse.ArgumentParser(prog="python -m horen_bench.paper.figures", description="Figures of the paper.")
    parser.add_argument("names", help=f"with commas between them, of {', '.join(FIGURES)}; or figures: all")
    parser.add_argument("overrides", nargs="*", help="suite=tiny, suite=paper, or any setting of a run")
    parser.add_argument("--protocol", default="greedy", help="of the rows to draw (default: greedy)")
    parser.add_argument("--jobs", default="1", help="runs side by side (default: 1)")
    parser.add_argument("--stored", action="store_true", help="run nothing, draw what is stored")
    options = parser.parse_intermixed_args(arguments)
    try:
        return _main(options)
    except UserError as error:
        _complain(error)
        return _ERROR


def _main(options: argparse.Namespace) -> int:
    names = list(FIGURES) if options.names == "figures" else options.names.split(",")
    if unknown := set(names) - set(FIGURES):
        raise UserError(f"{', '.join(sorted(unknown))}: there is no such figure; write one of {', '.join(FIGURES)}")
    overrides = [suite_of(options.overrides), *options.overrides]
    needed = dict.fromkeys(FIGURES[name].grid for name in names if FIGURES[name].runs)
    code = 0
    if needed and not options.stored:
        code = run_grids([",".join(needed), *options.overrides, "--jobs", options.jobs])
    if code == INTERRUPTED:
        return code
    for name in names:
        try:
            paths = draw(name, cells(FIGURES[name].grid, overrides), options.protocol)
        except UserError as error:  # the other figures are drawn
            _complain(error)
            code = _ERROR
        else:
            Console().print(f"written: {', '.join(map(str, paths))}", highlight=False, markup=False, soft_wrap=True)
    return code


def _complain(error: UserError) -> None:
    Console(stderr=True).print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
