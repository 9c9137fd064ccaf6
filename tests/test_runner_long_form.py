"""Streams whose predictions are texts: their rows, their shortcuts, and cases that the context has no room for."""

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from horen_bench.cases import EditCase, EditRecord
from horen_bench.config.compose import run_config
from horen_bench.config.schema import RunConfig
from horen_bench.errors import UserError
from horen_bench.evaluation.evaluator import Prediction
from horen_bench.evaluation.long_form import LongFormEvaluator
from horen_bench.evaluation.probes import CaseProbe
from horen_bench.models.context import ContextLimit
from horen_bench.results.console import checkpoint_tables, notes
from horen_bench.results.store import RunStore
from horen_bench.runner import run

FAST = ("method.n_steps=3",)
WITHOUT_MODELS = ("checkpoints=[]", "text.minilm=null", "text.bert_score=null", "device=cpu")
SCORES = ("bleu1_bp", "rouge1_recall", "rougeL_recall", "sacrebleu", "rouge_score_rougeL_f1", "length")


def config(results: Path, *overrides: str) -> RunConfig:
    """Three passages, without the scores that need a model."""
    return run_config([f"results_dir={results}", "dataset=passages", "n=3", *WITHOUT_MODELS, *overrides])


def stored(settings: RunConfig) -> RunStore:
    return run(settings, Console(file=io.StringIO())).store


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    """Evaluated after two and three edits, as texts and token by token."""
    return stored(config(tmp_path_factory.mktemp("both"), *FAST, "checkpoints=[2]", "protocol=[text,greedy]"))


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
    row = stored(config(tmp_path, f"method={method}", f"n={n}")).checkpoints().iloc[0]
    assert 0.6 < row["rel_rougeL_recall_base"] < 0.85
    assert row["rel_rougeL_recall"] > row["rel_rougeL_recall_base"] + 0.05
    assert row["gen_rougeL_recall"] > row["gen_rougeL_recall_base"] + 0.05


def test_a_records_text_and_scores_are_kept(both: RunStore) -> None:
    cases = both.cases().query("protocol == 'text' and n == 3")
    row = both.checkpoints().query("protocol == 'text' and n == 3").iloc[0]
    for name in ("rel_rouge1_recall", "sub_question_length"):
        assert cases[name].mean() == pytest.approx(row[name])
    for texts, length in zip(cases["rel_predictions"], cases["rel_length"], strict=True):
        assert [len(text.split()) for text in texts] == [length]
    assert [len(texts) for texts in cases["sub_question_predictions"]] == [3, 3, 3]


def test_texts_that_routes_imply_are_those_that_the_model_writes(
    tmp_path: Path, both: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    predict = LongFormEvaluator.predict_batch

    def counting(evaluator: LongFormEvaluator, probes: Sequence[CaseProbe]) -> list[Prediction]:
        counts.append(len(probes))
        return predict(evaluator, probes)

    monkeypatch.setattr(LongFormEvaluator, "predict_batch", counting)
    everything = stored(config(tmp_path, *FAST, "checkpoints=[2]", "reuse=false"))
    assert sum(counts) == (3 + 2 + 3) * 5  # before the edits, and after two and three of them
    columns = ["n", "case_id", "rel_predictions", "gen_predictions", "sub_question_predictions", "rel_rougeL_recall"]
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
    rows = stored(config(tmp_path / "results", *FAST, "n=2", f"text.minilm={empty}")).checkpoints()
    assert rows["rel_minilm_cosine"].isna().all()
    assert rows["rel_rouge1_recall"].notna().all()
    (warning,) = rows["warnings"]
    assert warning.startswith(f"minilm_cosine is missing: {empty} cannot be loaded (")
    assert warning in notes(rows)


def test_cases_that_are_too_long_are_not_written_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "unke.json"
    long, short = "word " * 200, "a word"
    path.write_text(
        json.dumps([{"id": f"r{i}", "question": f"Q{i}?", "answer": a} for i, a in enumerate((long, short))])
    )
    lengths: list[str] = []
    refusal = ContextLimit.refusal

    def counting(limit: ContextLimit, case: EditCase) -> EditRecord | None:
        lengths.append(case.id)
        return refusal(limit, case)

    monkeypatch.setattr(ContextLimit, "refusal", counting)
    overrides = ("n=2", "checkpoints=[1]", "protocol=[text,greedy]", "dataset=unke", f"dataset.path={path}")
    store = stored(config(tmp_path / "results", *FAST, *overrides))
    assert lengths == ["r0", "r1"]  # each once, however many checkpoints and protocols there are
    rows, cases = store.checkpoints().query("protocol == 'text'"), store.cases().query("n == 2 and protocol == 'text'")
    assert rows["failed_edits"].tolist() == [1, 1]
    assert math.isnan(rows["edits_per_second"].iloc[0])  # nothing was written, so there is no speed
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
        (["template=chat"], "template"),
        (
            ["template=model", "method=rome", "dataset=facts"],
            "method=rome looks for the subject in the bare prompt, so template=model does not suit it; write "
            "template=none or choose another method",
        ),
        (["text.max_new_tokens=0"], "text.max_new_tokens"),
        (["text.bert_score=false"], "text.bert_score"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_a_sentence(tmp_path: Path, overrides: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        stored(config(tmp_path, *overrides))
    assert str(caught.value).startswith(sentence)


def test_a_missing_template_is_refused_before_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("horen_bench.models.loading.AutoModelForCausalLM", None)
    with pytest.raises(UserError, match="brings no chat template"):
        stored(config(tmp_path, "template=model"))


def test_the_unstructured_sets_are_evaluated_as_texts_unless_configured_otherwise(tmp_path: Path) -> None:
    assert [config(tmp_path, f"dataset={name}").protocol for name in ("passages", "unke")] == [["text"], ["text"]]
    assert config(tmp_path, "protocol=[text,release]").protocol == ["text", "release"]
