"""`python -m horen_bench.results verify`: which cells cannot be trusted."""

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch

from horen_bench.config.compose import run_config
from horen_bench.models.weights import weights_fingerprint
from horen_bench.results.__main__ import main
from horen_bench.results.store import RunStore, stored_predictions

CONFIG = run_config()


@pytest.fixture
def run(tmp_path: Path) -> RunStore:
    """Two checkpoints of the embedded model with their cases, a state, and predictions of the base model."""
    store = RunStore(tmp_path / "runs" / "tiny-horen-facts-ab")
    store.describe(CONFIG, {"device": "cpu"}, {"n": 2})
    for n in (1, 2):
        write(store, n, rel=0.5)
    store.save_state({"x": torch.ones(8)}, {"records": [1, 2]})
    stored_predictions(tmp_path / "base_predictions" / "a.json", ["k"], lambda _: [{"ids": [1]}])
    return store


def write(store: RunStore, n: int, *, rel: float, weights: str | None = None) -> None:
    weights = weights or weights_fingerprint(CONFIG.model.hub_id, CONFIG.model.dtype)
    row = {"n": n, "protocol": "greedy", "weights": weights, "rel": rel, "rel_low": 0.0, "rel_high": 1.0}
    store.add_checkpoint(row, pd.DataFrame({"n": n, "protocol": "greedy", "rel": [0.25, 0.75]}))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_runs_that_are_as_they_were_written_are_sound(
    run: RunStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for named in (run.path, tmp_path, tmp_path / "runs"):
        assert main(["verify", str(named)]) == 0
        assert capsys.readouterr().out == f"{run.path}: sound\n1 of 1 runs are as they were written\n"


def a_score(run: RunStore) -> None:
    path = run.path / "checkpoints.csv"
    path.write_text(path.read_text().replace("2,greedy", "2,greedy,", 1).replace("0.5", "0.6").replace(",,", ","))


def a_file_of_cases(run: RunStore) -> None:
    flip(run.path / "cases.parquet" / "000000002-greedy.parquet", 40)


def all_rows(run: RunStore) -> None:
    (run.path / "checkpoints.csv").write_text("")


def the_state(run: RunStore) -> None:
    flip(run.path / "state" / "stream.safetensors", -2)


def a_score_with_its_checksum(run: RunStore) -> None:
    write(run, 2, rel=0.625)


def the_weights(run: RunStore) -> None:
    for n in (1, 2):
        write(run, n, rel=0.5, weights="0123-float32")


def one_of_two_weights(run: RunStore) -> None:
    write(run, 2, rel=0.5, weights="0123-float32")


def the_schema(run: RunStore) -> None:
    (run.path / "environment.json").write_text(json.dumps({"schema": 1}))


def the_base_predictions(run: RunStore) -> None:
    path = run.path.parent.parent / "base_predictions" / "a.json"
    path.write_text(path.read_text().replace("[1]", "[2]"))


DAMAGES: list[tuple[Callable[[RunStore], None], str]] = [
    (a_score, "N=1, greedy: its scores cannot be trusted: the row of N=1, greedy does not agree with its checksum"),
    (a_file_of_cases, "N=2, greedy: its per-case rows cannot be trusted: 000000002-greedy.parquet does not agree with"),
    (all_rows, "no cell can be trusted: "),
    (the_state, "the stream cannot be gone on with, finished cells are not concerned: "),
    (a_score_with_its_checksum, "N=2, greedy: rel cannot be trusted: it is 0.625, and the mean of its cases 0.5"),
    (the_weights, "no cell is about the model as it is now: its weights were 0123-float32, and are "),
    (one_of_two_weights, "rows are about different weights ("),
    (the_schema, "was made with another version of the program (schema 1, now "),
    (the_base_predictions, "base_predictions/a.json is damaged: 1 of 1 predictions are made again"),
]


@pytest.mark.parametrize(("damage", "sentence"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
def test_what_is_damaged_is_named(
    run: RunStore,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[RunStore], None],
    sentence: str,
) -> None:
    damage(run)
    assert main(["verify", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert sentence in out
    other = "N=1" if sentence.startswith("N=2") else "N=2"
    assert damage is a_score or other not in out, "a sound cell is not named"


def test_a_folder_without_runs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} is no run directory and holds none")
