"""Whether stored runs are as they were written: which cells cannot be trusted, and why."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from horen_bench.errors import UserError
from horen_bench.models.weights import weights_fingerprint
from horen_bench.results.console import score_columns
from horen_bench.results.store import RunStore, predictions_in

_ROUNDING = 1e-9  # of a mean


def run_directories(paths: Sequence[Path]) -> list[Path]:
    """The run directories that are named, or lie in the results folders that are.

    Raises:
        UserError: a path is neither.
    """
    directories: list[Path] = []
    for path in paths:
        inside = sorted(folder for folder in [*path.glob("runs/*"), *path.glob("*")] if _is_run(folder))
        if not _is_run(path) and not inside:
            raise UserError(f"{path} is no run directory and holds none; name results/runs/..., or a results folder")
        directories += [path] if _is_run(path) else inside
    return list(dict.fromkeys(directories))


def _is_run(path: Path) -> bool:
    names = ("config.yaml", "checkpoints.csv", "environment.json", "state", "cases.parquet", "failure.txt")
    return any((path / name).exists() for name in names)


def problems(path: Path) -> list[str]:
    """Sentences about everything in a run directory that cannot be trusted; none where all of it can.

    Checked are checksums of rows, files of cases and state, that a row's scores are the means of its cases, that the
    model's weights are still those of the rows, and the schema.
    """
    store = RunStore(path)
    return [*_of_schema(store), *_of_cells(store), *_of_state(store), *_of_weights(store)]


def _of_schema(store: RunStore) -> Iterator[str]:
    try:
        store.check_schema()
    except UserError as error:
        yield str(error)


def _of_cells(store: RunStore) -> Iterator[str]:
    try:
        cells = store.cells()
    except UserError as error:
        yield f"no cell can be trusted: {error}"
        return
    for cell in cells:
        name = f"N={'?' if cell.n is None else cell.n}, {cell.protocol or '?'}"
        if cell.row_problem:
            yield f"{name}: its scores cannot be trusted: {cell.row_problem}"
        if cell.cases_problem:
            yield f"{name}: its per-case rows cannot be trusted: {cell.cases_problem}"
    if not any(cell.row_problem or cell.cases_problem for cell in cells):
        yield from _of_means(store)


def _of_means(store: RunStore) -> Iterator[str]:
    """Scores that are not the means of their cases, though both are as they were written."""
    rows, cases = store.checkpoints(), store.cases()
    for row in rows.to_dict("records"):
        own = cases[(cases["n"] == row["n"]) & (cases["protocol"] == row["protocol"])]
        for name in score_columns(rows):
            if name in own and not _same(row[name], own[name].mean()):
                yield (
                    f"N={row['n']}, {row['protocol']}: {name} cannot be trusted: it is {row[name]:.6g}, and the mean "
                    f"of its cases {own[name].mean():.6g}"
                )


def _same(score: float, mean: float) -> bool:
    return math.isclose(score, mean, rel_tol=0, abs_tol=_ROUNDING) or (math.isnan(score) and math.isnan(mean))


def _of_state(store: RunStore) -> Iterator[str]:
    try:
        store.load_state()
    except UserError as error:
        yield f"the stream cannot be gone on with, finished cells are not concerned: {error}"


def _of_weights(store: RunStore) -> Iterator[str]:
    """Rows about other weights than those that their model has now, or than each other."""
    try:
        rows, now = store.checkpoints(), _weights(store.path / "config.yaml")
    except UserError:
        return  # said already, or the weights are gone, which says nothing about rows
    if "weights" not in rows:
        return
    if rows["weights"].nunique() > 1:
        yield f"rows are about different weights ({', '.join(rows['weights'].unique())})"
    elif now and len(rows) and rows["weights"].iloc[0] != now:
        yield f"no cell is about the model as it is now: its weights were {rows['weights'].iloc[0]}, and are {now}"


def _weights(config: Path) -> str | None:
    try:
        model: Any = OmegaConf.load(config).model
        return weights_fingerprint(str(model.hub_id), str(model.dtype), model.get("revision"))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException, AttributeError) as error:
        raise UserError(f"{config} cannot be read") from error


def damaged_predictions(paths: Sequence[Path]) -> list[str]:
    """Sentences about files of base predictions of the runs' results folders; what is damaged there is made again.

    Args:
        paths: run directories.
    """
    sentences: list[str] = []
    for folder in dict.fromkeys(path.absolute().parent.parent / "base_predictions" for path in paths):
        for file in sorted(folder.glob("*.json")):
            predictions_in(file, sentences.append)
    return sentences
