"""What is printed of a run, from rows written by hand."""

import io
import math
from typing import Any

import pandas as pd
from rich.console import Console

from horen_bench.results.console import checkpoint_tables, notes, score_columns

NAN = math.nan


def row(n: int, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"n": n, "run": "x", "model": "tiny", "method": "horen", "dataset": "facts"}
    values |= {"protocol": "greedy", "seed": 42, "items": n}
    for name, mean in {"rel": 1.0, "gen": 0.8436, "loc": 0.95, "op": 0.9285, "mhop": 0.25}.items():
        values |= {name: mean, f"{name}_low": mean - 0.05, f"{name}_high": mean + 0.05}
        if name != "op":
            values[f"{name}_items"] = n
    values |= {"rel_base": 0.1, "gen_base": 0.125, "failed_edits": 0, "edit_seconds": 3.0, "eval_seconds": 1.24}
    return values | {"warnings": None} | changes


def printed(rows: pd.DataFrame, width: int = 120) -> list[list[str]]:
    """Cells of each printed line that has any."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(checkpoint_tables(rows))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    lines = [line.replace("┃", "│").split("│") for line in text.splitlines()]
    return [[cell.strip() for cell in line[1:-1]] if len(line) > 1 else [line[0].strip()] for line in lines]


def test_both_tables_show_each_score_over_its_interval_and_the_cost() -> None:
    lines = printed(pd.DataFrame([row(20), row(60, eval_seconds=10.0)]))
    for line in (
        ["horen on tiny, facts"],
        ["N", "Rel ↑", "Gen ↑", "Loc ↑", "OP ↑", "ms/edit", "eval s"],
        ["20", "1.000", "0.844", "0.950", "0.928", "150.0", "1.2"],  # 3 s / 20 edits
        ["", "0.95-1.05", "0.79-0.89", "0.90-1.00", "0.88-0.98", "", ""],
        ["60", "1.000", "0.844", "0.950", "0.928", "50.0", "10.0"],
        ["N", "mhop", "Rel before", "Gen before"],
        ["20", "0.250", "0.100", "0.125"],
        ["protocol greedy, seed 42; below a score: its 95 % interval over cases"],
    ):
        assert line in lines


def test_what_is_missing_is_shown_as_missing_and_never_as_zero() -> None:
    rows = pd.DataFrame([row(20, mhop=NAN, mhop_low=NAN, mhop_high=NAN, gen=0.0, gen_low=NAN, gen_high=NAN)])
    lines = printed(rows)
    assert ["20", "--", "0.100", "0.125"] in lines
    assert ["20", "1.000", "0.000", "0.950", "0.928", "150.0", "1.2"] in lines


def test_scores_are_the_columns_with_an_interval() -> None:
    assert score_columns(pd.DataFrame([row(20)])) == ["rel", "gen", "loc", "op", "mhop"]


def test_a_clean_run_needs_no_note() -> None:
    assert notes(pd.DataFrame([row(20), row(60)])) == []


def test_notes_say_what_is_incomplete_and_each_warning_once() -> None:
    rows = pd.DataFrame([
        row(20, loc_items=15, warnings="first\nsecond"),
        row(60, mhop_items=2, failed_edits=3, warnings="second"),
    ])  # fmt: skip
    assert notes(rows) == [
        "N=20: loc covers 15 of 20 cases",
        "N=60: mhop covers 2 of 60 cases",
        "N=60: 3 edits failed; see edit_problem in cases.parquet",
        "first",
        "second",
    ]
