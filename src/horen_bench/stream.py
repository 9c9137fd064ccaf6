"""The stream at work: edit, evaluate at each checkpoint, store, save the state and go on from it.

An editor gets the cases in slices of its own `slice_size`, which depends on model, device and settings alone and never
on the clock; a checkpoint ends a slice early. Where a slice ends can change a trained value in its last digits (sums
are taken in another order), so each row says how its stream was cut (`slices`). Between slices the bar moves, the state
is saved once `save_every` seconds have passed, and a signal is obeyed; so slices are small where an edit takes long.
"""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console

from horen_bench.cases import EditCase, EditRecord, Route, fingerprint
from horen_bench.config.schema import MethodConfig, RunConfig
from horen_bench.editors.base import Editor
from horen_bench.errors import UserError
from horen_bench.evaluation.aggregate import Costs, RunFacts, rows_of
from horen_bench.evaluation.checkpoints import CheckpointEvaluation
from horen_bench.evaluation.decoding import inference_ms
from horen_bench.interruption import Interrupted, Interruptions
from horen_bench.models.architecture import without_weights
from horen_bench.models.context import ContextLimit
from horen_bench.models.loading import default_device, load_model
from horen_bench.models.memory import is_out_of_memory
from horen_bench.profiling import Stopwatch, environment, peak_memory
from horen_bench.progress import Bars
from horen_bench.results.store import RunStore, identity

