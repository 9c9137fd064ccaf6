"""A run: what of it is stored is read, what is missing is done.

Nothing heavy is imported before something is to be done, so a finished run is given back at once.
"""

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
from rich.console import Console

from horen_bench.cases import EditCase, fingerprint
from horen_bench.config.schema import RunConfig
from horen_bench.errors import UserError
from horen_bench.interruption import Interrupted, Interruptions
from horen_bench.models.weights import weights_fingerprint
from horen_bench.results.store import RunStore, identity, run_directory

Checkpoint = tuple[int, str]  # number of edits, protocol

_MORE_MEMORY = (
    "what is finished is kept: free some, or write a smaller batch_size= or fewer edits at once (settings of the "
    "method), and run the same command again"
)


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a finished run left.

    Attributes:
        store: where it is.
        rows: its rows up to the last N.
        reused: whether nothing had to be run.
        tracking_problem: why tracking failed, if it did.
        remark: what could not be checked about stored rows, if anything.
    """

    store: RunStore
    rows: pd.DataFrame
    reused: bool
    tracking_problem: str | None = None
    remark: str | None = None


def run(config: RunConfig, console: Console, wanted: Sequence[Checkpoint] | None = None) -> RunResult:
    """Do what is missing of a run and return its rows.

    With `force`, all of it is done again beside what is stored, which it replaces once it is finished; if it is stopped
    before, the same call goes on with it, and one without `force` still has what was stored.

    Args:
        config: of the run.
        console: where progress is shown.
        wanted: numbers of edits, up to `n`, and protocols to evaluate the model after and under; None: every
            checkpoint of the configuration under every protocol of it.

    Raises:
        UserError: the configuration cannot be run, what is stored cannot be gone on with, the disk refuses, or memory
            runs out.
        Interrupted: a signal ended the run; what is done is saved.
    """
    checkpoints = config.wanted() if wanted is None else wanted
    with _in_sentences():
        cases = _cases(config)
        store = RunStore(run_directory(config))
        if not config.force and not _missing(config, cases, checkpoints, store):
            return RunResult(store, _rows_of(store, checkpoints), reused=True, remark=_remark(config))
        return _run(config, cases, checkpoints, store, console)


def _run(
    config: RunConfig, cases: list[EditCase], checkpoints: Sequence[Checkpoint], store: RunStore, console: Console
) -> RunResult:
    gc.disable()  # a third of the time of the imports: the collector walks objects that stay
    from horen_bench import stream  # noqa: PLC0415 - seconds that a finished run does not need
    from horen_bench.models.memory import out_of_memory_in  # noqa: PLC0415

    gc.freeze()
    gc.enable()
    with out_of_memory_in("the method was checked", _MORE_MEMORY):
        stream.check_method(config)
    with Interruptions() as signals, store.locked(), store.failure_recorded():
        at_work = store.again() if config.force else store
        missing = _missing(config, cases, checkpoints, at_work)  # less, if another process was quicker
        problem = None
        if missing:
            tracker = config.tracker.build()
            with _saying_where(at_work, missing), out_of_memory_in("the run was at work", _MORE_MEMORY):
                work = stream.prepared(config, cases, missing, store=at_work, console=console, signals=signals)
                problem = _tracked(work.rows(missing), tracker, config, at_work)
        if config.force:
            store.take_over()
        reused = not (missing or config.force)
        return RunResult(store, _rows_of(store, checkpoints), reused=reused, tracking_problem=problem)


@contextmanager
def _saying_where(store: RunStore, missing: Mapping[int, Sequence[str]]) -> Iterator[None]:
    """Add to an interruption where the next run goes on: the stored state, unless it is beyond what is missing."""
    try:
        yield
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, Interrupted) else Interrupted().number
        saved_n, stored = store.saved_n(), {(row["n"], row["protocol"]) for row in store.rows()}
        beyond = any((n, name) not in stored for n, names in missing.items() for name in names if n < saved_n)
        raise Interrupted(number, 0 if beyond else saved_n) from stop


@contextmanager
def _in_sentences() -> Iterator[None]:
    """What a disk, a connection or the host's memory refuses, wherever it does, as a sentence that says what to do."""
    try:
        yield
    except MemoryError as error:
        raise UserError(f"memory ran out; {_MORE_MEMORY}") from error
    except OSError as error:
        what = error.filename or "a file or connection"
        reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{what} cannot be read or written ({reason}); mend that and run the same command again, what is finished "
            "is kept"
        ) from error


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
    """Protocols by number of edits, in order, of what is not stored yet.

    Raises:
        UserError: what is stored is damaged, about other cases or another model, or was written by another version of
            the program; with `force` it is forgotten instead.
    """
    try:
        stored = _stored(config, store, cases)
    except UserError:
        if not config.force:
            raise
        store.clear()
        stored = set()
    missing = [checkpoint for checkpoint in checkpoints if checkpoint not in stored]
    return {n: [protocol for m, protocol in missing if m == n] for n in sorted({n for n, _ in missing})}


def _stored(config: RunConfig, store: RunStore, cases: Sequence[EditCase]) -> set[Checkpoint]:
    store.check_schema()
    store.check()  # all of it, before hours of work are added to it
    rows = store.rows()
    if any(row["cases"] != fingerprint(cases[: row["n"]]) for row in rows if row["n"] <= len(cases)):
        raise store.made_with("other cases (the data changed since)")
    weights = _weights(config) if rows else None
    if weights and any(row["weights"] != weights for row in rows):
        raise store.made_with("other weights (the model's files changed since)")
    return {(row["n"], row["protocol"]) for row in rows if row["n"] <= len(cases)}


def _weights(config: RunConfig) -> str | None:
    """What names the model's weights as they are now; None where they are not on this machine."""
    model = config.model
    try:
        return weights_fingerprint(model.hub_id, model.dtype, model.revision)
    except UserError:  # a folder that is gone: loading says so, if there is anything to load
        return None


def _remark(config: RunConfig) -> str | None:
    if _weights(config):
        return None
    return (
        f"the weights of {config.model.hub_id} are not on this machine, so it could not be checked that the rows are "
        "about them"
    )


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
