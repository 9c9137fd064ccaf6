"""The command that makes tables and figures."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from horen_bench.paper.__main__ import main
from horen_bench.paper.grids import cells

Wrote = Callable[..., None]


def test_the_command_writes_the_table_of_what_is_stored(
    wrote: Wrote, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (cell,) = cells("table9", ["method=horen"])
    scores: dict[str, Any] = {f"{name}{end}": 0.5 for name in ("gen", "loc", "op") for end in ("", "_low", "_high")}
    wrote(cell=cell, n=100, **scores)
    assert main(["table9", "method=horen", "--stored"]) == 0
    out = capsys.readouterr().out
    for part in (
        "| Facts     | tiny         | HoReN",
        "| 0.88",
        "LLaMA-3.1 8B, HoReN, N = 100, 500, 1,000: not run: the weights",
    ):
        assert part in out
    assert {path.name for path in (tmp_path / "results" / "tables").iterdir()} == {
        "table9.md",
        "table9.csv",
        "table9.tex",
    }


def test_the_command_says_what_it_would_take(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table10,table11", "--estimate", "--jobs", "2"]) == 0
    out = capsys.readouterr().out
    assert "3 runs to do, 2 at a time: about" in out
    assert "tiny, HoReN, Facts, LoRA" in out


def test_settings_are_read_and_nothing_is_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["table3", "suite=tiny"]) == 0
    assert "LLaMA-3 8B" in capsys.readouterr().out
    assert not (tmp_path / "results" / "runs").exists()


@pytest.mark.parametrize("name", ["table12", "figure2"])
def test_an_unknown_name_is_refused_with_those_there_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {name}: there is no such table or figure; write one of table1, table2")
    assert "figure1, figure4" in error


def test_a_table_of_which_nothing_can_be_run_says_why(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["table1", "suite=tiny", "seed=-1"]) == 2
    assert capsys.readouterr().err == "error: seed must be at least 0, got -1\n"
    assert not (tmp_path / "results").exists()


def test_nothing_heavy_is_imported_to_read_what_is_stored(tmp_path: Path) -> None:
    code = (
        "import sys; from horen_bench.paper.__main__ import main; main(['table10', 'suite=tiny', '--stored']); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=tmp_path, capture_output=True).returncode == 0
