"""What the tests of grids share: an empty place to work in, and rows that a run would have left."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from horen_bench.paper.grids import Cell


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def wrote() -> Callable[..., None]:
    """Stores a checkpoint row, as a run would leave it."""

    def write(*, cell: Cell, n: int, protocol: str = "greedy", **more: Any) -> None:
        row = {"n": n, "protocol": protocol, **cell.names, "items": n, "cases": f"{n}", "rel": 0.5}
        row |= {
            "failed_edits": 0,
            "warnings": None,
            "edit_seconds": 1.0,
            "eval_seconds": 1.0,
            "peak_memory_bytes": 1,
            **more,
        }
        cell.store.path.mkdir(parents=True, exist_ok=True)
        cell.store.add_checkpoint(row, pd.DataFrame({"n": [n]}))

    return write
