"""Run directories: whole files at every moment, one process at a time."""

import contextlib
import errno
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from horen_bench.config.compose import run_config
from horen_bench.editors.horen.config import HorenConfig
from horen_bench.errors import UserError
from horen_bench.results.atomic import replacing, write_text
from horen_bench.results.store import SCHEMA, RunStore, identity, stored_predictions

ONE_CASE = pd.DataFrame({"case_id": ["a"]})


def place(n: int, protocol: str = "greedy") -> dict[str, Any]:
    """What names a checkpoint."""
    return {"n": n, "protocol": protocol}


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path / "run")


# --- Whole files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [RuntimeError("stopped"), KeyboardInterrupt(), OSError("broken")])
def test_a_write_that_fails_in_the_middle_leaves_the_old_file_alone(tmp_path: Path, failure: BaseException) -> None:
    path = tmp_path / "sub" / "file"
    write_text(path, "old")
    with pytest.raises((type(failure), UserError)), replacing(path) as temporary:
        temporary.write_text("half of the n")
        assert path.read_text() == "old"
        raise failure
    assert path.read_text() == "old"
    assert files(tmp_path) == ["sub/file"]


def test_the_new_file_is_on_the_disk_before_it_takes_the_old_ones_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    seen: list[tuple[str, Path]] = []

    def flush(descriptor: int) -> None:
        seen.append((path.read_text(), Path(f"/proc/self/fd/{descriptor}").resolve()))

    monkeypatch.setattr(os, "fsync", flush)
    write_text(path, "new")
    assert [text for text, _ in seen] == ["old", "new"]
    assert [where.parent for _, where in seen] == [tmp_path, tmp_path.parent], "the copy, then the folder's names"
    assert path.read_text() == "new"


def test_a_new_folder_is_on_the_disk_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.append(Path(f"/proc/self/fd/{fd}").resolve()))
    write_text(tmp_path / "a" / "b" / "file", "new")
    assert {tmp_path, tmp_path / "a", tmp_path / "a" / "b"} <= {*flushed}


