"""The stored runs that a report is about, and what sets them apart."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from horen_bench.config.schema import MethodConfig
from horen_bench.errors import UserError
from horen_bench.results.store import RunStore

# Parts of a configuration in which two runs of one method on one model and dataset can differ.
_SETTINGS = ("method", "dataset", "locality", "eval_cases", "template", "seed")
_NOT_OF_THE_STREAM = ("protocol", "path", "paths", "train_path", "folder")


@dataclass(frozen=True, slots=True)
class StoredRun:
    """What the store holds of one run.

    Attributes:
        name: name of its directory.
        config: its resolved configuration; empty where the run failed before it wrote one.
        rows: its checkpoint rows; may be empty.
        cases: its per-case rows at the last checkpoint of each protocol.
        failure: why its last attempt failed, if it did.
        damage: why its files cannot be read, if they cannot; then nothing but the name is known.
    """

    name: str
    config: Mapping[str, Any]
    rows: pd.DataFrame
    cases: pd.DataFrame
    failure: str | None = None
    damage: str | None = None

    def label(self, part: str) -> str:
        """The printed name of its `model`, `method` or `dataset`; "" where that is not known."""
        settings = self.config.get(part, {})
        return str(settings.get("label", settings.get("name", "")))


def read(results: Iterable[Path]) -> list[StoredRun]:
    """The runs below results folders, by model, dataset, method and name; one that is damaged is named and stays empty.

    Args:
        results: folders with `runs/` in them (`results_dir` of the runs).

    Raises:
        UserError: a folder holds no run.
    """
    runs: list[StoredRun] = []
    for folder in results:
        directories = [path for path in (folder / "runs").glob("*") if path.is_dir()]
        if not directories:
            raise UserError(f"{folder} holds no runs (no directory in {folder / 'runs'}); run something first.")
        runs += [_read_run(path) for path in directories]
    return sorted(runs, key=lambda run: (*(run.label(part) for part in ("model", "dataset", "method")), run.name))


def _read_run(path: Path) -> StoredRun:
    store = RunStore(path)
    try:
        rows, cases, config = store.checkpoints(), _last(store.cases()), _config(path / "config.yaml")
        if len(rows) and not config:
            raise UserError(f"{path / 'config.yaml'} is missing")
    except (UserError, OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        damage = f"{path} cannot be read ({reason}); move it away, or run it again with force=true"
        return StoredRun(path.name, {}, pd.DataFrame(columns=["n", "protocol"]), pd.DataFrame(), damage=damage)
    return StoredRun(path.name, config, rows, cases, store.failure())


def _config(file: Path) -> dict[str, Any]:
    """A run's configuration; nothing where it failed before it wrote one.

    Raises:
        ValueError: the file holds something else.
    """
    if not file.exists():
        return {}
    config = OmegaConf.to_container(OmegaConf.load(file))
    parts = [config.get(part) for part in ("model", "method", "dataset")] if isinstance(config, dict) else [None]
    if not all(isinstance(part, dict) and part.get("name") for part in parts):
        raise ValueError(f"{file} names no model, method and dataset")
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


def _last(cases: pd.DataFrame) -> pd.DataFrame:
    """The rows at each protocol's last checkpoint."""
    if cases.empty:
        return cases
    return cases[cases["n"] == cases.groupby("protocol")["n"].transform("max")].reset_index(drop=True)


def variants(runs: Sequence[StoredRun]) -> list[str]:
    """For each run the settings that set it apart from runs of the same method, model and dataset; "" for none.

    A value that more than half of these runs have goes without saying. Where settings do not tell two runs apart, the
    end of the directory's name does.
    """
    settings = [pd.json_normalize({key: run.config.get(key) for key in _SETTINGS}).astype(str) for run in runs]
    flat = pd.concat(settings, ignore_index=True).fillna("")  # "": this run has no such setting
    flat = flat[[name for name in flat.columns if _can_change_numbers(name)]]
    texts = [""] * len(runs)
    for places in _alike(runs):
        own = flat.loc[places]
        shares = own.apply(lambda column: column.map(column.value_counts(normalize=True)))
        unusual = own.where(shares <= 0.5, "")
        for place, values in zip(places, unusual.to_dict("records"), strict=True):
            named = {str(name).removeprefix("method."): value for name, value in values.items() if value}
            texts[place] = ", ".join(f"{name}={value}" for name, value in named.items())
        for place in [place for place in places if [texts[other] for other in places].count(texts[place]) > 1]:
            texts[place] = ", ".join(filter(None, [texts[place], runs[place].name.rpartition("-")[2]]))
    return texts


def _can_change_numbers(name: str) -> bool:
    """Whether a setting, named as in `method.hopfield.steps`, is more than a matter of paths and looks."""
    within_part = name.partition(".")[2].partition(".")[0]
    return name.rpartition(".")[2] not in _NOT_OF_THE_STREAM and within_part not in MethodConfig.presentation


def _alike(runs: Sequence[StoredRun]) -> list[list[int]]:
    """Positions of the runs that agree in model, method and dataset, group by group."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for place, run in enumerate(runs):
        key = tuple(run.label(part) for part in ("model", "method", "dataset"))
        groups.setdefault(key, []).append(place)
    return list(groups.values())
