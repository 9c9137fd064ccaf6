"""From predictions to rows, on predictions written by hand."""

import math
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest

from horen_bench.cases import EditCase, EditRecord, Probe, Route
from horen_bench.evaluation.aggregate import per_case, per_probe, summary
from horen_bench.evaluation.evaluator import Prediction
from horen_bench.evaluation.probes import probes_of
from horen_bench.evaluation.token_match import TokenMatchEvaluator, TokenMatchProtocol
from horen_bench.prompts import PromptEncoder

NAN = math.nan


class Letters:
    """A tokenizer whose ids are code points."""

    def __call__(self, texts: list[str], **_: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(map(chr, ids))


def letters(text: str) -> Prediction:
    ids = tuple(map(ord, text))
    return Prediction(ids, ids)


CASES = [
    EditCase(
        "a", "P1", "abcd", paraphrases=(Probe("Q1", "abcd"), Probe("Q2", "abcd")), locality=(Probe("L1", "xx"),),
        hard_locality={"same_subject": (Probe("H1", "yy"),)},
    ),
    EditCase("b", "P2", "ef", locality=(Probe("L2", "xx"), Probe("L3", "xx")), extras={"mhop": (Probe("M", "zz"),)}),
    EditCase("c", "P3", "gh"),
]  # fmt: skip

# In the order of `probes_of`: prompt, (edited prediction, base prediction, route).
PREDICTED: dict[str, tuple[str, str, Route | None]] = {
    "P1": ("abcd", "a", Route(0, 0.9, True)),
    "Q1": ("abcd", "zzzz", Route(0, 0.85, True)),
    "Q2": ("abzz", "zzzz", Route(1, 0.6, False)),
    "L1": ("xy", "xx", None),
    "H1": ("yy", "yy", None),
    "P2": ("e", "zz", None),
    "L2": ("xx", "xx", None),
    "L3": ("xxxx", "xx", None),
    "M": ("zz", "z", None),
    "P3": ("hg", "gh", None),
}
RECORDS = [
    EditRecord("a", "inserted", 0, Route(None, NAN, False), 0.25, 50, 0.5),
    EditRecord("b", "conflict", 1, Route(0, 0.95, True), 0.5, 40, 0.25),
    EditRecord("c", "failed", None, None, NAN, 0, 0.125, "the target is empty"),
]


def table() -> pd.DataFrame:
    evaluator = TokenMatchEvaluator(
        model=cast(Any, None),
        encoder=PromptEncoder(cast(Any, Letters())),
        protocol=TokenMatchProtocol("greedy", "generate"),
    )
    probes = probes_of(CASES)
    predictions = [letters(PREDICTED[probe.prompt][0]) for probe in probes]
    base = [letters(PREDICTED[probe.prompt][1]) for probe in probes]
    rows = per_probe(evaluator, probes, predictions, base, [PREDICTED[probe.prompt][2] for probe in probes])
    return per_case(range(len(CASES)), CASES, RECORDS, rows, "greedy")


def test_scores_are_means_over_a_cases_probes_and_missing_where_it_has_none() -> None:
    rows = table()
    np.testing.assert_array_equal(rows["rel"], [1.0, 0.5, 0.0])
    np.testing.assert_array_equal(rows["rel_base"], [0.25, 0.0, 1.0])
    np.testing.assert_array_equal(rows["gen"], [0.75, NAN, NAN])  # 1 and 2/4
    np.testing.assert_array_equal(rows["gen_base"], [0.0, NAN, NAN])
    np.testing.assert_array_equal(rows["loc"], [0.5, 0.75, NAN])  # against the base prediction: 1/2; 1 and 2/4
    np.testing.assert_array_equal(rows["same_subject"], [1.0, NAN, NAN])
    np.testing.assert_array_equal(rows["mhop"], [NAN, 1.0, NAN])  # against the given answer
    np.testing.assert_array_equal(rows["mhop_base"], [NAN, 0.5, NAN])


def test_predictions_and_routes_are_listed_probe_by_probe() -> None:
    rows = table()
    assert rows["gen_predictions"][0] == ["abcd", "abzz"]
    assert rows["gen_entries"][0] == [0, 1]
    assert rows["gen_route_scores"][0] == [0.85, 0.6]
    assert rows["gen_matched"][0] == [True, False]
    assert rows["loc_predictions"][1] == ["xx", "xxxx"]
    assert pd.isna(rows["mhop_predictions"][0])


def test_each_case_row_shows_what_was_written_and_how() -> None:
    rows = table()
    assert rows["n"].tolist() == [3, 3, 3]
    assert rows["case_id"].tolist() == ["a", "b", "c"]
    assert rows["target"].tolist() == ["abcd", "ef", "gh"]
    assert rows["edit_action"].tolist() == ["inserted", "conflict", "failed"]
    assert rows["edit_steps"].tolist() == [50, 40, 0]
    assert rows["edit_seconds"].tolist() == [0.5, 0.25, 0.125]
    np.testing.assert_array_equal(rows["edit_route_score"], [NAN, 0.95, NAN])
    assert rows["edit_problem"][2] == "the target is empty"
    assert "edit_route" not in rows


def many() -> pd.DataFrame:
    """The three cases ten times over, so that a resample without any paraphrase is out of reach."""
    cases = pd.concat([table()] * 10, ignore_index=True)
    cases.loc[3:, "same_subject"] = NAN
    return cases


def test_summary_averages_over_the_cases_that_have_the_family_and_counts_them() -> None:
    row = summary(many(), ["rel", "gen", "loc", "same_subject", "mhop"], seed=1)
    assert row["rel"] == 0.5
    assert row["gen"] == 0.75
    assert row["loc"] == 0.625
    assert row["op"] == pytest.approx((0.5 * 0.75 * 0.625) ** (1 / 3))
    assert row["rel_base"] == pytest.approx(1.25 / 3)
    assert row["gen_base"] == 0.0
    items = {name: row[f"{name}_items"] for name in ("rel", "gen", "loc", "same_subject", "mhop")}
    assert items == {"rel": 30, "gen": 10, "loc": 20, "same_subject": 1, "mhop": 10}
    assert row["rel_low"] < row["rel"] < row["rel_high"]
    assert math.isnan(row["same_subject_low"])  # one item


def test_summary_has_the_papers_columns_in_its_order() -> None:
    row = summary(many(), ["mhop"], seed=1)
    scores = [name for name in row if f"{name}_low" in row]
    assert scores == ["rel", "gen", "loc", "op", "mhop"]


def test_summary_resamples_by_its_seed() -> None:
    cases = pd.DataFrame({name: np.random.default_rng(0).random(30) for name in ("rel", "gen", "loc")})
    assert summary(cases, [], seed=1)["op_low"] == summary(cases, [], seed=1)["op_low"]
    assert summary(cases, [], seed=1)["op_low"] != summary(cases, [], seed=2)["op_low"]


def test_interval_of_op_does_not_break_when_a_resample_can_miss_a_sparse_family() -> None:
    row = summary(table(), ["rel", "gen", "loc"], seed=1)
    assert row["op"] == pytest.approx((0.5 * 0.75 * 0.625) ** (1 / 3))


def test_summary_of_a_stream_without_paraphrases_is_missing_not_zero() -> None:
    cases = pd.DataFrame({"rel": [1.0, 0.5], "loc": [1.0, 1.0]})
    row = summary(cases, ["rel", "loc"], seed=1)
    assert math.isnan(row["gen"])
    assert math.isnan(row["op"])
    assert row["gen_items"] == 0