def test_a_file_system_that_cannot_flush_folders_is_written_to_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flush(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").resolve().is_dir():
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", flush)
    write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_full_disk_is_one_sentence_that_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(UserError) as caught, replacing(path) as temporary:
        temporary.symlink_to("/dev/full")
        temporary.write_text("new")
    assert str(caught.value) == (
        f"{path}: the disk is full; free some space and run the same command again, what is finished is kept"
    )
    assert path.read_text() == "old"
    assert files(tmp_path) == ["file"]


def grow(store: RunStore) -> dict[str, Callable[[], None]]:
    big = pd.DataFrame({"text": [f"{i} " * 20 for i in range(2000)]})
    return {
        "state": lambda: store.save_state({"x": torch.zeros(20_000)}, {"position": 2}),
        "checkpoint": lambda: store.add_checkpoint(place(2), big),
        "text": lambda: write_text(store.path / "config.yaml", "x" * 20_000),
    }


@pytest.mark.parametrize("what", ["state", "checkpoint", "text"])
def test_a_disk_that_fills_while_flushing_keeps_what_was_stored(
    store: RunStore, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add_checkpoint(place(1), ONE_CASE)
    store.save_state({"x": torch.ones(2)}, {"position": 1})
    before = files(store.path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r": the disk is full; free some space"):
        patch.setattr(os, "fsync", full)
        grow(store)[what]()
    assert files(store.path) == before
    assert store.rows() == [place(1)]
    state = store.load_state()
    assert state is not None
    assert state[1] == {"position": 1}


LIMITED = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_store import grow, place, ONE_CASE
import torch
from horen_bench.errors import UserError
from horen_bench.results.store import RunStore
store = RunStore(Path({path!r}))
store.add_checkpoint(place(1), ONE_CASE)
store.save_state({{"x": torch.ones(2)}}, {{"position": 1}})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
for write in grow(store).values():
    try:
        write()
    except UserError as error:
        print(error)
"""


def test_a_write_that_the_system_cuts_short_keeps_what_was_stored(store: RunStore) -> None:
    """The kernel refuses to let any file grow past 8 KiB, in the middle of each of the three writers."""
    script = LIMITED.format(tests=str(Path(__file__).parent), path=str(store.path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done
    for line in lines:
        assert ": it cannot be written (" in line
        assert "File too large" in line
        assert line.endswith(
            "; mend that, or choose another place with results_dir= and run the same command again, "
            "what is finished is kept"
        )
    assert files(store.path) == [
        "cases.parquet/000000001-greedy.parquet",
        "checkpoints.csv",
        "state/stream.safetensors",
    ]
    assert store.rows() == [place(1)]
    state = store.load_state()
    assert state is not None
    assert state[1] == {"position": 1}


# --- Rows --------------------------------------------------------------------------------------------------


def test_an_empty_store_has_no_rows_no_cases_and_no_state(store: RunStore) -> None:
    assert store.rows() == []
    assert store.cases().empty
    assert store.load_state() is None
    assert not store.path.exists()


def test_checkpoints_come_back_in_order_and_replace_their_own_n(store: RunStore) -> None:
    for n, rel in ((20, 0.25), (10, 0.5), (20, 0.75)):
        cases = pd.DataFrame({"n": n, "rel": [rel] * n, "predictions": [["a", "b"]] * n})
        store.add_checkpoint(place(n) | {"rel": rel, "warnings": None}, cases)
    rows = store.checkpoints()
    assert rows["n"].tolist() == [10, 20]
    assert rows["rel"].tolist() == [0.5, 0.75]
    assert rows["warnings"].isna().all()
    cases = store.cases()
    assert cases["n"].tolist() == [10] * 10 + [20] * 20
    assert cases["rel"].iloc[-1] == 0.75
    assert list(cases["predictions"].iloc[0]) == ["a", "b"]


def test_protocols_of_one_checkpoint_stand_beside_each_other(store: RunStore) -> None:
    for n, protocol in ((10, "release"), (10, "greedy"), (5, "release"), (10, "release")):
        store.add_checkpoint(place(n, protocol), ONE_CASE.assign(n=n, protocol=protocol))
    assert store.rows() == [place(10, "greedy"), place(5, "release"), place(10, "release")]
    assert store.cases()[["n", "protocol"]].to_dict("records") == store.rows()


def test_a_row_reads_back_as_it_was_written_however_often_others_join_it(store: RunStore) -> None:
    row = {**place(1), "rel": 0.1 + 0.2, "edit_seconds": 1 / 3, "warnings": 'two\nlines, a comma and a "quote"'}
    store.add_checkpoint(row, ONE_CASE)
    for n in range(2, 6):
        store.add_checkpoint(place(n) | {"mhop": 0.5}, ONE_CASE)
    first = store.rows()[0]
    assert {name: first[name] for name in row} == row
    assert math.isnan(first["mhop"])


@pytest.mark.parametrize("run", ["0012345678", "12e4567890"])
def test_a_run_id_that_looks_like_a_number_stays_text(store: RunStore, run: str) -> None:
    store.add_checkpoint(place(1) | {"run": run}, ONE_CASE)
    assert store.rows()[0]["run"] == run


def test_cases_without_their_row_do_not_count(store: RunStore) -> None:
    """A process that dies between the two files of a checkpoint has not reached it."""
    store.add_checkpoint(place(1), ONE_CASE.assign(n=1))
    with replacing(store.path / "cases.parquet" / "000000002-greedy.parquet") as temporary:
        ONE_CASE.assign(n=2).to_parquet(temporary)
    assert store.cases()["n"].tolist() == [1]


# --- Damage ------------------------------------------------------------------------------------------------


def stored_twice(store: RunStore) -> Path:
    """Two checkpoints; the file of their rows."""
    for n in (1, 20):
        row = {**place(n), "run": "ab", "rel": 0.5, "rel_low": 0.25, "rel_high": 1.0, "warnings": "two\nlines"}
        store.add_checkpoint(row, pd.DataFrame({"n": n, "protocol": "greedy", "rel": [0.25, 0.75]}))
    return store.path / "checkpoints.csv"


DAMAGES = {
    "empty": lambda data: b"",
    "garbage": lambda data: b"\xff\x00\xfe" * 50,
    "text": lambda data: b"it is a fine day",
    "half": lambda data: data[: len(data) // 2],
    "last letter": lambda data: data[:-2],
    "no header": lambda data: data[data.index(b"\n") + 1 :],
    "a score": lambda data: data.replace(b"0.5", b"0.6", 1),
    "a column's name": lambda data: data.replace(b",rel,", b",gen,", 1),
    "no checksums": lambda data: data.replace(b"row_sha256", b"row_sha1"),
    "another protocol": lambda data: data.replace(b"20,greedy", b"20,text", 1),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_rows_are_named_and_never_believed(store: RunStore, damage: Callable[[bytes], bytes]) -> None:
    path = stored_twice(store)
    path.write_bytes(damage(path.read_bytes()))
    for read in (store.checkpoints, store.rows, store.cases, store.check):
        with pytest.raises(UserError) as caught:
            read()
        assert str(caught.value).startswith(f"{path} is damaged (")
        assert "; start the run again with force=true, or see what can be trusted with python -m" in str(caught.value)
    with pytest.raises(UserError):  # and nothing is written beside it
        store.add_checkpoint(place(3), ONE_CASE)
    assert store.sound_checkpoints().empty


def test_rows_of_an_older_version_are_called_that_and_not_damaged(store: RunStore) -> None:
    write_text(store.path / "checkpoints.csv", "n,protocol,rel\n1,greedy,0.5\n")
    write_text(store.path / "environment.json", '{"schema": 2}')
    with pytest.raises(UserError) as caught:
        store.checkpoints()
    assert str(caught.value) == refused(store, 2)


@pytest.mark.parametrize("what", ["bit", "empty", "missing", "folder"])
def test_damaged_cases_are_named(store: RunStore, what: str) -> None:
    stored_twice(store)
    path = store.path / "cases.parquet" / "000000020-greedy.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif what != "missing":
        path.write_bytes(data if what == "bit" else b"")
    for read in (store.check, store.cases):
        with pytest.raises(UserError, match=r"cases\.parquet is damaged \(000000020-greedy\.parquet "):
            read()
    assert store.checkpoints()["n"].tolist() == [1, 20], "rows have checksums of their own"


def test_a_lost_row_is_not_stored_and_the_others_are(store: RunStore) -> None:
    path = stored_twice(store)
    before = store.rows()
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]))  # the second row is on two lines each
    assert store.rows() == before[:1]


# --- A run that is made again ------------------------------------------------------------------------------


def test_a_run_that_is_made_again_takes_the_place_of_the_old_one_however_often_it_is_killed(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every rename and removal of the move in turn; the next holder of the lock does the rest."""
    for k in range(1, 20):
        store.clear()
        stored_twice(store)
        write_text(store.path / "wandb.json", "of the old run")
        with store.locked():
            store.again().add_checkpoint(place(5), ONE_CASE)
            store.again().save_state({}, {"records": [1, 2]})
            with monkeypatch.context() as patch:
                steps = kill_after(k, patch)
                with contextlib.suppress(KeyboardInterrupt):
                    store.take_over()
        with store.locked():
            pass
        assert store.rows() == [place(5)]
        assert store.saved_n() == 2
        assert files(store.path) == [
            ".lock",
            "cases.parquet/000000005-greedy.parquet",
            "checkpoints.csv",
            "state/stream.safetensors",
        ]
        if len(steps) < k:
            break
    assert k > 5


def kill_after(k: int, patch: pytest.MonkeyPatch) -> list[Path]:
    """Raise after the k-th path that is renamed or removed; those that were."""
    steps: list[Path] = []
    for name in ("rename", "unlink"):
        step = getattr(Path, name)

        def counted(path: Path, *rest: Any, step: Any = step, **more: Any) -> Any:
            result = step(path, *rest, **more)
            steps.append(path)
            if len(steps) == k:
                raise KeyboardInterrupt
            return result

        patch.setattr(Path, name, counted)
    return steps


def test_clear_forgets_everything_but_the_lock(store: RunStore) -> None:
    with store.locked():
        store.add_checkpoint(place(1), ONE_CASE)
        store.save_state({}, {"position": 1})
        write_text(store.path / "config.yaml", "n: 1")
        store.clear()
        assert files(store.path) == [".lock"]


# --- State -------------------------------------------------------------------------------------------------


def test_state_comes_back_bit_for_bit_with_its_progress(store: RunStore) -> None:
    tensors = {
        "keys": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).T,  # not contiguous
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "labels": torch.tensor([[1, -100]]),
        "empty": torch.zeros(0, 4),
    }
    progress = {"records": [{"loss": math.inf, "problem": None, "é": "ü"}], "edit_seconds": 0.1 + 0.2}
    store.save_state(tensors, progress)
    state = store.load_state()
    assert state is not None
    assert state[1] == progress
    assert state[0].keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert state[0][name].dtype == tensor.dtype
        assert torch.equal(state[0][name], tensor)


@pytest.mark.parametrize("damage", [lambda data: data[:-8], lambda data: b"", lambda data: b"\xff" * len(data)])
def test_a_damaged_state_says_how_to_start_again(store: RunStore, damage: Callable[[bytes], bytes]) -> None:
    store.save_state({"x": torch.ones(20)}, {"position": 1})
    path = store.path / "state" / "stream.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError) as caught:
        store.load_state()
    assert str(caught.value).startswith(f"{path} is damaged (")
    assert str(caught.value).endswith("or start the run again with force=true")


@pytest.mark.parametrize("place", ["values", "progress"])
def test_a_single_bit_of_a_state_is_noticed_and_never_believed(store: RunStore, place: str) -> None:
    store.save_state({"x": torch.ones(20)}, {"position": 7})
    path = store.path / "state" / "stream.safetensors"
    data = bytearray(path.read_bytes())
    data[data.rindex(b"7") if place == "progress" else len(data) - 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"is damaged \(it does not agree with its checksum\); delete it to edit"):
        store.load_state()


def test_a_state_that_is_not_finite_names_its_tensor(store: RunStore) -> None:
    store.save_state({"fine": torch.ones(2), "broken": torch.tensor([1.0, math.nan])}, {"position": 1})
    with pytest.raises(UserError, match=r"is damaged \(broken holds numbers that are not finite\)"):
        store.load_state()


def test_a_folder_in_the_place_of_the_state_is_one_sentence(store: RunStore) -> None:
    (store.path / "state" / "stream.safetensors").mkdir(parents=True)
    with pytest.raises(UserError, match=r"stream\.safetensors is damaged"):
        store.load_state()
    assert store.saved_n() == 0


# --- Identity ----------------------------------------------------------------------------------------------

CONFIG = run_config()


def changed(override: str) -> str:
    return identity(run_config([override]))


@pytest.mark.parametrize(
    "override",
    [
        "seed=43",
        "method.threshold=0.7",
        "method.hopfield.beta=10.0",
        "method.engine=sequential",
        "method=grace",
        "locality=clean",
        "eval_cases=5",
        "dataset.stream_seed=2",
        "dataset.name=zsre",
        "model.name=other",
        "model.hub_id=a/c",
        "model.revision=main",
        "model.dtype=bfloat16",
        "template=model",
        "text.max_new_tokens=128",
    ],
)
def test_what_changes_the_numbers_makes_another_run(override: str) -> None:
    assert changed(override) != identity(CONFIG)


def test_the_date_of_a_chat_makes_another_run() -> None:
    dates = ("2026-01-01", "2026-07-01")
    assert len({identity(run_config(["template=model", f"template_date={date}"])) for date in dates}) == 2


class NewConfig(HorenConfig):
    """A method of somebody else under the name of ours."""


class NewerConfig(NewConfig):
    """One with a setting more."""

    new_constant: int | None = None


def test_another_class_or_a_new_setting_makes_another_run() -> None:
    settings = dict(CONFIG.method)
    methods = [CONFIG.method, NewConfig(**settings), NewerConfig(**settings), NewerConfig(**settings, new_constant=1)]
    assert len({identity(CONFIG.model_copy(update={"method": method})) for method in methods}) == 4


@pytest.mark.parametrize(
    "override",
    [
        "n=5",
        "checkpoints=[1,2]",
        "protocol=[release,greedy]",
        "dataset.protocol=teacher_forced",
        "results_dir=elsewhere",
        "data_dir=elsewhere",
        "device=cuda",
        "threads=null",
        "batch_size=1",
        "save_every=0",
        "reuse=false",
        "force=true",
        "tracker=wandb",
        "model.threads=null",
        "model.device_map=auto",
        "model.label=Small",
        "model.rome.module=not_of_this_method",
        "template=none",
        "template_date=2026-07-01",
        "text.max_new_tokens=512",
        "text.minilm=elsewhere",
        "method.label=Other",
        "method.rank=7",
        "method.ms_per_edit=null",
        "method.style.line=':'",
        "dataset.label=Other",
    ],
)
def test_what_does_not_change_the_numbers_goes_on_with_the_run(override: str) -> None:
    assert changed(override) == identity(CONFIG)


def test_a_data_file_counts_by_what_it_holds_and_not_by_where_it_lies() -> None:
    here, there = (identity(run_config(["dataset=zsre", f"dataset.path={path}"])) for path in ("a.json", "b.json"))
    assert here == there != identity(CONFIG)


def test_statistics_count_by_what_they_hold_and_not_by_where_they_lie(tmp_path: Path) -> None:
    def with_statistics(**changes: Any) -> str:
        overrides = [f"method.statistics.{name}={value}" for name, value in changes.items()]
        return identity(run_config(["method=memit", "method.statistics.corpus=a.txt", *overrides]))

    for name, value in (("here", 1.0), ("there", 1.0), ("other", 2.0), ("damaged", 0.0)):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "layer_float32_mom2_100.npz", moment=np.full((2, 2), value))
    assert with_statistics(folder="elsewhere") == with_statistics()
    assert with_statistics(corpus="b.txt") != with_statistics()
    here, there, other = (with_statistics(published=str(tmp_path / name)) for name in ("here", "there", "other"))
    assert here == there
    assert len({here, other, with_statistics()}) == 3
    (tmp_path / "damaged" / "layer_float32_mom2_100.npz").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"method\.statistics\.published: .* cannot be read"):
        with_statistics(published=str(tmp_path / "damaged"))


