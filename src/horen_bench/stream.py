"""The stream at work: edit, evaluate at each checkpoint, store, save the state and go on from it."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console

from horen_bench.cases import EditCase, EditRecord, Route, fingerprint
from horen_bench.config.schema import MethodConfig, RunConfig
from horen_bench.editors.base import Editor
from horen_bench.evaluation.aggregate import Costs, RunFacts, rows_of
from horen_bench.evaluation.checkpoints import CheckpointEvaluation
from horen_bench.evaluation.decoding import inference_ms
from horen_bench.models.architecture import without_weights
from horen_bench.models.context import ContextLimit
from horen_bench.models.loading import default_device, load_model
from horen_bench.profiling import Stopwatch, environment, peak_memory
from horen_bench.progress import Bars
from horen_bench.results.store import RunStore, identity


def check_method(config: RunConfig) -> None:
    """See that the method fits the model, by building it on the model's module tree, without weights.

    Raises:
        UserError: the model lacks a module that the method names, or there is no such model.
    """
    bare = without_weights(config.model)
    if bare is not None:
        config.method.editor_class()(bare, None, config.method, seed=config.seed)


def prepared(
    config: RunConfig,
    cases: list[EditCase],
    checkpoints: Mapping[int, Sequence[str]],
    *,
    store: RunStore,
    console: Console,
) -> "EditStream":
    """Load the model, evaluate it while it is unedited, put the editor on, go on from the stored state.

    Args:
        config: of the run.
        cases: the stream.
        checkpoints: protocols by number of edits, ascending: what is to be evaluated.
        store: where rows and state go.
        console: where progress is shown.

    Raises:
        UserError: the model cannot be loaded, or the stored state is about other cases or weights.
    """
    device = config.device or default_device()
    if config.threads:
        torch.set_num_threads(config.threads)
    source = config.model.model_dump(include={"hub_id", "dtype", "device_map", "revision"})
    loaded = load_model(**source, device=device, template=config.template)
    if config.force:
        store.clear()  # only now: what is finished is not given up for a model that does not load
    store.describe(config, environment(device), stream_ids(cases))
    with Bars(console) as bars:
        evaluation = CheckpointEvaluation(config, loaded, cases, checkpoints, bars)
    facts = RunFacts(
        run=identity(config),
        **config.names(),
        seed=config.seed,
        device=device,
        weights=loaded.fingerprint,
        inference_base_ms=inference_ms(loaded.model, loaded.encoder, evaluation.probes),
    )
    editor: Editor[MethodConfig] = config.method.editor_class()(
        loaded.model, loaded.encoder, config.method, seed=config.seed
    )
    editor.expect(cases)
    stream = EditStream(
        editor=editor,
        limit=ContextLimit.of(loaded),
        evaluation=evaluation,
        cases=cases,
        store=store,
        facts=facts,
        warnings=config.dataset.warnings(),
        save_every=config.save_every,
        console=console,
    )
    stream.resume(before=min(checkpoints))
    return stream


def stream_ids(cases: Sequence[EditCase]) -> dict[str, Any]:
    """What two labs compare to know that they ran the same stream."""
    return {"n": len(cases), "cases": fingerprint(cases), "ids": [case.id for case in cases]}


@dataclass(slots=True)
class Position:
    """Where a stream stands.

    Attributes:
        records: what happened to each case so far.
        edit_seconds: wall time spent in the editor, device synchronised.
    """

    records: list[EditRecord] = field(default_factory=list)
    edit_seconds: float = 0.0

    @property
    def n(self) -> int:
        """Number of cases written."""
        return len(self.records)

    def to_json(self, cases: Sequence[EditCase]) -> dict[str, Any]:
        """Plain values, with a hash of the cases that they are about."""
        records = [asdict(record) for record in self.records]
        return {"records": records, "edit_seconds": self.edit_seconds, "cases": fingerprint(cases[: self.n])}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Position":
        """The position that `to_json` described."""
        routes = [Route(**record["route"]) if record["route"] else None for record in values["records"]]
        pairs = zip(values["records"], routes, strict=True)
        return cls([EditRecord(**{**record, "route": route}) for record, route in pairs], values["edit_seconds"])


@dataclass(slots=True)
class EditStream:
    """One editor at work on one stream of cases.

    Attributes:
        editor: the method, on the model.
        limit: refuses cases that are too long.
        evaluation: evaluates the model at a checkpoint.
        cases: the stream, in order.
        store: where rows and state go.
        facts: columns that are the same in every row.
        warnings: what the dataset has to say to whoever reads the rows.
        save_every: seconds between saves of the state.
        console: where progress is shown.
    """

    editor: Editor[MethodConfig]
    limit: ContextLimit
    evaluation: CheckpointEvaluation
    cases: list[EditCase]
    store: RunStore
    facts: RunFacts
    warnings: list[str]
    save_every: float
    console: Console
    position: Position = field(default_factory=Position)
    _saved_n: int = 0
    _next_save: float = 0.0

    def resume(self, before: int) -> None:
        """Go on from the stored state, unless it lies beyond the next checkpoint, `before`.

        Raises:
            UserError: the stored state is about other cases or weights: the data or the model changed under the run.
        """
        state = self.store.load_state()
        if state is None:
            return
        tensors, values = state
        position = Position.from_json(values)
        self._saved_n = position.n
        if position.n > before:
            return
        if values["cases"] != fingerprint(self.cases[: position.n]):
            raise self.store.made_with("other cases (the data changed since)")
        if values["weights"] != self.facts.weights:
            raise self.store.made_with("other weights (the model's files changed since)")
        self.editor.load_state_dict(tensors)
        self.position = position

    def rows(self, checkpoints: Mapping[int, Sequence[str]]) -> Iterator[dict[str, Any]]:
        """Edit up to each checkpoint in turn, evaluate the model there, store each row and yield it.

        Args:
            checkpoints: numbers of edits, ascending, none before the present position; their protocols.
        """
        with Bars(self.console) as bars:
            edited = bars.bar("editing", max(checkpoints), "edits", done=self.position.n)
            for n, protocols in checkpoints.items():
                while (before := self.position.n) < n:
                    self._edit_slice(n)
                    edited(self.position.n - before)
                self._save()
                spent_ms = inference_ms(self.editor.model, self.limit.encoder, self.evaluation.probes)
                for protocol in protocols:
                    yield self._record(n, protocol, spent_ms, bars)

    def _edit_slice(self, checkpoint: int) -> None:
        """Write the next few cases, but for those that are too long; save if the last save is long ago."""
        start = self.position.n
        cases = self.cases[start : min(start + self.editor.slice_size, checkpoint)]
        refusals = [self.limit.refusal(case) for case in cases]
        fitting = [case for case, refusal in zip(cases, refusals, strict=True) if refusal is None]
        seconds = Stopwatch()
        written = iter(self.editor.edit(fitting) if fitting else [])
        self.position.records += [refusal or next(written) for refusal in refusals]
        if self.position.n == checkpoint:
            self.editor.flush()
        self.position.edit_seconds += seconds.elapsed()
        if time.monotonic() > self._next_save:
            self._save()

    def _save(self) -> None:
        """Save the state, unless one that is further on is stored; a slow save is repeated less often."""
        seconds = Stopwatch()
        if self.position.n > self._saved_n:
            progress = {**self.position.to_json(self.cases), "weights": self.facts.weights}
            self.store.save_state(self.editor.state_dict(), progress)
            self._saved_n = self.position.n
        self._next_save = time.monotonic() + self.save_every + 10 * seconds.elapsed()

    def _record(self, n: int, protocol: str, spent_ms: float, bars: Bars) -> dict[str, Any]:
        """Evaluate the model on the first `n` cases and store the rows."""
        evaluated = self.evaluation.at(n, protocol, self.editor.routes, bars)
        records = self.position.records[:n]
        costs = Costs(
            edit_seconds=self.position.edit_seconds,
            inference_ms=spent_ms,
            side_parameters=self.editor.side_parameters(),
            side_memory=self.editor.side_memory(),
            peak_memory_bytes=peak_memory(),
        )
        warnings = [*self.editor.warnings(), *self.warnings, *evaluated.warnings, *self.limit.warnings(records)]
        row, cases = rows_of(evaluated, records, self.facts, costs, warnings)
        self.store.add_checkpoint(row, cases)
        return row
