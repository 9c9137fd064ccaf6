"""Our numbers beside the paper's: one long frame, a row per cell, N, protocol and score."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from horen_bench.errors import UserError
from horen_bench.paths import resource
from horen_bench.results.columns import TEXT_FAMILIES, TEXT_METRICS

# What the paper calls BERTScore is, in the release, the cosine of two MiniLM embeddings.
_TEXT_METRICS = {head: metric for metric, head in TEXT_METRICS.items()} | {"BERTScore": "minilm_cosine"}
_KEYS = ("dataset", "model", "method", "N", "metric")  # what makes a number of ours and one of the paper the same


def published(table: str) -> pd.DataFrame:
    """The paper's numbers as text, one row per score, with those of `dataset`, `model`, `method`, `N` that it names."""
    wide = pd.read_csv(resource("baselines") / "paper" / f"{table}.csv", dtype=str)
    wide = wide.rename(columns={"n": "N"})
    if table == "table7":
        families = {head: family for family, head in TEXT_FAMILIES.items()}
        wide["metric"] = wide["split"].map(families) + "_" + wide["metric"].map(_TEXT_METRICS)
        return wide.rename(columns={"value": "paper"}).drop(columns="split")
    names = [name for name in ("dataset", "model", "method", "N") if name in wide]
    return wide.melt(names, var_name="metric", value_name="paper")


def compared(rows: pd.DataFrame, paper: pd.DataFrame, metrics: Mapping[str, str]) -> pd.DataFrame:
    """One row per cell, N, protocol and score: ours, its interval, the unedited model's, the paper's, ours minus that.

    Args:
        rows: what `grids.collect` gives.
        paper: what `published` gives.
        metrics: columns of the rows, and their heads.

    Raises:
        UserError: two rows are about the same, or two that are compared are about other cases.
    """
    _refuse_duplicates(rows)
    _refuse_other_cases(rows)
    rows = _with_costs(rows)
    long = pd.DataFrame([_number(row, name, head) for row in rows.to_dict("records") for name, head in metrics.items()])
    paper = _in_order(paper, long)
    shared = [name for name in _KEYS if name in paper]
    ours_key, paper_key = _key(long, shared), _key(paper, shared)
    by_key = dict(zip(paper_key, paper["paper"], strict=True))
    long["paper"] = [by_key.get(key) for key in ours_key]
    long["difference"] = long["ours"] - pd.to_numeric(long["paper"])
    return long


def _number(row: Mapping[Any, Any], name: str, head: str) -> dict[str, Any]:
    own = ("dataset", "model")
    return {
        **{part: row[f"{part}_label"] for part in own},
        "method": row["variant"] or row["method_label"],
        "N": row["n"],
        "protocol": row["protocol"],
        "metric": name,
        "score": head,
        "ours": row.get(name, float("nan")),
        "low": row.get(f"{name}_low", float("nan")),
        "high": row.get(f"{name}_high", float("nan")),
        "unedited": row.get(f"{name}_base", float("nan")),
        "seed": row["seed"],
        "items": row.get(f"{name}_items", row.get("items", float("nan"))),
        **{part: row[part] for part in ("status", "reason", "command", "run_dir")},
    }


def _with_costs(rows: pd.DataFrame) -> pd.DataFrame:
    """With milliseconds per edit, and side memory in millions."""
    rows = rows.copy()
    if "edit_seconds" in rows:
        rows["edit_ms"] = 1000 * rows["edit_seconds"] / rows["n"]
    for name in ("side_keys", "side_values", "side_modified"):
        if name in rows:
            rows[name] = rows[name] / 1e6
    return rows


def _in_order(paper: pd.DataFrame, long: pd.DataFrame) -> pd.DataFrame:
    """The paper's numbers with our N for those columns of it whose N are lost."""
    if "n_column" not in paper:
        return paper
    same = long[long["dataset"].map(plain_name) == plain_name(paper["dataset"].iloc[0])]
    ours = dict(zip(sorted(paper["n_column"].unique()), sorted(same["N"].unique()), strict=False))
    return paper.assign(N=paper["n_column"].map(ours)).drop(columns="n_column")


def _key(frame: pd.DataFrame, names: Sequence[str]) -> list[tuple[str, ...]]:
    """Names without capitals and punctuation, which the paper does not always write the same way."""
    columns = [frame[name].map(plain_name if name != "metric" else str) for name in names]
    return list(zip(*columns, strict=True))


def plain_name(name: object) -> str:
    """A name without capitals and punctuation."""
    return re.sub(r"[^a-z0-9]", "", str(name).lower())


def _refuse_duplicates(rows: pd.DataFrame) -> None:
    names = ["model_label", "method_label", "dataset_label", "variant", "n", "protocol"]
    twice = rows[rows.duplicated(names, keep=False)]
    if len(twice):
        first = twice.iloc[0]
        where = twice[(twice[names] == first[names]).all(axis=1)]["run_dir"]
        raise UserError(
            f"{first['model_label']}, {first['method_label']}, {first['dataset_label']} has {len(where)} rows at "
            f"N={first['n']} under protocol {first['protocol']} ({', '.join(where)}); a table shows one of them: "
            "choose it by its settings"
        )


def _refuse_other_cases(rows: pd.DataFrame) -> None:
    """Rows of one dataset and N must be about the same cases, or their difference says nothing about the methods."""
    if "cases" not in rows:
        return
    stored = rows.dropna(subset="cases")
    for (dataset, n), part in stored.groupby(["dataset", "n"]):
        if part["cases"].nunique() > 1:
            places = part.drop_duplicates("cases")["run_dir"].tolist()
            raise UserError(
                f"the rows of {dataset} at N={n} are about different cases ({', '.join(places)}; the data changed "
                "between the runs); run one of them again with force=true"
            )
