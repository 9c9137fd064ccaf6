"""Every benchmark runs in small, so that none rots."""

import csv
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

_FOLDER = Path(__file__).parents[1] / "benchmarks"

# The least that makes each script print its whole table. `load_datasets` starts a process for each way.
_ARGUMENTS = {
    "codebook_growth": "--sizes 16 64 --edits 2",
    "engines": "--edits 2 --plain-edits 1 --matrix 64",
    "evaluation": "--edits 2 --batch-size 4",
    "grace": "--edits 2 --plain-edits 1",
    "key_dtype": "--entries 4",
    "load_datasets": "--records 16",
    "rewriting": "--edits 1 --methods rome ft_m",
    "startup": "--edits 1 --repeats 1",
    "ultraedit": "--edits 2",
    "unke": "--edits 1 --target-tokens 4",
    "wise": "--edits 1 --plain-edits 1 --shards 2",
}
_NO_SCRIPTS = {"common", "work", "gpu_suite", "architectures"}  # the last has tests of its own


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The folder of the scripts, which import each other by name, as when one is started."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(_FOLDER))
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(_FOLDER)):
            del sys.modules[name]


def _main(script: str, *arguments: object) -> None:
    import_module(script).main([str(argument) for argument in arguments])


def test_no_script_is_forgotten() -> None:
    assert {path.stem for path in _FOLDER.glob("*.py")} - _NO_SCRIPTS == set(_ARGUMENTS)


@pytest.mark.parametrize("script", sorted(_ARGUMENTS))
def test_a_script_prints_its_table(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    _main(script, *_ARGUMENTS[script].split())
    assert "│" in capsys.readouterr().out


# --- The GPU suite ---------------------------------------------------------------------------------------


def _rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "rows.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_dry_run_has_rows_of_every_step_and_a_second_one_measures_nothing(tmp_path: Path) -> None:
    _main("gpu_suite", "--dry", "--out", tmp_path)
    rows = _rows(tmp_path)
    steps = import_module("gpu.suite").Settings(dry=True).values["steps"]
    assert {row["step"] for row in rows} == set(steps)
    assert [row["note"] for row in rows if row["figure"] == "failed"] == []
    report = next(tmp_path.glob("dry-run-*.md")).read_text(encoding="utf-8")
    assert all(f"## {step}" in report for step in steps)
    _main("gpu_suite", "--dry", "--out", tmp_path)
    assert _rows(tmp_path) == rows


def test_without_a_gpu_the_suite_says_what_to_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        _main("gpu_suite", "--out", tmp_path)
    assert "ARGS=--dry" in capsys.readouterr().err


def _step(folder: Path, seconds: float = 60) -> Any:
    suite = import_module("gpu.suite")
    until = import_module("time").time() + seconds
    return suite.Step("llama", {}, "cpu", suite.Rows(folder / "rows.csv", "a device"), suite.Clock(until))


def test_a_measurement_that_fails_leaves_its_reason_and_the_next_goes_on(tmp_path: Path) -> None:
    figure = import_module("gpu.suite").Figure

    def fails() -> Iterator[Any]:
        yield figure("before", 1)
        raise ValueError("no\nmore")

    step = _step(tmp_path)
    step.measure("broken", fails)
    step.measure("whole", lambda: [figure("after", 2.5, "ms")])
    rows = {(row.measurement, row.figure): row for row in step.rows.all()}
    assert rows["broken", "before"].number == 1
    assert rows["broken", "failed"].note == "ValueError: no more"
    assert (rows["whole", "after"].number, rows["whole", "after"].unit) == (2.5, "ms")
    assert step.rows.failures("llama") == ["broken"]
    step.measure("broken", lambda: [figure("before", 3)])
    step.measure("whole", lambda: pytest.fail("it is there"))
    assert step.rows.failures("llama") == []
    assert step.rows.number("llama", "broken", "before") == 3


def test_nothing_is_begun_once_the_time_is_over(tmp_path: Path) -> None:
    step = _step(tmp_path, -1)
    step.measure("late", lambda: pytest.fail("it was begun"))
    (row,) = step.rows.all()
    assert "time was over" in row.note


def test_rows_of_another_device_do_not_count(tmp_path: Path) -> None:
    suite = import_module("gpu.suite")
    _step(tmp_path).measure("m", lambda: [suite.Figure("f", 1)])
    assert suite.Rows(tmp_path / "rows.csv", "another device").all() == []


def test_the_report_sets_goals_beside_figures_and_says_what_bounds_a_miss(tmp_path: Path) -> None:
    suite, report = import_module("gpu.suite"), import_module("gpu.report")
    rows = suite.Rows(tmp_path / "rows.csv", "Card H-1")
    for measurement, figure, value in (
        ("editing", "parallel", 120.0),
        ("editing", "parallel, one edit", 8.0),
        ("value training", "share of the matrix rate", 0.35),
        ("profile of a step", "device idle", 0.6),
        ("profile of a step", "launches", 300),
        ("profile of a step", "kernel 1", "40% gemm"),
        ("key extraction", "one edit", 2.0),
        ("growth", "one edit at C = 1,000", 8.0),
        ("growth", "time apart from products", 1.5),
    ):
        rows.add("llama", measurement, suite.Figure(figure, value))
    goals = report.goals_of(suite.Settings(dry=False).values)
    path = report.write_report(rows, goals, tmp_path, dry=False)
    assert path.name.startswith("card-h-1-")
    text = path.read_text(encoding="utf-8")
    assert "| editing | parallel | 120 |  | >= 200 | no |" in text
    assert "share of the matrix rate >= 0.3: met by value training (0.35)" in text
    (missed,) = [line for line in text.splitlines() if "**missed** by editing" in line]
    assert "reaches 35% of the matrix rate" in missed
    assert "key extraction is 25% of an edit" in missed
    assert "The host bounds it." in missed
    assert "one edit at C = 1,000 8" in text
    assert "detached bit for bit >= 1: not measured" in text


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import time; time.sleep(60)", "ended after 2 s"),
        ("raise SystemExit('the driver is gone')", "its process ended with 1: the driver is gone"),
    ],
    ids=["hangs", "crashes"],
)
def test_a_step_that_hangs_or_crashes_costs_the_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, reason: str
) -> None:
    suite, command = import_module("gpu.suite"), import_module("gpu_suite")
    script = tmp_path / "step.py"
    script.write_text(program, encoding="utf-8")
    monkeypatch.setattr(command, "__file__", str(script))
    monkeypatch.setattr(command, "_LEAST", 0.0)
    settings = suite.Settings(dry=False).values | {"steps": {"hardware": 2, "stream": 2}}
    rows = suite.Rows(tmp_path / "rows.csv", "a device")
    command.Suite(settings, rows, tmp_path, dry=False, again=False).run(["hardware", "stream"])
    notes = {row.step: row.note for row in rows.all()}
    assert notes.keys() == {"hardware", "stream"}
    assert all(reason in note for note in notes.values())
