"""Every write, fsync, rename, read and allocation of a run fails once, and runs are killed: what is left of them?

    make faults                                           the whole campaign, about a quarter of an hour on two cores
    make faults ARGS="--methods horen"                    one method
    make faults ARGS="--trial horen/fresh/file/12/once"   one trial, with all that it printed

In the spirit of SQLite's tests of I/O errors: the calls of an undisturbed run are counted, and for each of them the run
is done again with this call failing. It must end in a sentence and exit code 2, or go on as if nothing had been; the
same command must then finish with the rows of an undisturbed run, keep the rows that were finished, and do none of them
again. Kills (SIGKILL) at calls and at moments must leave the same. POSIX only: runs are forked.

Writes `trials.csv` and `report.md` into the folder of `--out`; exit code 1 if anything is wrong.
"""

import argparse
import gc
import importlib
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads do not survive a fork
from faults import process, report
from faults.campaign import SCENARIOS, Bench, Outcome, Scenario, Trial, named, small, trials

_BENCHES: dict[str, Bench] = {}  # where forked workers find them


def main(argv: Sequence[str] | None = None) -> None:
    """Run the campaign, or one trial of it."""
    settings = yaml.safe_load((Path(__file__).parent / "settings.yaml").read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(settings["methods"]), default=list(settings["methods"]))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("results/faults"), help="folder of the report")
    parser.add_argument("--every", type=int, default=1, help="only every so many trials")
    parser.add_argument("--only", default="", help="only trials whose name has this in it")
    parser.add_argument("--small", action="store_true", help="a few trials of the first method")
    parser.add_argument("--trial", nargs="+", help="these trials alone, by name")
    options = parser.parse_args(argv)
    if options.small:
        settings |= settings["few"]
    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        benches = _prepared(_methods(options), settings, Path(folder), options)
        outcomes = _performed(_planned(options, benches, settings), options.jobs, options.out)
    if options.trial:
        _say("\n".join(outcome.output for outcome in outcomes))
    text = report.write(outcomes, options.out)
    _say(f"{text}\n{time.monotonic() - started:.0f} s; every trial: {options.out / 'trials.csv'}")
    sys.exit(int(any(outcome.problem for outcome in outcomes)))


def _methods(options: argparse.Namespace) -> list[str]:
    if options.trial:
        return sorted({name.split("/")[0] for name in options.trial})
    methods: list[str] = options.methods
    return methods[:1] if options.small else methods


def _planned(options: argparse.Namespace, benches: Mapping[str, Bench], settings: Mapping[str, Any]) -> list[Trial]:
    if options.trial:
        return [named(benches, name) for name in options.trial]
    first = next(iter(settings["methods"]))
    if options.small:
        return list(small(benches[first], settings))
    planned = [trial for name, bench in benches.items() for trial in trials(bench, settings, first=name == first)]
    return [trial for trial in planned if options.only in trial.name][:: options.every]


def _prepared(
    methods: Sequence[str], settings: Mapping[str, Any], folder: Path, options: argparse.Namespace
) -> dict[str, Bench]:
    """The benches, their undisturbed runs done; what a run imports is imported here, once."""
    _import_all(methods[0], settings, folder)
    scenarios: Sequence[Scenario] = ("fresh",) if options.small else SCENARIOS
    with multiprocessing.get_context("fork").Pool(options.jobs) as pool:
        benches = pool.starmap(_prepare, [(method, settings, folder, scenarios) for method in methods], chunksize=1)
    _BENCHES.update({bench.method: bench for bench in benches})
    return {method: _BENCHES[method] for method in methods}


def _prepare(method: str, settings: Mapping[str, Any], folder: Path, scenarios: Sequence[Scenario]) -> Bench:
    bench = Bench(method, settings, folder)
    bench.prepare(scenarios)
    return bench


def _import_all(method: str, settings: Mapping[str, Any], folder: Path) -> None:
    """Import what a run imports, which a forked one has found out, and run nothing here: torch would start threads."""
    names = folder / "modules.txt"
    words = Bench(method, settings, folder).words("fresh")
    process.run(words, folder / "warm", process.Interference(modules=names))
    for name in names.read_text(encoding="utf-8").splitlines():
        if name not in sys.modules and not name.startswith("__"):
            with suppress(Exception):  # made at run time, not importable by name
                importlib.import_module(name)
    gc.collect()
    gc.freeze()


def _performed(planned: Sequence[Trial], jobs: int, out: Path) -> list[Outcome]:
    """All trials, in an order that mixes them; the report so far after every 50, so that a stop leaves one."""
    order = list(planned)
    random.Random(0).shuffle(order)
    outcomes: list[Outcome] = []
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        for outcome in pool.imap_unordered(_perform, order):
            outcomes.append(outcome)
            if outcome.problem:
                _say(f"{outcome.trial.name}: {outcome.problem}")
            if len(outcomes) % 50 == 0:
                report.write(outcomes, out)
                _say(f"{len(outcomes)} of {len(order)}")
    return outcomes


def _perform(trial: Trial) -> Outcome:
    return _BENCHES[trial.method].perform(trial)


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - what the command is for


if __name__ == "__main__":
    main()
