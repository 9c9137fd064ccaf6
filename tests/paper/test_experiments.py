"""Grids: what they consist of, what is run of them, and what is said of the rest."""

import io
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from rich.console import Console

from horen_bench import runner as stream
from horen_bench.__main__ import main as run_command
from horen_bench.errors import UserError
from horen_bench.paper import experiments
from horen_bench.paper.experiments import Cell, Job, cells, collect, duration, estimate, main, plan, run_missing
from horen_bench.paper.tables import LAYOUTS, compared, published
from horen_bench.paths import resource

QUICK = ["n=4", "checkpoints=[2]", "protocol=greedy", "method.n_steps=2", "device=cpu"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def said(console: Console) -> str:
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def names(grid: Sequence[Cell]) -> list[str]:
    return [cell.name for cell in grid]


def wrote(*, cell: Cell, n: int, protocol: str = "greedy", **more: Any) -> None:
    """A checkpoint row, as a run would leave it."""
    labels = {part: cell.config[part]["name"] for part in ("model", "method", "dataset")}
    row = {"n": n, "protocol": protocol, **labels, "seed": 42, "items": n, "cases": f"{n}", "rel": 0.5}
    row |= {
        "failed_edits": 0,
        "warnings": None,
        "edit_seconds": 1.0,
        "eval_seconds": 1.0,
        "peak_memory_bytes": 1,
        **more,
    }
    cell.store.path.mkdir(parents=True, exist_ok=True)
    cell.store.add_checkpoint(row, pd.DataFrame({"n": [n]}))


# --- What a grid consists of -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", experiments.experiments())
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
    assert not set(second.config) & {"suites", "labels"}


def test_a_variant_without_a_label_is_named_by_its_setting() -> None:
    grid = cells("table10", ["method.normalize=true", "method.hopfield.alpha=0.1,0.5", "seed=1,2"])
    assert [cell.labels["variant"] for cell in grid] == [
        f"Normalized, alpha={alpha}, seed={seed}" for alpha in (0.1, 0.5) for seed in (1, 2)
    ]


def test_tables_share_the_runs_that_are_the_same() -> None:
    horen = [one.store.path for one in cells("table1", ["method=horen"])]
    for table in ("table8", "table9", "protocol_audit"):
        assert [one.store.path for one in cells(table, ["method=horen"])] == horen
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


# --- What is stored ----------------------------------------------------------------------------------------


def test_every_wanted_checkpoint_is_a_row_whether_it_is_there_or_not() -> None:
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
    assert [job.missing for job in plan([cell])] == [((500, "greedy"),)]


def test_without_weights_nothing_is_started_unless_the_backbone_is_named() -> None:
    grid = cells("table1", ["suite=paper", "model=qwen25_7b", "method=horen"])
    rows = collect(grid)
    assert set(rows["reason"]) == {"the weights of Qwen/Qwen2.5-7B-Instruct are not on this machine"}
    assert set(rows["command"]) == {"python -m horen_bench.paper.experiments table1 model=qwen25_7b"}
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
    assert [job.missing for job in plan([cell])] == [((2000, "greedy"),)]


# --- Estimates ---------------------------------------------------------------------------------------------


def test_an_estimate_takes_the_speed_of_stored_runs_else_the_usual_one() -> None:
    (horen,) = cells("table1", ["method=horen", "protocol=greedy", "checkpoints=[]"])
    (job,) = plan([horen])
    before = estimate([job]).iloc[0]
    assert (before["edits"], before["seconds"]) == (1000, pytest.approx(1000 * (0.006 + 0.005)))
    assert pd.isna(before["memory"])
    (other,) = cells("table1", ["method=horen", "seed=7"])
    wrote(cell=other, n=10, edit_seconds=2.0, eval_seconds=1.0, peak_memory_bytes=2**30)
    after = estimate([job]).iloc[0]
    assert (after["seconds"], after["memory"]) == (pytest.approx(1000 * 0.2 + 1000 * 0.1), 2**30)
    wrote(cell=horen, n=400, edit_seconds=80.0, eval_seconds=40.0, peak_memory_bytes=2**30)
    assert estimate([job]).iloc[0]["edits"] == 600


def test_a_big_models_time_is_unknown_and_comes_first() -> None:
    grid = [*cells("table1", ["method=horen"]), *cells("table1", ["suite=paper", "model=qwen25_7b", "method=horen"])]
    jobs = plan(grid, download=True)
    assert [job.cell.labels["model"] for job in jobs] == ["Qwen2.5 7B", "tiny"]
    assert estimate(jobs)["seconds"].isna().tolist() == [True, False]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.2, "3 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (float("nan"), "an unknown time")],
)
def test_durations_are_rough(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# --- Running -----------------------------------------------------------------------------------------------


def test_cells_of_one_stream_are_one_job() -> None:
    grid = [
        *cells("table1", ["method=horen"]),
        *cells("table4", ["method=horen"]),
        *cells("protocol_audit", ["method=horen"]),
    ]
    (job,) = plan(grid)
    assert job.cell is grid[1]
    greedy = [n for n, protocol in job.missing if protocol == "greedy"]
    assert greedy == [100, 500, 1000, 2000, 5000, 10000]
    assert [n for n, protocol in job.missing if protocol == "teacher_forced"] == [100, 500, 1000]


def test_a_grid_runs_what_is_missing_goes_on_after_a_failure_and_repeats_nothing(tmp_path: Path) -> None:
    grid = cells("table10", ["dataset=zsre,facts", "method.normalize=true", *QUICK])
    console = quiet()
    run_missing(plan(grid), console, side_by_side=2)
    rows = collect(grid)
    assert rows.groupby("dataset")["status"].unique().map(list).to_dict() == {"facts": ["finished"], "zsre": ["failed"]}
    assert rows[rows["dataset"] == "facts"]["n"].tolist() == [2, 4]
    assert "tiny, HoReN, Facts, Normalized: done in" in said(console)
    assert "tiny, HoReN, ZsRE, Normalized: failed: data/zsre/zsre_edit_data.json does not exist" in said(console)
    assert rows["reason"].iloc[0].startswith("data/zsre/zsre_edit_data.json does not exist")
    assert [job.cell.labels["dataset"] for job in plan(grid)] == ["ZsRE"]


def test_a_sweep_of_the_same_file_by_hydra_fills_the_same_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")  # set by the command; taken back after the test
    monkeypatch.delenv("HYDRA_FULL_ERROR")
    monkeypatch.setattr(sys, "argv", ["horen_bench", "-m", "experiment=table10", *QUICK])
    run_command()
    grid = cells("table10", QUICK)
    rows = collect(grid)
    assert set(rows["status"]) == {"finished"}
    assert plan(grid) == []
    assert (rows[["inference_ms", "inference_base_ms"]] > 0).all(axis=None)
    assert (rows["side_keys"] + rows["side_values"] == rows["side_parameters"]).all()
    assert set(rows["side_modified"]) == {0}


def test_a_failure_is_forgotten_once_the_run_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    (cell,) = cells("table1", ["method=horen", *QUICK])
    job = Job(cell, ((2, "greedy"),))
    with monkeypatch.context() as broken:
        broken.setattr(stream, "load_model", lambda *_, **__: 1 / 0)
        experiments._run(job, quiet=True)
    assert cell.store.failure() == "ZeroDivisionError: division by zero"
    experiments._run(job, quiet=True)
    assert cell.store.failure() is None
    assert cell.missing() == [(4, "greedy")]


def test_whatever_goes_wrong_in_a_run_is_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: object) -> None:
        raise MemoryError("no\nroom")

    monkeypatch.setattr(experiments, "run", breaks)
    (cell,) = cells("table1", ["method=horen", *QUICK])
    experiments._run(Job(cell, cell.checkpoints), quiet=True)
    assert cell.store.failure() == "MemoryError: no room"


