"""Grids of runs: what a table or figure of the paper needs, what of it is stored, and running what is missing.

python -m horen_bench.paper.experiments table1 [suite=paper] [model=qwen25_7b] [--jobs 2]

A grid is a file of conf/experiment/; `python -m horen_bench -m experiment=table1` sweeps the same one with any launcher
of Hydra.
"""

import argparse
import math
import multiprocessing
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from horen_bench.config.compose import plain_words
from horen_bench.config.settings import checkpoints_of, protocols_of, resolved
from horen_bench.errors import UserError
from horen_bench.models.loading import weights_at_hand
from horen_bench.paper.tables import LAYOUTS, write_audit, write_settings, write_table
from horen_bench.paths import resource
from horen_bench.results.store import RunStore, in_a_sentence, run_directory
from horen_bench.runner import run

Checkpoint = tuple[int, str]  # number of edits, protocol

_GROUPS = ("model", "method", "dataset")
_OF_A_GRID = ("suite", "suites", "labels")  # top-level keys of an experiment that are not a run's


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a grid.

    Attributes:
        overrides: what to write behind `python -m horen_bench` to do this run alone.
        labels: `model`, `method` and `dataset` as printed, and `variant`: what else tells it from its neighbours.
        config: plain values, as `settings.resolved` gives them; unresolved where there is a problem.
        store: where the run is, or will be.
        checkpoints: where and how the grid wants the model questioned.
        at_most: the grid leaves out what needs more edits, for the time that they take; None: nothing.
        problem: why it cannot be run; None where it can.
    """

    overrides: tuple[str, ...]
    labels: Mapping[str, str]
    config: Mapping[str, Any]
    store: RunStore
    checkpoints: tuple[Checkpoint, ...]
    at_most: int | None = None
    problem: str | None = None

    @property
    def name(self) -> str:
        """E.g. `tiny, HoReN, Facts, T=3`."""
        return ", ".join(label for label in self.labels.values() if label)

    @property
    def command(self) -> str:
        """What a shell takes to do this run alone."""
        return " ".join(["python -m horen_bench", *self.overrides])

    def missing(self) -> list[Checkpoint]:
        """What is wanted and not stored, but for what the grid leaves out."""
        rows = self.store.checkpoints()
        stored = set(zip(rows["n"], rows["protocol"], strict=True))
        return [one for one in self.checkpoints if one not in stored and not self.leaves_out(one)]

    def leaves_out(self, checkpoint: Checkpoint) -> bool:
        """Whether so many edits are too many for this grid."""
        return self.at_most is not None and checkpoint[0] > self.at_most


def experiments() -> list[str]:
    """Names of the grids."""
    return sorted(path.stem for path in (resource("conf") / "experiment").glob("*.yaml"))


def cells(experiment: str, overrides: Sequence[str] = ()) -> list[Cell]:
    """The runs of a grid, in its order.

    Args:
        experiment: a file of `conf/experiment`.
        overrides: as behind `python -m horen_bench -m`: `model=a,b` sweeps, anything else holds for every run.

    Raises:
        UserError: no such experiment, or an override names nothing.
    """
    if experiment not in experiments():
        raise UserError(
            f"experiment={experiment}: there is no such experiment; write one of {', '.join(experiments())}"
        )
    parser = OverridesParser.create()
    try:
        with initialize_config_dir(str(resource("conf")), version_base="1.3"):
            given = parser.parse_overrides([f"experiment={experiment}", *overrides])
            alone = [str(one.input_line) for one in given if not one.is_sweep_override()]
            grid = compose("config", alone, return_hydra_config=True)
            params: dict[str, str] = _plain(grid.hydra.sweeper.params or {})
            swept = parser.parse_overrides([f"{key}={value}" for key, value in params.items()])
            (jobs,) = BasicSweeper.split_arguments([*swept, *given], max_batch_size=None)
            varied = {*params, *(one.get_key_element() for one in given if one.is_sweep_override())} - {*_GROUPS}
            return [_cell(job, compose("config", job), varied) for job in jobs]
    except HydraException as error:
        raise UserError(plain_words(error)) from error


def _plain(config: Any) -> Any:
    return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config


def _cell(job: Sequence[str], composed: DictConfig, varied: set[str]) -> Cell:
    """One run of a sweep.

    Args:
        job: its overrides, the experiment among them.
        composed: its configuration.
        varied: keys beside model, method and dataset that the grid varies.
    """
    problem = None
    try:
        config = resolved(composed)
    except UserError as error:
        problem = str(error)
        config = {str(key): value for key, value in dict(OmegaConf.to_container(composed)).items()}  # type: ignore[arg-type]
    suite = _plain(composed.get("suites", {})).get(composed.get("suite"), {})
    labels = config.pop("labels", {})
    for key in _OF_A_GRID:
        config.pop(key, None)
    own = [one for one in job if one.partition("=")[0] in varied]
    variant = ", ".join(str(labels.get(one, _short(one))) for one in own)
    checkpoints = [(n, protocol) for n in checkpoints_of(config) for protocol in protocols_of(config)]
    return Cell(
        overrides=tuple(sorted(job, key=lambda one: not one.startswith("experiment="))),
        labels={**{group: str(config[group]["label"]) for group in _GROUPS}, "variant": variant},
        config=config,
        store=RunStore(run_directory(config)),
        checkpoints=tuple(checkpoints),
        at_most=suite.get("at_most", {}).get(config["method"]["name"]),
        problem=problem,
    )


def _short(override: str) -> str:
    """`method.hopfield.steps=3` as `steps=3`."""
    key, _, value = override.partition("=")
    return f"{key.rpartition('.')[2]}={value}"


# --- What is stored ----------------------------------------------------------------------------------------


def collect(cells: Sequence[Cell]) -> pd.DataFrame:
    """The stored checkpoint rows of a grid, and one row for each checkpoint that is not there.

    Columns beside those of `checkpoints.csv`: `model_label`, `method_label`, `dataset_label`, `variant`; `status`:
    `finished`, `failed` or `not run`; `reason`, a sentence where it is not finished; `command`, which fills the row;
    `run_dir`.
    """
    parts = [part for cell in cells for part in (_stored(cell), _absent(cell)) if len(part)]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _about(cell: Cell) -> dict[str, Any]:
    labels = {f"{group}_label": cell.labels[group] for group in _GROUPS}
    return {**labels, "variant": cell.labels["variant"], "command": _filling(cell), "run_dir": str(cell.store.path)}


def _filling(cell: Cell) -> str:
    """The command that fills a cell: of a whole backbone where its weights are to be fetched first."""
    experiment = cell.overrides[0].partition("=")[2]
    model = cell.config["model"]["name"]
    return cell.command if at_hand(cell) else f"python -m horen_bench.paper.experiments {experiment} model={model}"


def _stored(cell: Cell) -> pd.DataFrame:
    rows = cell.store.checkpoints()
    rows = rows[[one in cell.checkpoints for one in zip(rows["n"], rows["protocol"], strict=True)]]
    about = pd.DataFrame({**_about(cell), "status": "finished", "reason": ""}, index=rows.index)
    return pd.concat([rows, about], axis=1)


def _absent(cell: Cell) -> pd.DataFrame:
    rows = cell.store.checkpoints()
    stored = set(zip(rows["n"], rows["protocol"], strict=True))
    names = {group: cell.config[group]["name"] for group in _GROUPS}
    return pd.DataFrame(
        {
            "n": n,
            "protocol": protocol,
            **names,
            "seed": cell.config["seed"],
            **_about(cell),
            **dict(zip(("status", "reason"), _why_absent(cell, (n, protocol)), strict=True)),
        }
        for n, protocol in cell.checkpoints
        if (n, protocol) not in stored
    )


def _why_absent(cell: Cell, checkpoint: Checkpoint) -> tuple[str, str]:
    """Status and reason."""
    if cell.problem:
        return "not run", cell.problem
    if cell.leaves_out(checkpoint):
        seconds = usual_seconds(cell, checkpoint[0])
        return "not run", f"{checkpoint[0]:,} edits take about {duration(seconds)} here"
    if failure := cell.store.failure():
        return "failed", failure
    if not at_hand(cell):
        return "not run", f"the weights of {cell.config['model']['hub_id']} are not on this machine"
    return "not run", "it was not started"


def at_hand(cell: Cell) -> bool:
    """Whether the model's weights are on this machine; the network is not asked."""
    return weights_at_hand(cell.config["model"]["hub_id"], cell.config["model"]["revision"])


