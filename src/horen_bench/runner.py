"""The run: write the stream of edits, question the model at each checkpoint, record, go on after a stop."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pandas as pd
import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Task as ProgressTask
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from horen_bench.cases import EditCase, fingerprint
from horen_bench.config.compose import build
from horen_bench.config.settings import Config, build_editor, check, checkpoints_of, editor_class, protocols_of
from horen_bench.datasets.audit import touched_probes
from horen_bench.datasets.base import Dataset
from horen_bench.editors.base import Editor, EditRecord, Route
from horen_bench.errors import UserError
from horen_bench.evaluation import Question, questions_about, sample
from horen_bench.evaluation.aggregate import asked_table, per_case, suffixes, summary
from horen_bench.evaluation.cache import Exam, exam_of, inference_ms
from horen_bench.models.architecture import context_length
from horen_bench.models.loading import LoadedModel, default_device, load_model, load_tokenizer
from horen_bench.profiling import Stopwatch, environment, peak_memory
from horen_bench.prompts import encode_edit, with_chat_template
from horen_bench.results.store import RunStore, identity, run_directory
from horen_bench.tracking import Tracker

_NAMED = 5  # ids that a warning lists


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a finished run left: its store, the rows up to the wanted N, and why tracking failed if it did."""

    store: RunStore
    rows: pd.DataFrame
    reused: bool
    tracking_problem: str | None = None


def run(config: Config, console: Console, wanted: Sequence[tuple[int, str]] | None = None) -> RunResult:
    """Do what is missing of a run and return its rows.

    Args:
        config: plain values, as `settings.resolved` gives them.
        console: where progress is shown.
        wanted: numbers of edits, up to `n`, and protocols to question the model at and under; None: every checkpoint
            of the configuration under every protocol of it.

    Raises:
        UserError: the configuration cannot be run, or the disk refuses.
    """
    check(config)
    if wanted is None:
        wanted = [(n, protocol) for n in checkpoints_of(config) for protocol in protocols_of(config)]
    dataset: Dataset = build(config["dataset"], "dataset")
    cases = dataset.cases(config["n"])
    if editor_class(config).needs_subject and all(case.subject is None for case in cases):
        raise UserError(
            f"method={config['method']['name']} writes at the subject of each case, and dataset="
            f"{config['dataset']['name']} has none; choose another method or a dataset with subjects"
        )
    store = RunStore(run_directory(config))
    with store.locked(), store.failure_recorded():
        done = set() if config["force"] else _finished(store, cases)
        missing = _by_n([one for one in wanted if one not in done])
        problem = None
        if missing:
            tracker: Tracker = build(config["tracker"], "tracker")
            stream = _prepare(config, cases, missing=missing, warnings=dataset.warnings(), store=store, console=console)
            stream.take_up(before=min(missing))
            problem = _tracked(stream, missing, tracker, config)
        return RunResult(store, _rows_of(store, wanted), reused=not missing, tracking_problem=problem)


def _by_n(checkpoints: Sequence[tuple[int, str]]) -> dict[int, list[str]]:
    """Protocols by number of edits, in order."""
    return {n: [protocol for m, protocol in checkpoints if m == n] for n, _ in sorted(checkpoints)}


def _rows_of(store: RunStore, wanted: Sequence[tuple[int, str]]) -> pd.DataFrame:
    rows = store.checkpoints()
    return rows[[one in wanted for one in zip(rows["n"], rows["protocol"], strict=True)]]


def _tracked(stream: "Stream", missing: Mapping[int, Sequence[str]], tracker: Tracker, config: Config) -> str | None:
    tracker.start(stream.store.path, stream.facts["run"], config, stream.store.rows())
    try:
        for row in stream.proceed(missing):
            tracker.log(row)
    except BaseException:
        tracker.abort()
        raise
    tracker.finish(stream.store.cases())
    return tracker.problem


def _finished(store: RunStore, cases: Sequence[EditCase]) -> set[tuple[int, str]]:
    """N and protocol of the checkpoints that are stored, which must be about these cases."""
    rows = [row for row in store.rows() if row["n"] <= len(cases)]
    if any(row["cases"] != fingerprint(cases[: row["n"]]) for row in rows):
        raise _other_cases(store)
    return {(row["n"], row["protocol"]) for row in rows}


def _other_cases(store: RunStore) -> UserError:
    return UserError(
        f"{store.path} was made with other cases (the data changed since); start again with force=true, or keep it "
        "by choosing another results_dir="
    )


