"""Running what is missing, and what becomes of failures."""

import io
import multiprocessing
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from horen_bench import stream
from horen_bench.__main__ import main as run_command
from horen_bench.paper import pool
from horen_bench.paper.estimate import PlannedRun
from horen_bench.paper.grids import cells, collect, plan
from horen_bench.paper.pool import run_missing

QUICK = ["n=4", "checkpoints=[2]", "protocol=greedy", "method.n_steps=2", "device=cpu"]


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def printed(console: Console) -> str:
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_cells_of_one_stream_are_one_job() -> None:
    grid = [
        *cells("table1", ["method=horen"]),
        *cells("table4", ["method=horen"]),
        *cells("protocol_audit", ["method=horen"]),
    ]
    (planned,) = plan(grid)
    assert planned.config is grid[1].config
    greedy = [n for n, protocol in planned.missing if protocol == "greedy"]
    assert greedy == [100, 500, 1000, 2000, 5000, 10000]
    assert [n for n, protocol in planned.missing if protocol == "teacher_forced"] == [100, 500, 1000]


def test_a_grid_runs_what_is_missing_goes_on_after_a_failure_and_repeats_nothing(tmp_path: Path) -> None:
    grid = cells("table10", ["dataset=zsre,facts", "method.normalize=true", *QUICK])
    console = quiet()
    run_missing(plan(grid), console, side_by_side=2)
    rows = collect(grid)
    assert rows.groupby("dataset")["status"].unique().map(list).to_dict() == {"facts": ["finished"], "zsre": ["failed"]}
    assert rows[rows["dataset"] == "facts"]["n"].tolist() == [2, 4]
    assert "tiny, HoReN, Facts, Normalized: done in" in printed(console)
    assert "tiny, HoReN, ZsRE, Normalized: failed: data/zsre/zsre_edit_data.json does not exist" in printed(console)
    assert rows["reason"].iloc[0].startswith("data/zsre/zsre_edit_data.json does not exist")
    assert [planned.config.dataset.label for planned in plan(grid)] == ["ZsRE"]


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
    planned = PlannedRun(cell.name, cell.config, cell.store, ((2, "greedy"),))
    with monkeypatch.context() as broken:
        broken.setattr(stream, "load_model", lambda *_, **__: 1 / 0)
        pool._run(planned, quiet=True)
    assert cell.store.failure() == "ZeroDivisionError: division by zero"
    pool._run(planned, quiet=True)
    assert cell.store.failure() is None
    assert cell.missing() == [(4, "greedy")]


def test_whatever_goes_wrong_in_a_run_is_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: object) -> None:
        raise MemoryError("no\nroom")

    monkeypatch.setattr(pool, "run", breaks)
    (cell,) = cells("table1", ["method=horen", *QUICK])
    pool._run(PlannedRun(cell.name, cell.config, cell.store, cell.checkpoints), quiet=True)
    assert cell.store.failure() == "MemoryError: no room"


def test_a_killed_process_leaves_a_reason_too() -> None:
    (cell,) = cells("table1", ["method=horen", *QUICK])
    killed: Any = SimpleNamespace(exitcode=-9)
    console = quiet()
    pool._report(PlannedRun(cell.name, cell.config, cell.store, cell.checkpoints), killed, 1.0, console)
    assert cell.store.failure() == "its process was killed, most likely for lack of memory"
    assert "failed: its process was killed" in printed(console)


def test_an_interruption_stops_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pool, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_missing(plan(cells("table1", ["method=horen", *QUICK])), quiet())
    assert multiprocessing.active_children() == []