# --- What it will take -------------------------------------------------------------------------------------

# Milliseconds with the embedded model and one thread: for each edit, and for each case questioned. Ours, measured.
_MS_PER_EDIT = {
    "horen": 6.0,
    "grace": 12.0,
    "grace_norm": 13.0,
    "grace_norm_cosine": 13.0,
    "ultraedit": 7.0,
    "wise": 300.0,
    "repair": 570.0,
    "rome": 200.0,
    "memit": 200.0,
    "alphaedit": 160.0,
    "ft_l": 250.0,
    "ft_m": 250.0,
    "unke": 800.0,
}
_MS_PER_CASE = {"greedy": 5.0, "teacher_forced": 3.0, "release": 12.0, "text": 60.0}


def usual_seconds(cell: Cell, n: int) -> float:
    """Seconds of `n` edits into the embedded model, from the table above; NaN for other models."""
    known = cell.config["model"]["name"] == "tiny"
    return n * _MS_PER_EDIT.get(cell.config["method"]["name"], float("nan")) / 1000 if known else float("nan")


def estimate(jobs: Sequence["Job"]) -> pd.DataFrame:
    """What each planned run will take: `name`, `edits`, `seconds`, `memory` in bytes; NaN is unknown.

    Speeds are those of stored runs of the same model, method and dataset, else of the table above, which knows the
    embedded model alone; memory is the most that a stored run of the model took.
    """
    history = {path: _history(path) for path in {str(job.cell.config["results_dir"]) for job in jobs}}
    return pd.DataFrame([_estimate(job, history[str(job.cell.config["results_dir"])]) for job in jobs])


