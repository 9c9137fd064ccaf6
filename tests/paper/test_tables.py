"""The paper's tables from rows written by hand: what stands beside what, and what is refused."""

import math
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from horen_bench.errors import UserError
from horen_bench.paper.published import compared, published
from horen_bench.paper.tables import (
    LAYOUTS,
    Layout,
    absences,
    caption,
    laid_out,
    write_audit,
    write_settings,
    write_table,
)

NAN = math.nan


def row(method: str, n: int, **changes: Any) -> dict[str, Any]:
    """A finished row of Llama on ZsRE, whose scores are those of HoReN at N = 100 in Table 9, and a bit."""
    values: dict[str, Any] = {"n": n, "protocol": "greedy", "seed": 42, "items": n, "cases": f"first {n}"}
    values |= {"model": "llama31_8b", "method": method.lower(), "dataset": "zsre", "edit_seconds": 2.0}
    values |= {"model_label": "LLaMA-3.1 8B", "method_label": method, "dataset_label": "ZsRE", "variant": ""}
    values |= {"failed_edits": 0, "warnings": None}
    values |= {"status": "finished", "reason": "", "command": "do it", "run_dir": f"runs/{method}"}
    for name, mean in {"rel": 0.99, "gen": 0.9, "loc": 1.0, "op": 0.9525}.items():
        values |= {name: mean, f"{name}_low": mean - 0.02, f"{name}_high": min(1.0, mean + 0.02)}
    return values | changes


def absent(method: str, n: int, status: str, reason: str, **changes: Any) -> dict[str, Any]:
    stored = ("rel", "gen", "loc", "op", "items", "edit_seconds")
    values = row(method, n, status=status, reason=reason, cases=None)
    return {
        key: NAN if key.split("_")[0] in stored or key in stored else value for key, value in values.items()
    } | changes


