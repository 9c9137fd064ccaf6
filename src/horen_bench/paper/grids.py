"""Grids of runs: what a table or figure of the paper needs, what of it is stored, and what is still to be run.

A grid is a file of `conf/experiment`; `python -m horen_bench -m experiment=table1` sweeps the same one with any
launcher of Hydra.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from horen_bench.config.compose import composed, in_words, validated
from horen_bench.config.schema import RunConfig
from horen_bench.errors import UserError
from horen_bench.models.weights import EMBEDDED, weights_at_hand
from horen_bench.paper.estimate import PlannedRun, duration, estimate, usual_seconds
from horen_bench.paths import resource
from horen_bench.results.store import RunStore, run_directory
from horen_bench.runner import Checkpoint

_GROUPS = ("model", "method", "dataset")


@dataclass(frozen=True)
class Cell:
    """One run of a grid.

    Attributes:
        overrides: what to write behind `python -m horen_bench` to do this run alone.
        labels: `model`, `method` and `dataset` as printed, and `variant`: what else tells it from its neighbours.
        names: `model`, `method`, `dataset` and `seed` as rows have them.
        checkpoints: where and how the grid wants the model evaluated.
        config_or_problem: its configuration; a sentence where there can be none, e.g. a method without values for a
            backbone.
        at_most: the grid leaves out what needs more edits, for the time that they take; None: nothing.
    """

    overrides: tuple[str, ...]
    labels: Mapping[str, str]
    names: Mapping[str, Any]
    checkpoints: tuple[Checkpoint, ...]
    config_or_problem: RunConfig | str
    at_most: int | None = None

    @property
    def problem(self) -> str | None:
        """Why it cannot be run; None where it can."""
        return self.config_or_problem if isinstance(self.config_or_problem, str) else None

    @property
    def config(self) -> RunConfig:
        """The run's configuration.

        Raises:
            UserError: the problem, where there is one.
        """
        if isinstance(self.config_or_problem, str):
            raise UserError(self.config_or_problem)
        return self.config_or_problem

    @cached_property
    def store(self) -> RunStore:
        """Where the run is, or will be.

        Raises:
            UserError: as `config`.
        """
        return RunStore(run_directory(self.config))

    @property
    def name(self) -> str:
        """E.g. `tiny, HoReN, Facts, T=3`."""
        return ", ".join(label for label in self.labels.values() if label)

    @property
    def command(self) -> str:
        """What a shell takes to do this run alone."""
        return " ".join(["python -m horen_bench", *self.overrides])

    def at_hand(self) -> bool:
        """Whether the model's weights are on this machine; nothing is fetched."""
        return weights_at_hand(self.config.model.hub_id, self.config.model.revision)

    def missing(self) -> list[Checkpoint]:
        """Checkpoints that are not stored, but for what the grid leaves out; none of a cell that cannot be run."""
        if self.problem:
            return []
        stored = _places(self.store.sound_checkpoints())
        return [place for place in self.checkpoints if place not in stored and not self.leaves_out(place)]

    def leaves_out(self, checkpoint: Checkpoint) -> bool:
        """Whether so many edits are too many for this grid."""
        return self.at_most is not None and checkpoint[0] > self.at_most


def _places(rows: pd.DataFrame) -> set[Checkpoint]:
    return set(zip(rows["n"], rows["protocol"], strict=True))


def experiments() -> list[str]:
    """Names of the grids."""
    return sorted(path.stem for path in (resource("conf") / "experiment").glob("*.yaml"))


def cells(experiment: str, overrides: Sequence[str] = ()) -> list[Cell]:
    """The runs of a grid, in its order.

    Args:
        experiment: a file of `conf/experiment`.
        overrides: as behind `python -m horen_bench -m`: `model=a,b` sweeps, anything else holds for every run.

    Raises:
        UserError: no such experiment or suite, or an override names nothing.
    """
    if experiment not in experiments():
        raise UserError(
            f"experiment={experiment}: there is no such experiment; write one of {', '.join(experiments())}"
        )
    parser = OverridesParser.create()
    try:
        given = parser.parse_overrides([f"experiment={experiment}", *overrides])
        grid = composed(
            [str(override.input_line) for override in given if not override.is_sweep_override()], with_hydra=True
        )
        params = _sweep(grid)
        swept = parser.parse_overrides([f"{key}={value}" for key, value in params.items()])
        (runs,) = BasicSweeper.split_arguments([*swept, *given], max_batch_size=None)
        keys = {override.get_key_element() for override in given if override.is_sweep_override()}
        return [_cell(run, composed(run), {*params, *keys} - {*_GROUPS}) for run in runs]
    except HydraException as error:
        raise UserError(in_words(error, overrides)) from error


def _sweep(grid: DictConfig) -> dict[str, str]:
    """What the grid varies, by key.

    Raises:
        UserError: it has no such suite.
    """
    suites = grid.get("suites", {})
    if suites and grid.suite not in suites:
        raise UserError(f"suite={grid.suite}: there is no such suite; write one of {', '.join(suites)}")
    params: dict[str, str] = _plain(grid.hydra.sweeper.params or {})
    return params


def _plain(config: Any) -> Any:
    return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config


