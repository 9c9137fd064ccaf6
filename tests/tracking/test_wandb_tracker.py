"""The W&B copy of a run, checked on what the real client writes offline."""

import importlib
import json
import math
import os
import pty
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pandas as pd
import pytest
import wandb

from horen_bench.config.compose import run_config
from horen_bench.errors import UserError
from horen_bench.tracking import wandb_tracker
from horen_bench.tracking.base import NoTracker
from horen_bench.tracking.config import WandbConfig
from horen_bench.tracking.wandb_tracker import WandbTracker

PROTO: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")  # generated, without types
RUN_ID = "0123456789abcdef"
CONFIG = {
    "model": {"name": "tiny"},
    "method": {"name": "horen", "threshold": 0.85},
    "dataset": {"name": "facts"},
}
FAKE_KEY = "5ec7e7" * 7
CASES = pd.DataFrame(
    {
        "n": [10, 10, 20],
        "case": ["a", "b", "a"],
        "rel": [1.0, math.nan, 0.5],
        "inserted": [True, False, True],
        "predictions": [["Oslo", "Bergen"], [], None],
    }
)


@pytest.fixture(autouse=True, scope="module")
def _own_wandb_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the client's home, cache and credentials inside the tests' folder."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in _clean_environment(tmp_path_factory.mktemp("home")).items():
            patch.setenv(name, value)
        for name in set(os.environ) - set(_clean_environment(Path())):
            patch.delenv(name)
        patch.setenv("WANDB_API_KEY", FAKE_KEY)  # offline runs must not write it anywhere
        wandb.teardown()
        yield
        wandb.teardown()


def _clean_environment(home: Path) -> dict[str, str]:
    """The environment without anything of W&B's, with a home that holds no credentials."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "XDG_"))}
    return {**kept, "HOME": str(home), "NETRC": str(home / "netrc")}


def _tracker(mode: Literal["online", "offline"] = "offline") -> WandbTracker:
    return WandbTracker(WandbConfig(project="horen-bench", mode=mode, group="tiny-facts", tags=["test"]))


def _row(n: int, **changes: Any) -> dict[str, Any]:
    row = {
        "n": n,
        "rel": 0.5 + n / 1000,
        "rel_low": 0.25,
        "op": None,
        "loc": math.nan,
        "same_subject": 0.75,
        "items": 20,
        "edit_seconds": 1.5 * n,
        "eval_seconds": 2.0,
        "edits_per_second": 2 / 3,
        "inference_ms": 0.5,
        "side_parameters": 2**40,
        "side_keys": 128,
        "peak_memory_bytes": 4096,
        "protocol": "greedy",
        "warnings": math.nan,
    }
    return {**row, **changes}


def _records(file: Path) -> list[Any]:
    """Read a `.wandb` file: a LevelDB log (32 KiB blocks; crc, length and type before each piece)."""
    data, position, pieces, records = file.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        pieces += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            records.append(PROTO.Record.FromString(pieces))
            pieces = b""
    return records


def _closed(run_dir: Path) -> list[list[Any]]:
    """The records of each process that wrote to `run_dir`, oldest first, once all files are closed."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        processes = [_records(file) for file in sorted(run_dir.rglob("*.wandb"), key=_creation)]
        if processes and all(_of(records, "exit") for records in processes):
            return processes
        time.sleep(0.05)
    raise AssertionError(f"W&B did not close its files in {run_dir}")


def _creation(file: Path) -> int:
    header = _of(_records(file), "run")
    return header[0].start_time.ToNanoseconds() if header else 0


def _of(records: list[Any], kind: str) -> list[Any]:
    return [getattr(record, kind) for record in records if record.WhichOneof("record_type") == kind]


def _history(records: list[Any]) -> list[dict[str, Any]]:
    """The logged rows, without the client's own `_timestamp` and `_runtime`."""
    rows = [_values(history.item) for history in _of(records, "history")]
    return [{k: v for k, v in row.items() if k not in ("_timestamp", "_runtime")} for row in rows]


def _summary(records: list[Any]) -> dict[str, Any]:
    return {k: v for update in _of(records, "summary") for k, v in _values(update.update).items()}


