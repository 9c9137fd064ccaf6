"""Streams whose answers are texts: their rows, their shortcuts, and cases that the context has no room for."""

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from horen_bench.config.compose import composed
from horen_bench.config.settings import check, resolved
from horen_bench.errors import UserError
from horen_bench.evaluation import Answer, Question, TextExaminer
from horen_bench.results.console import checkpoint_tables, notes
from horen_bench.results.store import RunStore
from horen_bench.runner import run

WITHOUT_MODELS = ("checkpoints=[]", "text.minilm=null", "text.bert_score=null", "device=cpu")
SCORES = ("bleu1_bp", "rouge1_recall", "rougeL_recall", "sacrebleu", "rouge_score_rougeL_f1", "length")


def config(results: Path, *overrides: str) -> dict[str, Any]:
    """HoReN on three passages, without the scores that need a model."""
    values = resolved(composed([f"results_dir={results}", "dataset=passages", "n=3", *WITHOUT_MODELS, *overrides]))
    return values | {"method": values["method"] | {"n_steps": 3}} if values["method"]["name"] == "horen" else values


def stored(values: dict[str, Any]) -> RunStore:
    return run(values, Console(file=io.StringIO())).store


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    """Questioned after two and three edits, as texts and token by token."""
    return stored(config(tmp_path_factory.mktemp("both"), "checkpoints=[2]", "protocol=[text,greedy]"))


def test_a_text_row_has_every_score_of_every_family_and_none_of_the_short_ones(both: RunStore) -> None:
    rows = both.checkpoints().query("protocol == 'text'")
    assert rows["n"].tolist() == [2, 3]
    for family in ("rel", "gen", "sub_question"):
        for score in SCORES:
            name = f"{family}_{score}"
            assert (rows[f"{name}_low"] <= rows[name]).all()
            assert (rows[name] <= rows[f"{name}_high"]).all()
            assert rows[f"{name}_items"].tolist() == [2, 3]
            assert rows[f"{name}_base"].notna().all()
    assert rows[["rel", "gen", "loc", "op"]].isna().all().all()
    short = both.checkpoints().query("protocol == 'greedy'")
    assert short["rel"].notna().all()
    assert short["rel_length"].isna().all()


@pytest.mark.parametrize(("method", "n"), [("horen", 20), ("unke", 1)])  # what UnKE writes, its next edits undo
def test_the_embedded_model_can_be_edited_to_tell_passages(method: str, n: int, tmp_path: Path) -> None:
    """Beyond the text's form, which it knows."""
    overrides = (f"results_dir={tmp_path}", "dataset=passages", f"method={method}", f"n={n}", *WITHOUT_MODELS)
    values = resolved(composed(overrides))
    row = stored(values).checkpoints().iloc[0]
    assert 0.6 < row["rel_rougeL_recall_base"] < 0.85
    assert row["rel_rougeL_recall"] > row["rel_rougeL_recall_base"] + 0.05
    assert row["gen_rougeL_recall"] > row["gen_rougeL_recall_base"] + 0.05


def test_a_records_text_and_scores_are_kept(both: RunStore) -> None:
    cases = both.cases().query("protocol == 'text' and n == 3")
    row = both.checkpoints().query("protocol == 'text' and n == 3").iloc[0]
    for name in ("rel_rouge1_recall", "sub_question_length"):
        assert cases[name].mean() == pytest.approx(row[name])
    for answers, length in zip(cases["rel_answers"], cases["rel_length"], strict=True):
        assert [len(text.split()) for text in answers] == [length]
    assert [len(answers) for answers in cases["sub_question_answers"]] == [3, 3, 3]