def _prepare(
    config: Config,
    cases: list[EditCase],
    *,
    missing: Mapping[int, Sequence[str]],
    warnings: list[str],
    store: RunStore,
    console: Console,
) -> "Stream":
    """Load the model, ask it everything while it is unedited, put the editor on."""
    device = config["device"] or default_device()
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    loaded = _loaded(config, device)
    if config["force"]:
        store.clear()  # only now: what is finished is not given up for a model that does not load
    store.describe(OmegaConf.to_yaml(OmegaConf.create(dict(config))), environment(device), stream_ids(cases))
    asked = {n: set(sample(n, config["eval_cases"], config["seed"])) for n in missing}
    questions = questions_about(cases, sorted(set().union(*asked.values())))
    exams: dict[str, Exam] = {}
    with _progress(console) as progress:
        for name in dict.fromkeys(protocol for protocols in missing.values() for protocol in protocols):
            about = set().union(*(asked[n] for n, protocols in missing.items() if name in protocols))
            own = {i: question for i, question in enumerate(questions) if question.case in about}
            exams[name] = exam_of(name, config, loaded, own, progress=progress)
    base_ms = inference_ms(loaded.model, loaded.tokenizer, questions)
    editor = build_editor(config, loaded.model, loaded.tokenizer)
    editor.expect(cases)
    facts = {
        "run": identity(config),
        **{part: config[part]["name"] for part in ("model", "method", "dataset")},
        "seed": config["seed"],
        "device": device,
        "weights": loaded.fingerprint,
        "inference_base_ms": base_ms,
    }
    return Stream(
        editor=editor,
        fits=Fit(loaded.tokenizer, context_length(loaded.model)),
        exams=exams,
        cases=cases,
        questions=questions,
        store=store,
        facts=facts,
        warnings=warnings,
        clean_locality=config["locality"] == "clean",
        eval_cases=config["eval_cases"],
        save_every=config["save_every"],
        console=console,
    )


