"""From predictions to rows: per probe, per case, per checkpoint. Only this module knows the rows' columns."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from horen_bench.cases import EditCase, EditRecord, Route, fingerprint
from horen_bench.evaluation.evaluator import Evaluator, Prediction
from horen_bench.evaluation.probes import CaseProbe
from horen_bench.metrics.token_match import mean_interval, op_interval, overall_performance

_OF_A_PROBE = ("case", "family", "score", "base_score", "prediction", "entry", "route_score", "matched")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """Columns that are the same in every row that a run writes in one session."""

    run: str  # its identity
    model: str
    method: str
    dataset: str
    seed: int
    device: str
    weights: str  # fingerprint of the unedited model
    inference_base_ms: float  # per probe, before the edits


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What the edits up to a checkpoint took, as columns."""

    edit_seconds: float  # in the editor so far
    slices: str  # how many cases the editor got at a time, e.g. `1024x3 28`: decides the order of sums
    inference_ms: float  # per probe, after the edits
    side_parameters: int  # numbers stored beside the base model
    side_memory: Mapping[str, int]  # the same by kind; columns `side_<kind>`
    peak_memory_bytes: int  # of the process or its GPUs


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """What an edited model predicted on the probes of a prefix."""

    protocol: str
    prefix: Sequence[EditCase]  # all cases up to the checkpoint
    positions: Sequence[int]  # the evaluated ones, as positions in the stream
    probes: pd.DataFrame  # what `per_probe` gives
    seconds: float  # to route and predict
    n_touched: int  # locality probes that another edit of the prefix touches
    warnings: Sequence[str]


def per_probe(
    evaluator: Evaluator,
    probes: Sequence[CaseProbe],
    predictions: Sequence[Prediction],
    base: Sequence[Prediction],
    routes: Sequence[Route | None],
) -> pd.DataFrame:
    """One row per probe: its scores, the base model's, the prediction as text, the router's decision.

    A protocol's own score is `score` and `base_score`, a named one `score_<metric>` and `base_score_<metric>`.
    """
    if not probes:
        return pd.DataFrame(columns=list(_OF_A_PROBE), dtype=float)
    scores, before = evaluator.scores(probes, predictions, base), evaluator.scores(probes, base, base)
    return pd.DataFrame(
        {
            "case": probe.case,
            "family": probe.family,
            **{f"score{_suffix(metric)}": value for metric, value in scores[i].items()},
            **{f"base_score{_suffix(metric)}": value for metric, value in before[i].items()},
            "prediction": evaluator.text(predictions[i]),
            "entry": route.entry if route else None,
            "route_score": route.score if route else None,
            "matched": route.matched if route else None,
        }
        for i, (probe, route) in enumerate(zip(probes, routes, strict=True))
    )


def per_case(
    positions: Sequence[int],
    cases: Sequence[EditCase],
    records: Sequence[EditRecord],
    probes: pd.DataFrame,
    protocol: str,
) -> pd.DataFrame:
    """One row per case: what was written and how, and for each family of probes scores and predictions.

    A family's `<family>` and `<family>_base` (`<family>_<metric>` and `<family>_<metric>_base` where scores have names)
    are means over the case's probes, NaN where it has none; `<family>_predictions`, `_entries`, `_route_scores`,
    `_matched` are lists over them.

    Args:
        positions: the evaluated cases, as positions in the stream.
        cases: all cases up to the checkpoint, whose number is in every row (`n`).
        records: what happened to each of them.
        probes: what `per_probe` gives.
        protocol: how they were evaluated, in every row.
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
    ).drop(columns=["edit_case_id", "edit_route", "edit_too_long"])
    table.index = pd.Index(positions)
    lists = {"prediction": "predictions", "entry": "entries", "route_score": "route_scores", "matched": "matched"}
    columns: dict[str, pd.Series[Any]] = {}
    for family, group in probes.groupby("family", sort=False):
        by_case = group.groupby("case")
        for suffix in suffixes(probes):
            columns[f"{family}{suffix}"] = by_case[f"score{suffix}"].mean()
            columns[f"{family}{suffix}_base"] = by_case[f"base_score{suffix}"].mean()
        columns |= {f"{family}_{name}": by_case[column].agg(list) for column, name in lists.items()}
    scores = pd.DataFrame({name: column.reindex(table.index) for name, column in columns.items()}, index=table.index)
    return pd.concat([table, scores], axis=1).reset_index(drop=True)


def rows_of(
    evaluated: Evaluated, records: Sequence[EditRecord], facts: RunFacts, costs: Costs, warnings: Sequence[str]
) -> tuple[dict[str, Any], pd.DataFrame]:
    """The row of one checkpoint under one protocol, and those of its cases.

    Args:
        evaluated: what the model predicted.
        records: what happened to each case of the prefix.
        facts: the same in every row.
        costs: what the edits took.
        warnings: sentences that whoever reads the row must know.
    """
    n, probes = len(evaluated.prefix), evaluated.probes
    cases = per_case(evaluated.positions, evaluated.prefix, records, probes, evaluated.protocol)
    written = sum(not record.too_long for record in records)
    row = {
        "n": n,
        "protocol": evaluated.protocol,
        **asdict(facts),
        "cases": fingerprint(evaluated.prefix),
        "items": len(cases),
        **summary(cases, list(probes["family"].unique()), facts.seed, suffixes(probes)),
        "loc_touched": evaluated.n_touched,
        "failed_edits": sum(record.action == "failed" for record in records),
        "slices": costs.slices,
        "edit_seconds": costs.edit_seconds,
        "eval_seconds": evaluated.seconds,
        "edits_per_second": written / costs.edit_seconds if written else math.nan,
        "inference_ms": costs.inference_ms,
        "side_parameters": costs.side_parameters,
        **{f"side_{kind}": count for kind, count in costs.side_memory.items()},
        "peak_memory_bytes": costs.peak_memory_bytes,
        "warnings": "\n".join(warnings) or None,
    }
    return row, cases


def suffixes(probes: pd.DataFrame) -> list[str]:
    """What follows a family's name in the names of its scores: nothing, or `_<metric>` each."""
    return [str(name).removeprefix("score") for name in probes.columns if str(name).startswith("score")]


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
    names = ["rel", "gen", "loc", *families] if plain else [f"{f}{suffix}" for f in families for suffix in suffixes]
    scores = {name: _column(cases, name) for name in dict.fromkeys(names)}
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