def _cell(run: Sequence[str], config: DictConfig, varied: set[str]) -> Cell:
    """One run of a sweep.

    Args:
        run: its overrides, the experiment among them.
        config: what they compose.
        varied: keys beside model, method and dataset that the grid varies.

    Raises:
        UserError: a fault that is not one of this cell alone: it cannot even be said what the cell is about.
    """
    suite, labels = _plain(config.get("suites", {})).get(config.get("suite"), {}), _plain(config.get("labels", {}))
    try:
        typed = validated(config)
    except UserError as error:
        names, checkpoints = _about_unconfigured(config, error)
        outcome: RunConfig | str = str(error)
    else:
        names, checkpoints, outcome = {**typed.names(), "seed": typed.seed}, typed.wanted(), typed
    own = [override for override in run if override.partition("=")[0] in varied]
    variant = ", ".join(str(labels.get(override, _short(override))) for override in own)
    return Cell(
        overrides=tuple(sorted(run, key=lambda override: not override.startswith("experiment="))),
        labels={**{group: str(config[group].label) for group in _GROUPS}, "variant": variant},
        names=names,
        checkpoints=tuple(checkpoints),
        config_or_problem=outcome,
        at_most=suite.get("at_most", {}).get(names["method"]),
    )


def _about_unconfigured(config: DictConfig, error: UserError) -> tuple[dict[str, Any], list[Checkpoint]]:
    """Names, seed and checkpoints of a run that has no typed configuration; the fault, where there are none either."""
    n, checkpoints, protocol, seed = (_plain(config.get(key)) for key in ("n", "checkpoints", "protocol", "seed"))
    if not all(OmegaConf.is_dict(config.get(group)) for group in _GROUPS):
        raise error
    protocols = protocol if isinstance(protocol, list) else [protocol]
    known: dict[str, Any] = {"n": n, "checkpoints": checkpoints, "protocol": protocols}
    try:
        places = RunConfig.model_construct(**known).wanted()
    except TypeError:
        raise error from None
    return {**{group: config[group].name for group in _GROUPS}, "seed": seed}, places


def _short(override: str) -> str:
    """`method.hopfield.steps=3` as `steps=3`."""
    key, _, value = override.partition("=")
    return f"{key.rpartition('.')[2]}={value}"


def suite_of(overrides: Sequence[str]) -> str:
    """The suite, unless one is given: the paper's where a backbone is named, or there are weights of one."""
    for override in overrides:
        if override.startswith("suite="):
            return override
        if override.startswith("model="):
            return "suite=tiny" if override == "model=tiny" else "suite=paper"
    models = [OmegaConf.load(path) for path in (resource("conf") / "model").glob("*.yaml")]
    backbones = [model for model in models if not model.hub_id.startswith(EMBEDDED)]
    return f"suite={'paper' if any(weights_at_hand(model.hub_id, model.revision) for model in backbones) else 'tiny'}"


def results_dir(grid: Sequence[Cell]) -> Path:
    """Where a grid's results go.

    Raises:
        UserError: none of its cells can be run; the first one's problem.
    """
    return Path(next((cell for cell in grid if not cell.problem), grid[0]).config.results_dir)


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
    run_dir = "" if cell.problem else str(cell.store.path)
    return {**labels, "variant": cell.labels["variant"], "command": filling(cell), "run_dir": run_dir}


def filling(cell: Cell) -> str:
    """The command that fills a cell: of a whole backbone where its weights are to be fetched first."""
    if cell.problem or cell.at_hand():
        return cell.command
    return f"python -m horen_bench.paper {cell.overrides[0].partition('=')[2]} model={cell.names['model']}"


def _stored(cell: Cell) -> pd.DataFrame:
    if cell.problem:
        return pd.DataFrame()
    rows = cell.store.sound_checkpoints()
    rows = rows[[place in cell.checkpoints for place in zip(rows["n"], rows["protocol"], strict=True)]]
    about = pd.DataFrame({**_about(cell), "status": "finished", "reason": ""}, index=rows.index)
    return pd.concat([rows, about], axis=1)


def _absent(cell: Cell) -> pd.DataFrame:
    stored = set() if cell.problem else _places(cell.store.sound_checkpoints())
    return pd.DataFrame(
        {
            "n": n,
            "protocol": protocol,
            **cell.names,
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
        seconds = usual_seconds(cell.config, checkpoint[0])
        return "not run", f"{checkpoint[0]:,} edits take about {duration(seconds)} here"
    if failure := cell.store.damage() or cell.store.failure():
        return "failed", failure
    if not cell.at_hand():
        return "not run", f"the weights of {cell.config.model.hub_id} are not on this machine"
    return "not run", "it was not started"


# --- What is to be run -------------------------------------------------------------------------------------


def plan(cells: Sequence[Cell], download: bool = False) -> list[PlannedRun]:
    """What is to be run, longest first; without the runs whose weights are not here, unless they may be downloaded."""
    by_directory: dict[Path, PlannedRun] = {}
    for cell in cells:
        missing = cell.missing() if not cell.problem and (download or cell.at_hand()) else []
        if missing:
            planned = PlannedRun(cell.name, cell.config, cell.store, tuple(sorted(missing)))
            earlier = by_directory.get(cell.store.path)
            by_directory[cell.store.path] = earlier.joined(planned) if earlier else planned
    runs = list(by_directory.values())
    seconds = estimate(runs).get("seconds", pd.Series(dtype=float)).fillna(math.inf)
    return [runs[i] for i in np.argsort(-seconds.to_numpy(), kind="stable")]