def _values(items: Any) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of one run of two checkpoints, tracked to its end."""
    run_dir = tmp_path_factory.mktemp("finished")
    tracker = _tracker()
    tracker.start(run_dir, RUN_ID, CONFIG, [])
    tracker.log(_row(10))
    tracker.log(_row(20, rel=np.float64(0.25), items=np.int64(7), op=pd.NA, warnings="slow; hot"))
    tracker.finish(CASES)
    assert tracker.problem is None
    _closed(run_dir)
    return run_dir


def _metrics(step: int, n: int, rel: float, items: int) -> dict[str, Any]:
    return {
        "_step": step,
        "edits": n,
        "greedy/rel": rel,
        "greedy/rel_low": 0.25,
        "greedy/same_subject": 0.75,
        "greedy/items": items,
        "cost/edit_seconds": 1.5 * n,
        "cost/eval_seconds": 2.0,
        "cost/edits_per_second": 2 / 3,
        "cost/inference_ms": 0.5,
        "cost/side_parameters": 2**40,
        "cost/side_keys": 128,
        "cost/peak_memory_bytes": 4096,
    }


def test_each_checkpoint_is_one_history_row_without_missing_values(finished: Path) -> None:
    assert _history(_closed(finished)[0]) == [_metrics(0, 10, 0.51, 20), _metrics(1, 20, 0.25, 7)]


def test_every_metric_is_drawn_against_edits(finished: Path) -> None:
    metrics = _of(_closed(finished)[0], "metric")
    assert [(m.name, m.glob_name, m.step_metric) for m in metrics] == [("edits", "", ""), ("", "*", "edits")]


def test_run_carries_id_name_group_tags_and_config(finished: Path) -> None:
    run = _of(_closed(finished)[0], "run")[0]
    assert (run.run_id, run.project, run.run_group) == (RUN_ID, "horen-bench", "tiny-facts")
    assert run.display_name == "horen-tiny-facts-01234567"
    assert list(run.tags) == ["test"]
    config = _values(run.config.update)
    assert {part: config[part] for part in CONFIG} == CONFIG


def test_summary_is_the_last_row_with_its_texts(finished: Path) -> None:
    summary = _summary(_closed(finished)[0])
    expected = {**_metrics(1, 20, 0.25, 7), "warnings": "slow; hot"}
    assert {key: summary.get(key) for key in expected} == expected
    assert not {"greedy/op", "greedy/loc"} & set(summary)


def test_finished_run_exits_with_code_zero(finished: Path) -> None:
    assert [exit_.exit_code for exit_ in _of(_closed(finished)[0], "exit")] == [0]


def _artifact(run_dir: Path) -> tuple[Any, dict[str, Path]]:
    """The artifact of per-case rows and its files; the client adds one of its own for the table."""
    (artifact,) = (one for one in _of(_closed(run_dir)[-1], "artifact") if one.type == "cases")
    return artifact, {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}


def _table(run_dir: Path) -> Any:
    """The table `cases` that the summary points to."""
    (files,) = (run_dir / "wandb").glob("*/files")
    return json.loads((files / _summary(_closed(run_dir)[-1])["cases"]["path"]).read_text())


def test_artifact_holds_all_cases_as_parquet(finished: Path) -> None:
    artifact, files = _artifact(finished)
    assert artifact.name == f"cases-{RUN_ID}"
    stored = pd.read_parquet(files["cases.parquet"])
    plain = ["n", "case", "rel", "inserted"]
    pd.testing.assert_frame_equal(stored[plain], CASES[plain])
    assert [None if p is None else list(p) for p in stored["predictions"]] == list(CASES["predictions"])


def test_summary_holds_a_table_of_the_cases_with_gaps_for_missing_values(finished: Path) -> None:
    assert _summary(_closed(finished)[0])["cases"]["_type"] == "table-file"
    table = _table(finished)
    assert table["columns"] == list(CASES.columns)
    assert table["data"] == [
        [10, "a", 1.0, True, "['Oslo', 'Bergen']"],
        [10, "b", None, False, "[]"],
        [20, "a", 0.5, True, None],
    ]
    assert json.loads(_artifact(finished)[0].metadata) == {"rows": 3, "table_rows": 3}


def test_long_table_is_cut_to_its_last_rows_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_tracker, "_TABLE_ROWS", 1)
    tracker = _tracker()
    tracker.start(tmp_path, RUN_ID, CONFIG, [])
    tracker.finish(CASES)
    artifact, files = _artifact(tmp_path)
    assert json.loads(artifact.metadata) == {"rows": 3, "table_rows": 1}
    assert _table(tmp_path)["data"] == [[20, "a", 0.5, True, None]]
    assert len(pd.read_parquet(files["cases.parquet"])) == 3


def test_api_key_is_nowhere_in_the_run_directory(finished: Path) -> None:
    files = [path for path in finished.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if FAKE_KEY.encode() in path.read_bytes()] == []


def test_run_directory_gets_no_code_packages_or_metadata(finished: Path) -> None:
    names = {path.name for path in finished.rglob("files/**/*")}
    assert not names & {"requirements.txt", "wandb-metadata.json", "output.log", "diff.patch", "code"}
    assert {path.name for path in finished.iterdir()} == {"wandb", "wandb.json"}
    assert len(list((finished / "wandb").iterdir())) == 1  # no latest-run, which changes with each process
    assert not _of(_closed(finished)[0], "environment")


def test_resumed_run_keeps_its_id_and_logs_only_what_is_missing(tmp_path: Path) -> None:
    first = _tracker()
    first.start(tmp_path, RUN_ID, CONFIG, [])
    first.log(_row(10))
    first.log(_row(20))
    first.log(_row(20))
    first.abort()
    logged = json.loads((tmp_path / "wandb.json").read_text())
    assert logged == {"run_id": RUN_ID, "logged": ["greedy/10", "greedy/20"], "finished": False}

    second = _tracker()
    second.start(tmp_path, RUN_ID, CONFIG, [_row(10), _row(20), _row(30)])
    second.log(_row(40))
    second.finish(CASES)
    assert (first.problem, second.problem) == (None, None)

    processes = _closed(tmp_path)
    assert [[row["edits"] for row in _history(records)] for records in processes] == [[10, 20], [30, 40]]
    assert {run.run_id for records in processes for run in _of(records, "run")} == {RUN_ID}
    assert all(run.resume for records in processes for run in _of(records, "run"))
    assert [_of(records, "exit")[0].exit_code for records in processes] == [1, 0]
    assert [row["_step"] for records in processes for row in _history(records)] == [0, 1, 2, 3]
    ledger = json.loads((tmp_path / "wandb.json").read_text())
    assert ledger == {"run_id": RUN_ID, "logged": [f"greedy/{n}" for n in (10, 20, 30, 40)], "finished": True}
    assert {path.name for path in tmp_path.iterdir()} == {"wandb", "wandb.json"}


def test_resumed_run_with_nothing_left_to_log_still_has_its_summary(tmp_path: Path) -> None:
    (tmp_path / "wandb.json").write_text(json.dumps({"run_id": RUN_ID, "logged": ["greedy/10"], "finished": False}))
    tracker = _tracker()
    tracker.start(tmp_path, RUN_ID, CONFIG, [_row(10)])
    tracker.finish(CASES)
    records = _closed(tmp_path)[0]
    assert _history(records) == []
    assert _summary(records)["greedy/rel"] == 0.51


def test_run_that_another_directory_has_tracked_gets_an_id_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What the server tells of an old run cannot be had offline, so the client is played here.
    opened: list[str] = []

    def init(**arguments: Any) -> Any:
        opened.append(arguments["id"])
        nothing = SimpleNamespace(resumed=arguments["id"] == RUN_ID)
        nothing.finish = nothing.define_metric = lambda *_args, **_kwargs: None
        return nothing

    monkeypatch.setattr(wandb, "init", init)
    _tracker().start(tmp_path, RUN_ID, CONFIG, [])
    assert opened[0] == RUN_ID
    assert opened[1].startswith(f"{RUN_ID}-")
    assert json.loads((tmp_path / "wandb.json").read_text())["run_id"] == opened[1]

    _tracker().start(tmp_path, RUN_ID, CONFIG, [])
    assert opened[2:] == [opened[1]]


def test_damaged_ledger_is_refused_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "wandb.json").write_text("{")
    with pytest.raises(UserError, match=r"wandb\.json is damaged; delete it"):
        _tracker().start(tmp_path, RUN_ID, CONFIG, [])


def test_run_that_the_client_refuses_is_reported_in_one_line(tmp_path: Path) -> None:
    tracker = WandbTracker(WandbConfig(project="a/b", mode="offline"))
    with pytest.raises(UserError, match=r"did not open the run \(UsageError: Invalid project name.*tracker=none"):
        tracker.start(tmp_path, RUN_ID, CONFIG, [])


def test_two_trackers_in_one_process_do_not_meet(tmp_path: Path) -> None:
    trackers = {name: _tracker() for name in ("one", "two")}
    for name, tracker in trackers.items():
        (tmp_path / name).mkdir()
        tracker.start(tmp_path / name, name, CONFIG, [])
    trackers["one"].log(_row(1))
    trackers["two"].log(_row(2))
    assert wandb.run is None
    for tracker in trackers.values():
        tracker.finish(CASES)
    logged = {name: [row["edits"] for row in _history(_closed(tmp_path / name)[0])] for name in trackers}
    assert logged == {"one": [1], "two": [2]}


def _python(script: str, home: Path, *arguments: Path, stdin: int = subprocess.DEVNULL, exit_code: int = 0) -> str:
    """Run `script` in a new process without W&B credentials; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        env=_clean_environment(home) | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        stdin=stdin,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == exit_code, done.stderr
    return done.stdout


