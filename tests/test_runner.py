"""Runs that are stopped, killed, extended and repeated: what is finished is kept, and the numbers are the same."""

import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from horen_bench import runner, stream
from horen_bench.cases import EditCase, EditRecord
from horen_bench.config.compose import run_config
from horen_bench.config.schema import MethodConfig, RunConfig
from horen_bench.datasets.facts import records, to_json
from horen_bench.editors.base import Editor
from horen_bench.editors.codebook.editor import parallel_slice
from horen_bench.errors import UserError
from horen_bench.evaluation.cache import PredictionCache
from horen_bench.evaluation.evaluator import Evaluator
from horen_bench.interruption import Interrupted, Interruptions
from horen_bench.paths import resource
from horen_bench.profiling import environment as stream_environment
from horen_bench.results.console import notes
from horen_bench.results.store import SCHEMA, RunStore
from horen_bench.runner import RunResult

MEASURED = [
    "edit_seconds",
    "eval_seconds",
    "edits_per_second",
    "inference_base_ms",
    "inference_ms",
    "peak_memory_bytes",
]


class DriftConfig(MethodConfig):
    """Settings of `DriftEditor`."""

    editor: ClassVar[str] = f"{__name__}:DriftEditor"

    name: str = "drift"
    label: str = "Drift"
    slice_size: int = 1
    failing: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


