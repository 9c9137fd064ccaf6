"""The command line: what it prints, what it refuses in one sentence, and with which exit code it ends."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest

from horen_bench.__main__ import main
from horen_bench.cases import EditCase, EditRecord
from horen_bench.datasets.facts import records, to_json
from horen_bench.editors.horen.editor import HorenEditor
from horen_bench.paths import resource

QUICK = ["method.n_steps=2", "device=cpu"]


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`python -m horen_bench ...` with results in a folder of its own, in this process."""

    def call(*words: str) -> Outcome:
        monkeypatch.setenv("HYDRA_FULL_ERROR", "")  # `main` sets it; so it is taken back after the test
        monkeypatch.delenv("HYDRA_FULL_ERROR")
        monkeypatch.setattr(sys, "argv", ["horen_bench", *words])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Outcome(code, *capsys.readouterr())

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return call


# --- Refusals: one sentence, exit code 2, no traceback -----------------------------------------------------


def known(group: str) -> str:
    return ", ".join(sorted(path.stem for path in (resource("conf") / group).glob("*.yaml")))


# What only the model, the machine or the files can tell; wrong settings have tests/config/test_wrong_command_lines.py.
REFUSED = [
    (["method.module=model.layers.4.mlp.down_proj"],
     "method.module=model.layers.4.mlp.down_proj: LlamaForCausalLM has no such module; model.layers has 4 entries, "
     "0 to 3"),
    (["method.module=model.layers.2.mlp.down"],
     "method.module=model.layers.2.mlp.down: LlamaForCausalLM has no such module; model.layers.2.mlp has "
     "gate_proj, up_proj, down_proj, act_fn"),
    (["method.module=model.layers.2.mlp"],
     "method.module=model.layers.2.mlp is a LlamaMLP; a linear module is needed"),
    (["model.hub_id=./nowhere"],
     "model.hub_id=./nowhere: there is no such folder; give a hub id or an existing folder"),
    (["model.hub_id=embedded:large"],
     "model.hub_id=embedded:large: no such embedded model; the package brings embedded:tiny"),
    (["device=cuda:99"], "device=cuda:99 cannot be used here (..."),
    (["dataset=zsre", "dataset.locality_source=record", "dataset.path=there/is/none.json"],
     "there/is/none.json does not exist..."),
    (["n=200000000"], "n=200000000 is more than facts stream 1 holds; write n=700000 or less"),
    (["dataset=zsre", "dataset.locality_source=record", "dataset.path=three.json", "dataset.target=alt", "n=4"],
     "n=4 is more than three.json holds; write n=3 or less"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "sentence"), REFUSED, ids=[" ".join(words) for words, _ in REFUSED])
def test_what_cannot_be_run_is_answered_with_one_sentence(
    command: Command, tmp_path: Path, words: list[str], sentence: str
) -> None:
    (tmp_path / "three.json").write_text(to_json(records(1, stop=3)))
    done = command(*words)
    assert done.code == 2
    assert done.out == ""
    line, rest = done.err.split("\n", 1)
    assert rest == ""
    if sentence.endswith("..."):  # what follows is torch's or the dataset's
        assert line.startswith(f"error: {sentence[:-3]}")
    else:
        assert line == f"error: {sentence}"
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".csv", ".parquet", ".safetensors")]


# --- Runs --------------------------------------------------------------------------------------------------


def test_a_run_prints_its_table_and_where_it_is_and_a_second_call_prints_it_again(command: Command) -> None:
    first = command("n=5", "checkpoints=[2]", *QUICK)
    assert first.code == 0
    assert first.err == ""
    for part in ("horen on tiny, facts", "Rel ↑", "│ 2 ", "│ 5 ", "protocol greedy, seed 42", "stored: results/runs/"):
        assert part in first.out
    again = command("n=5", "checkpoints=[2]", *QUICK)
    assert again.code == 0
    table = first.out[first.out.index("horen on tiny") : first.out.index("stored: ")]
    assert again.out[again.out.index("horen on tiny") :].startswith(table)
    assert "already finished, nothing was run (force=true runs it again): results/runs/" in again.out
    assert "evaluating" not in again.out