def _history(results_dir: str) -> pd.DataFrame:
    stores = [RunStore(path.parent) for path in Path(results_dir).glob("runs/*/checkpoints.csv")]
    rows = [store.checkpoints() for store in stores]
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()


def _estimate(job: "Job", history: pd.DataFrame) -> dict[str, Any]:
    cell, stored = job.cell, job.cell.store.checkpoints()["n"]
    first, last = job.missing[0][0], max(n for n, _ in job.missing)
    edits = last - int(max((n for n in stored if n <= first), default=0))
    alike, memory = history, float("nan")
    if len(history):
        same = {group: history[group] == cell.config[group]["name"] for group in _GROUPS}
        alike = history[same["model"] & same["method"] & same["dataset"]]
        memory = history[same["model"]]["peak_memory_bytes"].max()
    per_edit = (alike["edit_seconds"] / alike["n"]).median() if len(alike) else usual_seconds(cell, 1)
    at_most = cell.config["eval_cases"]
    asking = sum(min(n, at_most or n) * _seconds_per_case(cell, protocol, alike) for n, protocol in job.missing)
    return {"name": cell.name, "edits": edits, "seconds": edits * per_edit + asking, "memory": memory}


def _seconds_per_case(cell: Cell, protocol: str, alike: pd.DataFrame) -> float:
    same = alike[alike["protocol"] == protocol] if len(alike) else alike
    if len(same):
        return float((same["eval_seconds"] / same["items"]).median())
    known = cell.config["model"]["name"] == "tiny"
    return _MS_PER_CASE.get(protocol, float("nan")) / 1000 if known else float("nan")


