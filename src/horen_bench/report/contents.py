"""What the page shows of the runs, as plain values for its script."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from horen_bench.report.runs import StoredRun
from horen_bench.results.columns import COSTS, MAIN, TEXT_FAMILIES, TEXT_METRICS, printed, text_family
from horen_bench.results.console import score_columns

MOST_CHARACTERS = 400  # of a prompt, target or prediction; ours
_LISTS = (np.ndarray, list)


def contents(runs: Sequence[tuple[StoredRun, str]], most_cases: int) -> dict[str, Any]:
    """Runs, their curves and a sample of their cases; JSON has no NaN, so a missing value is None.

    Args:
        runs: the runs to show, each with what sets it apart (`runs.variants`).
        most_cases: so many cases of a run and protocol at most, evenly spread over the stream.
    """
    return {
        "scores": [
            {"name": name, "label": printed(name), "group": _group(name)}
            for name in _score_names(run for run, _ in runs)
        ],
        "runs": [
            {
                "run": run.name,
                **{part: run.label(part) for part in ("model", "dataset", "method")},
                "variant": variant,
                "curves": {str(name): _curves(rows) for name, rows in run.rows.groupby("protocol", sort=False)},
                "cases": {
                    str(name): _sample(cases, most_cases)
                    for name, cases in (run.cases.groupby("protocol", sort=False) if len(run.cases) else ())
                },
            }
            for run, variant in runs
        ],
    }


def _group(score: str) -> str:
    if score in MAIN:
        return "scores"
    if score in COSTS:
        return "cost"
    return "text scores" if text_family(score) else "further probes"


def _score_names(runs: Iterable[StoredRun]) -> list[str]:
    """The paper's scores, then the others as the rows have them, then costs."""
    stored = dict.fromkeys(name for run in runs for name in score_columns(run.rows))
    return [*(name for name in MAIN if name in stored), *(name for name in stored if name not in MAIN), *COSTS]


def _curves(rows: pd.DataFrame) -> dict[str, Any]:
    """Per score the value, low and high end of each checkpoint; scores without a value are left out."""
    names = [name for name in [*score_columns(rows), *COSTS] if name in rows and rows[name].notna().any()]
    return {
        "n": rows["n"].tolist(),
        "items": rows["items"].tolist(),
        "scores": {
            name: [[_number(row.get(f"{name}{end}")) for end in ("", "_low", "_high")] for _, row in rows.iterrows()]
            for name in names
        },
    }


def _sample(cases: pd.DataFrame, most: int) -> dict[str, Any]:
    places = np.unique(np.linspace(0, len(cases) - 1, min(most, len(cases))).round().astype(int))
    names = [str(name) for name in cases.columns]
    families = [name.removesuffix("_predictions") for name in names if name.endswith("_predictions")]
    rows = cases.iloc[places].to_dict("records")
    return {"n": int(cases["n"].iloc[0]), "total": len(cases), "rows": [_case(row, families) for row in rows]}


def _case(row: Mapping[Any, Any], families: Sequence[str]) -> dict[str, Any]:
    return {
        "position": int(row["position"]),
        "id": str(row["case_id"]),
        "prompt": _text(row["prompt"]),
        "target": _text(row["target"]),
        "edit": _edit(row),
        "families": [_family(row, name) for name in families if isinstance(row[f"{name}_predictions"], _LISTS)],
    }


def _edit(row: Mapping[Any, Any]) -> str:
    """What the editor did with the case, in a few words."""
    parts = [str(row["edit_action"])]
    for key, words in (("edit_entry", "entry {:.0f}"), ("edit_steps", "{:.0f} steps"), ("edit_loss", "loss {:.3g}")):
        if not _is_missing(row.get(key)):
            parts.append(words.format(row[key]))
    if not _is_missing(row.get("edit_problem")):
        parts.append(str(row["edit_problem"]))
    return ", ".join(parts)


def _family(row: Mapping[Any, Any], family: str) -> list[Any]:
    """Name, score now and before the edits, text scores, and per probe prediction, entry, route score, matched."""
    columns = [row[f"{family}_{name}"] for name in ("predictions", "entries", "route_scores", "matched")]
    probes = [
        [_text(prediction), _number(entry), _number(score), None if _is_missing(matched) else bool(matched)]
        for prediction, entry, score, matched in zip(*columns, strict=True)
    ]
    text = {name: _number(row[key]) for metric, name in TEXT_METRICS.items() if (key := f"{family}_{metric}") in row}
    name = TEXT_FAMILIES[family] if text else printed(family)
    return [name, _number(row.get(family)), _number(row.get(f"{family}_base")), text, probes]


def _text(value: object) -> str:
    text = str(value)
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + "…"


def _number(value: Any) -> float | None:
    """Five significant digits; None where the value is missing."""
    if _is_missing(value):
        return None
    short = float(f"{float(value):.5g}")
    return int(short) if short.is_integer() else short


def _is_missing(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float | np.floating) and not math.isfinite(value))
