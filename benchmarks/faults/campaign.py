"""What is tried, on which run, and what must hold afterwards."""

import json
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from faults.points import Disturbance, Event, Mode
from faults.process import Ending, Interference, fresh, in_a_process, run

Scenario = Literal["fresh", "goes_on", "force"]
SCENARIOS: tuple[Scenario, ...] = ("fresh", "goes_on", "force")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# Of a row: what is measured, and what says in words how it was made.
_MEASURED = {
    "edit_seconds",
    "eval_seconds",
    "edits_per_second",
    "inference_base_ms",
    "inference_ms",
    "peak_memory_bytes",
    "warnings",
}
_ROUNDING = 1e-4  # relative; of numbers whose batch was halved when memory ran out
_ERROR = 2
_GOES_ON = "the same command goes on"  # what an interrupted run says
_READS = ("open to read", "read", "list", "load")  # a disk that fails on is tried with what follows them


@dataclass(frozen=True, slots=True)
class Trial:
    """One disturbed run and what followed.

    Attributes:
        name: repeats it: `--trial NAME`.
        method: of the run.
        scenario: what was stored before.
        action: `fails`, `lasting`, `kill`, `kill by time`, `size limit`, or a signal.
        kind: of the disturbed call; "" without one.
        what: its file, or the operation of torch.
        where: the lines of the package that made it.
        interference: what the run meets.
    """

    name: str
    method: str
    scenario: Scenario
    action: str
    kind: str
    what: str
    where: str
    interference: Interference


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a trial.

    Attributes:
        trial: which.
        ended: `sentence`, `went on` or `killed`, or in words what else happened.
        phase: what was going on at last.
        sentence: what the run said.
        problem: what must not be; "" if all holds.
        seconds: of the disturbed run.
        output: all that it printed.
    """

    trial: Trial
    ended: str
    phase: str
    sentence: str
    problem: str
    seconds: float
    output: str


class Bench:
    """The runs of one method, undisturbed, and what a disturbed one is compared with.

    Args:
        method: its name.
        settings: of the campaign.
        folder: where everything is kept.
    """

    def __init__(self, method: str, settings: Mapping[str, Any], folder: Path) -> None:
        self.method = method
        self._settings = settings
        self._folder = folder / method
        self._seeds: dict[Scenario, Path | None] = {
            "fresh": None,
            "goes_on": self._folder / "goes_on",
            "force": self._folder / "force",
        }
        self.seconds: dict[Scenario, float] = {}
        self.events: dict[Scenario, list[Event]] = {}

    def words(self, scenario: Scenario, n: int | None = None) -> list[str]:
        """The command line of a scenario."""
        checkpoints = ",".join(str(checkpoint) for checkpoint in self._settings["checkpoints"])
        words = [f"method={self.method}", f"n={n or self._settings['n']}", f"checkpoints=[{checkpoints}]"]
        words += ["save_every=0", *self._settings["methods"][self.method]]
        return [*words, "force=true"] if scenario == "force" else words

    def prepare(self, scenarios: Sequence[Scenario] = SCENARIOS) -> None:
        """Run undisturbed: for what is stored before each scenario, for its time, and for its calls.

        Args:
            scenarios: that are to be tried.

        Raises:
            RuntimeError: an undisturbed run fails, or another one has other rows.
        """
        if "goes_on" in scenarios:
            self._undisturbed("goes_on", n=self._settings["checkpoints"][0])
        self._undisturbed("force")
        for scenario in scenarios:
            place = self._begin(scenario, f"count-{scenario}")
            counted = _well(run(self.words(scenario), place, Interference(count=True)))
            self.seconds[scenario], self.events[scenario] = counted.seconds, counted.events
            difference = _in_child(lambda place=place: self.difference(place))
            if difference:
                raise RuntimeError(f"{self.method}, {scenario}: two undisturbed runs differ: {difference}")

    def _undisturbed(self, scenario: Scenario, n: int | None = None) -> None:
        _well(run(self.words("fresh", n), fresh(self._folder / scenario)))

    def _begin(self, scenario: Scenario, name: str) -> Path:
        return fresh(self._folder / name, self._seeds[scenario])

    def perform(self, trial: Trial) -> Outcome:
        """Run disturbed, look at what it left, run again, and compare."""
        place = self._begin(trial.scenario, f"at-{os.getpid()}")
        ending = run(self.words(trial.scenario), place, trial.interference)
        rounding = trial.kind == "allocation"
        problems = [*_wrong_ending(trial, ending), _in_child(lambda: self._lost(trial.scenario, place))]
        if ending.code == 0:
            problems.append(_in_child(lambda: self.difference(place, rounding=rounding), "its own rows: "))
        before = _rows_as_text(place)
        again = run(self.words(trial.scenario), place)
        if again.code != 0:
            problems.append(f"the next run failed: {again.sentence or again.output[-300:]}")
        else:
            problems.append(_in_child(lambda: self.difference(place, rounding=rounding), "the next run's rows: "))
            if trial.scenario != "force":
                problems += [_missing_lines(before, place), self._lost_sittings(trial.scenario, place)]
        met = ending.events[0] if ending.events else Event("file", trial.kind, trial.what, trial.where)
        return Outcome(
            trial=replace(trial, kind=met.kind, what=met.what, where=met.where),
            ended=_ended(trial, ending),
            phase=ending.phase,
            sentence=ending.sentence,
            problem="; ".join(" ".join(problem.split()) for problem in problems if problem).replace(str(place), "..."),
            seconds=ending.seconds,
            output=ending.output,
        )

    def difference(self, place: Path, *, rounding: bool = False) -> str:
        """Where the rows of a folder are not those of an undisturbed run; "" if nowhere.

        Args:
            place: the folder.
            rounding: whether numbers may differ by it, which they do where memory ran out and a batch was halved.
        """
        reference = self._seeds["force"]
        assert reference is not None
        for name, read in (("checkpoints", _checkpoints), ("cases", _cases)):
            try:
                pd.testing.assert_frame_equal(
                    read(place), read(reference), check_exact=not rounding, rtol=_ROUNDING, atol=_ROUNDING
                )
            except AssertionError as error:
                return f"{name} differ: {error}"
        return ""

    def _lost(self, scenario: Scenario, place: Path) -> str:
        """Which checkpoints that were finished before are in no file any more.

        `force` may give the old ones up as soon as the first new one is stored.
        """
        seed = self._seeds[scenario]
        if seed is None or (scenario == "force" and _places(place)):
            return ""
        finished = _places(seed)
        lost = sorted(finished - _places(place))
        return f"finished checkpoints are lost: {lost}" if lost else ""

    def _lost_sittings(self, scenario: Scenario, place: Path) -> str:
        """Whether the run no longer says on which machine and with which versions it began."""
        seed = self._seeds[scenario]
        lost = seed is not None and not all(sitting in _sittings(place) for sitting in _sittings(seed))
        return "the environment of an earlier sitting is lost" if lost else ""


# --- What is tried ---------------------------------------------------------------------------------------


def trials(bench: Bench, settings: Mapping[str, Any], *, first: bool) -> Iterator[Trial]:
    """All trials of a method.

    Args:
        bench: prepared.
        settings: of the campaign.
        first: whether it is the method that meets everything.
    """
    plan = settings["first" if first else "others"]
    for scenario, modes in plan.items():
        for mode in modes:
            alike = () if first else settings["alike"]
            yield from _of_files(bench, scenario, mode, alike, loading=first and scenario == "fresh")
    for number, at in enumerate(spread(bench.events["fresh"], settings["allocations"])):
        yield of_call(bench, "fresh", Disturbance("memory", at, "lasting" if number % 2 else "once"))
    yield from _kills(bench, settings["kills"])
    if first:
        yield from (_of_size(bench, size) for size in settings["largest_files"])
        for sent in SIGNALS:
            yield from (
                _of_signal(bench, "fresh", sent, (i + 0.5) / settings["signals"]) for i in range(settings["signals"])
            )


def small(bench: Bench, settings: Mapping[str, Any]) -> Iterator[Trial]:
    """A few trials: of each kind of call the one in the middle of a run from nothing."""
    for mode, kind, what in settings["trials"]:
        group: Literal["file", "memory"] = "memory" if kind == "allocation" else "file"
        calls = [event for event in bench.events["fresh"] if event.group == group]
        fitting = [at for at, event in enumerate(calls) if event.kind == kind and what in ("", event.what)]
        yield of_call(bench, "fresh", Disturbance(group, fitting[len(fitting) // 2], _mode(mode)))


def of_call(bench: Bench, scenario: Scenario, disturbance: Disturbance) -> Trial:
    """A trial in which one call is disturbed."""
    calls = [event for event in bench.events[scenario] if event.group == disturbance.group]
    event = calls[disturbance.at]
    action = {"once": "fails", "lasting": "lasting", "kill": "kill"}[disturbance.mode]
    name = f"{bench.method}/{scenario}/{disturbance.group}/{disturbance.at}/{disturbance.mode}"
    interference = Interference(disturbance)
    return Trial(name, bench.method, scenario, action, event.kind, event.what, event.where, interference)


def named(benches: Mapping[str, Bench], name: str) -> Trial:
    """The trial of a name: `METHOD/SCENARIO/file|memory/CALL/once|lasting|kill`, or what `trials` gave."""
    method, scenario, group, at, mode = name.split("/")
    bench = benches[method]
    if group == "size":
        return _of_size(bench, int(at))
    if group == "time":
        return _of_signal(bench, _scenario(scenario), signal.Signals[mode], float(at))
    disturbance = Disturbance("memory" if group == "memory" else "file", int(at), _mode(mode))
    return of_call(bench, _scenario(scenario), disturbance)


def _scenario(name: str) -> Scenario:
    return SCENARIOS[SCENARIOS.index(name)]


def _mode(name: str) -> Mode:
    modes: tuple[Mode, ...] = ("once", "lasting", "kill")
    return modes[modes.index(name)]


def _of_files(bench: Bench, scenario: Scenario, mode: Mode, alike: Sequence[str], *, loading: bool) -> Iterator[Trial]:
    """Every call on a file, but of reads that a line repeats on a file only the first and the last.

    Those of loading the model only where that is wished, and none on files that are `alike` in all runs.
    """
    calls = [event for event in bench.events[scenario] if event.group == "file"]
    last = {event: at for at, event in enumerate(calls)}
    first = {event: at for at, event in reversed(list(enumerate(calls)))}
    for at, event in enumerate(calls):
        reads = event.kind in _READS
        if event.what in alike or (reads and (mode == "lasting" or at not in (first[event], last[event]))):
            continue
        if loading or not event.where.startswith("models/"):
            yield of_call(bench, scenario, Disturbance("file", at, mode))


def spread(events: Sequence[Event], count: int) -> list[int]:
    """Numbers of allocations: the first of every place in the code, and more, evenly, up to a count."""
    memory = [event for event in events if event.group == "memory"]
    firsts = list({_line(event): at for at, event in reversed(list(enumerate(memory)))}.values())
    places = sorted(firsts)
    if len(places) >= count:
        return places
    even = (round(i * (len(memory) - 1) / max(1, count - len(places))) for i in range(count - len(places)))
    return sorted({*places, *even})


def _line(event: Event) -> str:
    return event.where.partition(" < ")[0]


def _kills(bench: Bench, counts: Mapping[str, int]) -> Iterator[Trial]:
    """Kills at calls, files and allocations in turn, and at moments; three in five from nothing."""
    scenarios: Sequence[Scenario] = ("fresh", "goes_on", "fresh", "force", "fresh")
    for i in range(counts["at_calls"]):
        scenario = scenarios[i % len(scenarios)]
        group: Literal["file", "memory"] = "memory" if i % 3 == 2 else "file"
        calls = sum(event.group == group for event in bench.events[scenario])
        yield of_call(bench, scenario, Disturbance(group, i * calls // counts["at_calls"], "kill"))
    for i in range(counts["by_time"]):
        scenario = scenarios[i % len(scenarios)]
        yield _of_signal(bench, scenario, signal.SIGKILL, (i + 0.5) / counts["by_time"])


def _of_signal(bench: Bench, scenario: Scenario, sent: signal.Signals, share: float) -> Trial:
    """A signal after a share of the time of an undisturbed run."""
    name = f"{bench.method}/{scenario}/time/{share:.4f}/{sent.name}"
    action = "kill by time" if sent is signal.SIGKILL else sent.name
    interference = Interference(signal=sent, after=share * bench.seconds[scenario])
    return Trial(name, bench.method, scenario, action, "", "", "", interference)


def _of_size(bench: Bench, size: int) -> Trial:
    name = f"{bench.method}/fresh/size/{size}/limit"
    return Trial(name, bench.method, "fresh", "size limit", "", f"{size} bytes", "", Interference(largest_file=size))


# --- What must hold --------------------------------------------------------------------------------------


def _wrong_ending(trial: Trial, ending: Ending) -> Iterator[str]:
    """What a run must not do when it is disturbed."""
    if "Traceback" in ending.output:
        yield f"a traceback: {ending.output.strip().splitlines()[-1][:200]}"
    sent = trial.interference.signal
    if trial.action == "kill" or sent is signal.SIGKILL:
        allowed: set[int] = {-signal.SIGKILL, 0}
    elif sent is not None:
        allowed = {128 + sent, 0, *([-sent] if ending.phase == "starting" else [])}  # before it has read its settings
    else:
        allowed = {0, _ERROR}
    if ending.code not in allowed:
        yield f"exit code {ending.code}"
    if (ending.code == _ERROR and not ending.sentence) or (ending.code > 128 and _GOES_ON not in ending.output):
        yield "no sentence"
    if trial.interference.disturbance and "force=true" in ending.sentence:
        yield f"it advises force=true, which gives sound files up: {ending.sentence}"


def _ended(trial: Trial, ending: Ending) -> str:
    if ending.code == -signal.SIGKILL:
        return "killed"
    if ending.code == _ERROR and "Traceback" not in ending.output:
        return "sentence"
    sent = trial.interference.signal
    if sent is not None and ending.code == 128 + sent:
        return "sentence"
    return "went on" if ending.code == 0 else f"exit code {ending.code}"


def _well(ending: Ending) -> Ending:
    if ending.code != 0:
        raise RuntimeError(f"an undisturbed run failed: {ending.output[-2000:]}")
    return ending


def _in_child(work: Any, prefix: str = "") -> str:
    """What `work` returns, from a process of its own: Parquet is read with threads, and those do not survive a fork."""

    def child() -> int:
        print(work(), end="")  # noqa: T201 - read by the parent
        return 0

    code, text, _ = in_a_process(child)
    if code != 0:
        return f"{prefix}cannot be read: {text.strip().splitlines()[-1][:300]}"
    return f"{prefix}{text}" if text else ""


def _run_folder(place: Path) -> Path:
    """The run's folder: the one that holds rows, or any; a run that was moved aside is not it."""
    folders = [path for path in sorted((place / "results" / "runs").glob("*")) if not path.name.startswith(".")]
    with_rows = [path for path in folders if (path / "checkpoints.csv").exists()]
    return (with_rows or folders)[0]