def test_no_tracker_leaves_wandb_unimported(tmp_path: Path) -> None:
    script = """
        import sys
        from pathlib import Path
        from horen_bench.tracking.base import NoTracker
        from horen_bench.tracking.config import WandbConfig
        from horen_bench.tracking.wandb_tracker import WandbTracker
        WandbTracker(WandbConfig(project="p", mode="online"))
        tracker = NoTracker()
        tracker.start(Path(), "id", {}, [])
        tracker.log({"n": 1, "protocol": "greedy"})
        tracker.finish(None)
        tracker.abort()
        print("wandb" in sys.modules, tracker.problem)
    """
    assert _python(script, tmp_path).split() == ["False", "None"]
    assert list(tmp_path.iterdir()) == []


def test_online_without_login_is_refused_without_a_prompt(tmp_path: Path) -> None:
    script = f"""
        import sys
        from pathlib import Path
        from horen_bench.errors import UserError
        from horen_bench.tracking.config import WandbConfig
        from horen_bench.tracking.wandb_tracker import WandbTracker
        sys.stdout.isatty = sys.stderr.isatty = lambda: True
        tracker = WandbTracker(WandbConfig(project="p", mode="online"))
        try:
            tracker.start(Path(sys.argv[1]), "id", {CONFIG!r}, [])
        except UserError as error:
            print(error)
    """
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    keyboard, terminal = pty.openpty()  # nobody types: a prompt would wait for ever
    try:
        printed = _python(script, tmp_path, run_dir, stdin=terminal)
    finally:
        os.close(keyboard)
        os.close(terminal)
    expected = "W&B is not logged in: run `wandb login`, or stay offline (tracker.mode=offline, upload --offline)."
    assert printed.strip() == expected
    assert list(run_dir.iterdir()) == []


