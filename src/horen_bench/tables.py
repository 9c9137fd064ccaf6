"""Tables made from stored rows; nothing here runs or measures anything."""

from collections.abc import Sequence

import pandas as pd
from rich.console import Group
from rich.table import Table
from rich.text import Text

MISSING = "--"
_MAIN = {"rel": "Rel ↑", "gen": "Gen ↑", "loc": "Loc ↑", "op": "OP ↑"}


def score_columns(rows: pd.DataFrame) -> list[str]:
    """Names of the scores in checkpoint rows: those that have an interval."""
    return [name for name in rows.columns if f"{name}_low" in rows.columns]


def checkpoint_tables(rows: pd.DataFrame) -> Group:
    """One run's checkpoints, protocol by protocol: the paper's scores with their cost, and the further probes.

    Under each score stands its 95 % bootstrap interval over cases.
    """
    return Group(*(_one_protocol(part) for _, part in rows.groupby("protocol", sort=False)))


def _one_protocol(rows: pd.DataFrame) -> Group:
    first = rows.iloc[0]
    further = [name for name in score_columns(rows) if name not in _MAIN]
    main = Table(title=f"{first['method']} on {first['model']}, {first['dataset']}")
    probes = Table(title="further probes, and the model before the edits")
    for head in ("N", *_MAIN.values(), "ms/edit", "eval s"):
        main.add_column(head, justify="right", no_wrap=True)
    for head in ("N", *further, "Rel before", "Gen before"):
        probes.add_column(head, justify="right")
    for _, row in rows.iterrows():
        main.add_row(
            str(row["n"]),
            *(_score(row, name) for name in _MAIN),
            _number(1000 * row["edit_seconds"] / row["n"], 1),
            _number(row["eval_seconds"], 1),
        )
        before = (_number(row["rel_base"]), _number(row["gen_base"]))
        probes.add_row(str(row["n"]), *(_score(row, name) for name in further), *before)
    caption = f"protocol {first['protocol']}, seed {first['seed']}; below a score: its 95 % interval over cases"
    return Group(main, probes, Text(caption, style="dim"))


def notes(rows: pd.DataFrame) -> list[str]:
    """What a reader of the rows must know: incomplete coverage, failed edits, the run's own warnings."""
    found: list[str] = []
    for _, row in rows.iterrows():
        for name in score_columns(rows):
            items = row.get(f"{name}_items", row["items"])
            if items < row["items"]:
                found.append(f"N={row['n']}: {name} covers {int(items)} of {row['items']} cases")
        if row["items"] < row["n"]:
            found.append(f"N={row['n']}: {row['items']} cases were questioned, a fixed random sample")
        if row["failed_edits"]:
            found.append(f"N={row['n']}: {row['failed_edits']} edits failed; see edit_problem in cases.parquet")
    return [*_unique(found), *_unique(rows["warnings"].dropna().tolist())]


def _unique(texts: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(line for text in texts for line in text.splitlines()))


def _score(row: "pd.Series[float]", name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return _number(row[name]) + ("" if pd.isna(low) else f"\n{low:.2f}-{high:.2f}")


def _number(value: float, digits: int = 3) -> str:
    return MISSING if pd.isna(value) else f"{value:.{digits}f}"
