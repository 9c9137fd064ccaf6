"""One command line of the program in a process of its own, forked from one that has imported everything."""

import itertools
import json
import os
import select
import shutil
import signal as signals
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import astuple, dataclass, field
from functools import cache
from mmap import mmap
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import hydra
from omegaconf import DictConfig

from faults.points import PHASES, Disturbance, Event, Points
from horen_bench import stream
from horen_bench.__main__ import main
from horen_bench.config.compose import composed
from horen_bench.paths import resource

_LONGEST = 120.0  # seconds until a run counts as hanging
_READ = 1 << 16
_ENDING = (signals.SIGINT, signals.SIGTERM, signals.SIGHUP)
_TICK = 1000  # seconds by which a run's clock moves whenever it is read: it saves at every chance, however slow it is


@dataclass(frozen=True, slots=True)
class Interference:
    """What a run meets; nothing by default.

    Attributes:
        disturbance: of one call; None: none.
        largest_file: bytes beyond which the system refuses to let a file grow; None: any size.
        signal: sent from outside after `after` seconds; None: none.
        after: see `signal`.
        count: note all calls.
        modules: a file for the names of all modules that the run has imported; None: none.
    """

    disturbance: Disturbance | None = None
    largest_file: int | None = None
    signal: signals.Signals | None = None
    after: float = 0.0
    count: bool = False
    modules: Path | None = None


@dataclass(frozen=True, slots=True)
class Ending:
    """How a run ended.

    Attributes:
        code: its exit code; negative: the signal that ended it.
        output: all that it printed.
        seconds: wall time.
        phase: what was going on at last, as far as that was followed.
        events: its calls, if they were counted; else the disturbed one.
    """

    code: int
    output: str
    seconds: float
    phase: str
    events: list[Event] = field(default_factory=list)

    @property
    def sentence(self) -> str:
        """The last error that it printed, "" if none."""
        errors = [line for line in self.output.splitlines() if line.startswith("error: ")]
        return errors[-1].removeprefix("error: ") if errors else ""


def run(words: Sequence[str], folder: Path, interference: Interference = Interference()) -> Ending:
    """Run `python -m horen_bench WORDS` with its results and its cache under a folder.

    Args:
        words: of the command line.
        folder: where everything goes that it writes.
        interference: what it meets.
    """
    settings = _composed(tuple(words))
    phase = mmap(-1, 1)
    noted = folder / "events.jsonl"
    noted.unlink(missing_ok=True)

    def child() -> int:
        return _command(settings, folder, interference, phase, noted)

    code, output, seconds = in_a_process(child, interference.signal, interference.after)
    lines = noted.read_text(encoding="utf-8").splitlines() if noted.exists() else []
    events = [Event(*json.loads(line)) for line in lines]
    return Ending(code, output, seconds, PHASES[phase[0]], events)


def in_a_process(
    work: Callable[[], int], signal_after: signals.Signals | None = None, after: float = 0.0
) -> tuple[int, str, float]:
    """Do something in a forked process: its exit code, what it printed, and its seconds.

    Args:
        work: gives the exit code.
        signal_after: sent to it; None: none.
        after: seconds until then.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe()
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _become(work, writing)
    os.close(writing)
    output, signalled = b"", signal_after is None
    while True:
        seconds = time.monotonic() - started
        if not signalled and seconds >= after:
            os.kill(pid, signal_after or signals.SIGKILL)
            signalled = True
        if seconds > _LONGEST:
            os.kill(pid, signals.SIGKILL)
        left = _LONGEST if signalled else max(0.0, after - seconds)
        if select.select([reading], [], [], min(left, 1.0))[0]:
            part = os.read(reading, _READ)
            if not part:
                break
            output += part
    os.close(reading)
    _, status = os.waitpid(pid, 0)
    seconds = time.monotonic() - started
    text = output.decode(errors="replace")
    if seconds > _LONGEST:
        text += f"\nit hung for {_LONGEST:.0f} s"
    return os.waitstatus_to_exitcode(status), text, seconds


def _become(work: Callable[[], int], output: int) -> NoReturn:
    """What the child does instead of going on as its parent."""
    code = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", encoding="utf-8", closefd=False) for fd in (1, 2))
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@cache
def _composed(words: tuple[str, ...]) -> DictConfig:
    return composed(words)


def _command(settings: DictConfig, folder: Path, interference: Interference, phase: mmap, noted: Path) -> int:
    """The command line, in this process, for its exit code; composed before, which is a third of Hydra's time."""
    for name in ("HOME", "XDG_CACHE_HOME"):
        os.environ[name] = str(folder / "cache")
    # A signal waits until the command is there to answer it: what comes before is the campaign's own.
    signals.pthread_sigmask(signals.SIG_BLOCK, _ENDING)
    for number in _ENDING:  # a campaign under nohup ignores some
        signals.signal(number, signals.SIG_DFL)
    signals.signal(signals.SIGINT, signals.default_int_handler)
    sys.argv = ["horen_bench"]
    settings.results_dir = str(folder / "results")
    ticks = itertools.count(step=_TICK)
    vars(stream)["time"] = SimpleNamespace(**{**vars(time), "monotonic": ticks.__next__})
    hydra.main = lambda **_: lambda job: lambda: _answering(job, settings)
    points = None
    disturbance = interference.disturbance
    if interference.count or interference.signal or disturbance:
        lines = noted.open("a", encoding="utf-8", buffering=1)  # a line is written before a kill
        points = Points(
            [folder / "results", folder / "cache", resource("data")],
            disturbance,
            phase,
            lambda event: lines.write(json.dumps(astuple(event)) + "\n") if disturbance or interference.count else None,
        )
        points.install()
    if interference.largest_file is not None:
        import resource as limits  # noqa: PLC0415 - POSIX only

        limits.setrlimit(limits.RLIMIT_FSIZE, (interference.largest_file, limits.RLIM_INFINITY))
    counts_memory = points and (disturbance is None or disturbance.group == "memory")
    try:
        with points.allocations() if points and counts_memory else nullcontext():
            main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(bool(end.code))
    finally:
        if interference.modules:
            interference.modules.write_text("\n".join(sys.modules), encoding="utf-8")
    return 0


def _answering(job: Callable[[DictConfig], None], settings: DictConfig) -> None:
    signals.pthread_sigmask(signals.SIG_UNBLOCK, _ENDING)
    job(settings)


def fresh(folder: Path, seed: Path | None = None) -> Path:
    """An empty folder, or a copy of another."""
    shutil.rmtree(folder, ignore_errors=True)
    if seed is None:
        folder.mkdir(parents=True)
    else:
        shutil.copytree(seed, folder)
    return folder
