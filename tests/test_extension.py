"""A package of somebody else's adds a method and a dataset by YAML on Hydra's search path and a `_target_`."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pandas as pd
import pytest

FILES = {
    "hydra_plugins/their_lab.py": """
        from hydra.core.config_search_path import ConfigSearchPath
        from hydra.plugins.search_path_plugin import SearchPathPlugin

        class TheirLab(SearchPathPlugin):
            def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
                search_path.append(provider="their_lab", path="pkg://their_lab.conf")
    """,
    "their_lab/__init__.py": "",
    "their_lab/conf/__init__.py": "",
    "their_lab/conf/method/nothing.yaml": """
        _target_: their_lab.nothing.NothingConfig
        name: nothing
        label: Nothing at all
        style: {colour: "#123456", line: "--", marker: x}
        rank: 5
        ms_per_edit: 0.1
        patience: 2
    """,
    "their_lab/conf/dataset/capitals.yaml": """
        _target_: their_lab.capitals.Capitals
        name: capitals
        label: Capitals
        protocol: greedy
        reverse: false
    """,
    "their_lab/nothing.py": '''
        """A method that writes nothing."""

        import math
        from typing import ClassVar

        import torch

        from horen_bench.cases import EditRecord
        from horen_bench.config.schema import Count, MethodConfig
        from horen_bench.editors.base import Editor

        class NothingConfig(MethodConfig):
            editor: ClassVar[str] = "their_lab.nothing:NothingEditor"
            patience: Count
            """Edits to wait before nothing is done."""

        class NothingEditor(Editor[NothingConfig]):
            n_edits = 0

            def edit(self, cases):
                self.n_edits += len(cases)
                return [EditRecord(case.id, "inserted", None, None, math.nan, 0, 1e-9) for case in cases]

            def state_dict(self):
                return {"n_edits": torch.tensor(self.n_edits)}

            def load_state_dict(self, state):
                if set(state) != {"n_edits"}:
                    raise ValueError("no state of this editor's")
                self.n_edits = int(state["n_edits"])

            def detach(self):
                pass

            def side_parameters(self):
                return 0
    ''',
    "their_lab/capitals.py": '''
        """A dataset of their own."""

        from horen_bench.cases import EditCase, Probe
        from horen_bench.config.schema import Dataset

        NAMES = ["Lisbon", "Quito", "Oslo", "Riga", "Lima", "Bern"]

        class Capitals(Dataset):
            reverse: bool
            """Backwards."""

            def cases(self, n):
                names = NAMES[::-1] if self.reverse else NAMES
                return [
                    EditCase(f"c{i}", f"The capital number {i} is", name, locality=(Probe("The sea is", "blue"),))
                    for i, name in enumerate(names[:n])
                ]
    ''',
}


@pytest.fixture(scope="module")
def their_lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder on the path of Python that holds their package."""
    folder = tmp_path_factory.mktemp("site")
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")
    return folder


def run(their_lab: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(their_lab), "COLUMNS": "160"}
    environment.pop("HYDRA_FULL_ERROR", None)
    return subprocess.run(
        [sys.executable, "-m", *words], capture_output=True, text=True, check=False, cwd=folder, env=environment
    )


def test_their_method_and_dataset_run_and_are_tabled_and_drawn(their_lab: Path, tmp_path: Path) -> None:
    run_words = ["horen_bench", "method=nothing", "dataset=capitals", "n=6", "checkpoints=[2,4]", "device=cpu"]
    done = run(their_lab, tmp_path, *run_words)
    assert done.returncode == 0, done.stderr
    assert "nothing on tiny, capitals" in done.stdout
    (folder,) = (tmp_path / "results" / "runs").iterdir()
    rows = pd.read_csv(folder / "checkpoints.csv")
    assert rows["n"].tolist() == [2, 4, 6]
    assert (rows["rel"] == rows["rel_base"]).all()
    assert (rows["loc"] == 1).all()

    grid = ["method=nothing,horen", "dataset=capitals", "n=6", "checkpoints=[2,6]"]
    table = run(their_lab, tmp_path, "horen_bench.paper", "table1", "suite=tiny", *grid, "protocol=[greedy]")
    assert table.returncode == 0, table.stderr
    assert "Nothing at all" in table.stdout
    assert "Capitals" in table.stdout
    figure = run(their_lab, tmp_path, "horen_bench.paper", "figure1", "suite=tiny", *grid, "protocol=[greedy]")
    assert figure.returncode == 0, figure.stderr
    drawn = (tmp_path / "results" / "figures" / "figure1.svg").read_text(encoding="utf-8")
    assert "Nothing at all" in drawn
    assert "#123456" in drawn


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["method=nothing", "method.patience=0"], ("method.patience must be at least 1, got 0",)),
        (["method=nothing", "method.patiense=1"], ("method.patiense", "did you mean method.patience?")),
        (["dataset=capitals", "dataset.reverse=5"], ("dataset.reverse must be true or false, got 5",)),
        (["method=nothin"], ("write one of", "nothing")),
    ],
)
def test_their_settings_are_checked_like_ours(
    their_lab: Path, tmp_path: Path, words: list[str], parts: tuple[str, ...]
) -> None:
    done = run(their_lab, tmp_path, "horen_bench", *words)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert [part for part in parts if part not in done.stderr] == []


def test_help_shows_their_choices_and_settings(their_lab: Path, tmp_path: Path) -> None:
    done = run(their_lab, tmp_path, "horen_bench", "method=nothing", "--help")
    assert done.returncode == 0, done.stderr
    assert "method.patience=2  (whole number, >= 1)" in done.stdout
    assert "Edits to wait before nothing is done." in done.stdout
    assert "capitals" in done.stdout