# What of a sitting can change the last digits of a number.
_SITTING = ("horen_bench", "torch", "transformers", "numpy", "tokenizers", "device", "threads", "commit")
_LONG_SLICE = 5.0  # seconds; longer ones are saved as they end, since a signal may not wait for the next


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
    signals: Interruptions,
) -> "EditStream":
    """Load the model, evaluate it while it is unedited, put the editor on, go on from the stored state.

    Args:
        config: of the run.
        cases: the stream.
        checkpoints: protocols by number of edits, ascending: what is to be evaluated.
        store: where rows and state go.
        console: where progress is shown.
        signals: of interruption.

    Raises:
        UserError: the model cannot be loaded, or the stored state is about other cases or weights; with `force`, it is
            forgotten instead.
    """
    device = config.device or default_device()
    if config.threads:
        torch.set_num_threads(config.threads)
    source = config.model.model_dump(include={"hub_id", "dtype", "device_map", "revision"})
    loaded = load_model(**source, device=device, template=config.template, template_date=config.template_date)
    sitting = environment(device)
    store.describe(config, sitting, stream_ids(cases))
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
        limit=evaluation.limit,
        evaluation=evaluation,
        cases=cases,
        store=store,
        facts=facts,
        warnings=config.dataset.warnings(),
        save_every=config.save_every,
        console=console,
        signals=signals,
        sitting={name: sitting[name] for name in _SITTING},
    )
    stream.resume(before=min(checkpoints), or_anew=config.force)
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
        slices: how many cases each call of the editor got, in order.
        sittings: versions, device and commit of the processes that made the edits, as far as they differ.
    """

    records: list[EditRecord] = field(default_factory=list)
    edit_seconds: float = 0.0
    slices: list[int] = field(default_factory=list)
    sittings: list[dict[str, Any]] = field(default_factory=list)

    @property
    def n(self) -> int:
        """Number of cases written."""
        return len(self.records)

    def to_json(self, cases: Sequence[EditCase]) -> dict[str, Any]:
        """Plain values, with a hash of the cases that they are about."""
        return {**asdict(self), "cases": fingerprint(cases[: self.n])}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Position":
        """The position that `to_json` described; KeyError or TypeError where it is none."""
        routes = [Route(**record["route"]) if record["route"] else None for record in values["records"]]
        pairs = zip(values["records"], routes, strict=True)
        records = [EditRecord(**{**record, "route": route}) for record, route in pairs]
        return cls(records, float(values["edit_seconds"]), [*values["slices"]], [*values["sittings"]])

    def cut(self) -> str:
        """The slices, equal ones counted: `1024x3 28`."""
        runs = [(size, len([*group])) for size, group in itertools.groupby(self.slices)]
        return " ".join(f"{size}x{count}" if count > 1 else f"{size}" for size, count in runs)

    def sat_by(self, sitting: Mapping[str, Any]) -> None:
        """Note who goes on with the stream from here."""
        if sitting not in self.sittings:
            self.sittings.append(dict(sitting))

    def warnings(self) -> list[str]:
        """In what the sittings differ."""
        values = {name: list(dict.fromkeys(str(each.get(name)) for each in self.sittings)) for name in _SITTING}
        differing = [f"{name} {' and '.join(texts)}" for name, texts in values.items() if len(texts) > 1]
        if not differing:
            return []
        return [f"sittings of this stream differ in {', '.join(differing)}; last digits may differ from a single one's"]


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
        signals: of interruption.
        sitting: versions, device and commit of this process.
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
    signals: Interruptions
    sitting: Mapping[str, Any]
    position: Position = field(default_factory=Position)
    _saved_n: int = 0
    _next_save: float = 0.0
    _earliest_save: float = 0.0

    def resume(self, before: int, *, or_anew: bool) -> None:
        """Go on from the stored state, unless it lies beyond the next checkpoint, `before`.

        Args:
            before: the next checkpoint.
            or_anew: start from the first case where the state cannot be gone on from.

        Raises:
            UserError: the stored state is damaged, or about other cases or weights: the data or the model changed under
                the run.
        """
        try:
            stored = self._stored()
        except UserError:
            if not or_anew:
                raise
            stored = None
        if stored is not None:
            tensors, position = stored
            self._saved_n = position.n
            if position.n <= before:
                self._load(tensors)
                self.position = position
        self.position.sat_by(self.sitting)

    def _stored(self) -> tuple[Mapping[str, torch.Tensor], Position] | None:
        """The stored state and where it stands, if it is about this stream."""
        state = self.store.load_state()
        if state is None:
            return None
        tensors, values = state
        try:
            position = Position.from_json(values)
            cases, weights = values["cases"], values["weights"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self.store.unusable_state(f"its progress cannot be read: {error!r}") from error
        if position.n <= len(self.cases) and cases != fingerprint(self.cases[: position.n]):
            raise self.store.made_with("other cases (the data changed since)")
        if weights != self.facts.weights:
            raise self.store.made_with("other weights (the model's files changed since)")
        return tensors, position

    def _load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        try:
            self.editor.load_state_dict(tensors)
        except (KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
            if is_out_of_memory(error):
                raise
            raise self.store.unusable_state(f"it does not fit the method: {error}") from error

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
        """Write the next few cases, but for those that are too long; save if the last save is long ago.

        Raises:
            Interrupted: a signal came. What is written is saved, unless the slice was left in its middle: then the
                last save stands, which is the end of the slice before where slices are long.
        """
        start = self.position.n
        cases = self.cases[start : min(start + self.editor.slice_size, checkpoint)]
        seconds = Stopwatch()
        with self.signals.finishing():
            self._write(cases, last=start + len(cases) == checkpoint)
        spent = seconds.elapsed()
        self.position.edit_seconds += spent
        if self.signals.received is not None:
            self._save()
            raise Interrupted(self.signals.received)
        if time.monotonic() > self._next_save or (spent > _LONG_SLICE and time.monotonic() > self._earliest_save):
            self._save()

    def _write(self, cases: Sequence[EditCase], *, last: bool) -> None:
        """Hand a slice to the editor; the `last` before a checkpoint also writes what waits for later cases."""
        refusals = [self.limit.refusal(case) for case in cases]
        fitting = [case for case, refusal in zip(cases, refusals, strict=True) if refusal is None]
        written = iter(self.editor.edit(fitting) if fitting else [])
        records = [refusal or next(written) for refusal in refusals]
        if last:
            self.editor.flush()
        self.position.records += records
        self.position.slices.append(len(cases))

    def _save(self) -> None:
        """Save the state, unless one that is further on is stored; a slow save is repeated less often."""
        seconds = Stopwatch()
        if self.position.n > self._saved_n:
            progress = {**self.position.to_json(self.cases), "weights": self.facts.weights}
            self.store.save_state(self.editor.state_dict(), progress)
            self._saved_n = self.position.n
        self._earliest_save = time.monotonic() + 10 * seconds.elapsed()
        self._next_save = self._earliest_save + self.save_every

    def _record(self, n: int, protocol: str, spent_ms: float, bars: Bars) -> dict[str, Any]:
        """Evaluate the model on the first `n` cases and store the rows."""
        evaluated = self.evaluation.at(n, protocol, self.editor.routes, bars)
        records = self.position.records[:n]
        costs = Costs(
            edit_seconds=self.position.edit_seconds,
            slices=self.position.cut(),
            inference_ms=spent_ms,
            side_parameters=self.editor.side_parameters(),
            side_memory=self.editor.side_memory(),
            peak_memory_bytes=peak_memory(),
        )
        own = [*self.position.warnings(), *self.limit.warnings(records)]
        warnings = [*self.editor.warnings(), *self.warnings, *evaluated.warnings, *own]
        row, cases = rows_of(evaluated, records, self.facts, costs, warnings)
        self.store.add_checkpoint(row, cases)
        return row
