"""Grids: what they consist of, what of them is stored, what is planned."""

from collections.abc import Callable, Sequence

import pytest

from horen_bench.errors import UserError
from horen_bench.paper import grids
from horen_bench.paper.grids import Cell, cells, collect, experiments, plan, suite_of
from horen_bench.paper.published import compared, published
from horen_bench.paper.tables import LAYOUTS

Wrote = Callable[..., None]


def names(grid: Sequence[Cell]) -> list[str]:
    return [cell.name for cell in grid]


# --- What a grid consists of -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", experiments())
def test_every_grid_composes_for_the_embedded_model_and_every_run_of_it_is_another(name: str) -> None:
    grid = cells(name)
    assert [cell.problem for cell in grid] == [None] * len(grid)
    assert {cell.labels["model"] for cell in grid} == {"tiny"}
    assert len({cell.store.path for cell in grid}) == len(grid) == len(set(names(grid)))


@pytest.mark.parametrize(
    ("table", "choice"),
    [
        ("table1", ["model=qwen25_7b"]),
        ("table1", ["method=rome"]),
        ("table2", ["method=horen"]),
        ("table4", []),
        ("table5", ["method=wise"]),
        ("table6", []),
        ("table7", []),
        ("table8", ["dataset=zsre"]),
        ("table9", ["method=horen,grace_norm,grace"]),
        ("table10", []),
        ("table11", []),
    ],
)
def test_every_run_of_the_papers_suite_has_its_number_in_the_paper(table: str, choice: list[str]) -> None:
    grid = cells(table, ["suite=paper", *choice])
    assert [cell.problem for cell in grid] == [None] * len(grid)
    metrics = {"gen": "Gen"} if table not in ("table5", "table7") else LAYOUTS[table].metrics
    metrics = {name: head for name, head in metrics.items() if name in set(published(table)["metric"])}
    rows = collect(grid)
    long = compared(rows[rows["protocol"] == rows["protocol"].iloc[0]], published(table), metrics)
    assert long["paper"].notna().all()


def test_a_cell_says_what_it_is_and_how_it_is_run_alone() -> None:
    first, second = cells("table10", ["n=5"])
    assert first.labels == {"model": "tiny", "method": "HoReN", "dataset": "Facts", "variant": "Normalized"}
    assert second.name == "tiny, HoReN, Facts, Unnormalized"
    assert second.overrides[:2] == ("experiment=table10", "model=tiny")
    assert second.command.startswith("python -m horen_bench experiment=table10 model=tiny dataset=facts method=horen")
    assert second.checkpoints == ((5, "greedy"), (5, "release"))
    assert not set(second.config.model_dump()) & {"suites", "labels", "table"}


def test_a_variant_without_a_label_is_named_by_its_setting() -> None:
    grid = cells("table10", ["method.normalize=true", "method.hopfield.alpha=0.1,0.5", "seed=1,2"])
    assert [cell.labels["variant"] for cell in grid] == [
        f"Normalized, alpha={alpha}, seed={seed}" for alpha in (0.1, 0.5) for seed in (1, 2)
    ]


def test_tables_share_the_runs_that_are_the_same() -> None:
    horen = [cell.store.path for cell in cells("table1", ["method=horen"])]
    for table in ("table8", "table9", "protocol_audit"):
        assert [cell.store.path for cell in cells(table, ["method=horen"])] == horen
    assert cells("table10")[0].store.path == cells("table11")[0].store.path == horen[0]


def test_an_unknown_grid_or_setting_is_a_sentence() -> None:
    with pytest.raises(UserError, match="experiment=table12: there is no such experiment; write one of figure1, "):
        cells("table12")
    with pytest.raises(UserError, match=r"method.treshold: there is no such setting"):
        cells("table9", ["method.treshold=1"])


def test_a_method_without_values_for_a_backbone_is_a_cell_that_says_so() -> None:
    (cell,) = cells("table1", ["suite=paper", "model=gpt_oss_20b", "method=rome"])
    assert cell.problem
    assert cell.problem.startswith("method=rome needs a value that conf/model/gpt_oss_20b.yaml lacks")
    assert plan([cell], download=True) == []
    rows = collect([cell])
    assert set(rows["status"]) == {"not run"}
    assert set(rows["reason"]) == {cell.problem}


# --- Suites --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "suite"),
    [([], "tiny"), (["model=tiny"], "tiny"), (["model=qwen25_7b"], "paper"), (["suite=tiny", "model=x"], "tiny")],
)
def test_the_suite_follows_the_backbone(overrides: list[str], suite: str) -> None:
    assert suite_of(overrides) == f"suite={suite}"


def test_weights_in_the_cache_make_the_papers_suite_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grids, "weights_at_hand", lambda hub_id, _: hub_id == "Qwen/Qwen2.5-7B-Instruct")
    assert suite_of([]) == "suite=paper"


# --- What is stored ----------------------------------------------------------------------------------------


def test_every_wanted_checkpoint_is_a_row_whether_it_is_there_or_not(wrote: Wrote) -> None:
    (cell,) = cells("table1", ["method=horen", "n=500", "protocol=greedy"])
    wrote(cell=cell, n=100)
    wrote(cell=cell, n=250)  # of another table
    rows = collect([cell])
    assert rows["n"].tolist() == [100, 500]
    assert rows["status"].tolist() == ["finished", "not run"]
    assert rows["reason"].tolist() == ["", "it was not started"]
    assert rows["rel"].isna().tolist() == [False, True]
    assert set(rows["method_label"]) == {"HoReN"}
    cell.store.record_failure("the disk is full")
    assert collect([cell])[["status", "reason"]].iloc[1].tolist() == ["failed", "the disk is full"]
    assert [planned.missing for planned in plan([cell])] == [((500, "greedy"),)]


def test_a_damaged_run_is_a_cell_that_says_so_and_the_others_are_shown(wrote: Wrote) -> None:
    grid = cells("table1", ["method=horen,grace", "n=100", "checkpoints=[]", "protocol=greedy"])
    for cell in grid:
        wrote(cell=cell, n=100)
    file = grid[0].store.path / "checkpoints.csv"
    file.write_text(file.read_text().replace("0.5", "0.75", 1))
    rows = collect(grid)
    assert rows["status"].tolist() == ["failed", "finished"]
    assert rows["reason"].iloc[0].startswith(f"{file} is damaged (")
    assert [planned.missing for planned in plan(grid)] == [((100, "greedy"),)]


def test_without_weights_nothing_is_started_unless_the_backbone_is_named() -> None:
    grid = cells("table1", ["suite=paper", "model=qwen25_7b", "method=horen"])
    rows = collect(grid)
    assert set(rows["reason"]) == {"the weights of Qwen/Qwen2.5-7B-Instruct are not on this machine"}
    assert set(rows["command"]) == {"python -m horen_bench.paper table1 model=qwen25_7b"}
    assert plan(grid) == []
    assert len(plan(grid, download=True)) == 1


def test_what_takes_too_long_is_left_out_with_its_time() -> None:
    (cell,) = cells("table4", ["method=wise"])
    rows = collect([cell])
    assert rows["reason"].tolist() == [
        "it was not started",
        "5,000 edits take about 25 min here",
        "10,000 edits take about 50 min here",
    ]
    assert [planned.missing for planned in plan([cell])] == [((2000, "greedy"),)]
