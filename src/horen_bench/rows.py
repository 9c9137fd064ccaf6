"""From answers to rows: per question, per case, per checkpoint."""

from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from horen_bench.cases import EditCase
from horen_bench.editors.base import EditRecord, Route
from horen_bench.evaluation import Answer, Examiner, Question
from horen_bench.metrics.tokens import mean_interval, op_interval, overall_performance


def asked_table(
    examiner: Examiner,
    questions: Sequence[Question],
    answers: Sequence[Answer],
    base: Sequence[Answer],
    routes: Sequence[Route | None],
) -> pd.DataFrame:
    """One row per question: its score, the base model's, the answer as text, the router's decision."""
    return pd.DataFrame(
        {
            "case": question.case,
            "family": question.family,
            "score": examiner.score(question, answer, before),
            "base_score": examiner.score(question, before, before),
            "answer": examiner.text(answer),
            "entry": route.entry if route else None,
            "route_score": route.score if route else None,
            "matched": route.matched if route else None,
        }
        for question, answer, before, route in zip(questions, answers, base, routes, strict=True)
    )


def per_case(
    positions: Sequence[int],
    cases: Sequence[EditCase],
    records: Sequence[EditRecord],
    asked: pd.DataFrame,
    protocol: str,
) -> pd.DataFrame:
    """One row per case: what was written and how, and for each family of questions score and answers.

    A family's `<family>` and `<family>_base` are means over the case's questions, NaN where it has none;
    `<family>_answers`, `_entries`, `_route_scores`, `_matched` are lists over them.

    Args:
        positions: the questioned cases, as positions in the stream.
        cases: all cases up to the checkpoint, whose number is in every row (`n`).
        records: what happened to each of them.
        asked: what `asked_table` gives.
        protocol: how they were asked, in every row.
    """
    table = pd.DataFrame(
        {
            "n": len(cases),
            "protocol": protocol,
            "position": i,
            "case_id": cases[i].id,
            "prompt": cases[i].prompt,
            "target": cases[i].target,
            **{f"edit_{key}": value for key, value in asdict(replace(records[i], route=None)).items()},
            "edit_route_score": route.score if (route := records[i].route) else None,
        }
        for i in positions
    ).drop(columns=["edit_case_id", "edit_route"])
    table.index = pd.Index(positions)
    names = {"answer": "answers", "entry": "entries", "route_score": "route_scores", "matched": "matched"}
    for family, group in asked.groupby("family", sort=False):
        by_case = group.groupby("case")
        table[str(family)] = by_case["score"].mean().reindex(table.index)
        table[f"{family}_base"] = by_case["base_score"].mean().reindex(table.index)
        for column, name in names.items():
            table[f"{family}_{name}"] = by_case[column].agg(list).reindex(table.index)
    return table.reset_index(drop=True)


def summary(cases: pd.DataFrame, families: Sequence[str], seed: int) -> dict[str, float]:
    """Means over cases with 95 % intervals and item counts, and OP from the unrounded means.

    Args:
        cases: what `per_case` gives.
        families: the columns to average; Rel, Gen and Loc are always in the result, NaN where absent.
        seed: of the resampling.
    """
    scores = {name: _column(cases, name) for name in dict.fromkeys(["rel", "gen", "loc", *families])}
    means = {name: _mean(values) for name, values in scores.items()}
    rng = np.random.default_rng(seed)
    row: dict[str, float] = {}
    for name, values in scores.items():
        low, high = mean_interval(values, rng)
        row |= {name: means[name], f"{name}_low": low, f"{name}_high": high}
        row[f"{name}_items"] = int((~np.isnan(values)).sum())
        if name == "loc":
            three = (scores["rel"], scores["gen"], scores["loc"])
            row["op"] = overall_performance(means["rel"], means["gen"], means["loc"])
            row["op_low"], row["op_high"] = op_interval(*three, rng)
    row["rel_base"] = _mean(_column(cases, "rel_base"))
    row["gen_base"] = _mean(_column(cases, "gen_base"))
    return row


def _column(cases: pd.DataFrame, name: str) -> NDArray[np.float64]:
    return cases[name].to_numpy(dtype=float) if name in cases else np.full(len(cases), np.nan)


def _mean(values: NDArray[np.float64]) -> float:
    return float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")
