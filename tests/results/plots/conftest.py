"""Rows written by hand."""

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest

Row = dict[str, Any]


@pytest.fixture
def absent() -> Callable[..., Row]:
    """Makes a row as `grids.collect` gives it for what is missing."""

    def make(n: int, method: str = "HoReN", **changes: Any) -> Row:
        labels = {"model_label": "tiny", "method_label": method, "dataset_label": "Facts", "variant": ""}
        about = {"protocol": "greedy", "seed": 1, "status": "not run", "reason": "it was not started"}
        return {"n": n, **labels, **about, **changes}

    return make


@pytest.fixture
def finished(absent: Callable[..., Row]) -> Callable[..., Row]:
    """Makes a stored row, whose intervals reach .1 to both sides."""

    def make(n: int, method: str = "HoReN", **changes: Any) -> Row:
        scores = {
            name: changes.pop(name, value) for name, value in {"rel": 0.9, "gen": 0.8, "loc": 1.0, "op": 0.89}.items()
        }
        intervals = {
            f"{name}_{end}": score + by for name, score in scores.items() for end, by in (("low", -0.1), ("high", 0.1))
        }
        return {
            **absent(n, method),
            "status": "finished",
            "reason": "",
            "device": "cpu",
            "items": n,
            **scores,
            **intervals,
            **changes,
        }

    return make


@pytest.fixture
def published() -> pd.DataFrame:
    """Two points of the paper."""
    about = {"model": "LLaMA-3.1 8B", "dataset": "ZsRE", "method": "HoReN"}
    return pd.DataFrame([{**about, "n": n, "rel": 1.0, "gen": 0.9, "loc": 1.0, "op": 0.97} for n in (100, 1000)])