class DriftEditor(Editor[DriftConfig]):
    """Edits nothing in particular: each case bends one weight vector, halving what earlier ones did to it.

    So the state tells which cases were written, in which order and how often.
    """

    written: ClassVar[list[str]] = []  # case ids, over all editors
    stop_at: ClassVar[tuple[str, BaseException] | None] = None

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: DriftConfig, *, seed: int = 0
    ) -> None:
        super().__init__(model, tokenizer, config, seed=seed)
        self.slice_size = config.slice_size
        self.weight = model.get_parameter("model.norm.weight")
        self.base = self.weight.detach().clone()
        self.drift = torch.zeros_like(self.base)

    def edit(self, cases: Sequence[EditCase]) -> list[EditRecord]:
        return [self._edit_one(case) for case in cases]

    def _edit_one(self, case: EditCase) -> EditRecord:
        if self.stop_at and self.stop_at[0] == case.id:
            raise self.stop_at[1]
        self.written.append(case.id)
        if case.id in self.config.failing:
            return EditRecord(case.id, "failed", None, None, math.nan, 0, 0.0, "it would not")
        noise = torch.randn(self.base.shape, generator=torch.Generator().manual_seed(int(case.id)))
        self.drift = self.drift / 2 + noise
        self._write()
        return EditRecord(case.id, "inserted", None, None, 0.5, 1, 0.0)

    def _write(self) -> None:
        self.weight.data.copy_(self.base * (1 + self.drift))

    def state_dict(self) -> dict[str, Tensor]:
        return {"drift": self.drift.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.drift = state["drift"].clone()
        self._write()

    def detach(self) -> None:
        self.weight.data.copy_(self.base)

    def side_parameters(self) -> int:
        return self.drift.numel()

    def warnings(self) -> list[str]:
        return [*self.config.remarks]


@pytest.fixture(autouse=True)
def _fresh_editor(monkeypatch: pytest.MonkeyPatch) -> None:
    DriftEditor.written.clear()
    DriftEditor.stop_at = None
    # A clock that says a thousand seconds have gone by whenever it is looked at, so that save_every alone
    # decides when the state is saved, not how fast this machine writes.
    monkeypatch.setattr(stream, "time", SimpleNamespace(monotonic=itertools.count(1000, 1000).__next__))


DEFAULT = run_config()


def config(results: Path, n: int, checkpoints: Sequence[int] = (), **changes: Any) -> RunConfig:
    """The embedded model and facts under `DriftEditor`; keyword arguments are top-level settings."""
    values = {"method": DriftConfig(), "save_every": 0, "device": "cpu", **changes}
    return RunConfig(**{**dict(DEFAULT), "n": n, "checkpoints": [*checkpoints], "results_dir": str(results), **values})


def run(settings: RunConfig) -> RunResult:
    return runner.run(settings, Console(file=io.StringIO()))


def run_until(settings: RunConfig, case: str, problem: BaseException) -> None:
    """Run a stream whose editor raises when it gets to a case."""
    DriftEditor.stop_at = (case, problem)
    with pytest.raises(type(problem)):
        run(settings)
    DriftEditor.stop_at = None


def assert_same_numbers(store: RunStore, expected: RunStore) -> None:
    """Equal in everything but what was measured."""
    pd.testing.assert_frame_equal(
        store.checkpoints().drop(columns=MEASURED), expected.checkpoints().drop(columns=MEASURED), check_exact=True
    )
    pd.testing.assert_frame_equal(
        store.cases().drop(columns="edit_seconds"), expected.cases().drop(columns="edit_seconds"), check_exact=True
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    """Six edits, evaluated after two, four and six, without a stop."""
    return run(config(tmp_path_factory.mktemp("whole"), 6, [2, 4])).store


# --- Rows --------------------------------------------------------------------------------------------------


def test_each_checkpoint_has_a_row_with_scores_cost_and_what_it_is_about(whole: RunStore) -> None:
    rows = whole.checkpoints()
    assert rows["n"].tolist() == rows["items"].tolist() == [2, 4, 6]  # n is always among them
    assert whole.cases()["n"].value_counts().to_dict() == {2: 2, 4: 4, 6: 6}
    for name in ("rel", "gen", "loc", "op", "same_subject", "same_relation", "held_out"):
        assert rows[name].between(0, 1).all()
        assert (rows[f"{name}_low"] <= rows[name]).all()
        assert (rows[name] <= rows[f"{name}_high"]).all()
    np.testing.assert_allclose(rows["op"], (rows["rel"] * rows["gen"] * rows["loc"]) ** (1 / 3))
    assert (rows[[*MEASURED, "side_parameters"]] > 0).all().all()
    assert rows["edit_seconds"].is_monotonic_increasing
    np.testing.assert_allclose(rows["edits_per_second"], rows["n"] / rows["edit_seconds"])
    described = rows[["model", "method", "dataset", "protocol", "seed"]].drop_duplicates()
    assert described.to_numpy().tolist() == [["tiny", "drift", "facts", "greedy", 42]]
    assert (whole.path / "config.yaml").exists()
    assert [sitting["device"] for sitting in whole.sittings()] == ["cpu"]
    assert rows["slices"].tolist() == ["1x2", "1x4", "1x6"]


def test_a_row_is_the_mean_of_its_cases(whole: RunStore) -> None:
    means = whole.cases().groupby("n")[["rel", "gen", "loc", "held_out", "rel_base"]].mean()
    rows = whole.checkpoints().set_index("n")
    pd.testing.assert_frame_equal(rows[means.columns], means)


def test_later_edits_change_the_predictions_about_earlier_cases(whole: RunStore) -> None:
    """Each checkpoint evaluates its whole prefix again, on the model of that moment."""
    cases = whole.cases()
    early, late = (cases.loc[cases["n"] == n, "rel_predictions"].map(list).tolist()[:2] for n in (2, 6))
    assert early != late


def test_failed_edits_and_warnings_stand_in_the_row_and_in_the_notes(tmp_path: Path) -> None:
    method = DriftConfig(failing=("1", "2"), remarks=("mind the gap", "and the step"))
    result = run(config(tmp_path, 4, [2], method=method))
    assert result.rows["failed_edits"].tolist() == [1, 2]
    assert result.rows["warnings"].tolist() == ["mind the gap\nand the step"] * 2
    assert notes(result.rows) == [
        "N=2: 1 edits failed; see edit_problem in cases.parquet",
        "N=4: 2 edits failed; see edit_problem in cases.parquet",
        "mind the gap",
        "and the step",
    ]
    cases = result.store.cases()
    problems = cases.loc[cases["n"] == 4].set_index("case_id")["edit_problem"].dropna()
    assert problems.to_dict() == {"1": "it would not", "2": "it would not"}


# --- Going on ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("save_every", "stop", "written_again"),
    [(0, "1", 0), (0, "2", 0), (0, "3", 0), (0, "5", 0), (1e9, "3", 1), (1e9, "4", 0), (1e9, "5", 1)],
)
def test_a_stopped_run_goes_on_where_it_was_saved_and_ends_like_one_without_a_stop(
    tmp_path: Path, whole: RunStore, save_every: float, stop: str, written_again: int
) -> None:
    """Saved after every edit, or at checkpoints alone: then what came after the last one is written again."""
    settings = config(tmp_path, 6, [2, 4], save_every=save_every)
    run_until(settings, stop, RuntimeError("broken"))
    assert DriftEditor.written == list("012345"[: int(stop)])
    result = run(settings)
    assert DriftEditor.written[int(stop) :] == list("012345"[int(stop) - written_again :])
    assert_same_numbers(result.store, whole)


def test_a_stopped_run_may_be_stopped_again(tmp_path: Path, whole: RunStore) -> None:
    settings = config(tmp_path, 6, [2, 4])
    problems: list[BaseException] = [RuntimeError("broken"), KeyboardInterrupt(), UserError("the disk is full")]
    for stop, problem in zip("134", problems, strict=True):
        run_until(settings, stop, problem)
    assert_same_numbers(run(settings).store, whole)
    assert DriftEditor.written == list("012345")


def test_slices_of_edits_end_at_checkpoints(tmp_path: Path, whole: RunStore) -> None:
    """An editor that likes three cases at once: the numbers are those of one at a time."""
    result = run(config(tmp_path, 6, [2, 4], method=DriftConfig(slice_size=3)))
    others = [*MEASURED, "run", "slices"]
    same = result.store.checkpoints().drop(columns=others)
    pd.testing.assert_frame_equal(same, whole.checkpoints().drop(columns=others), check_exact=True)
    longer = run(config(tmp_path, 10, [2, 4], method=DriftConfig(slice_size=3)))
    assert longer.rows["slices"].tolist() == ["2", "2x2", "2x3 3 1"], "each row says how its stream was cut"


def test_editor_expects_the_whole_stream_first_and_flushes_before_each_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(DriftEditor, "expect", lambda _self, cases: calls.append(f"{len(cases)} cases"))
    monkeypatch.setattr(DriftEditor, "flush", lambda _self: calls.append(f"flushed {DriftEditor.written}"))
    run(config(tmp_path, 3, [2]))
    assert calls == ["3 cases", "flushed ['0', '1']", "flushed ['0', '1', '2']"]


def test_a_longer_run_goes_on_from_a_shorter_one(tmp_path: Path, whole: RunStore) -> None:
    first = run(config(tmp_path, 2))
    assert first.rows["n"].tolist() == [2]
    second = run(config(tmp_path, 6, [2, 4]))
    assert second.store.path == first.store.path
    assert DriftEditor.written == list("012345")  # nothing twice
    assert second.rows["n"].tolist() == [2, 4, 6]
    assert_same_numbers(second.store, whole)
    pd.testing.assert_frame_equal(second.rows.head(1)[MEASURED], first.rows[MEASURED])  # the row itself was kept


def test_one_stream_of_edits_is_evaluated_under_several_protocols(tmp_path: Path, whole: RunStore) -> None:
    """Each protocol has rows of its own, those of a run under it alone; one that comes later edits again."""
    both = run(config(tmp_path / "both", 6, [2, 4], protocol=["teacher_forced", "greedy"]))
    assert DriftEditor.written == list("012345")
    assert both.rows[["n", "protocol"]].to_numpy().tolist() == [
        [n, protocol] for protocol in ("greedy", "teacher_forced") for n in (2, 4, 6)
    ]
    greedy = both.store.checkpoints().query("protocol == 'greedy'").drop(columns=MEASURED)
    pd.testing.assert_frame_equal(greedy, whole.checkpoints().drop(columns=MEASURED), check_exact=True)
    later = run(config(tmp_path / "later", 6, [2, 4]))
    added = run(config(tmp_path / "later", 6, [2, 4], protocol="teacher_forced"))
    assert added.store.path == later.store.path
    assert added.rows["protocol"].tolist() == ["teacher_forced"] * 3
    assert_same_numbers(added.store, both.store)
    assert run(config(tmp_path / "later", 4, [2], protocol=["greedy", "teacher_forced"])).reused


def test_an_earlier_checkpoint_that_is_missing_starts_over_and_keeps_the_rest(tmp_path: Path, whole: RunStore) -> None:
    first = run(config(tmp_path, 6, [4]))
    before = first.store.checkpoints()
    DriftEditor.written.clear()
    second = run(config(tmp_path, 6, [2, 4]))
    assert DriftEditor.written == list("01")
    assert_same_numbers(second.store, whole)
    pd.testing.assert_frame_equal(second.store.checkpoints().tail(2).reset_index(drop=True), before)
    run(config(tmp_path, 7))
    assert DriftEditor.written == list("016")  # the state after six edits was not given up for the one after two


def test_a_finished_run_is_given_back_without_loading_a_model(
    tmp_path: Path, whole: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    first = run(config(tmp_path, 6, [2, 4]))
    monkeypatch.setattr(stream, "load_model", refuse)
    again = run(config(tmp_path, 6, [2, 4]))
    assert not first.reused
    assert again.reused
    pd.testing.assert_frame_equal(again.rows, first.rows)
    part = run(config(tmp_path, 4))  # also for a shorter one that it passed through
    assert part.reused
    assert part.rows["n"].tolist() == [4]
    with pytest.raises(AssertionError, match="a model was loaded"):
        run(config(tmp_path, 5))


def test_force_runs_all_of_it_again(tmp_path: Path) -> None:
    run(config(tmp_path, 6, [2]))
    DriftEditor.written.clear()
    again = run(config(tmp_path, 4, [2], force=True))
    assert DriftEditor.written == list("0123")
    assert not again.reused
    assert again.store.checkpoints()["n"].tolist() == [2, 4]
    assert again.store.cases()["n"].value_counts().to_dict() == {2: 2, 4: 4}


def test_force_gives_nothing_up_before_the_model_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise UserError("the hub is gone")

    store = run(config(tmp_path, 2)).store
    monkeypatch.setattr(stream, "load_model", missing)
    with pytest.raises(UserError, match="the hub is gone"):
        run(config(tmp_path, 2, force=True))
    assert store.checkpoints()["n"].tolist() == [2]


@pytest.mark.parametrize("problem", [MemoryError(), KeyboardInterrupt()])
def test_force_keeps_what_was_stored_until_it_is_finished_and_goes_on_where_it_was_stopped(
    tmp_path: Path, problem: BaseException
) -> None:
    """Stopped before its first checkpoint, behind it, and not at all."""
    store = run(config(tmp_path, 4, [2])).store
    before = store.checkpoints()
    again = config(tmp_path, 4, [2], force=True)
    DriftEditor.written.clear()
    for stop in ("1", "3"):
        DriftEditor.stop_at = (stop, problem)
        with pytest.raises((UserError, KeyboardInterrupt)):
            run(again)
        DriftEditor.stop_at = None
        pd.testing.assert_frame_equal(store.checkpoints(), before, check_exact=True)
        assert run(config(tmp_path, 4, [2])).reused
    result = run(again)
    assert DriftEditor.written == list("0123"), "nothing twice"
    pd.testing.assert_frame_equal(result.rows.drop(columns=MEASURED), before.drop(columns=MEASURED), check_exact=True)
    assert not result.rows["edit_seconds"].equals(before["edit_seconds"])
    assert not store.again().path.exists()


def test_force_starts_over_where_what_it_left_is_damaged(tmp_path: Path, whole: RunStore) -> None:
    again = config(tmp_path, 6, [2, 4], force=True)
    run_until(again, "3", KeyboardInterrupt())
    (run_dir,) = (tmp_path / "runs").iterdir()
    state = run_dir / "again" / "state" / "stream.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    assert_same_numbers(run(again).store, whole)


# --- Signals -----------------------------------------------------------------------------------------------


class Signals:
    """Sends signals to this process when an editor or evaluator gets to a place."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def at(self, owner: type, name: str, call: int, *numbers: int) -> None:
        calls = itertools.count(1)
        function = getattr(owner, name)

        def signalled(*args: Any, **more: Any) -> Any:
            if next(calls) == call:
                for number in numbers:
                    signal.raise_signal(number)
            return function(*args, **more)

        self.monkeypatch.setattr(owner, name, signalled)


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[Signals]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number in before:  # a run that does not see to them ends a test, not the tests
        signal.signal(number, signal.default_int_handler)
    yield Signals(monkeypatch)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_the_slice_end_saves_it_and_says_where_the_next_run_goes_on(
    tmp_path: Path, whole: RunStore, signals: Signals, number: signal.Signals
) -> None:
    """Though the next save were far away."""
    settings = config(tmp_path, 6, [2, 4], save_every=1e9)
    before = signal.getsignal(number)
    signals.at(DriftEditor, "_edit_one", 4, number)
    with pytest.raises(Interrupted) as caught:
        run(settings)
    assert caught.value.sentence == (
        f"interrupted by {number.name}: 4 edits are saved, and the same command goes on from N=4"
    )
    assert caught.value.code == 128 + number
    assert signal.getsignal(number) == before
    assert_same_numbers(run(settings).store, whole)
    assert DriftEditor.written == list("012345")


def test_a_second_signal_leaves_a_slice_in_its_middle(tmp_path: Path, whole: RunStore, signals: Signals) -> None:
    settings = config(tmp_path, 6, [2, 4])
    signals.at(DriftEditor, "_edit_one", 4, signal.SIGTERM, signal.SIGTERM)
    with pytest.raises(Interrupted, match="interrupted by SIGTERM: 3 edits are saved"):
        run(settings)
    assert_same_numbers(run(settings).store, whole)
    assert DriftEditor.written == list("012345")


def test_a_slice_that_does_not_end_soon_after_a_signal_is_left() -> None:
    with pytest.raises(Interrupted, match="SIGINT"), Interruptions(patience=0.1) as received, received.finishing():
        signal.raise_signal(signal.SIGINT)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            time.sleep(0.01)


def test_a_signal_during_evaluation_ends_it_at_once_and_the_edits_are_saved(
    tmp_path: Path, whole: RunStore, signals: Signals
) -> None:
    settings = config(tmp_path, 6, [2, 4], save_every=1e9)
    signals.at(Evaluator, "predict", 3, signal.SIGHUP)  # of the base model, at N=2, at N=4
    with pytest.raises(Interrupted, match="interrupted by SIGHUP: 4 edits are saved"):
        run(settings)
    assert_same_numbers(run(settings).store, whole)
    assert DriftEditor.written == list("012345")


def test_a_signal_that_the_process_ignores_stays_ignored(tmp_path: Path, signals: Signals) -> None:
    """As under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signals.at(DriftEditor, "_edit_one", 1, signal.SIGHUP)
        assert run(config(tmp_path, 2)).rows["n"].tolist() == [2]
    finally:
        signal.signal(signal.SIGHUP, before)


def test_long_slices_are_saved_as_they_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_LONG_SLICE", 0.0)
    settings = config(tmp_path, 6, save_every=1e9)
    run_until(settings, "5", RuntimeError("broken"))
    run(settings)
    assert DriftEditor.written == list("012345"), "nothing twice"


# --- What a machine refuses --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "sentence"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), r"^memory ran out .*Tried to allocate"),
        (MemoryError(), r"^memory ran out .*what is finished is kept"),
        (
            OSError(5, "Input/output error", "/data/file"),
            r"^/data/file cannot be read or written \(Input/output error\)",
        ),
    ],
)
def test_memory_and_disks_that_fail_in_the_middle_are_one_sentence_and_lose_nothing(
    tmp_path: Path, whole: RunStore, problem: Exception, sentence: str
) -> None:
    settings = config(tmp_path, 6, [2, 4])
    DriftEditor.stop_at = ("3", problem)
    with pytest.raises(UserError, match=sentence):
        run(settings)
    DriftEditor.stop_at = None
    assert_same_numbers(run(settings).store, whole)
    assert DriftEditor.written == list("012345")


