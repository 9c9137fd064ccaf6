"""Probes that the context has no room for are left out of their score, and named."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from horen_bench.config.compose import run_config
from horen_bench.errors import UserError
from horen_bench.evaluation.probes import CaseProbe
from horen_bench.results.store import RunStore
from horen_bench.runner import run

LONG = "word " * 200  # the embedded model has 128 positions
PROTOCOLS = ("greedy", "teacher_forced", "release", "text")


def records(tmp_path: Path, **changes: Any) -> Path:
    """Four records of zsRE, the second of them changed."""
    facts = run_config(["n=4"]).dataset.cases(4)
    values = [
        {
            "src": case.prompt,
            "answers": [case.target],
            "rephrase": case.paraphrases[0].prompt,
            "subject": case.subject,
            "loc": case.locality[0].prompt,
            "loc_ans": case.locality[0].answer,
        }
        for case in facts
    ]
    values[1] |= changes
    path = tmp_path / "zsre.json"
    path.write_text(json.dumps(values))
    return path


def stored(tmp_path: Path, path: Path, *overrides: str) -> RunStore:
    data = ("dataset=zsre", f"dataset.path={path}", "dataset.locality_source=record", "n=4", "checkpoints=[]")
    fast = ("method.n_steps=3", "device=cpu", "text.minilm=null", "text.bert_score=null", "text.max_new_tokens=4")
    settings = run_config([f"results_dir={tmp_path / 'results'}", *data, *fast, *overrides])
    return run(settings, Console(file=io.StringIO())).store


@pytest.mark.parametrize(
    ("family", "changes"),
    [("gen", {"rephrase": LONG + "?"}), ("loc", {"loc": LONG + "?"})],
    ids=["paraphrase", "locality"],
)
def test_a_long_probe_is_left_out_under_every_protocol(
    family: str, changes: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[str] = []

    def timing(_model: object, _encoder: object, probes: Sequence[CaseProbe]) -> float:
        timed.extend(probe.prompt for probe in probes)
        return 1.0

    monkeypatch.setattr("horen_bench.stream.inference_ms", timing)
    path = records(tmp_path, **changes)
    store = stored(tmp_path, path, f"protocol=[{','.join(PROTOCOLS)}]")
    rows = store.checkpoints().set_index("protocol")
    other = {"gen": "loc", "loc": "gen"}[family]
    for protocol in PROTOCOLS:
        metric = "_length" if protocol == "text" else ""
        row, cases = rows.loc[protocol], store.cases().query(f"protocol == '{protocol}'")
        assert (row[f"{family}{metric}_items"], row[f"{other}{metric}_items"]) == (3, 4)
        assert cases[f"{family}{metric}"].isna().tolist() == [False, True, False, False]
        assert row[f"{family}{metric}"] == pytest.approx(cases[f"{family}{metric}"].mean())
        (note,) = [line for line in row["warnings"].splitlines() if "left out" in line]
        assert f"(1 {family})" in note
        assert note.endswith(f"of case {cases['case_id'].iloc[1]}")
    assert timed
    assert not any("word word" in prompt for prompt in timed)


def test_a_long_answer_counts_where_it_is_decoded_and_not_where_the_model_writes(tmp_path: Path) -> None:
    store = stored(tmp_path, records(tmp_path, answers=[LONG]), "protocol=[greedy,teacher_forced,text]")
    rows = store.checkpoints().set_index("protocol")
    assert rows["failed_edits"].tolist() == [1, 1, 1]
    assert [rows.loc[name, "rel_items"] for name in ("greedy", "teacher_forced")] == [3, 3]
    assert rows.loc["text", "rel_length_items"] == 4


def test_a_checkpoint_whose_probes_are_all_too_long_has_no_scores(tmp_path: Path) -> None:
    path = records(tmp_path)
    values = json.loads(path.read_text())
    values[0] |= {"src": LONG + "?", "rephrase": LONG + "!", "loc": LONG + "."}
    path.write_text(json.dumps(values))
    rows = stored(tmp_path, path, "checkpoints=[1,4]").checkpoints()
    assert rows[["rel_items", "gen_items", "loc_items"]].values.tolist() == [[0, 0, 0], [3, 3, 3]]
    assert rows[["rel", "gen", "loc", "op"]].isna().all(axis=1).tolist() == [True, False]


def test_a_stream_without_a_probe_that_fits_is_refused(tmp_path: Path) -> None:
    path = records(tmp_path)
    values = [
        value | {"src": LONG + "?", "rephrase": LONG + "!", "loc": LONG + "."} for value in json.loads(path.read_text())
    ]
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="none of the 12 probes fits the model's 128 positions"):
        stored(tmp_path, path)