def test_a_killed_process_leaves_a_reason_too() -> None:
    (cell,) = cells("table1", ["method=horen", *QUICK])
    killed: Any = SimpleNamespace(exitcode=-9)
    console = quiet()
    experiments._report(Job(cell, cell.checkpoints), killed, 1.0, console)
    assert cell.store.failure() == "its process was killed, most likely for lack of memory"
    assert "failed: its process was killed" in said(console)


def test_an_interruption_stops_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(experiments, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_missing(plan(cells("table1", ["method=horen", *QUICK])), quiet())
    assert multiprocessing.active_children() == []


# --- The command -------------------------------------------------------------------------------------------


def test_the_command_writes_the_table_of_what_is_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cell,) = cells("table9", ["method=horen"])
    scores: dict[str, Any] = {f"{name}{end}": 0.5 for name in ("gen", "loc", "op") for end in ("", "_low", "_high")}
    wrote(cell=cell, n=100, **scores)
    assert main(["table9", "method=horen", "--stored"]) == 0
    out = capsys.readouterr().out
    for part in (
        "| Facts     | tiny         | HoReN",
        "| 0.88",
        "LLaMA-3.1 8B, HoReN, N = 100, 500, 1,000: not run: the weights",
    ):
        assert part in out
    assert {path.name for path in (tmp_path / "results" / "tables").iterdir()} == {
        "table9.md",
        "table9.csv",
        "table9.tex",
    }