def test_identity_does_not_depend_on_the_order_of_settings() -> None:
    settings = dict(reversed([*dict(CONFIG.method).items()]))
    backwards = CONFIG.model_copy(update={"method": HorenConfig(**settings)})
    assert identity(backwards) == identity(CONFIG)
    assert len(identity(CONFIG)) == 10


# --- Schema ------------------------------------------------------------------------------------------------


def refused(store: RunStore, number: object) -> str:
    """What is printed about a folder that a version with another schema left."""
    return (
        f"{store.path} was made with another version of the program (schema {number}, now {SCHEMA}); start again with "
        "force=true, or keep it by choosing another results_dir="
    )


def test_a_folder_of_this_schema_is_gone_on_with_and_an_empty_one_too(store: RunStore) -> None:
    store.check_schema()
    store.record_failure("no weights")
    store.check_schema()
    store.describe(CONFIG, {"device": "cpu"}, {"n": 1})
    store.add_checkpoint(place(1), ONE_CASE)
    store.check_schema()
    store.describe(CONFIG, {"device": "cuda"}, {"n": 1})
    assert json.loads((store.path / "environment.json").read_text()) == {
        "schema": SCHEMA,
        "sittings": [{"device": "cpu"}, {"device": "cuda"}],
    }


@pytest.mark.parametrize(
    ("environment", "number"),
    [
        (None, "none"),
        ('{"device": "cpu"}', "none"),
        ('{"schema": 1}', 1),
        ('{"schema": 99}', 99),
        ("[", "none"),
        ("[]", "none"),
    ],
)
@pytest.mark.parametrize("what", ["rows", "state"])
def test_a_folder_of_another_schema_is_refused_in_a_sentence(
    store: RunStore, what: str, environment: str | None, number: object
) -> None:
    if what == "rows":
        store.add_checkpoint(place(1), ONE_CASE)
    else:
        store.save_state({}, {"position": 1})
    if environment is not None:
        write_text(store.path / "environment.json", environment)
    with pytest.raises(UserError) as caught:
        store.check_schema()
    assert str(caught.value) == refused(store, number)


