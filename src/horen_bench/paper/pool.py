"""Planned runs, each in a process of its own, so that its peak memory is its own and a crash stops no other."""

import multiprocessing
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from horen_bench.interruption import Interrupted
from horen_bench.paper.estimate import PlannedRun, duration
from horen_bench.results.store import in_a_sentence
from horen_bench.runner import run


def run_missing(runs: Sequence[PlannedRun], console: Console, side_by_side: int = 1) -> None:
    """Do the planned runs, some side by side.

    A run that fails leaves its reason in its directory. An interruption stops all; the same command goes on.
    """
    context = _processes()
    waiting = list(runs)
    running: dict[BaseProcess, tuple[PlannedRun, TaskID, float]] = {}
    with _progress(console, hidden=side_by_side == 1) as progress:
        grid = progress.add_task("runs", total=len(runs))
        try:
            while waiting or running:
                while waiting and len(running) < side_by_side:
                    planned = waiting.pop(0)
                    say(console, f"[{len(runs) - len(waiting)}/{len(runs)}] {planned.name}")
                    started: BaseProcess = context.Process(target=_run, args=(planned, side_by_side > 1))
                    started.start()
                    running[started] = (planned, progress.add_task(planned.name, total=None), time.monotonic())
                wait([process.sentinel for process in running], timeout=1)
                for ended in [process for process in running if not process.is_alive()]:
                    planned, task, since = running.pop(ended)
                    _report(planned, ended, time.monotonic() - since, console)
                    progress.remove_task(task)
                    progress.advance(grid)
        finally:
            for process in running:  # only after an interruption
                process.terminate()
                process.join()


def _processes() -> ForkServerContext | SpawnContext:
    """Where processes are made: forked off one that has imported what takes seconds, so that no run has to."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["horen_bench.stream"])
    return context


def _run(planned: PlannedRun, quiet: bool) -> None:
    """In a process of its own."""
    config = planned.config.model_copy(update={"n": max(n for n, _ in planned.missing)})
    try:
        run(config, Console(quiet=quiet), planned.missing)
    except Interrupted as stop:  # by the process that started this one, which says so
        sys.exit(stop.code)
    except Exception as error:  # whatever it is, the other runs go on
        planned.store.record_failure(in_a_sentence(error))


def _report(planned: PlannedRun, process: BaseProcess, seconds: float, console: Console) -> None:
    if process.exitcode:
        killed = "its process was killed, most likely for lack of memory"
        planned.store.record_failure(killed if process.exitcode < 0 else f"its process ended with {process.exitcode}")
    failure = planned.store.failure()
    say(console, f"{planned.name}: {f'failed: {failure}' if failure else f'done in {duration(seconds)}'}")


def say(console: Console, sentence: str) -> None:
    """Print a sentence as it is, for people and files alike."""
    console.print(sentence, highlight=False, markup=False, soft_wrap=True)


def _progress(console: Console, hidden: bool) -> Progress:
    columns = (TextColumn("{task.description:>40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=hidden)
