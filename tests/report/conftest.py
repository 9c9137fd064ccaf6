"""Runs made by hand, with texts that try to break out of the page."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import pytest

from horen_bench.report import StoredRun

HOSTILE = "</script><script>document.title='broken'</script><img src=x onerror=alert(1)> & \"quoted\" <!--"


def make_run(
    method: str = "HoReN", protocols: Sequence[str] = ("greedy",), seed: int = 1, n_cases: int = 30
) -> StoredRun:
    """A run with checkpoints at 10 and `n_cases` edits; OP and Gen differ, Loc is missing at the first."""
    name = method.lower()
    config = {
        "model": {"name": "tiny", "label": "Tiny"},
        "method": {"name": name, "label": method, "n_steps": 50},
        "dataset": {"name": "facts", "label": "Facts"},
        "seed": seed,
    }
    rows = pd.DataFrame([_row(name, protocol, n, seed) for protocol in protocols for n in (10, n_cases)])
    cases = pd.DataFrame([_case(protocol, i, n_cases) for protocol in protocols for i in range(n_cases)])
    return StoredRun(f"tiny-{name}-facts-{seed:010d}", config, rows, cases)


def _row(method: str, protocol: str, n: int, seed: int) -> dict[str, Any]:
    scores = {"rel": 0.9, "gen": 0.25, "loc": None if n == 10 else 1.0, "op": 0.75 if protocol == "greedy" else 0.5}
    row: dict[str, Any] = {"n": n, "protocol": protocol, "model": "tiny", "method": method, "dataset": "facts"}
    row |= {"seed": seed, "items": n, "failed_edits": 0, "warnings": "the <b>fan</b> was loud" if n == 10 else None}
    row |= {"edit_seconds": n / 100, "eval_seconds": 2.0, "edits_per_second": 100.0}
    for name, value in scores.items():
        row |= {name: value, f"{name}_low": value and value - 0.125, f"{name}_high": value, f"{name}_items": n}
    return row


def _case(protocol: str, i: int, n: int) -> dict[str, Any]:
    right, acts = i % 3 != 0, i % 2 == 0
    case: dict[str, Any] = {
        "n": n,
        "protocol": protocol,
        "position": i,
        "case_id": f"case-{i}",
        "edit_action": "inserted",
    }
    case |= {"prompt": f"Who founded town {i}? {HOSTILE if i == 0 else ''}", "target": f"Founder {i}"}
    case |= {"edit_entry": i, "edit_steps": 12, "edit_loss": 0.0061, "edit_problem": None}
    case |= {"rel": 1.0 if right else 0.5, "rel_base": 0.0, "rel_predictions": [f"answer {i}"]}
    case |= {"rel_entries": [i], "rel_route_scores": [0.97 if acts else 0.5], "rel_matched": [acts]}
    case |= {"loc": 1.0, "loc_base": 1.0, "loc_predictions": ["blue", "red"]}
    return case | {"loc_entries": [None, None], "loc_route_scores": [None, None], "loc_matched": [None, None]}


@pytest.fixture
def runs() -> list[StoredRun]:
    """Two methods, one of them with two seeds and two protocols."""
    both = ("greedy", "release")
    return [make_run("GRACE", both), make_run("HoReN", both), make_run("HoReN", seed=2)]
