"""What the command line costs before any edit: CPU seconds of a page of help, of refusals, of a finished run.

    python benchmarks/startup.py
    python benchmarks/startup.py --python /other/.venv/bin/python    another installation beside this one

A finished run is one of `--edits` edits into the embedded model, which is made first, for each installation its own.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from common import what_ran

_WORDS = {"--help": ["--help"], "a wrong value": ["n=-1"], "an unknown setting": ["method.treshold=0.7"]}


def cpu_seconds(python: str, words: Sequence[str], folder: Path) -> float:
    """CPU time of one call, its children included, user and system."""
    before = os.times()
    subprocess.run([python, "-m", "horen_bench", *words], cwd=folder, capture_output=True, check=False)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", default=[], help="an interpreter to measure beside this one")
    parser.add_argument("--edits", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3, help="the least of so many calls counts")
    options = parser.parse_args(argv)
    interpreters = [sys.executable, *options.python]
    table = Table("call", *(f"CPU s, {python}" for python in interpreters))
    table.title = f"{what_ran('tiny', 'cpu')}; {time.strftime('%Y-%m-%d')}"
    finished = [f"n={options.edits}", "checkpoints=[]", "method.n_steps=2", "device=cpu"]
    columns = [_measured(python, {**_WORDS, "a finished run": finished}, options.repeats) for python in interpreters]
    for call in columns[0]:
        table.add_row(call, *(f"{seconds[call]:.2f}" for seconds in columns))
    Console().print(table)


def _measured(python: str, calls: dict[str, list[str]], repeats: int) -> dict[str, float]:
    """The least CPU seconds of each call; the first call of each only warms up, and makes the run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for words in calls.values():
            cpu_seconds(python, words, folder)
        return {call: min(cpu_seconds(python, words, folder) for _ in range(repeats)) for call, words in calls.items()}


if __name__ == "__main__":
    main()