@pytest.mark.parametrize("place", ["runner._cases", "stream.check_method"])
def test_memory_that_runs_out_before_the_first_edit_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(f"horen_bench.{place}", fail)
    with pytest.raises(UserError, match=r"^memory ran out"):
        run(config(tmp_path, 2))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"records": [{"case_id": "0"}]}, "its progress cannot be read"),
        ({"records": 7}, "its progress cannot be read"),
        ({"slices": None}, "its progress cannot be read"),
    ],
)
def test_a_state_whose_progress_is_of_another_kind_is_one_sentence(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    settings = config(tmp_path, 6)
    run_until(settings, "3", RuntimeError("broken"))
    (run_dir,) = (tmp_path / "runs").iterdir()
    state = RunStore(run_dir).load_state()
    assert state is not None
    RunStore(run_dir).save_state(state[0], {**state[1], **change})
    with pytest.raises(UserError, match=rf"stream\.safetensors is damaged \({reason}"):
        run(settings)


def test_a_state_of_another_shape_is_one_sentence(tmp_path: Path) -> None:
    settings = config(tmp_path, 6)
    run_until(settings, "3", RuntimeError("broken"))
    (run_dir,) = (tmp_path / "runs").iterdir()
    state = RunStore(run_dir).load_state()
    assert state is not None
    RunStore(run_dir).save_state({"drift": torch.zeros(7)}, state[1])
    with pytest.raises(UserError, match=r"stream\.safetensors is damaged \(it does not fit the method: "):
        run(settings)


def test_damaged_cases_are_found_before_a_longer_run_works(tmp_path: Path) -> None:
    store = run(config(tmp_path, 2)).store
    (part,) = (store.path / "cases.parquet").iterdir()
    part.write_bytes(part.read_bytes()[:-9])
    DriftEditor.written.clear()
    with pytest.raises(UserError, match=r"cases\.parquet is damaged \(000000002-greedy\.parquet does not agree"):
        run(config(tmp_path, 4))
    assert DriftEditor.written == []
    assert run(config(tmp_path, 2, force=True)).store.damage() is None


# --- Sittings ----------------------------------------------------------------------------------------------


def test_a_stream_of_two_sittings_keeps_both_and_its_rows_say_in_what_they_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sitting(version: str) -> None:
        known = stream_environment("cpu") | {"torch": version}
        monkeypatch.setattr(stream, "environment", lambda _: dict(known))

    sitting("1.0")
    run_until(config(tmp_path, 6, [2, 4]), "3", RuntimeError("broken"))
    sitting("2.0")
    result = run(config(tmp_path, 6, [2, 4]))
    assert [each["torch"] for each in result.store.sittings()] == ["1.0", "2.0"]
    warning = "sittings of this stream differ in torch 1.0 and 2.0; last digits may differ from a single one's"
    assert result.rows["warnings"].fillna("").tolist() == ["", warning, warning]


# --- Weights that changed ----------------------------------------------------------------------------------


@pytest.fixture
def copied_model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(resource("data") / "tiny", folder)
    return folder


def test_a_run_whose_weights_changed_under_the_same_name_says_so_and_keeps_its_rows(
    tmp_path: Path, copied_model: Path
) -> None:
    changes = {"model": run_config([f"model.hub_id={copied_model}"]).model}
    settings = config(tmp_path, 4, [2], **changes)
    store = run(settings).store
    before = (store.path / "checkpoints.csv").read_text()
    assert run(settings).reused
    file = next(copied_model.glob("*.safetensors"))
    tensors = load_file(file)
    name = max(tensors, key=lambda key: tensors[key].numel())
    tensors[name][len(tensors[name]) // 2] += 1  # in the middle of the file
    save_file(tensors, file, metadata={"format": "pt"})
    for n, checkpoints in ((4, [2]), (4, [1, 2]), (5, [2])):
        with pytest.raises(UserError, match=r"made with other weights \(the model's files changed since\); start"):
            run(config(tmp_path, n, checkpoints, **changes))
    assert (store.path / "checkpoints.csv").read_text() == before
    again = run(config(tmp_path, 4, [2], force=True, **changes))
    assert set(again.rows["weights"]) != set(pd.read_csv(io.StringIO(before))["weights"])


def test_rows_are_shown_with_a_note_where_the_weights_are_gone(tmp_path: Path, copied_model: Path) -> None:
    settings = config(tmp_path, 2, model=run_config([f"model.hub_id={copied_model}"]).model)
    assert run(settings).remark is None
    assert run(settings).remark is None
    shutil.rmtree(copied_model)
    result = run(settings)
    assert result.reused
    assert result.remark == (
        f"the weights of {copied_model} are not on this machine, so it could not be checked that the rows are about "
        "them"
    )


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many probes each call of an evaluator runs the model on."""
    counts: list[int] = []
    predict = Evaluator.predict

    def counting(self: Evaluator, probes: Sequence[Any], *rest: Any) -> Any:
        counts.append(len(probes))
        return predict(self, probes, *rest)

    monkeypatch.setattr(Evaluator, "predict", counting)
    return counts


def test_the_base_model_is_evaluated_once_for_all_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(config(tmp_path, 2))
    (file,) = (tmp_path / "base_predictions").glob("*.json")
    kept = file.read_text()
    counts = counted(monkeypatch)
    other = run(config(tmp_path, 2, seed=1))  # another run of the same model
    assert not other.reused
    assert len(counts) == 1  # the edited model alone
    assert file.read_text() == kept


REPRINT = """
import sys
from rich.console import Console
from horen_bench.config.compose import run_config
from horen_bench.runner import run
result = run(run_config(sys.argv[1:]), Console())
print(result.reused, result.rows["n"].tolist(), sorted({"torch", "transformers", "scipy"} & sys.modules.keys()))
"""


def test_a_finished_run_is_given_back_without_importing_torch(tmp_path: Path) -> None:
    overrides = ["n=2", "checkpoints=[1]", "method.n_steps=2", "device=cpu", f"results_dir={tmp_path}"]
    run(run_config(overrides))
    command = [sys.executable, "-c", REPRINT, *overrides]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "True [1, 2] []\n"


def test_a_method_that_does_not_fit_the_model_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    overrides = ["method.module=model.layers.9.mlp.down_proj", f"results_dir={tmp_path}"]
    with pytest.raises(UserError, match=r"method\.module=.* has no such module; model\.layers has 4 entries, 0 to 3"):
        run(run_config(overrides))
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_another_version_is_refused_and_force_runs_it_again(tmp_path: Path) -> None:
    store = run(config(tmp_path, 2)).store
    environment = store.path / "environment.json"
    values = json.loads(environment.read_text())
    environment.write_text(json.dumps({name: value for name, value in values.items() if name != "schema"}))
    advice = (
        f"{store.path} was made with another version of the program (schema none, now {SCHEMA}); start again with "
        "force=true, or keep it by choosing another results_dir="
    )
    for n in (2, 3):  # finished or not
        with pytest.raises(UserError) as caught:
            run(config(tmp_path, n))
        assert str(caught.value) == advice
    assert store.checkpoints()["n"].tolist() == [2]
    assert run(config(tmp_path, 2, force=True)).rows["n"].tolist() == [2]
    assert run(config(tmp_path, 2)).reused


# --- Data that changed -------------------------------------------------------------------------------------


def from_file(path: Path) -> dict[str, Any]:
    overrides = ["dataset=zsre", f"dataset.path={path}", "dataset.locality_source=record", "dataset.target=alt"]
    return {"dataset": run_config(overrides).dataset}


def write_facts(path: Path, n: int, **changes: str) -> None:
    """Facts in the ZsRE schema; the second record with fields of its own."""
    facts = list(records(1, stop=n))
    facts[1] |= changes
    path.write_text(to_json(facts))


@pytest.mark.parametrize("stop", [None, "3"])
@pytest.mark.parametrize("checkpoints", [[2], [1, 2]])
def test_a_run_whose_data_changed_meanwhile_says_so_and_keeps_its_rows(
    tmp_path: Path, stop: str | None, checkpoints: list[int]
) -> None:
    """Whether it was finished or stopped, and also when it would have to start over for an earlier checkpoint."""
    path = tmp_path / "edits.json"
    write_facts(path, 5)
    settings = config(tmp_path, 4, [2], **from_file(path))
    if stop:
        run_until(settings, stop, RuntimeError("broken"))
    else:
        run(settings)
    store = next((tmp_path / "runs").iterdir())
    before = (store / "checkpoints.csv").read_text()
    write_facts(path, 5, alt="something else")
    with pytest.raises(UserError) as caught:
        run(settings.model_copy(update={"checkpoints": checkpoints}))
    assert str(caught.value) == (
        f"{store} was made with other cases (the data changed since); start again with force=true, or keep it by "
        "choosing another results_dir="
    )
    assert (store / "checkpoints.csv").read_text() == before
    again = run(settings.model_copy(update={"force": True}))
    assert again.rows["n"].tolist() == [2, 4]
    assert "something else" in again.store.cases()["target"].tolist()


def test_data_that_only_grew_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "edits.json"
    write_facts(path, 2)
    run(config(tmp_path, 2, **from_file(path)))
    write_facts(path, 5)
    assert run(config(tmp_path, 4, [2], **from_file(path))).rows["n"].tolist() == [2, 4]
    assert DriftEditor.written == list("0123")


def test_a_method_that_needs_subjects_says_so_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "edits.json"
    file.write_text('[{"src": "Who founded it?", "answers": ["Lucan Vey"]}]', encoding="utf-8")
    monkeypatch.setattr(DriftConfig, "needs_subject", True)
    overrides = ["dataset=zsre", f"dataset.path={file}", "dataset.target=answers", "dataset.locality_source=record"]
    with pytest.raises(UserError, match=r"writes at the subject of each case, and dataset=zsre has none"):
        run(config(tmp_path, 1, dataset=run_config(overrides).dataset))


def test_locality_that_another_edit_touches_is_noted_or_left_out(tmp_path: Path) -> None:
    path = tmp_path / "edits.json"
    write_facts(path, 6, loc=next(records(1, stop=1))["src"])
    touched = "N=6: 1 locality probes are touched by another edit and"
    all_of_it = run(config(tmp_path, 6, **from_file(path)))
    assert notes(all_of_it.rows) == [f"{touched} count in Loc; locality=clean leaves them out"]
    assert all_of_it.rows["loc_items"].tolist() == [6]
    clean = run(config(tmp_path, 6, locality="clean", **from_file(path)))
    assert notes(clean.rows) == ["N=6: loc covers 5 of 6 cases", f"{touched} were left out"]
    assert clean.rows["loc_items"].tolist() == [5]


# --- Killed ------------------------------------------------------------------------------------------------

# One process imports everything; each run is a fork of it that calls the command line, so that a kill
# takes a real process at an exact place and a run costs a second, not its imports.
KILLER = """
import itertools, json, os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
from horen_bench import stream
from horen_bench.__main__ import main
from horen_bench.editors.horen.editor import HorenEditor
from horen_bench.results.store import RunStore

folder = Path(sys.argv[1])
stream.time = SimpleNamespace(monotonic=itertools.count(1000, 1000).__next__)  # saved after every slice

def watched(owner, name, kill_at=0, after=False):
    calls = []
    function = getattr(owner, name)
    def call(*args, **kwargs):
        calls.append(name)
        if len(calls) == kill_at and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if len(calls) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, call)
    return calls

def start(name, *overrides, kill=None):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        log = os.open(folder / f"{name}.log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        counts = {name: watched(*place) for name, place in PLACES.items()} if kill is None else {}
        if kill:
            watched(*PLACES[kill[0]], kill_at=kill[1], after=kill[0] == "rename")
        sys.argv = ["horen_bench", "n=4", "checkpoints=[2]", "method.n_steps=3", "save_every=0", "device=cpu",
                    f"results_dir={folder / name}", *overrides]
        main()
        (folder / f"{name}.json").write_text(json.dumps({name: len(calls) for name, calls in counts.items()}))
        code = 0
    finally:
        sys.stdout.flush()
        os._exit(code)

def end(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

PLACES = {"flush": (os, "fsync"), "rename": (Path, "replace"), "edit": (HorenEditor, "edit")}
codes = {"whole": [end(start("whole"))]}
n = json.loads((folder / "whole.json").read_text())
kills = [
    ("flush", n["flush"] // 2),    # the first state
    ("flush", n["flush"] - 1),     # cases of the last checkpoint
    ("flush", n["flush"]),         # its row, while its cases are there
    ("rename", n["rename"] - 2),   # the last state is in its place, the checkpoint not
    ("edit", n["edit"]),
]
for place, k in kills:
    name = f"{place}-{k}"
    codes[name] = [end(start(name, kill=(place, k))), end(start(name))]

# From outside, at a moment that nothing chose.
pid = start("outside", "n=2000", "checkpoints=[]")
deadline = time.monotonic() + 60
while not list(folder.glob("outside/runs/*/state/*.safetensors")):
    time.sleep(0.01)
    assert time.monotonic() < deadline
time.sleep(0.1)
os.kill(pid, signal.SIGKILL)
code = end(pid)
(run,) = folder.glob("outside/runs/*")
further = f"n={len(RunStore(run).load_state()[1]['records']) + 1}"
codes["outside"] = [code, end(start("outside", further, "checkpoints=[]"))]
codes["outside-whole"] = [end(start("outside-whole", further, "checkpoints=[]"))]
print(json.dumps(codes))
"""


def test_a_run_killed_at_any_moment_goes_on_with_the_same_command_to_the_same_numbers(tmp_path: Path) -> None:
    """SIGKILL just before a file is flushed (its temporary copy is left behind), just after one took its
    place, in the middle of editing, and from outside."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLER, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout)
    stores = {name: RunStore(next((tmp_path / name / "runs").iterdir())) for name in codes}
    assert codes.pop("whole") == codes.pop("outside-whole") == [0]
    assert len(codes) == 6
    for name, code in codes.items():
        assert code == [-9, 0], (name, (tmp_path / f"{name}.log").read_text())
        assert_same_numbers(stores[name], stores["outside-whole" if name == "outside" else "whole"])
    left_behind = [path.name for name in codes for path in (tmp_path / name).rglob("*.tmp")]
    assert left_behind == []  # what a killed process left half-written is gone with the next run


# --- Running the model no more than necessary -------------------------------------------------------------


@pytest.mark.parametrize("method", ["horen", "grace_norm"])
def test_predictions_that_routes_imply_are_those_that_the_model_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """`reuse=false` gives the same rows; the stream writes the same prompts again, changed or not."""
    path = tmp_path / "edits.json"
    facts = list(records(1, stop=12))
    again = [fact | {"alt": facts[-1 - i]["alt"]} if i % 2 else fact for i, fact in enumerate(facts)]
    path.write_text(to_json([*facts, *again]))
    known: list[int] = []
    counts = counted(monkeypatch)
    predict = PredictionCache.predict

    def counting(self: PredictionCache, probes: Any, *rest: Any) -> Any:
        before = sum(counts)
        predictions = predict(self, probes, *rest)
        known.append(len(probes) - (sum(counts) - before))
        assert predictions == self.evaluator.predict(probes)
        return predictions

    monkeypatch.setattr(PredictionCache, "predict", counting)
    overrides = [
        f"method={method}", "method.threshold=0.6", "method.n_steps=5", "dataset=zsre", f"dataset.path={path}",
        "dataset.target=alt", "dataset.locality_source=record", "n=24", "checkpoints=[6,12,18]",
        "protocol=[greedy,teacher_forced,release]", "device=cpu",
    ]  # fmt: skip
    reused = run(run_config([*overrides, f"results_dir={tmp_path / 'reused'}"])).store
    assert len(set(reused.cases()["edit_action"])) >= 2, "some prompts met an entry"
    assert len(known) == 12
    assert all(later > 24 for later in known[6:]), "more than the locality probes is known later on"
    known.clear()
    made = run(run_config([*overrides, f"results_dir={tmp_path / 'made'}", "reuse=false"])).store
    assert known == [0] * 12
    assert made.path.name == reused.path.name
    assert_same_numbers(made, reused)


# --- How a stream is cut -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "device", "edits"),
    [(1_000_000, "cpu", 1024), (67_108_864, "cpu", 64), (270_000_000, "cpu", 16), (8_000_000_000, "cuda", 274)],
)
def test_slices_of_a_large_model_are_short_whatever_the_clock_says(parameters: int, device: str, edits: int) -> None:
    weights = SimpleNamespace(numel=lambda: parameters)
    model: Any = SimpleNamespace(device=torch.device(device), parameters=lambda: [weights])
    assert parallel_slice(model) == edits
