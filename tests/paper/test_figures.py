"""Figures by their names, from rows that a run would have left."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from horen_bench.paper import __main__ as command
from horen_bench.paper import figures
from horen_bench.paper.__main__ import main
from horen_bench.paper.estimate import PlannedRun
from horen_bench.paper.figures import FIGURES
from horen_bench.paper.grids import Cell, cells, experiments


def grid(name: str, *overrides: str) -> list[Cell]:
    return cells(FIGURES[name].grid, ["suite=tiny", *overrides])


def store(cell: Cell, n: int, gen: float = 0.5) -> None:
    """What a run leaves of a checkpoint."""
    scores = {"rel": 1.0, "gen": gen, "loc": 1.0, "op": 0.8, "same_subject": 0.9}
    intervals = {f"{name}_{end}": value for name, value in scores.items() for end in ("low", "high")}
    row: dict[str, Any] = {"n": n, "protocol": "greedy", **cell.names, "device": "cpu", "items": n}
    position = {"n": n, "protocol": "greedy", "position": range(n), "rel": 1.0, "gen": gen, "loc": 1.0}
    cell.store.add_checkpoint({**row, **scores, **intervals, "warnings": None}, pd.DataFrame(position))


def written(name: str) -> pd.DataFrame:
    assert all(Path("results/figures", f"{name}{suffix}").exists() for suffix in (".svg", ".png"))
    return pd.read_csv(Path("results/figures", f"{name}.csv"))


def stored(names: str, *overrides: str) -> int:
    return main([names, "suite=tiny", "--stored", *overrides])


def test_every_figure_has_a_grid() -> None:
    assert {spec.grid for spec in FIGURES.values()} <= set(experiments())


def test_the_figures_along_the_stream_share_their_runs(capsys: pytest.CaptureFixture[str]) -> None:
    for cell in grid("figure1"):
        for n in (100, 500, 1000):
            store(cell, n)
    assert {FIGURES[name].grid for name in ("figure5", "figure6", "figure7", "figure8")} == {"figure1"}
    assert stored("figure1,figure5,figure7") == 0, capsys.readouterr().err
    rows = written("figure1")
    finished = rows[rows["status"] == "finished"]
    assert set(finished["n"]) == {100, 500, 1000}
    assert set(finished["method_label"]) == {"ROME", "GRACE", "WISE", "AlphaEdit", "UltraEdit", "HoReN"}
    assert rows.loc[rows["status"] != "finished", "op"].isna().all()
    assert "gen" in written("figure7")
    written("figure5")
    early = pd.read_csv("results/figures/figure5_early.csv")
    assert set(early["n"]) == {500, 1000}
    assert set(early["items"]) == {500}
    paper = pd.read_csv("results/figures/figure1_paper.csv")
    assert set(paper["model"]) == {"LLaMA-3.1 8B"}


def test_swept_settings_are_columns(capsys: pytest.CaptureFixture[str]) -> None:
    steps, ratios = ("method.hopfield.alpha=0.1,0.5", "method.hopfield.steps=0,2"), ("method.pooling_ratio=0.3,1.0",)
    for cell in grid("figure10", *steps):
        store(cell, 500, gen=cell.config.method["hopfield"]["steps"] / 10)
    for cell in grid("figure11", *ratios):
        store(cell, 100, gen=cell.config.method["pooling_ratio"])
    assert stored("figure10", *steps) == stored("figure11", *ratios) == 0, capsys.readouterr().err
    columns = ["alpha", "steps", "gen"]
    assert written("figure10")[columns].to_numpy().tolist() == [[a, t, t / 10] for a in (0.1, 0.5) for t in (0, 2)]
    rows = written("figure11")
    assert rows.loc[rows["n"] == 100, ["pooling_ratio", "gen"]].to_numpy().tolist() == [[0.3, 0.3], [1.0, 1.0]]
    assert "run_dir" not in rows, "no path of this machine"


def test_the_ladder_shows_rows_and_where_prompts_lie(capsys: pytest.CaptureFixture[str]) -> None:
    small = ("n=4", "checkpoints=[4]", "device=cpu")
    for cell in grid("figure4", *small):
        store(cell, 4)
    assert stored("figure4", *small) == 0, capsys.readouterr().err
    assert written("figure4")["method_label"].tolist() == ["GRACE", "GRACE+Norm", "GRACE+Norm, equal cosine", "HoReN"]
    routed = pd.read_csv("results/figures/figure4_routed.csv")
    assert routed["prompts"].tolist() == [4] * 8
    assert routed.loc[routed["kind"] == "unrelated", "routed"].tolist() == [0.0] * 4


def test_the_cost_of_a_query_is_measured_and_needs_no_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(figures, "_SIZES", (10, 20))
    assert main(["figure9", "suite=tiny", "device=cpu"]) == 0, capsys.readouterr().err
    assert written("figure9")[["method_label", "entries"]].to_numpy().tolist() == [
        [method, size] for method in ("GRACE", "HoReN") for size in (10, 20)
    ]
    assert not Path("results/runs").exists()


def test_no_model_is_downloaded_to_be_timed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["figure9", "suite=paper"]) == 2
    assert "are not on this machine; `python -m horen_bench.paper figure9 model=llama31_8b`" in (
        capsys.readouterr().err
    )


def test_what_is_missing_is_run_before_a_figure_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    few = "method.pooling_ratio=0.3,1.0"

    def run_missing(runs: Sequence[PlannedRun], _console: object, side_by_side: int) -> None:
        assert ([planned.config.method["pooling_ratio"] for planned in runs], side_by_side) == ([0.3, 1.0], 2)
        for cell in grid("figure11", few):
            store(cell, 100)

    monkeypatch.setattr(command, "run_missing", run_missing)
    assert main(["figure11", "suite=tiny", few, "--jobs", "2"]) == 0
    rows = written("figure11")
    assert rows.loc[rows["status"] == "finished", "n"].tolist() == [100, 100]


def test_nothing_to_draw_is_an_error_that_says_why_and_stops_no_other_figure(
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = ("method=horen", "method.hopfield.alpha=0.1")
    for cell in grid("figure1", *few):
        store(cell, 100)
    assert stored("figure10,figure1", *few) == 2
    assert capsys.readouterr().err == ("error: there is nothing to draw under protocol greedy: it was not started\n")
    written("figure1")


def test_several_models_are_not_one_figure(capsys: pytest.CaptureFixture[str]) -> None:
    assert stored("figure1", "model=tiny,llama31_8b", "method=horen") == 2
    assert "figure1 is about one model, and the grid has LLaMA-3.1 8B, tiny; choose one with model=" in (
        capsys.readouterr().err.replace("\n", " ")
    )


def test_a_figure_about_codebooks_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert stored("figure9", "method=rome") == 2
    assert capsys.readouterr().err == (
        "error: this figure is about methods with a codebook, and method=rome has none; leave method= out\n"
    )