def lines(markdown: str) -> list[list[str]]:
    """Cells of each line of the tables."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line[:1] == "|"]


# --- Beside the paper --------------------------------------------------------------------------------------


def test_each_score_stands_over_its_interval_the_papers_and_the_difference(tmp_path: Path) -> None:
    rows = pd.DataFrame([row("HoReN", 100), row("HoReN", 500, gen=0.8)])
    cells = lines(write_table("table9", rows, tmp_path))
    assert cells[0][3:] == ["", *(f"N = {n}, {s} ↑" for n in (100, 500) for s in ("Rel", "Gen", "Loc", "OP"))]
    assert cells[2][2:8] == ["HoReN", "ours", "0.990", "0.900", "1.000", "0.953"]
    assert cells[3][2:8] == ["", "95 %", "0.97-1.00", "0.88-0.92", "0.98-1.00", "0.93-0.97"]
    assert cells[4][2:8] == ["", "paper", "0.99", "0.88", "1.00", "0.96"]
    assert cells[5][2:8] == ["", "difference", "+0.000", "+0.020", "+0.000", "-0.007"]  # 0.9525 - 0.96, to even
    assert cells[5][9] == "-0.120"  # Gen at N = 500: 0.80 - 0.92
    assert len(cells) == 6


@pytest.mark.parametrize("table", [name for name in LAYOUTS if name != "table7"])
def test_every_number_of_the_paper_finds_its_row(table: str) -> None:
    paper = published(table)
    keys = [name for name in ("dataset", "model", "method", "N") if name in paper]
    named = paper.drop_duplicates(keys)[keys].to_dict("records")
    labels = [{f"{part}_label": keys[part] for part in ("dataset", "model") if part in keys} for keys in named]
    rows = pd.DataFrame(
        row(keys["method"], int(keys.get("N", 1000)), **of, cases=None, inference_ms=1.0)
        for keys, of in zip(named, labels, strict=True)
    )
    long = compared(rows, paper, LAYOUTS[table].metrics)
    assert long["paper"].notna().sum() == len(paper)


def test_names_are_compared_without_punctuation() -> None:
    rows = pd.DataFrame([row("GRACE+Norm", 100), row("HoReN", 100, model_label="LLaMA 3.1-8B")])
    long = compared(rows, published("table9"), {"gen": "Gen ↑"})
    assert long["paper"].tolist() == ["0.41", "0.88"]


def test_a_variants_name_is_its_rows_name() -> None:
    rows = pd.DataFrame([row("HoReN", 100, variant="Unnormalized")])
    assert compared(rows, published("table10"), {"loc": "Loc ↑"})["paper"].tolist() == ["0.08"]


def test_the_text_tables_columns_of_unknown_n_are_set_beside_ours_in_order(tmp_path: Path) -> None:
    text = {
        "dataset_label": "UnKE",
        "protocol": "text",
        "rel_bleu1_bp": 0.2,
        "rel_bleu1_bp_low": 0.1,
        "rel_bleu1_bp_high": 0.3,
        "rel_bleu1_bp_base": 0.15,
    }
    rows = pd.DataFrame([row(method, n, **text) for n in (50, 200, 500) for method in ("UnKE", "HoReN")])
    cells = lines(write_table("table7", rows, tmp_path))
    assert cells[0][4:] == [f"N = {n}, {method}" for n in (50, 200, 500) for method in ("UnKE", "HoReN")]
    assert cells[2][2:] == ["Original, BLEU ↑", "ours", *["0.200"] * 6]
    assert cells[4][2:] == ["", "unedited", *["0.150"] * 6]
    assert cells[5][2:] == ["", "paper", "0.191", "0.143", "0.202", "0.126", "0.098", "0.117"]
    assert cells[6][2:5] == ["", "difference", "+0.009"]
    cosine = next(i for i, line in enumerate(cells) if line[2] == "Original, MiniLM cosine ↑")
    assert cells[cosine + 1][3:5] == ["paper", "0.713"]  # what the paper calls BERTScore
    assert ["Paraphrase, ROUGE-L ↑", "ours", *["--"] * 6] in [line[2:] for line in cells]


def test_cost_is_per_edit_and_memory_in_millions(tmp_path: Path) -> None:
    cost = {
        "inference_ms": 110.0,
        "inference_base_ms": 90.0,
        "side_keys": 4_000_000,
        "side_values": 500_000,
        "side_modified": 0,
    }
    cells = lines(write_table("table5", pd.DataFrame([row("HoReN", 1000, **cost)]), tmp_path))
    assert cells[2][2:] == ["HoReN", "1000", "ours", "2.000", "110.000", "90.000", "4.000", "0.500", "0.000"]
    assert cells[3][4:] == ["paper", "1670", "100", *["--"] * 4]
    assert cells[4][4:] == ["difference", "-1668.000", "+10.000", *["--"] * 4]


# --- What is missing ---------------------------------------------------------------------------------------


def test_missing_numbers_are_dashes_beside_the_papers_and_are_explained(tmp_path: Path) -> None:
    rows = pd.DataFrame([
        row("HoReN", 100),
        absent("GRACE", 100, "failed", "RuntimeError: boom"),
        absent("GRACE", 500, "failed", "RuntimeError: boom"),
        absent("HoReN", 100, "not run", "no weights", model_label="other", command="fetch"),
        absent("GRACE", 100, "not run", "no weights", model_label="other", command="fetch"),
    ])  # fmt: skip
    markdown = write_table("table9", rows, tmp_path)
    cells = lines(markdown)
    assert cells[7][:8] == ["", "", "", "paper", "1.0", "0.06", "1.0", "0.40"]
    assert cells[6][2:] == ["GRACE", "ours", *["--"] * 8]
    assert "- LLaMA-3.1 8B, GRACE, N = 100, 500: failed: RuntimeError: boom; `do it`" in markdown
    assert "- other, HoReN, GRACE, N = 100: not run: no weights; `fetch`" in markdown
    assert markdown.count("\n- ") == 2


def test_a_score_of_zero_is_no_missing_one() -> None:
    long = compared(pd.DataFrame([row("HoReN", 100, rel=0.0)]), published("table9"), {"rel": "Rel ↑"})
    assert laid_out(long, Layout({"rel": "Rel ↑"})).iloc[0, 0] == "0.000"


def test_what_the_runs_say_stands_below_their_table(tmp_path: Path) -> None:
    rows = pd.DataFrame([
        row("HoReN", 100, gen_items=90, mhop=0.1, mhop_low=0.0, mhop_high=0.2, mhop_items=3),
        row("GRACE", 100, warnings="a turn is 5 edits", failed_edits=2),
        absent("GRACE", 500, "not run", "why"),
    ])  # fmt: skip
    markdown = write_table("table9", rows, tmp_path)
    assert "- LLaMA-3.1 8B, HoReN, ZsRE: N=100: gen covers 90 of 100 cases" in markdown
    assert "- LLaMA-3.1 8B, GRACE, ZsRE: N=100: 2 edits failed" in markdown
    assert "- LLaMA-3.1 8B, GRACE, ZsRE: a turn is 5 edits" in markdown
    assert "mhop" not in markdown


# --- Protocols ---------------------------------------------------------------------------------------------


def test_two_protocols_never_share_a_table(tmp_path: Path) -> None:
    rows = pd.DataFrame([row("HoReN", 100), row("HoReN", 100, protocol="release", rel=0.5)])
    markdown = write_table("table9", rows, tmp_path)
    assert re.findall(r"Protocol (\w+)", markdown) == ["greedy", "release"]
    assert [line[4] for line in lines(markdown) if line[3] == "ours"] == ["0.990", "0.500"]
    assert (tmp_path / "table9.tex").read_text().count(r"\begin{longtable}") == 2


def test_the_audit_sets_the_protocols_of_the_same_edits_side_by_side(tmp_path: Path) -> None:
    rows = pd.DataFrame([row("HoReN", 100), row("HoReN", 100, protocol="release", rel=0.5)])
    cells = lines(write_audit(rows, tmp_path))
    assert cells[0][4:6] == ["Rel ↑, greedy", "Rel ↑, release"]
    assert cells[2][4:8] == ["0.990", "0.500 (-0.490)", "0.900", "0.900 (+0.000)"]


# --- Refusals ----------------------------------------------------------------------------------------------


def test_two_rows_about_the_same_are_refused_by_name() -> None:
    rows = pd.DataFrame([row("HoReN", 100), row("HoReN", 100, seed=7, run_dir="runs/other")])
    with pytest.raises(
        UserError, match=r"HoReN, ZsRE has 2 rows at N=100 under protocol greedy \(runs/HoReN, runs/other\)"
    ):
        compared(rows, published("table9"), LAYOUTS["table9"].metrics)


def test_rows_about_other_cases_are_refused() -> None:
    rows = pd.DataFrame([row("HoReN", 100), row("GRACE", 100, cases="others")])
    with pytest.raises(
        UserError, match=r"the rows of zsre at N=100 are about different cases \(runs/HoReN, runs/GRACE"
    ):
        compared(rows, published("table9"), LAYOUTS["table9"].metrics)


# --- Captions and files ------------------------------------------------------------------------------------


def test_a_caption_says_protocol_seed_and_items() -> None:
    rows = pd.DataFrame([row("HoReN", 100), row("HoReN", 10_000, items=2000)])
    text = caption("table4", compared(rows, published("table4"), LAYOUTS["table4"].metrics))
    assert "Protocol greedy; cases evaluated: 100 at N = 100, 2,000 at N = 10,000; seed 42." in text
    nothing = compared(pd.DataFrame([absent("HoReN", 100, "not run", "why")]), published("table4"), {"rel": "Rel ↑"})
    assert "nothing of ours yet" in caption("table4", nothing)
    assert absences(nothing) == ["LLaMA-3.1 8B, HoReN, N = 100: not run: why; `do it`"]


def test_the_csv_keeps_what_the_layout_leaves_out_and_latex_is_escaped(tmp_path: Path) -> None:
    write_table("table9", pd.DataFrame([row("HoReN", 100)]), tmp_path)
    kept = pd.read_csv(tmp_path / "table9.csv", dtype={"paper": str})
    first = kept.iloc[0]
    assert first["paper"] == "0.99"
    assert (first["ours"], first["items"], first["seed"], first["run_dir"]) == (0.99, 100, 42, "runs/HoReN")
    latex = (tmp_path / "table9.tex").read_text()
    for part in (r"95 \%", r"Rel $\uparrow$", r"\toprule", r"\multirow"):
        assert part in latex
    assert not re.search(r"(?<!\\)%", latex)


def test_no_sign_of_a_label_is_read_by_latex(tmp_path: Path) -> None:
    """In the index, which is what labels of methods, datasets and variants become."""
    label = r"A#1 $x^2$ {y}_z ~50% R&D \end"
    write_table("table9", pd.DataFrame([row("HoReN", 100, method_label=label)]), tmp_path)
    printed = r"A\#1 \$x\textasciicircum{}2\$ \{y\}\_z \textasciitilde{}50\% R\&D \textbackslash{}end"
    assert printed in (tmp_path / "table9.tex").read_text()


def test_settings_stand_beside_the_papers_under_the_hubs_names(tmp_path: Path) -> None:
    llama = {"model": "LLaMA-3 8B", "hub_id": "meta-llama/Meta-Llama-3-8B-Instruct", "threshold": 0.85}
    tiny = {"model": "tiny", "hub_id": "embedded:tiny", "threshold": 0.8}
    settings = pd.DataFrame([llama | {"pooling_percent": 50.0}, tiny | {"pooling_percent": 60.0}])
    cells = lines(write_settings(settings, tmp_path))
    assert cells[2][:4] == ["LLaMA-3 8B", "0.85", "0.80", "+0.05"]
    assert cells[3] == ["tiny", "0.8", "--", "--", "60", "--", "--"]