def test_the_command_says_what_it_would_take(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table10,table11", "--estimate", "--jobs", "2"]) == 0
    out = capsys.readouterr().out
    assert "3 runs to do, 2 at a time: about" in out
    assert "tiny, HoReN, Facts, LoRA" in out


def test_settings_are_read_and_nothing_is_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["table3", "suite=tiny"]) == 0
    assert "LLaMA-3 8B" in capsys.readouterr().out
    assert not (tmp_path / "results" / "runs").exists()


def test_the_commands_refusals_are_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table12"]) == 2
    assert capsys.readouterr().err.startswith("error: experiment=table12: there is no such experiment")


@pytest.mark.parametrize(
    ("overrides", "suite"),
    [([], "tiny"), (["model=tiny"], "tiny"), (["model=qwen25_7b"], "paper"), (["suite=tiny", "model=x"], "tiny")],
)
def test_the_suite_follows_the_backbone(overrides: list[str], suite: str) -> None:
    assert experiments.suite_of(overrides) == f"suite={suite}"


def test_weights_in_the_cache_make_the_papers_suite_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments, "weights_at_hand", lambda hub_id, _: hub_id == "Qwen/Qwen2.5-7B-Instruct")
    assert experiments.suite_of([]) == "suite=paper"


# --- Launchers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "launcher",
    [
        ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
        ["hydra/launcher=submitit_local", "hydra.launcher.submitit_folder=jobs"],
    ],
    ids=["joblib", "submitit"],
)
def test_launchers_run_the_members_of_a_sweep_and_bring_failures_back(tmp_path: Path, launcher: list[str]) -> None:
    words = ["-m", "horen_bench", "-m", "seed=3,-1", *QUICK, *launcher]
    environment = {key: value for key, value in os.environ.items() if key != "HYDRA_FULL_ERROR"}
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    assert done.returncode == 2, done.stderr
    assert "seed=-1" in done.stderr
    assert len(list(tmp_path.glob("results/runs/*/checkpoints.csv"))) == 1


def test_the_cluster_settings_are_those_of_submitit() -> None:
    with initialize_config_dir(str(resource("conf")), version_base="1.3"):
        chosen = compose("config", ["hydra/launcher=slurm", "hydra.launcher.partition=gpu"], return_hydra_config=True)
    launcher = chosen.hydra.launcher
    assert (launcher._target_.rpartition(".")[2], launcher.partition, launcher.gpus_per_node) == (
        "SlurmLauncher",
        "gpu",
        1,
    )