def _loaded(config: Config, device: str) -> LoadedModel:
    """The model, its tokenizer under the template asked for; a missing template is told before weights are read."""
    spec = config["model"]
    view = (
        with_chat_template(load_tokenizer(spec["hub_id"], spec["revision"])) if config["template"] == "model" else None
    )
    loaded = load_model(
        spec["hub_id"],
        dtype=spec["dtype"],
        device=device,
        device_map=spec["device_map"],
        revision=spec["revision"],
    )
    return replace(loaded, tokenizer=view or loaded.tokenizer)


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
    def from_json(cls, values: dict[str, Any]) -> "Position":
        """The position that `to_json` described."""
        records = [
            EditRecord(**{**one, "route": Route(**one["route"]) if one["route"] else None}) for one in values["records"]
        ]
        return cls(records, values["edit_seconds"])


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether cases fit the model's context.

    Attributes:
        tokenizer: of the model.
        positions: the context's length; None: no limit.
    """

    tokenizer: PreTrainedTokenizerBase
    positions: int | None

    def problem(self, case: EditCase) -> str | None:
        """Why a case cannot be written, in one sentence; None where it fits."""
        if self.positions is None:
            return None
        n_tokens = len(encode_edit(self.tokenizer, case.prompt, case.target).ids)
        if n_tokens <= self.positions:
            return None
        return f"prompt and target have {n_tokens} tokens, the model has {self.positions} positions"


@dataclass(slots=True)
class Stream:
    """One editor at work on one stream of cases.

    Attributes:
        editor: the method, on the model.
        fits: tells cases that are too long.
        exams: how the model is questioned, by protocol.
        cases: the stream, in order.
        questions: all that is asked about the cases, in case order.
        store: where rows and state go.
        facts: columns that are the same in every row.
        warnings: what the dataset has to say to whoever reads the rows.
        clean_locality: leave out locality probes that another edit of the prefix touches.
        eval_cases: question at most so many cases per checkpoint; None: all.
        save_every: seconds between saves of the state.
        console: where progress is shown.
    """

    editor: Editor
    fits: Fit
    exams: Mapping[str, Exam]
    cases: list[EditCase]
    questions: list[Question]
    store: RunStore
    facts: dict[str, Any]
    warnings: list[str]
    clean_locality: bool
    eval_cases: int | None
    save_every: float
    console: Console
    position: Position = field(default_factory=Position)
    _saved_n: int = 0
    _next_save: float = 0.0

    def take_up(self, before: int) -> None:
        """Go on from the stored state, unless it lies beyond the next checkpoint, `before`.

        Raises:
            UserError: the stored state is about other cases: the data changed under the run.
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
            raise _other_cases(self.store)
        if values["weights"] != self.facts["weights"]:
            raise UserError(
                f"{self.store.path} was made with other weights (the model's files changed since); start again with "
                "force=true, or keep it by choosing another results_dir="
            )
        self.editor.load_state_dict(tensors)
        self.position = position

    def proceed(self, checkpoints: Mapping[int, Sequence[str]]) -> Iterator[dict[str, Any]]:
        """Edit up to each checkpoint in turn, question the model there, store each row and yield it.

        Args:
            checkpoints: numbers of edits, ascending, none before the present position; their protocols.
        """
        with _progress(self.console) as progress:
            total, done = max(checkpoints), self.position.n
            task = progress.add_task("editing", total=total, completed=done, unit="edits")
            for checkpoint, protocols in checkpoints.items():
                while self.position.n < checkpoint:
                    self._edit_slice(checkpoint)
                    progress.update(task, completed=self.position.n)
                self._save()
                exam = self.exams[protocols[0]]
                spent = inference_ms(self.editor.model, exam.examiner.tokenizer, self.questions)
                for protocol in protocols:
                    yield self._record(checkpoint, protocol, spent, progress)

    def _edit_slice(self, checkpoint: int) -> None:
        """Write the next few cases, but for those that are too long; save if the last save is long ago."""
        start = self.position.n
        cases = self.cases[start : min(start + self.editor.slice_size, checkpoint)]
        problems = [self.fits.problem(case) for case in cases]
        fitting = [case for case, problem in zip(cases, problems, strict=True) if problem is None]
        seconds = Stopwatch()
        written = iter(self.editor.edit(fitting) if fitting else [])
        self.position.records += [
            _refused(case, problem) if problem else next(written) for case, problem in zip(cases, problems, strict=True)
        ]
        if self.position.n == checkpoint:
            self.editor.settle()
        self.position.edit_seconds += seconds.elapsed()
        if time.monotonic() > self._next_save:
            self._save()

    def _save(self) -> None:
        """Save the state, unless one that is further on is stored; a slow save is repeated less often."""
        seconds = Stopwatch()
        if self.position.n > self._saved_n:
            progress = {**self.position.to_json(self.cases), "weights": self.facts["weights"]}
            self.store.save_state(self.editor.state_dict(), progress)
            self._saved_n = self.position.n
        self._next_save = time.monotonic() + self.save_every + 10 * seconds.elapsed()

    def _record(self, n: int, protocol: str, spent_ms: float, progress: Progress) -> dict[str, Any]:
        """Question the model about the first `n` cases and store what comes out, with what a question takes."""
        exam = self.exams[protocol]
        touched = {(one.case, one.probe.prompt) for one in touched_probes(self.cases[:n])}
        left_out = touched if self.clean_locality else set()
        positions = sample(n, self.eval_cases, self.facts["seed"])
        among = set(positions)
        chosen = [i for i, q in enumerate(self.questions) if q.case in among and not _is_locality_of(q, left_out)]
        questions = [self.questions[i] for i in chosen]
        task = progress.add_task(f"asking at N={n}, {protocol}", total=len(questions), unit="questions")
        seconds = Stopwatch()
        routes = self.editor.routes([question.prompt for question in questions])
        answers = exam.answers(self.questions, chosen, routes, lambda count: progress.advance(task, count))
        eval_seconds = seconds.elapsed()
        asked = asked_table(exam.examiner, questions, answers, [exam.base[i] for i in chosen], routes)
        records = self.position.records[:n]
        too_long = [case.id for case in self.cases[:n] if self.fits.problem(case)]
        cases = per_case(positions, self.cases[:n], records, asked, protocol)
        row = {
            "n": n,
            "protocol": protocol,
            **self.facts,
            "cases": fingerprint(self.cases[:n]),
            "items": len(positions),
            **summary(cases, list(asked["family"].unique()), self.facts["seed"], suffixes(asked)),
            "loc_touched": len(touched),
            "failed_edits": sum(record.action == "failed" for record in records),
            "edit_seconds": self.position.edit_seconds,
            "eval_seconds": eval_seconds,
            "edits_per_second": (n - len(too_long)) / self.position.edit_seconds if len(too_long) < n else math.nan,
            "inference_ms": spent_ms,
            "side_parameters": self.editor.side_parameters(),
            **{f"side_{kind}": count for kind, count in self.editor.side_memory().items()},
            "peak_memory_bytes": peak_memory(),
            "warnings": "\n".join(self._warnings(n, exam, touched, too_long)) or None,
        }
        self.store.add_checkpoint(row, cases)
        return row

    def _warnings(self, n: int, exam: Exam, touched: set[tuple[int, str]], too_long: Sequence[str]) -> list[str]:
        return [
            *self.editor.warnings(),
            *self.warnings,
            *exam.examiner.warnings(),
            *self._locality_warnings(n, touched),
            *self._length_warnings(n, too_long),
        ]

    def _length_warnings(self, n: int, too_long: Sequence[str]) -> list[str]:
        if not too_long:
            return []
        some = ", ".join(too_long[:_NAMED]) + (", ..." if len(too_long) > _NAMED else "")
        positions = self.fits.positions
        return [
            f"N={n}: cases that are longer than the model's {positions} positions were not written, {len(too_long)} of "
            f"{n}: {some}"
        ]

    def _locality_warnings(self, n: int, touched: set[tuple[int, str]]) -> list[str]:
        if not touched:
            return []
        rule = "were left out" if self.clean_locality else "count in Loc; locality=clean leaves them out"
        return [f"N={n}: {len(touched)} locality probes are touched by another edit and {rule}"]


def _refused(case: EditCase, problem: str) -> EditRecord:
    return EditRecord(case.id, "failed", None, None, math.nan, 0, 0.0, problem)


def _is_locality_of(question: Question, probes: set[tuple[int, str]]) -> bool:
    return question.family == "loc" and (question.case, question.prompt) in probes


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:>30}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Speed(),
        TimeRemainingColumn(),
        console=console,
    )


class _Speed(ProgressColumn):
    """Items per second, in the task's own unit."""

    def render(self, task: ProgressTask) -> Text:
        """E.g. `12.3 edits/s`."""
        return Text(f"{task.speed:.1f} {task.fields['unit']}/s" if task.speed else "")
