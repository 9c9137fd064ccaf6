"""The campaign's table: what was done, how often, how the runs ended, and what must not be."""

import os
import platform
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import torch

from faults.campaign import Outcome


def frame(outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """One row per trial."""
    rows = [
        {
            "trial": each.trial.name,
            "method": each.trial.method,
            "scenario": each.trial.scenario,
            "action": each.trial.action,
            "kind": each.trial.kind,
            "what": each.trial.what,
            "where": each.trial.where,
            "ended": each.ended,
            "phase": each.phase,
            "seconds": round(each.seconds, 3),
            "sentence": each.sentence,
            "problem": each.problem,
        }
        for each in sorted(outcomes, key=lambda outcome: outcome.trial.name)
    ]
    return pd.DataFrame(rows)


def summary(outcomes: Sequence[Outcome]) -> str:
    """Markdown: counts by what was done and to what, kills by what was going on, and every problem."""
    lines = [f"{len(outcomes)} runs, {_machine()}", ""]
    lines += [
        "| what happens | to | runs | a sentence | went on | killed | wrong |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for each in outcomes:
        groups.setdefault((each.trial.action, each.trial.kind or "the run"), []).append(each)
    for (action, kind), members in sorted(groups.items()):
        ended = Counter(each.ended for each in members)
        wrong = sum(bool(each.problem) for each in members)
        counts = (len(members), ended["sentence"], ended["went on"], ended["killed"], wrong)
        lines.append(f"| {action} | {kind} | {' | '.join(str(count) for count in counts)} |")
    killed = Counter(each.phase for each in outcomes if each.ended == "killed")
    if killed:
        lines += ["", f"Killed while {', '.join(f'{phase}: {count}' for phase, count in killed.most_common())}."]
    lines.append("")
    lines += _problems(outcomes)
    return "\n".join(lines) + "\n"


def _problems(outcomes: Sequence[Outcome]) -> list[str]:
    """Every kind of problem with the number of its trials and a name that repeats it."""
    kinds: dict[tuple[str, str], list[Outcome]] = {}
    for each in outcomes:
        if each.problem:
            kinds.setdefault((each.problem[:160], each.trial.where), []).append(each)
    if not kinds:
        return ["Nothing went wrong."]
    lines = ["| wrong | where | runs | repeat with `--trial` |", "| --- | --- | --- | --- |"]
    for (problem, where), members in sorted(kinds.items(), key=lambda item: -len(item[1])):
        lines.append(f"| {problem.replace('|', '/')} | {where} | {len(members)} | {members[0].trial.name} |")
    return lines


def _machine() -> str:
    date = datetime.now(UTC).date().isoformat()
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    return f"{date}, {machine}, Python {platform.python_version()}, torch {torch.__version__}"


def write(outcomes: Sequence[Outcome], folder: Path) -> str:
    """Write `trials.csv` and `report.md`; the report."""
    folder.mkdir(parents=True, exist_ok=True)
    frame(outcomes).to_csv(folder / "trials.csv", index=False)
    text = summary(outcomes)
    (folder / "report.md").write_text(text, encoding="utf-8")
    return text
