"""A few trials of the campaign of `make faults`: five calls that fail, three kills; `docs/reliability.md` has all."""

import csv
import os
import subprocess
import sys
from pathlib import Path

_BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_a_run_whose_calls_fail_ends_in_a_sentence_and_the_next_one_has_the_rows_of_an_undisturbed_one(
    tmp_path: Path,
) -> None:
    path = os.pathsep.join([str(_BENCHMARKS), *sys.path])
    command = [sys.executable, "-m", "faults", "--small", "--out", str(tmp_path)]
    ended = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False, timeout=240
    )
    with (tmp_path / "trials.csv").open(newline="", encoding="utf-8") as file:
        trials = list(csv.DictReader(file))
    assert [(trial["trial"], trial["problem"]) for trial in trials if trial["problem"]] == []
    assert sorted(trial["ended"] for trial in trials) == ["killed"] * 3 + ["sentence"] * 5
    assert all(trial["sentence"] for trial in trials if trial["ended"] == "sentence")
    assert ended.returncode == 0, ended.stderr
