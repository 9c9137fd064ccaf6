"""MEMIT: what it refuses, what it keeps, and that both engines write the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from horen_bench.cases import EditCase
from horen_bench.configuration import build, composed
from horen_bench.editors.memit import MemitEditor
from horen_bench.errors import UserError
from horen_bench.settings import resolved

CASES = [
    EditCase("a", "Who founded Brightwater?", "Lucan Vey", "Brightwater"),
    EditCase("b", "The language spoken by the fishermen of Halvard Bay is", "Norrish", "Halvard Bay"),
    EditCase("c", "Edda Quillfeather was born where?", "Grenholm by the Sea", "Edda Quillfeather"),
]
WRONG = [
    EditCase("none", "Who founded Brightwater?", "Lucan Vey"),
    EditCase("absent", "Who founded Brightwater?", "Lucan Vey", "Oldmere"),
    EditCase("twice", "Is Oldmere near Oldmere?", "yes", "Oldmere"),
    EditCase("empty", "Who founded Brightwater?", "", "Brightwater"),
]
CONSTANTS: dict[str, Any] = {"moment_weight": 1.0, "ridge": 1e-6}

Make = Callable[..., MemitEditor]


@pytest.fixture
def make(golden_model: Any, golden_tokenizer: Any, baselines_folder: Path, tmp_path_factory: Any) -> Make:
    settings = resolved(composed(["method=memit"]))["method"]
    statistics = {
        **settings["statistics"],
        "corpus": str(baselines_folder / "rome" / "stats_texts.json"),
        "folder": str(tmp_path_factory.getbasetemp() / "statistics"),
    }

    def made(model: Any = golden_model, **changes: Any) -> MemitEditor:
        values = {**settings, "statistics": statistics, **CONSTANTS, **changes}
        editor: MemitEditor = build(values, "method", model=model, tokenizer=golden_tokenizer, seed=42)
        return editor

    return made


def weights(editor: MemitEditor) -> dict[str, torch.Tensor]:
    return {path: weight.detach().clone() for path, weight in editor.pristine.weights.items()}


def test_engines_write_the_same(make: Make, golden_model: Any, other_golden_model: Any) -> None:
    fast, plain = make(engine="cached"), make(other_golden_model, engine="sequential")
    assert [record.steps for record in fast.edit(CASES)] == [record.steps for record in plain.edit(CASES)]
    for path, weight in weights(plain).items():
        change = weight - plain.pristine.originals()[path]
        found = weights(fast)[path] - fast.pristine.originals()[path]
        torch.testing.assert_close(found, change, rtol=0, atol=5e-3 * float(change.abs().max()))


def test_refused_cases_are_named_and_the_stream_goes_on(make: Make, other_golden_model: Any) -> None:
    editor, clean = make(), make(other_golden_model)
    records = editor.edit([CASES[0], *WRONG, CASES[1]])
    assert [record.action for record in records] == ["inserted", *["failed"] * 4, "inserted"]
    sentences = ["has no subject", "does not occur in the prompt", "occurs 2 times", "target has no token"]
    assert all(sentence in str(record.problem) for sentence, record in zip(sentences, records[1:5], strict=True))
    clean.edit(CASES[:2])
    assert all(torch.equal(weights(editor)[path], weight) for path, weight in weights(clean).items())


def test_an_update_that_is_not_finite_leaves_the_model_as_it_was(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = make()
    editor.edit(CASES[:1])
    before, state = weights(editor), editor.state_dict()
    last = editor._projections[list(editor._projections)[-1]]
    add = editor._add

    def spoilt(path: str, update: torch.Tensor) -> None:
        add(path, update * (torch.nan if editor._projections[path] is last else 1))

    with monkeypatch.context() as patch:
        patch.setattr(editor, "_add", spoilt)
        (record,) = editor.edit(CASES[1:2])
    assert (record.action, record.problem) == ("failed", "the update is not finite")
    assert all(torch.equal(weights(editor)[path], weight) for path, weight in before.items())
    changed = [key for key, value in editor.state_dict().items() if not torch.equal(value, state[key])]
    assert changed == ["n_edits"]
    assert editor.edit(CASES[1:2])[0].action == "inserted"


def test_subjects_are_asked_for_before_the_start() -> None:
    assert MemitEditor.needs_subject


def test_bfloat16_weights_are_rounded_once_per_edit(make: Make, golden_model: Any) -> None:
    editor = make(golden_model.to(torch.bfloat16))
    records = editor.edit(CASES[:2])
    assert [record.action for record in records] == ["inserted"] * 2
    editor.detach()
    assert all(torch.equal(weights(editor)[path], one) for path, one in editor.pristine.originals().items())


def test_a_turn_of_several_is_one_joint_write(make: Make, other_golden_model: Any) -> None:
    joint, apart = make(batch_size=3), make(other_golden_model)
    assert joint.slice_size == 3
    assert joint.edit([*CASES[:2], WRONG[0]])[2].action == "failed"
    apart.edit(CASES[:2])
    assert any(not torch.allclose(weights(joint)[path], weight) for path, weight in weights(apart).items())
    assert "turns of 3" in joint.warnings()[0]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"batch_size": 0}, "method.batch_size must be"),
        ({"moment_weight": 0.0}, "method.moment_weight must be > 0"),
        ({"modules": []}, "method.modules must name"),
        ({"modules": ["model.layers.2.mlp.down_proj", "model.layers.1.mlp.down_proj"]}, "the lowest layer first"),
    ],
)
def test_wrong_settings_are_named(make: Make, wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        make(**wrong)
