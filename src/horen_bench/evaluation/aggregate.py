"""From answers to rows: per question, per case, per checkpoint."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from horen_bench.cases import EditCase
from horen_bench.editors.base import EditRecord, Route
from horen_bench.evaluation import Answer, Examiner, Question
from horen_bench.metrics.token_match import mean_interval, op_interval, overall_performance


def asked_table(
    examiner: Examiner,
    questions: Sequence[Question],
    answers: Sequence[Answer],
    base: Sequence[Answer],
    routes: Sequence[Route | None],
) -> pd.DataFrame:
    """One row per question: its scores, the base model's, the answer as text, the router's decision.

    A protocol's own score is `score` and `base_score`, a named one `score_<metric>` and `base_score_<metric>`.
    """
    scores, before = examiner.scores(questions, answers, base), examiner.scores(questions, base, base)
    return pd.DataFrame(
        {
            "case": question.case,
            "family": question.family,
            **{f"score{_suffix(metric)}": value for metric, value in scores[i].items()},
            **{f"base_score{_suffix(metric)}": value for metric, value in before[i].items()},
            "answer": examiner.text(answers[i]),
            "entry": route.entry if route else None,
            "route_score": route.score if route else None,
            "matched": route.matched if route else None,
        }
        for i, (question, route) in enumerate(zip(questions, routes, strict=True))
    )


def per_case(
    positions: Sequence[int],
    cases: Sequence[EditCase],
    records: Sequence[EditRecord],
    asked: pd.DataFrame,
    protocol: str,
) -> pd.DataFrame:
    """One row per case: what was written and how, and for each family of questions score and answers.

    A family's `<family>` and `<family>_base` (`<family>_<metric>` and `<family>_<metric>_base` where scores have names)
    are means over the case's questions, NaN where it has none; `<family>_answers`, `_entries`, `_route_scores`,
    `_matched` are lists over them.

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
    columns: dict[str, pd.Series[Any]] = {}
    for family, group in asked.groupby("family", sort=False):
        by_case = group.groupby("case")
        for suffix in suffixes(asked):
            columns[f"{family}{suffix}"] = by_case[f"score{suffix}"].mean()
            columns[f"{family}{suffix}_base"] = by_case[f"base_score{suffix}"].mean()
        columns |= {f"{family}_{name}": by_case[column].agg(list) for column, name in names.items()}
    found = pd.DataFrame({name: column.reindex(table.index) for name, column in columns.items()}, index=table.index)
    return pd.concat([table, found], axis=1).reset_index(drop=True)


def suffixes(asked: pd.DataFrame) -> list[str]:
    """What follows a family's name in the names of its scores: nothing, or `_<metric>` each."""
    return [str(name).removeprefix("score") for name in asked.columns if str(name).startswith("score")]


def summary(
    cases: pd.DataFrame, families: Sequence[str], seed: int, suffixes: Sequence[str] = ("",)
) -> dict[str, float]:
    """Means over cases with 95 % intervals and item counts, OP from the unrounded means, and means before the edits.

    Args:
        cases: what `per_case` gives.
        families: the columns to average; Rel, Gen and Loc are always in the result, NaN where absent, unless scores
            have names.
        seed: of the resampling.
        suffixes: ends of the names of each family's scores.
    """
    plain = list(suffixes) == [""]
    chosen = ["rel", "gen", "loc", *families] if plain else [f"{f}{suffix}" for f in families for suffix in suffixes]
    scores = {name: _column(cases, name) for name in dict.fromkeys(chosen)}
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
    before = ["rel", "gen"] if plain else list(scores)
    return row | {f"{name}_base": _mean(_column(cases, f"{name}_base")) for name in before}


def _suffix(metric: str) -> str:
    return f"_{metric}" if metric else ""


def _column(cases: pd.DataFrame, name: str) -> NDArray[np.float64]:
    return cases[name].to_numpy(dtype=float) if name in cases else np.full(len(cases), np.nan)


def _mean(values: NDArray[np.float64]) -> float:
    return float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")