def _checkpoints(place: Path) -> pd.DataFrame:
    rows = pd.read_csv(_run_folder(place) / "checkpoints.csv", dtype={"run": str, "cases": str, "weights": str})
    return rows.drop(columns=[name for name in rows if str(name) in _MEASURED or "sha256" in str(name)])


def _cases(place: Path) -> pd.DataFrame:
    parts = sorted((_run_folder(place) / "cases.parquet").glob("[0-9]*.parquet"))
    cases = pd.concat([pd.read_parquet(part) for part in parts], ignore_index=True)
    return cases.drop(columns="edit_seconds")


def _sittings(place: Path) -> list[Any]:
    environment = json.loads((_run_folder(place) / "environment.json").read_text(encoding="utf-8"))
    return list(environment.get("sittings", []))


def _places(place: Path) -> set[tuple[int, str]]:
    """Checkpoints in any table of rows below a folder, also one that was put aside."""
    tables = [pd.read_csv(path) for path in (place / "results").rglob("checkpoints.csv")]
    return {(int(n), str(protocol)) for rows in tables for n, protocol in zip(rows["n"], rows["protocol"], strict=True)}


def _rows_as_text(place: Path) -> str:
    """The lines of rows that a run has stored, times and all; "" without any."""
    tables = sorted((place / "results").rglob("checkpoints.csv"))
    return "".join(path.read_text(encoding="utf-8") for path in tables)


def _missing_lines(before: str, place: Path) -> str:
    """Which rows the next run did anew although they were finished."""
    gone = [line for line in before.splitlines() if line not in _rows_as_text(place).splitlines()]
    return f"{len(gone)} finished rows were made again" if gone else ""
