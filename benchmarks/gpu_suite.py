"""Everything that cannot be known without a GPU, in one command of less than nine minutes.

    make gpu                          all steps; what is there already is not measured again
    make gpu ARGS="--only llama"      one step
    make gpu ARGS=--dry               tiny shapes on the CPU, to see that every step runs

Each step runs in a process of its own, which is ended when its time is over: a hang, a crash, or memory that was not
given back costs the other steps nothing. Each row is written when it is known, to `rows.csv` in the folder of `--out`;
the same command goes on where the last one ended. After every step the report is written beside it, as
`<device>-<date>.md` and `.csv`: each figure with its goal, and what bounds those that were missed. `gpu.yaml` has the
settings.
"""

import argparse
import importlib
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpu.report import goals_of, write_report
from gpu.suite import FAILED, SECONDS, WHOLE, Clock, Figure, Rows, Settings, Step

_MODULES = {"llama": "throughput", "qwen": "throughput"}  # of the steps that are not named as their module
_LEAST = 15.0  # seconds without which a step is not begun
_GRACE = 8.0  # seconds that a process gets to end by itself


@dataclass(frozen=True, slots=True)
class Suite:
    """What the command is to do."""

    settings: dict[str, Any]
    rows: Rows
    out: Path
    dry: bool
    again: bool

    def run(self, names: Sequence[str]) -> None:
        """The steps, as far as the time goes; the report after each."""
        clock = Clock(time.time() + self.settings["budget"])
        for name in names:
            if self.rows.finished(name, WHOLE) and not self.again:
                _say(f"{name}: is there")
                continue
            limit = min(self.settings["steps"][name], clock.left())
            if limit < _LEAST and not self.dry:
                self._add(name, Figure(FAILED, ""), "not begun: no time was left; run the same command again to go on")
                continue
            _say(f"{name}: up to {limit:.0f} s")
            started = time.perf_counter()
            reason = self._here(name, limit) if self.dry else self._in_a_process(name, limit)
            seconds = time.perf_counter() - started
            failures = self.rows.failures(name)
            if failures and not reason:
                reason = f"failed: {', '.join(failures)}; the same command repeats them"
            if reason:
                self._add(name, Figure(FAILED, ""), reason)
            else:
                self._add(name, Figure(SECONDS, seconds, "s"))
            _say(f"{name}: {seconds:.0f} s {reason or ''}")
            write_report(self.rows, goals_of(self.settings), self.out, dry=self.dry)
        _say(f"report: {write_report(self.rows, goals_of(self.settings), self.out, dry=self.dry)}")

    def step(self, name: str, until: float) -> None:
        """The measurements of a step, as far as they begin before a moment in seconds since the epoch."""
        device = "cpu" if self.dry else "cuda"
        step = Step(name, self.settings[name], device, self.rows, Clock(until), self.again)
        importlib.import_module(f"gpu.{_MODULES.get(name, name)}").run(step)

    def _here(self, name: str, limit: float) -> str | None:
        """One step, in this process."""
        self.step(name, time.time() + limit)
        return None

    def _in_a_process(self, name: str, limit: float) -> str | None:
        """One step, in a process of its own; why it did not end well, if so."""
        command = [sys.executable, __file__, "--only", name, "--out", str(self.out), "--until"]
        command += [str(time.time() + limit - _GRACE), *(["--again"] if self.again else [])]
        log = self.out / f"{name}.log"
        try:
            with log.open("w", encoding="utf-8") as file:
                code = subprocess.run(command, stdout=file, stderr=file, check=False, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            return f"ended after {limit:.0f} s, in the middle of a measurement"
        if code == 0:
            return None
        last = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()][-1:]
        return f"its process ended with {code}: {' '.join(last)[:300]}"

    def _add(self, name: str, figure: Figure, note: str = "") -> None:
        self.rows.add(name, WHOLE, figure, note)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the steps and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(Settings(dry=False).values["steps"])
    parser.add_argument("--only", choices=names, help="one step alone")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU, in this process")
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), help="folder of rows and report")
    parser.add_argument("--again", action="store_true", help="measure once more what is there already")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # a step in its process: when its time is over
    options = parser.parse_args(argv)
    if not options.dry and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; write ARGS=--dry for a dry run on the CPU")
    if options.dry:
        torch.set_num_threads(1)
    device = "dry run" if options.dry else torch.cuda.get_device_name()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = Rows(options.out / "rows.csv", device)
    suite = Suite(Settings(dry=options.dry).values, rows, options.out, options.dry, options.again)
    if options.until:
        suite.step(options.only, options.until)
    else:
        suite.run([options.only] if options.only else names)


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - what the command is for


if __name__ == "__main__":
    main()