def test_a_signal_ends_the_command_with_its_code_and_where_it_goes_on(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit, number = HorenEditor.edit, signal.SIGTERM

    def interrupted(editor: HorenEditor, cases: Sequence[EditCase]) -> list[EditRecord]:
        if editor.n_edits == 2:
            signal.raise_signal(number)
        return edit(editor, cases)

    words = ["n=5", "checkpoints=[]", "method.engine=sequential", "save_every=1e9", *QUICK]
    with monkeypatch.context() as patch:
        patch.setattr(HorenEditor, "edit", interrupted)
        stopped = command(*words)
    assert stopped.code == 128 + number
    assert stopped.out.splitlines()[-1] == (
        f"interrupted by {number.name}: 3 edits are saved, and the same command goes on from N=3"
    )
    assert command(*words).code == 0


def test_a_sweep_goes_on_after_a_member_that_fails_and_its_runs_share_their_edits(
    command: Command, tmp_path: Path
) -> None:
    done = command("-m", "n=3,0,5", "checkpoints=[]", *QUICK)
    assert done.code == 2
    assert done.err == "error: n must be at least 1, got 0\n"
    (folder,) = (tmp_path / "results" / "runs").iterdir()
    assert pd.read_csv(folder / "checkpoints.csv")["n"].tolist() == [3, 5]
    assert done.out.count("stored: ") == 2


def test_a_sweep_of_sound_members_ends_well(command: Command, tmp_path: Path) -> None:
    assert command("-m", "seed=1,2", "n=2", "checkpoints=[]", *QUICK).code == 0
    assert len(list((tmp_path / "results" / "runs").iterdir())) == 2


def test_a_sweep_goes_on_after_a_dataset_that_fails(command: Command, tmp_path: Path) -> None:
    (tmp_path / "three.json").write_text(to_json(records(1, stop=3)))
    files = ["dataset=zsre", "dataset.locality_source=record", "dataset.path=three.json"]
    done = command("-m", "dataset.target=other,alt", *files, "n=2", "checkpoints=[]", *QUICK)
    assert done.code == 2
    assert len(list((tmp_path / "results" / "runs").iterdir())) == 1


def test_help_names_every_choice_and_the_settings(command: Command) -> None:
    done = command("--help")
    assert done.code == 0
    for group in ("model", "method", "dataset", "tracker"):
        assert f"{group}: {known(group)}" in done.out
    for setting in ("n", "checkpoints", "results_dir", "device", "method.threshold"):
        assert f"  {setting}=" in done.out


def test_a_model_folder_is_checked_by_its_own_configuration(command: Command, tmp_path: Path) -> None:
    values = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **values}))
    done = command(f"model.hub_id={tmp_path}", *QUICK)
    assert done.code == 2
    assert done.err.endswith("model.layers has 2 entries, 0 to 1\n")


# --- A process of its own ----------------------------------------------------------------------------------


def process(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "HYDRA_FULL_ERROR"}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=False, cwd=folder, env=environment
    )


def test_the_command_ends_with_its_sentence_and_code_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = process("-m", "horen_bench", "method=horn", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: method=horn: there is no such method; write one of {known('method')}\n"
    assert list(tmp_path.iterdir()) == []


IMPORT_ALL = """
import importlib, json, logging, os, pkgutil, random, sys
import numpy, rich.progress, torch  # rich draws from random
before = dict(os.environ)
states = torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()
threads, handlers = torch.get_num_threads(), list(logging.getLogger().handlers)
import horen_bench
for module in pkgutil.walk_packages(horen_bench.__path__, "horen_bench."):
    if not module.name.endswith("datasets.__main__"):
        importlib.import_module(module.name)
changed = sorted(key for key in before.keys() | os.environ.keys() if before.get(key) != os.environ.get(key))
print(json.dumps({
    "environment": [key for key in changed if not key.startswith(("KMP_", "TORCHINDUCTOR", "TRITON"))],
    "seeded": states != (torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()),
    "threads": threads != torch.get_num_threads(),
    "loggers": handlers != logging.getLogger().handlers,
    "wandb": "wandb" in sys.modules,
    "cuda": torch.cuda.is_initialized(),
    "modules": sum(name.startswith("horen_bench.") for name in sys.modules),
}))
"""


def test_importing_every_module_does_nothing(tmp_path: Path) -> None:
    done = process("-c", IMPORT_ALL, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert found.pop("modules") > 20
    assert found == {
        "environment": [], "seeded": False, "threads": False, "loggers": False, "wandb": False, "cuda": False,
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == []
