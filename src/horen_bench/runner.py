"""A run: what of it is stored is read, what is missing is done.

Nothing heavy is imported before something is to be done, so a finished run is given back at once.
"""

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from rich.console import Console

from horen_bench.cases import EditCase, fingerprint
from horen_bench.config.schema import RunConfig
from horen_bench.errors import UserError
from horen_bench.results.store import RunStore, identity, run_directory

Checkpoint = tuple[int, str]  # number of edits, protocol


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a finished run left: its store, the rows up to the last N, and why tracking failed if it did."""

    store: RunStore
    rows: pd.DataFrame
    reused: bool
    tracking_problem: str | None = None


def run(config: RunConfig, console: Console, wanted: Sequence[Checkpoint] | None = None) -> RunResult:
    """Do what is missing of a run and return its rows.

    Args:
        config: of the run.
        console: where progress is shown.
        wanted: numbers of edits, up to `n`, and protocols to evaluate the model after and under; None: every
            checkpoint of the configuration under every protocol of it.

    Raises:
        UserError: the configuration cannot be run, what is stored cannot be gone on with, or the disk refuses.
    """
    checkpoints = config.wanted() if wanted is None else wanted
    cases = _cases(config)
    store = RunStore(run_directory(config))
    if not _missing(config, cases, checkpoints, store):
        return RunResult(store, _rows_of(store, checkpoints), reused=True)
    gc.disable()  # a third of the time of the imports: the collector walks objects that stay
    from horen_bench import stream  # noqa: PLC0415 - seconds that a finished run does not need

    gc.freeze()
    gc.enable()
    stream.check_method(config)
    with store.locked(), store.failure_recorded():
        missing = _missing(config, cases, checkpoints, store)  # less, if another process was quicker
        problem = None
        if missing:
            tracker = config.tracker.build()
            at_work = stream.prepared(config, cases, missing, store=store, console=console)
            problem = _tracked(at_work.rows(missing), tracker, config, store)
        return RunResult(store, _rows_of(store, checkpoints), reused=not missing, tracking_problem=problem)


def _cases(config: RunConfig) -> list[EditCase]:
    """The stream, which must have subjects where the method needs them."""
    cases = config.dataset.cases(config.n)
    if config.method.needs_subject and all(case.subject is None for case in cases):
        raise UserError(
            f"method={config.method.name} writes at the subject of each case, and dataset={config.dataset.name} has "
            "none; choose another method or a dataset with subjects"
        )
    return cases


def _missing(
    config: RunConfig, cases: Sequence[EditCase], checkpoints: Sequence[Checkpoint], store: RunStore
) -> dict[int, list[str]]:
    """Protocols by number of edits, in order, of what is not stored yet; all of them with `force`.

    Raises:
        UserError: what is stored is about other cases, or was written by another version of the program.
    """
    stored = set() if config.force else _stored(store, cases)
    missing = [checkpoint for checkpoint in checkpoints if checkpoint not in stored]
    return {n: [protocol for m, protocol in missing if m == n] for n in sorted({n for n, _ in missing})}


def _stored(store: RunStore, cases: Sequence[EditCase]) -> set[Checkpoint]:
    store.check_schema()
    rows = [row for row in store.rows() if row["n"] <= len(cases)]
    if any(row["cases"] != fingerprint(cases[: row["n"]]) for row in rows):
        raise store.made_with("other cases (the data changed since)")
    return {(row["n"], row["protocol"]) for row in rows}


def _rows_of(store: RunStore, checkpoints: Sequence[Checkpoint]) -> pd.DataFrame:
    rows = store.checkpoints()
    return rows[[place in checkpoints for place in zip(rows["n"], rows["protocol"], strict=True)]]


def _tracked(rows: Iterator[Mapping[str, Any]], tracker: Any, config: RunConfig, store: RunStore) -> str | None:
    """Log rows as they come; why tracking stopped before they ended, if it did."""
    tracker.start(store.path, identity(config), config.plain(), store.rows())
    try:
        for row in rows:
            tracker.log(row)
    except BaseException:
        tracker.abort()
        raise
    tracker.finish(store.cases())
    problem: str | None = tracker.problem
    return problem
