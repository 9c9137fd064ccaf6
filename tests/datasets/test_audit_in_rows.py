"""What a row says of its stream: which subject most touched locality probes mention, and contradicting paraphrases."""

import io
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from horen_bench import runner
from horen_bench.config.compose import run_config
from horen_bench.datasets.facts import records


def test_a_row_names_what_dominates_its_touched_locality_and_contradicting_paraphrases(
    written: Callable[..., Path], tmp_path: Path
) -> None:
    first, second, third = list(records(1, stop=3))
    subject = third["subject"]
    first["loc"], second["loc"] = f"where is {subject} from", f"how old is {subject}"
    first["rephrase"] = second["rephrase"] = "Reformulated Question:"
    overrides = [
        "dataset=zsre",
        f"dataset.path={written([first, second, third])}",
        "dataset.locality_source=record",
        "dataset.target=alt",
        "method=ft_l",
        "method.n_steps=1",
        "device=cpu",
        f"results_dir={tmp_path / 'results'}",
        "n=3",
        "checkpoints=[2,3]",
    ]
    rows = runner.run(run_config(overrides), Console(file=io.StringIO())).rows
    before, after = rows["warnings"]
    assert "2 paraphrases are given different targets" in before
    assert "'Reformulated Question:' (2)" in before
    assert "touched" not in before  # the edit about the subject is not among the first two
    assert f"2 locality probes are touched by another edit (2 of them because they mention {subject!r})" in after
    assert "2 paraphrases are given different targets" in after
