"""Tables and figures of the paper by their names: runs what is missing, prints and writes them.

python -m horen_bench.paper table1,figure1 [suite=paper] [model=qwen25_7b] [--jobs 2]
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from rich.console import Console

from horen_bench.errors import UserError
from horen_bench.interruption import Interrupted, Interruptions
from horen_bench.paper.estimate import estimate, estimate_table
from horen_bench.paper.figures import FIGURES, draw
from horen_bench.paper.grids import Cell, cells, collect, plan, results_dir, suite_of
from horen_bench.paper.pool import run_missing, say
from horen_bench.paper.tables import TABLES, write_audit, write_settings, write_table

_ERROR = 2  # exit code
_SETTINGS = "table3"  # reads the configuration; nothing is run for it


def main(arguments: Sequence[str] | None = None) -> int:
    """Estimate, run what is missing, write tables and figures; the exit code.

    It is 2 if a run failed or something cannot be written, 128 and its number after a signal.
    """
    parser = argparse.ArgumentParser(prog="python -m horen_bench.paper", description="Tables and figures of the paper.")
    known = ", ".join([*TABLES, *FIGURES])
    parser.add_argument("names", help=f"with commas between them, of {known}; or paper: all tables, figures: all")
    parser.add_argument("overrides", nargs="*", help="suite=tiny, suite=paper, model=..., or any setting of a run")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (default: 1)")
    parser.add_argument("--estimate", action="store_true", help="say what it will take, and stop")
    parser.add_argument("--stored", action="store_true", help="run nothing, use what is stored")
    parser.add_argument("--protocol", default="greedy", help="of the rows that a figure draws (default: greedy)")
    options = parser.parse_intermixed_args(arguments)
    console = Console()
    try:
        with Interruptions():
            return _main(options, console)
    except UserError as error:
        _complain(error)
        return _ERROR
    except KeyboardInterrupt as stop:
        signal = stop if isinstance(stop, Interrupted) else Interrupted()
        say(console, signal.sentence)
        return signal.code


def _main(options: argparse.Namespace, console: Console) -> int:
    names = _names(options.names)
    backbone_named = any(override.startswith("model=") for override in options.overrides)
    overrides = [suite_of(options.overrides), *options.overrides]
    files = {name: FIGURES[name].grid if name in FIGURES else name for name in names}
    by_file = {file: cells(file, overrides) for file in dict.fromkeys(files.values())}
    for grid in by_file.values():
        results_dir(grid)  # refuses a grid of which nothing can be run
    grids = {name: by_file[file] for name, file in files.items()}
    to_run = [cell for name, grid in grids.items() if _shows_runs(name) for cell in grid]
    runs = [] if options.stored else plan(to_run, download=backbone_named)
    if runs:
        console.print(estimate_table(estimate(runs), options.jobs))
    if options.estimate:
        return 0
    run_missing(runs, console, options.jobs)
    failed = any(cell.missing() and cell.store.failure() for cell in to_run)
    if not (backbone_named or "suite=paper" in overrides):  # the paper's backbones stand below the embedded model
        for name in set(names) & set(TABLES):
            grids[name] = [*grids[name], *cells(name, [*options.overrides, "suite=paper"])]
    return _ERROR if _write_all(grids, options, backbone_named, console) or failed else 0


def _names(text: str) -> list[str]:
    """The names of a list with commas, groups written out.

    Raises:
        UserError: one is unknown.
    """
    groups: Mapping[str, Sequence[str]] = {"paper": TABLES, "figures": tuple(FIGURES)}
    names = [name for part in text.split(",") for name in groups.get(part, [part])]
    for name in names:
        if name not in (*TABLES, *FIGURES):
            raise UserError(
                f"{name}: there is no such table or figure; write one of {', '.join([*TABLES, *FIGURES])}, or paper or "
                "figures for all of a kind"
            )
    return list(dict.fromkeys(names))


def _shows_runs(name: str) -> bool:
    return FIGURES[name].runs if name in FIGURES else name != _SETTINGS


def _write_all(grids: Mapping[str, list[Cell]], options: argparse.Namespace, download: bool, console: Console) -> bool:
    """Write the tables, then the figures; whether one of these could not be drawn."""
    for name in [name for name in grids if name in TABLES]:
        _write(name, grids[name], console)
    incomplete = False
    for name in [name for name in grids if name in FIGURES]:
        try:
            paths = draw(name, grids[name], options.protocol, download)
        except UserError as error:  # the other figures are drawn
            _complain(error)
            incomplete = True
        else:
            say(console, f"written: {', '.join(map(str, paths))}")
    return incomplete


def _write(name: str, grid: Sequence[Cell], console: Console) -> None:
    """Write and print a table."""
    folder = results_dir(grid) / "tables"
    if name == _SETTINGS:
        text = write_settings(pd.DataFrame([_settings(cell) for cell in grid]), folder)
    elif name == "protocol_audit":
        text = write_audit(collect(grid), folder)
    else:
        text = write_table(name, collect(grid), folder)
    say(console, text)
    say(console, f"written: {folder / name}.md, .csv, .tex")


def _settings(cell: Cell) -> dict[str, Any]:
    model, method = cell.config.model, cell.config.method
    threshold, ratio = (getattr(method, name, None) for name in ("threshold", "pooling_ratio"))
    if threshold is None or ratio is None:
        raise UserError(f"{_SETTINGS} is about threshold and pooling_ratio, and method={method.name} lacks one of them")
    return {"model": model.label, "hub_id": model.hub_id, "threshold": threshold, "pooling_percent": 100 * ratio}


def _complain(error: UserError) -> None:
    say(Console(stderr=True), f"error: {error}")


if __name__ == "__main__":
    sys.exit(main())