def estimate_table(expected: pd.DataFrame, side_by_side: int) -> Table:
    """The estimate, for people."""
    unknown = int(expected["seconds"].isna().sum())
    total = duration(expected["seconds"].sum() / side_by_side) if unknown < len(expected) else "an unknown time"
    beside = f", {unknown} of them unknown" if 0 < unknown < len(expected) else ""
    table = Table(title=f"{len(expected)} runs to do, {side_by_side} at a time: about {total}{beside}")
    for head in ("run", "edits", "time", "memory"):
        table.add_column(head, justify="left" if head == "run" else "right")
    for one in expected.to_dict("records"):
        memory = "unknown" if pd.isna(one["memory"]) else f"{one['memory'] / 2**30:.1f} GiB"
        table.add_row(one["name"], f"{one['edits']:,}", duration(one["seconds"]), memory)
    return table


def duration(seconds: float) -> str:
    """E.g. `50 s`, `12 min`, `4 h`, or `an unknown time`."""
    if math.isnan(seconds):
        return "an unknown time"
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


# --- Running what is missing -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Job:
    """One run directory's share of a plan: cells that are one stream are done together.

    Attributes:
        cell: the one that goes farthest.
        missing: what to question the model at, of all of them.
    """

    cell: Cell
    missing: tuple[Checkpoint, ...]


def plan(cells: Sequence[Cell], download: bool = False) -> list[Job]:
    """What is to be run, longest first; without the runs whose weights are not here, unless they may be downloaded."""
    jobs: dict[str, Job] = {}
    for cell in cells:
        missing = [] if cell.problem or not (download or at_hand(cell)) else cell.missing()
        if missing:
            earlier = jobs.get(str(cell.store.path), Job(cell, ()))
            farthest = max(earlier.cell, cell, key=lambda one: int(one.config["n"]))
            jobs[str(cell.store.path)] = Job(farthest, tuple(sorted({*earlier.missing, *missing})))
    found = list(jobs.values())
    seconds = estimate(found).get("seconds", pd.Series(dtype=float)).fillna(math.inf)
    return [found[i] for i in np.argsort(-seconds.to_numpy(), kind="stable")]


def run_missing(jobs: Sequence[Job], console: Console, side_by_side: int = 1) -> None:
    """Do the planned runs, each in a process of its own, so that its peak memory is its own and a crash stops no other.

    A run that fails leaves its reason in its directory. An interruption stops all; the same command goes on.
    """
    context = _processes()
    waiting = list(jobs)
    running: dict[BaseProcess, tuple[Job, TaskID, float]] = {}
    with _progress(console, hidden=side_by_side == 1) as progress:
        grid = progress.add_task("runs", total=len(jobs))
        try:
            while waiting or running:
                while waiting and len(running) < side_by_side:
                    job = waiting.pop(0)
                    _say(console, f"[{len(jobs) - len(waiting)}/{len(jobs)}] {job.cell.name}")
                    started: BaseProcess = context.Process(target=_run, args=(job, side_by_side > 1))
                    started.start()
                    running[started] = (job, progress.add_task(job.cell.name, total=None), time.monotonic())
                wait([process.sentinel for process in running], timeout=1)
                for ended in [process for process in running if not process.is_alive()]:
                    job, task, since = running.pop(ended)
                    _report(job, ended, time.monotonic() - since, console)
                    progress.remove_task(task)
                    progress.advance(grid)
        finally:
            for process in running:  # only after an interruption
                process.terminate()
                process.join()