def test_run_goes_on_when_the_client_dies(tmp_path: Path) -> None:
    script = f"""
        import sys, time
        from pathlib import Path
        import pandas as pd
        import psutil
        from horen_bench.tracking.config import WandbConfig
        from horen_bench.tracking.wandb_tracker import WandbTracker
        tracker = WandbTracker(WandbConfig(project="p", mode="offline"))
        tracker.start(Path(sys.argv[1]), "id", {CONFIG!r}, [])
        tracker.log({{"n": 10, "protocol": "greedy"}})
        (client,) = [child for child in psutil.Process().children() if "wandb-core" in child.name()]
        client.kill()
        time.sleep(0.5)
        for n in (20, 30):
            tracker.log({{"n": n, "protocol": "greedy"}})
        tracker.finish(pd.DataFrame())
        print(tracker.problem)
    """
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    problem = _python(script, tmp_path, run_dir).strip().splitlines()[-1]
    assert problem.startswith("W&B tracking stopped at 20 edits (ConnectionResetError")
    assert problem.endswith("the stored results are not affected.")
    assert json.loads((run_dir / "wandb.json").read_text()) == {
        "run_id": "id",
        "logged": ["greedy/10"],
        "finished": False,
    }


def test_run_is_closed_even_where_its_cases_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_tracker, "_cases_artifact", lambda *_: 1 / 0)
    tracker = _tracker()
    tracker.start(tmp_path, RUN_ID, CONFIG, [_row(10)])
    tracker.finish(CASES)
    assert tracker.problem is not None
    assert "stopped at the end of the run (ZeroDivisionError" in tracker.problem
    records = _closed(tmp_path)[0]
    assert [len(_of(records, kind)) for kind in ("history", "exit")] == [1, 1]
    assert "cases" not in {artifact.type for artifact in _of(records, "artifact")}


def test_rows_of_a_killed_process_are_in_its_file(tmp_path: Path) -> None:
    script = f"""
        import os, sys, time
        from pathlib import Path
        from horen_bench.tracking.config import WandbConfig
        from horen_bench.tracking.wandb_tracker import WandbTracker
        tracker = WandbTracker(WandbConfig(project="p", mode="offline"))
        tracker.start(Path(sys.argv[1]), "id", {CONFIG!r}, [])
        tracker.log({{"n": 10, "protocol": "greedy"}})
        time.sleep(2.5)
        os.kill(os.getpid(), 9)
    """
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    _python(script, tmp_path, run_dir, exit_code=-9)
    (file,) = run_dir.rglob("*.wandb")
    assert [row["edits"] for row in _history(_records(file))] == [10]


@pytest.mark.parametrize(("name", "kind"), [("none", NoTracker), ("wandb", WandbTracker)])
def test_config_file_builds_its_tracker(name: str, kind: type) -> None:
    tracker = run_config([f"tracker={name}"]).tracker.build()
    assert type(tracker) is kind
    if isinstance(tracker, WandbTracker):
        settings = tracker.config
        assert (settings.project, settings.mode, settings.entity) == ("horen-bench", "online", None)
        assert settings.group == "tiny-facts"