@pytest.mark.parametrize(
    ("metadata", "number"),
    [(None, "none"), ({"progress": "{}"}, "none"), ({"schema": "1", "progress": "{}"}, 1), ({"schema": "99"}, 99)],
)
def test_a_state_of_another_schema_is_refused_in_a_sentence(
    store: RunStore, metadata: dict[str, str] | None, number: object
) -> None:
    path = store.path / "state" / "stream.safetensors"
    path.parent.mkdir(parents=True)
    save_file({"x": torch.ones(2)}, path, metadata=metadata)
    with pytest.raises(UserError) as caught:
        store.load_state()
    assert str(caught.value) == refused(store, number)


# --- One process at a time ---------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from horen_bench.results.store import RunStore
with RunStore(Path(sys.argv[1])).locked():
    print("held", flush=True)
    time.sleep(100)
"""


def test_a_second_process_is_told_to_wait_until_the_first_is_gone_however_it_went(store: RunStore) -> None:
    command = [sys.executable, "-c", HOLD, str(store.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(UserError) as caught, store.locked():
                pass
        finally:
            holder.send_signal(signal.SIGKILL)
    assert str(caught.value) == (
        f"another process is working on this run ({store.path}); wait for it, or change the settings"
    )
    with store.locked():
        assert store.path.exists()


def test_an_error_of_something_else_while_holding_the_lock_is_not_taken_for_a_full_disk(store: RunStore) -> None:
    with pytest.raises(ConnectionError), store.locked():
        raise ConnectionError("the hub is gone")


# --- Base predictions --------------------------------------------------------------------------------------


def test_only_missing_base_predictions_are_made(tmp_path: Path) -> None:
    path = tmp_path / "base" / "predictions.json"
    made: list[list[int]] = []

    def predict(missing: list[int]) -> list[dict[str, list[int]]]:
        made.append(missing)
        return [{"ids": [i]} for i in missing]

    assert stored_predictions(path, ["a", "b"], predict) == [{"ids": [0]}, {"ids": [1]}]
    assert stored_predictions(path, ["c", "a", "b", "d"], predict) == [{"ids": [i]} for i in (0, 0, 1, 3)]
    assert stored_predictions(path, ["d", "a"], predict) == [{"ids": [3]}, {"ids": [0]}]
    assert made == [[0, 1], [0, 3]]
    assert sorted(json.loads(path.read_text())) == ["a", "b", "c", "d"]


OTHER_SCHEMAS = ['{"a": {"ids"', "[]", "null", '"a"', '{"a": {"ids": [1]}}', '{"a": [1]}', '{"a": null}', "\udcff", ""]


@pytest.mark.parametrize("content", OTHER_SCHEMAS)
def test_a_file_that_holds_no_base_predictions_is_named_and_made_again(tmp_path: Path, content: str) -> None:
    path = tmp_path / "predictions.json"
    path.write_text(content, errors="surrogateescape")
    said: list[str] = []
    made = stored_predictions(path, ["a"], lambda missing: [{"ids": [7]} for _ in missing], said.append)
    assert made == [{"ids": [7]}]
    assert len(said) == 1
    assert said[0].startswith(f"{path} is damaged")
    assert stored_predictions(path, ["a"], lambda _: [], said.append) == [{"ids": [7]}]
    assert len(said) == 1


def test_a_changed_base_prediction_is_made_again_and_the_others_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "predictions.json"
    predicted: list[list[int]] = []

    def predict(missing: list[int]) -> list[dict[str, list[int]]]:
        predicted.append(missing)
        return [{"ids": [10 * i]} for i in missing]

    made = stored_predictions(path, ["a", "b", "c"], predict)
    entries = json.loads(path.read_text())
    entries["b"]["ids"] = [11]  # one more than it was
    path.write_text(json.dumps(entries))
    said: list[str] = []
    assert stored_predictions(path, ["a", "b", "c"], predict, said.append) == [
        {"ids": [0]},
        {"ids": [10]},
        {"ids": [20]},
    ]
    assert made == [{"ids": [0]}, {"ids": [10]}, {"ids": [20]}]
    assert predicted == [[0, 1, 2], [1]]
    assert said == [f"{path} is damaged: 1 of 3 predictions are made again"]


def test_predictions_of_another_model_or_probe_are_not_believed(tmp_path: Path) -> None:
    path, other = tmp_path / "a.json", tmp_path / "b.json"
    stored_predictions(path, ["a", "b"], lambda missing: [{"ids": [i]} for i in missing])
    other.write_bytes(path.read_bytes())
    assert stored_predictions(other, ["a"], lambda _: [{"ids": [9]}]) == [{"ids": [9]}]
    entries = json.loads(path.read_text())
    path.write_text(json.dumps({"a": entries["b"], "b": entries["a"]}))
    assert stored_predictions(path, ["b"], lambda _: [{"ids": [8]}]) == [{"ids": [8]}]


def test_what_a_killed_writer_left_among_the_base_predictions_is_swept(tmp_path: Path) -> None:
    leftovers = [tmp_path / name for name in (".predictions.json.12.tmp", ".of-another-model.json.7.tmp")]
    for leftover in leftovers:
        leftover.write_text("half of")
    stored_predictions(tmp_path / "predictions.json", ["a"], lambda _: [{"ids": [1]}])
    assert [path for path in leftovers if path.exists()] == []
