"""ROME: what it refuses, what it keeps, and that both engines write the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from horen_bench.cases import EditCase
from horen_bench.configuration import build, composed
from horen_bench.editors.rome import RomeEditor
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
CONSTANTS: dict[str, Any] = {"ridge": 1e-6}

Make = Callable[..., RomeEditor]


@pytest.fixture
def make(golden_model: Any, golden_tokenizer: Any, baselines_folder: Path, tmp_path_factory: Any) -> Make:
    settings = resolved(composed(["method=rome"]))["method"]
    statistics = {
        **settings["statistics"],
        "corpus": str(baselines_folder / "rome" / "stats_texts.json"),
        "folder": str(tmp_path_factory.getbasetemp() / "statistics"),
    }

    def made(model: Any = golden_model, **changes: Any) -> RomeEditor:
        values = {**settings, "statistics": statistics, **CONSTANTS, **changes}
        editor: RomeEditor = build(values, "method", model=model, tokenizer=golden_tokenizer, seed=42)
        return editor

    return made


def weights(editor: RomeEditor) -> dict[str, torch.Tensor]:
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
    assert RomeEditor.needs_subject


def test_bfloat16_weights_are_rounded_once_per_edit(make: Make, golden_model: Any) -> None:
    editor = make(golden_model.to(torch.bfloat16))
    records = editor.edit(CASES[:2])
    assert [record.action for record in records] == ["inserted"] * 2
    editor.detach()
    assert all(torch.equal(weights(editor)[path], one) for path, one in editor.pristine.originals().items())


@pytest.mark.parametrize("mode", ["mean", "prompt"])
def test_with_one_key_its_value_becomes_the_target_exactly(
    make: Make, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`W_new k = v*`, the paper's Eq. 2."""
    editor = make(key_mode=mode)
    seen: list[Any] = []
    write = editor._write

    def noting(*args: Any) -> None:
        seen.append(args)
        write(*args)

    monkeypatch.setattr(editor, "_write", noting)
    editor.edit(CASES[:1])
    _, reading, hidden = seen[0]
    key = (reading.keys if mode == "mean" else reading.prompt_keys)[editor.module_path][0]
    said = editor.pristine.weights[editor.module_path] @ key
    torch.testing.assert_close(said, hidden.target[0], rtol=1e-4, atol=1e-4)


def test_direction_solves_with_the_second_moment(make: Make) -> None:
    editor = make()
    editor.edit(CASES[:1])
    assert editor._factor is not None
    key = torch.randn(176)
    expected = torch.linalg.inv(editor._factor @ editor._factor.T) @ key.double()
    torch.testing.assert_close(editor.direction(key).double(), expected / expected.norm(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [({"key_mode": "both"}, "method.key_mode must be"), ({"engine": "fast"}, "method.engine must be")],
)
def test_wrong_settings_are_named(make: Make, wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        make(**wrong)


def test_written_value_makes_the_target_likelier(make: Make) -> None:
    editor = make()
    ids = torch.tensor([editor.tokenizer("Who founded Brightwater? Lucan Vey")["input_ids"]])
    n_prompt = len(editor.tokenizer("Who founded Brightwater?")["input_ids"])

    def loss() -> float:
        logits = editor.model(ids).logits[0, n_prompt - 1 : -1]
        return float(torch.nn.functional.cross_entropy(logits, ids[0, n_prompt:]))

    before = loss()
    editor.edit(CASES[:1])
    assert loss() < 0.75 * before
