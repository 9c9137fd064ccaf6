"""An edit whose training fails leaves no trace: what follows is what the stream without it gives."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from horen_bench.cases import EditCase, EditRecord
from horen_bench.config.compose import run_config
from horen_bench.editors.codebook import editor as codebook_editor
from horen_bench.editors.codebook.editor import CodebookEditor
from horen_bench.editors.codebook.parallel import train_values
from horen_bench.models.partial import UpperLayers

Build = Callable[..., CodebookEditor[Any]]


@pytest.fixture
def build(golden_model: Any, golden_tokenizer: Any) -> Build:
    def built(method: str, **changes: Any) -> CodebookEditor[Any]:
        config = run_config([f"method={method}"]).method.changed(
            **{"module": "model.layers.2.mlp.down_proj", "n_steps": 3, "early_stopping": None, **changes}
        )
        editor: CodebookEditor[Any] = config.editor_class()(golden_model, golden_tokenizer, config, seed=1)
        return editor

    return built


def stream(prompts: Sequence[str]) -> list[EditCase]:
    """Cases of few prompts and two targets, so that entries are made, parted and trained on."""
    return [EditCase(f"{prompt}{i}", prompt, ("Lucan Vey", "Petra Dunmore")[i % 2]) for i, prompt in enumerate(prompts)]


PROMPTS = [
    "Who founded Brightwater?",
    "Who founded Halvard Bay?",
    "What city was Edda born in?",
    "Where is the museum?",
]
STREAM = stream([PROMPTS[i] for i in (0, 1, 0, 2, 0, 1, 1, 3, 2, 0)])


def outline(records: Sequence[EditRecord]) -> list[Any]:
    return [(record.case_id, record.action, record.entry) for record in records]


@pytest.mark.parametrize("method", ["horen", "grace"])
@pytest.mark.parametrize("bad", [[0], [1], [4], [9], [0, 1], [3, 7, 8], list(range(10))])
def test_later_decisions_are_those_of_a_stream_without_what_failed(
    build: Build, monkeypatch: pytest.MonkeyPatch, method: str, bad: list[int]
) -> None:
    plain, editor = train_values, build(method)
    broken = [editor.encoder.edit(STREAM[i].prompt, STREAM[i].target) for i in bad]
    failing = [i for i, case in enumerate(STREAM) if editor.encoder.edit(case.prompt, case.target) in broken]

    def training(jobs: Any, upper: Any, added: Any, schedule: Any, size: Any) -> Any:
        for job, trained in plain(jobs, upper, added, schedule, size):
            if job.edit in broken:
                object.__setattr__(trained, "finite", False)
            yield job, trained

    monkeypatch.setattr(codebook_editor, "train_values", training)
    records = editor.edit(STREAM)
    assert [i for i, record in enumerate(records) if record.action == "failed"] == failing
    assert all(record.entry is None and record.problem for i, record in enumerate(records) if i in failing)
    state = editor.state_dict()
    editor.detach()

    monkeypatch.undo()
    without = build(method)
    # A value's first numbers belong to its place in the stream.
    places = [i for i in range(len(STREAM)) if i not in failing]
    draw = without._initial_value
    monkeypatch.setattr(without, "_initial_value", lambda i: draw(places[i]))
    expected = without.edit([STREAM[i] for i in places])
    assert outline([record for i, record in enumerate(records) if i not in failing]) == outline(expected)
    for name, tensor in without.state_dict().items():
        if name != "n_edits":
            torch.testing.assert_close(state[name], tensor, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("method", ["horen", "grace", "grace_norm"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_key_that_is_not_finite_fails_alone(
    build: Build, monkeypatch: pytest.MonkeyPatch, method: str, bad: float
) -> None:
    expected_editor = build(method)
    expected = expected_editor.edit([*STREAM[:2], *STREAM[3:5]])
    expected_editor.detach()
    editor = build(method)
    read = editor.queries

    def queries(prompts: Any, batch_size: int = 64) -> Tensor:
        keys = read(prompts, batch_size).clone()
        if len(keys) > 1:
            keys[2] = bad
        return keys

    monkeypatch.setattr(editor, "queries", queries)
    records = editor.edit(STREAM[:5])
    assert (records[2].action, records[2].entry) == ("failed", None)
    assert outline(records[:2] + records[3:]) == outline(expected)
    assert editor.codebook.keys.isfinite().all()


@pytest.mark.parametrize("engine", ["parallel", "sequential"])
@pytest.mark.parametrize("method", ["horen", "grace", "grace_norm"])
@pytest.mark.parametrize("n_steps", [1, 3])
def test_steps_that_leave_the_numbers_write_nothing(build: Build, method: str, engine: str, n_steps: int) -> None:
    editor = build(method, engine=engine, n_steps=n_steps, vector={"learning_rate": 1e38})
    records = editor.edit(STREAM[:4])
    assert [(record.action, record.entry, record.steps) for record in records] == [("failed", None, 0)] * 4
    assert len(editor.codebook) == 0
    assert editor.n_edits == 4


@pytest.mark.parametrize("method", ["horen", "grace"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_call_leaves_the_codebook_as_it_was(
    build: Build, monkeypatch: pytest.MonkeyPatch, method: str, error: type[BaseException]
) -> None:
    editor = build(method, train_batch=1)
    editor.edit(STREAM[:3])
    before = editor.state_dict()
    calls = iter(range(100))
    own = UpperLayers.losses

    def losses(self: UpperLayers, states: Any, added: Tensor) -> Tensor:
        if next(calls) == 7:
            raise error
        return own(self, states, added)

    with monkeypatch.context() as patch:
        patch.setattr(UpperLayers, "losses", losses)
        with pytest.raises(error):
            editor.edit(STREAM[3:])
    after = editor.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    records = editor.edit(STREAM[3:])
    assert all(record.action != "failed" for record in records)
