"""Tables made from stored rows; nothing here runs or measures anything."""

from collections.abc import Sequence

import pandas as pd
from rich.console import Group
from rich.table import Table
from rich.text import Text

from horen_bench.results.columns import MAIN

MISSING = "--"
_LONG = {"rel": "Original", "gen": "Para", "sub_question": "Sub"}  # as the paper's Table 7 calls them
_MAIN = {name: f"{head} ↑" for name, head in MAIN.items()}


def score_columns(rows: pd.DataFrame) -> list[str]:
    """Names of the scores in checkpoint rows: those that have an interval, and are of a protocol among the rows."""
    names = [name for name in rows.columns if f"{name}_low" in rows.columns]
    return [name for name in names if f"{name}_items" not in rows or rows[f"{name}_items"].notna().any()]


def checkpoint_tables(rows: pd.DataFrame) -> Group:
    """One run's checkpoints, protocol by protocol: the paper's scores with their cost, and the further probes.

    Under each score stands its 95 % bootstrap interval over cases.
    """
    return Group(
        *(
            _long_form(part) if protocol == "text" else _one_protocol(part)
            for protocol, part in rows.groupby("protocol", sort=False)
        )
    )


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


def _long_form(rows: pd.DataFrame) -> Group:
    """A table per checkpoint: a line per score, a column per family of probes, and before the edits, Original."""
    first = rows.iloc[0]
    names = score_columns(rows)
    families = [name.removesuffix("_length") for name in names if name.endswith("_length")]
    metrics = [name.removeprefix("rel_") for name in names if name.startswith("rel_")]
    tables: list[Table | Text] = []
    for _, row in rows.iterrows():
        table = Table(title=f"{first['method']} on {first['model']}, {first['dataset']}, N={row['n']}")
        for head in ("score", *(_LONG.get(family, family) for family in families), "before"):
            table.add_column(head, justify="left" if head == "score" else "right", no_wrap=True)
        for metric in metrics:
            cells = [_score(row, f"{family}_{metric}") for family in families]
            table.add_row(metric, *cells, _number(row[f"rel_{metric}_base"]))
        per_edit = _number(1000 * row["edit_seconds"] / row["n"], 1)
        cost = f"{per_edit} ms/edit, evaluation {_number(row['eval_seconds'], 1)} s"
        tables += [table, Text(cost, style="dim")]
    caption = f"protocol text, seed {first['seed']}; below a score: its 95 % interval over cases; length in words"
    return Group(*tables, Text(caption, style="dim"))


def notes(rows: pd.DataFrame) -> list[str]:
    """What a reader of the rows must know: incomplete coverage, failed edits, the run's own warnings."""
    sentences: list[str] = []
    for _, row in rows.iterrows():
        for name in score_columns(rows):
            items = row.get(f"{name}_items", row["items"])
            explained = row["protocol"] == "text" and not items  # a warning tells why the whole score is missing
            if items < row["items"] and not explained:
                sentences.append(f"N={row['n']}: {name} covers {int(items)} of {row['items']} cases")
        if row["items"] < row["n"]:
            sentences.append(f"N={row['n']}: {row['items']} cases were evaluated, a fixed random sample")
        if row["failed_edits"]:
            sentences.append(f"N={row['n']}: {row['failed_edits']} edits failed; see edit_problem in cases.parquet")
    return [*_unique(sentences), *_unique(rows["warnings"].dropna().tolist())]


def _unique(texts: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(line for text in texts for line in text.splitlines()))


def _score(row: "pd.Series[float]", name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return _number(row[name]) + ("" if pd.isna(low) else f"\n{low:.2f}-{high:.2f}")


def _number(value: float, digits: int = 3) -> str:
    return MISSING if pd.isna(value) else f"{value:.{digits}f}"