def _processes() -> ForkServerContext | SpawnContext:
    """Where processes are made: forked off one that has imported what takes seconds, so that no run has to."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["horen_bench.runner"])
    return context


def _run(job: Job, quiet: bool) -> None:
    """In a process of its own."""
    config = {**job.cell.config, "n": max(n for n, _ in job.missing)}
    try:
        run(config, Console(quiet=quiet), job.missing)
    except Exception as error:  # whatever it is, the other runs go on
        job.cell.store.record_failure(in_a_sentence(error))


def _report(job: Job, process: BaseProcess, seconds: float, console: Console) -> None:
    if process.exitcode:
        killed = "its process was killed, most likely for lack of memory"
        job.cell.store.record_failure(killed if process.exitcode < 0 else f"its process ended with {process.exitcode}")
    failure = job.cell.store.failure()
    _say(console, f"{job.cell.name}: {f'failed: {failure}' if failure else f'done in {duration(seconds)}'}")


def _say(console: Console, sentence: str) -> None:
    console.print(sentence, highlight=False, markup=False, soft_wrap=True)


def _progress(console: Console, hidden: bool) -> Progress:
    columns = (TextColumn("{task.description:>40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=hidden)


# --- The command -------------------------------------------------------------------------------------------

INTERRUPTED = 130  # exit code
_OTHER_TABLES = ("table3", "protocol_audit")
_READS_ONLY = "table3"  # of the configuration; nothing is run for it


def main(arguments: Sequence[str] | None = None) -> int:
    """Estimate, run what is missing, print and write the tables; 2 if a run failed, 130 after an interruption."""
    parser = argparse.ArgumentParser(prog="python -m horen_bench.paper.experiments", description="Tables of the paper.")
    parser.add_argument("names", help="experiments with commas between them, or paper: all of conf/experiment")
    parser.add_argument("overrides", nargs="*", help="suite=tiny, suite=paper, model=..., or any setting of a run")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (default: 1)")
    parser.add_argument("--estimate", action="store_true", help="say what it will take, and stop")
    parser.add_argument("--stored", action="store_true", help="run nothing, write the tables from what is stored")
    options = parser.parse_intermixed_args(arguments)
    console = Console()
    try:
        return _main(options, console)
    except UserError as error:
        _say(Console(stderr=True), f"error: {error}")
        return 2
    except KeyboardInterrupt:
        _say(console, "interrupted; the same command goes on")
        return INTERRUPTED


def _main(options: argparse.Namespace, console: Console) -> int:
    names = experiments() if options.names == "paper" else options.names.split(",")
    chosen = any(one.startswith("model=") for one in options.overrides)
    overrides = [suite_of(options.overrides), *options.overrides]
    grids = {name: cells(name, overrides) for name in names}
    to_run = [cell for name, grid in grids.items() if name != _READS_ONLY for cell in grid]
    jobs = [] if options.stored else plan(to_run, download=chosen)
    if jobs:
        console.print(estimate_table(estimate(jobs), options.jobs))
    if options.estimate:
        return 0
    run_missing(jobs, console, options.jobs)
    failed = any(cell.store.failure() and cell.missing() for cell in to_run)
    alone = chosen or "suite=paper" in overrides  # else the paper's backbones stand below the embedded model
    for name in (one for one in names if one in (*LAYOUTS, *_OTHER_TABLES)):
        beside = [] if alone else cells(name, [*options.overrides, "suite=paper"])
        _write(name, [*grids[name], *beside], console)
    return 2 if failed else 0


def suite_of(overrides: Sequence[str]) -> str:
    """The suite, unless one is given: the paper's where a backbone is named, or there are weights of one."""
    for one in overrides:
        if one.startswith("suite="):
            return one
        if one.startswith("model="):
            return "suite=tiny" if one == "model=tiny" else "suite=paper"
    models = [OmegaConf.load(path) for path in (resource("conf") / "model").glob("*.yaml")]
    big = [one for one in models if one.name != "tiny"]
    return f"suite={'paper' if any(weights_at_hand(one.hub_id, one.revision) for one in big) else 'tiny'}"


def _write(name: str, grid: Sequence[Cell], console: Console) -> None:
    """Write and print a table."""
    folder = Path(grid[0].config["results_dir"]) / "tables"
    if name == "table3":
        text = write_settings(pd.DataFrame([_settings(cell) for cell in grid]), folder)
    elif name == "protocol_audit":
        text = write_audit(collect(grid), folder)
    else:
        text = write_table(name, collect(grid), folder)
    _say(console, text)
    _say(console, f"written: {folder / name}.md, .csv, .tex")


def _settings(cell: Cell) -> dict[str, Any]:
    model = cell.config["model"]
    percent = 100 * model["horen"]["pooling_ratio"]
    return {
        "model": model["label"],
        "hub_id": model["hub_id"],
        "threshold": model["horen"]["threshold"],
        "pooling_percent": percent,
    }


if __name__ == "__main__":
    sys.exit(main())