def test_a_method_that_is_asked_everything_and_one_that_is_not_write_the_same(
    tmp_path: Path, both: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers that are known by their route are those that the model writes."""
    monkeypatch.setattr(
        "horen_bench.editors.horen.editor.HorenEditor.routes", lambda self, prompts: [None] * len(prompts)
    )
    asked: list[int] = []
    ask = TextExaminer.ask_batch

    def counting(examiner: TextExaminer, some: Sequence[Question]) -> list[Answer]:
        asked.append(len(some))
        return ask(examiner, some)

    monkeypatch.setattr(TextExaminer, "ask_batch", counting)
    everything = stored(config(tmp_path, "checkpoints=[2]"))
    assert sum(asked) == (3 + 2 + 3) * 5  # before the edits, and after two and three of them
    columns = ["n", "case_id", "rel_answers", "gen_answers", "sub_question_answers", "rel_rougeL_recall"]
    known = both.cases().query("protocol == 'text'")[columns].reset_index(drop=True)
    pd.testing.assert_frame_equal(everything.cases()[columns], known)


def test_a_text_table_has_a_line_per_score_and_a_column_per_family(both: RunStore) -> None:
    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(checkpoint_tables(both.checkpoints()))
    lines = console.export_text().splitlines()
    heads = [[cell.strip() for cell in line.split("┃")[1:-1]] for line in lines if "Original" in line and "┃" in line]
    assert heads == [["score", "Original", "Para", "Sub", "before"]] * 2
    assert sum(line.startswith("│ rougeL_recall") for line in lines) == 2
    assert any("N=3" in line for line in lines)
    assert any("Rel ↑" in line for line in lines)  # of the greedy rows, which have no score of texts
    (probes,) = [line for line in lines if "Rel before" in line]
    assert [cell.strip() for cell in probes.split("┃")[1:-1]] == ["N", "sub_question", "Rel before", "Gen before"]
    assert any(line.startswith("protocol text, seed 42") for line in lines)


def test_a_missing_scoring_model_leaves_dashes_and_a_sentence(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    rows = stored(config(tmp_path / "results", "n=2", f"text.minilm={empty}")).checkpoints()
    assert rows["rel_minilm_cosine"].isna().all()
    assert rows["rel_rouge1_recall"].notna().all()
    (warning,) = rows["warnings"]
    assert warning.startswith(f"minilm_cosine is missing: {empty} cannot be loaded (")
    assert warning in notes(rows)


def test_cases_that_are_too_long_are_not_written_and_named(tmp_path: Path) -> None:
    path = tmp_path / "unke.json"
    long, short = "word " * 200, "a word"
    path.write_text(
        json.dumps([{"id": f"r{i}", "question": f"Q{i}?", "answer": a} for i, a in enumerate((long, short))])
    )
    store = stored(config(tmp_path / "results", "n=2", "checkpoints=[1]", "dataset=unke", f"dataset.path={path}"))
    rows, cases = store.checkpoints(), store.cases().query("n == 2")
    assert rows["failed_edits"].tolist() == [1, 1]
    assert math.isnan(rows["edits_per_second"][0])  # nothing was written, so there is no speed
    assert cases["edit_action"].tolist() == ["failed", "inserted"]
    assert cases["edit_problem"].iloc[0].endswith("tokens, the model has 128 positions")
    assert rows["warnings"].tolist() == [
        f"N={n}: cases that are longer than the model's 128 positions were not written, 1 of {n}: r0" for n in (1, 2)
    ]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["template=model"],
            "template=model: the tokenizer of this model brings no chat template; write template=none, or choose a "
            "model that was trained to chat",
        ),
        (["template=chat"], "template must be none or model, got 'chat'"),
        (
            ["template=model", "method=rome", "dataset=facts"],
            "method=rome looks for the subject in the bare prompt, so template=model does not suit it; write "
            "template=none or choose another method",
        ),
        (["text.max_new_tokens=0"], "text.max_new_tokens must hold whole numbers of at least 1, got 0"),
        (["text.bert_score=false"], "text.bert_score must be a hub id, a folder or null, got False"),
    ],
)
def test_settings_that_cannot_be_are_told_in_a_sentence(tmp_path: Path, overrides: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        stored(config(tmp_path, *overrides))
    assert str(caught.value) == sentence


def test_the_unstructured_sets_are_questioned_for_texts_unless_told_otherwise(tmp_path: Path) -> None:
    assert [config(tmp_path, f"dataset={name}")["protocol"] for name in ("passages", "unke")] == ["text", "text"]
    check(config(tmp_path, "protocol=[text,release]"))
