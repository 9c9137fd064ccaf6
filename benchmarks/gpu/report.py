"""The report: every figure with its goal, and for each goal that was missed a sentence that says what bounds it."""

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from gpu.suite import FAILED, SECONDS, WHOLE, Row, Rows


@dataclass(frozen=True, slots=True)
class Goal:
    """What a figure should be.

    Attributes:
        step: of the suite.
        measurement: a pattern.
        figure: its name.
        why: names the sentence for a miss.
        least: lowest value; None: any.
        most: highest value; None: any.
    """

    step: str
    measurement: str
    figure: str
    why: str
    least: float | None = None
    most: float | None = None

    def is_of(self, row: Row) -> bool:
        """Whether it is about a row."""
        return (row.step, row.figure) == (self.step, self.figure) and fnmatchcase(row.measurement, self.measurement)

    def met(self, row: Row) -> bool:
        """Whether a row reaches it."""
        number = row.number
        if number is None:
            return False
        return (self.least is None or number >= self.least) and (self.most is None or number <= self.most)

    def text(self) -> str:
        """As it stands in the table."""
        return f">= {self.least:g}" if self.least is not None else f"<= {self.most:g}"


def write_report(rows: Rows, goals: Sequence[Goal], folder: Path, *, dry: bool) -> Path:
    """Write `<device>-<date>.md` and the same as CSV; a run that goes on later writes the same files.

    Args:
        rows: of one device.
        goals: see `gpu.yaml`.
        folder: where the files go.
        dry: whether the shapes were those of the dry run, for which goals mean nothing.
    """
    measured = rows.all()
    name = re.sub(r"[^a-z0-9]+", "-", rows.device.lower()).strip("-")
    path = folder / f"{name}-{min(row.date for row in measured)}.md"
    pairs = [(row, next((goal for goal in goals if not dry and goal.is_of(row)), None)) for row in measured]
    path.write_text(_page(rows, pairs, goals, dry=dry), encoding="utf-8")
    with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "measurement", "figure", "value", "unit", "goal", "met", "note"])
        for row, goal in pairs:
            verdict = [goal.text(), _met(row, goal)] if goal else ["", ""]
            writer.writerow([row.step, row.measurement, row.figure, row.value, row.unit, *verdict, row.note])
    return path


def _page(rows: Rows, pairs: Sequence[tuple[Row, Goal | None]], goals: Sequence[Goal], *, dry: bool) -> str:
    lines = [f"# {rows.device}", ""]
    if dry:
        lines += ["A dry run: tiny shapes, so that the figures mean nothing and goals do not apply.", ""]
    else:
        lines += ["## Goals", "", *_verdicts(rows, pairs, goals), ""]
    for step in dict.fromkeys(row.step for row, _ in pairs):
        lines += [f"## {step}", "", "| measurement | figure | value | unit | goal | met |", f"|{' --- |' * 6}"]
        for row, goal in pairs:
            if row.step == step and row.figure not in (SECONDS, FAILED):
                cells = [row.measurement, row.figure, row.value, row.unit]
                cells += [goal.text(), _met(row, goal)] if goal else ["", ""]
                lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
        failed = [row for row, _ in pairs if (row.step, row.figure) == (step, FAILED)]
        lines += ["", *(f"- {row.measurement}: {row.note}" for row in failed)]
        ended = [row for row, _ in pairs if (row.step, row.figure) == (step, SECONDS) and row.measurement != WHOLE]
        lines += ["", f"The measurements took {sum(row.number or 0 for row in ended):.0f} s.", ""]
    return "\n".join(lines)


def _verdicts(rows: Rows, pairs: Sequence[tuple[Row, Goal | None]], goals: Sequence[Goal]) -> list[str]:
    """A line for each goal: met, missed and why, or not measured."""
    lines: list[str] = []
    for goal in goals:
        about = [row for row, its_goal in pairs if its_goal is goal]
        if not about:
            lines.append(f"- {goal.step}, {goal.figure} {goal.text()}: not measured.")
        met = [row for row in about if goal.met(row)]
        if met:
            lines.append(f"- {goal.step}, {goal.figure} {goal.text()}: met by {', '.join(map(_named, met))}.")
        for row in about:
            if row not in met:
                why = _REASONS[goal.why](rows, row)
                lines.append(f"- {goal.step}, {goal.figure} {goal.text()}: **missed** by {_named(row)}. {why}")
    return lines


def _named(row: Row) -> str:
    return f"{row.measurement} ({row.value})"


def _met(row: Row, goal: Goal) -> str:
    return "yes" if goal.met(row) else "no"


# --- What bounds a figure --------------------------------------------------------------------------------


def _speed(rows: Rows, row: Row) -> str:
    """Where the time of an edit goes."""

    def of(measurement: str, figure: str) -> float | None:
        return rows.number(row.step, measurement, figure)

    parts: list[str] = []
    share, idle = of("value training", "share of the matrix rate"), of("profile of a step", "device idle")
    if share is not None:
        parts.append(f"a step of value training reaches {share:.0%} of the matrix rate")
    if idle is not None:
        launches, waits = (of("profile of a step", name) or 0 for name in ("launches", "waits of the host"))
        parts.append(f"the device idles {idle:.0%} of a step, with {launches:.0f} launches and {waits:.0f} host waits")
    keys, edit = of("key extraction", "one edit"), of("editing", "parallel, one edit")
    if keys is not None and edit:
        parts.append(f"key extraction is {keys / edit:.0%} of an edit")
    first = (row.step, "profile of a step", "kernel 1")
    parts += [f"most of it goes to {r.value}" for r in rows.all() if (r.step, r.measurement, r.figure) == first]
    bound = "" if idle is None else " The host bounds it." if idle > 0.5 else " The kernels bound it."
    return (_joined(parts) + bound) if parts else _unknown(rows, row)


def _growth(rows: Rows, row: Row) -> str:
    """What an edit takes at each size."""
    beside = [other for other in rows.all() if (other.step, other.measurement) == (row.step, row.measurement)]
    figures = [other for other in beside if " at C = " in other.figure]
    if not figures:
        return _unknown(rows, row)
    listed = ", ".join(f"{r.figure} {r.value} {r.unit}" for r in figures)
    return f"What grows beside the products are the passes over the scores: {listed}."


def _difference(rows: Rows, row: Row) -> str:
    """How far apart the two sides are."""
    far = rows.number(row.step, row.measurement, "largest difference of a value")
    if far is None:
        return _unknown(rows, row)
    return f"The largest difference of a value is {far:.2g} of the largest value."


def _unknown(_rows: Rows, _row: Row) -> str:
    return "No other figure says why."


def _joined(parts: Sequence[str]) -> str:
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


_REASONS: Mapping[str, Callable[[Rows, Row], str]] = {"speed": _speed, "growth": _growth, "difference": _difference}


def goals_of(settings: Mapping[str, Any]) -> list[Goal]:
    """The goals of `gpu.yaml`."""
    return [Goal(**goal) for goal in settings["goals"]]
