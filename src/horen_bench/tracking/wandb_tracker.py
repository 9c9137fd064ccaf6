"""The copy of a run on Weights & Biases."""

import json
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from horen_bench.errors import UserError
from horen_bench.results.atomic import write_text
from horen_bench.tracking.config import WandbConfig

if TYPE_CHECKING:
    import wandb

_COSTS = re.compile(r"side_.*|.*(_seconds|_ms|_bytes|_parameters|_per_second)")
CASES = "cases"  # name of the per-case table in a run's summary
_TABLE_ROWS = 10_000  # what W&B shows of a table without complaint

# The run alone is recorded: no console, code, git, packages or machine.
_SETTINGS: dict[str, Any] = {
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "save_code": False,
    "symlink": False,
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
    "x_transaction_log_flush_interval": 0.5,  # seconds; what a killed process can lose of its local file
    "finish_timeout": 300.0,  # seconds that closing a run may wait for its upload
    "finish_timeout_raises": True,
    "max_end_of_run_history_metrics": 0,  # nothing but the link is printed
    "max_end_of_run_summary_metrics": 0,
}


class WandbTracker:
    """Copies a run to Weights & Biases, online or into local files.

    Every metric is drawn against `edits`, the number of edits written so far; scores carry their protocol in
    front (`greedy/rel`), costs do not. `run_dir/wandb.json` remembers which rows are logged; the count of them is
    W&B's step, so that a row that reaches the server twice is refused there. The last per-case rows are the table
    `cases` in the summary, all of them an artifact. When W&B fails in the middle of a run, `problem` says so and the
    run goes on untracked.
    """

    def __init__(self, config: WandbConfig) -> None:
        """Keep the settings; nothing is opened before `start`."""
        self.config = config
        self.problem: str | None = None
        self._run: wandb.Run | None = None
        self._ledger: _Ledger | None = None
        self._last: Mapping[str, Any] = {}

    def start(self, run_dir: Path, run_id: str, config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
        """Open the run in W&B, or go on with the one in `run_dir/wandb.json`, and log what is missing.

        Raises:
            UserError: not logged in, or W&B does not open the run.
        """
        import wandb  # noqa: PLC0415

        name = "-".join([*(config[part]["name"] for part in ("method", "model", "dataset")), run_id[:8]])
        ledger = _Ledger.read(run_dir / "wandb.json")
        known = ledger is not None
        ledger = ledger or _Ledger(run_dir / "wandb.json", run_id)
        try:
            if self.config.mode == "online" and not wandb.login(prompt=False, verify=False):
                raise UserError(
                    "W&B is not logged in: run `wandb login`, or stay offline (tracker.mode=offline, upload --offline)."
                )
            run = self._open(ledger.run_id, name, run_dir, config)
            if run.resumed and not known:
                # The same settings ran before, elsewhere or before force=true; its curves stay its own.
                run.finish()
                ledger.run_id = f"{run_id}-{uuid.uuid4().hex[:6]}"
                run = self._open(ledger.run_id, name, run_dir, config)
            run.define_metric("edits")
            run.define_metric("*", step_metric="edits")
        except (wandb.errors.Error, ValueError, OSError) as error:
            raise UserError(
                f"W&B did not open the run ({in_one_line(error)}); use tracker.mode=offline or tracker=none."
            ) from error
        ledger.write()
        self._run, self._ledger = run, ledger
        for row in rows:
            self.log(row)

    def _open(self, run_id: str, name: str, run_dir: Path, config: Mapping[str, Any]) -> "wandb.Run":
        import wandb  # noqa: PLC0415

        run: wandb.Run = wandb.init(
            project=self.config.project,
            entity=self.config.entity,
            mode="offline" if self.config.mode == "offline" else "online",
            group=self.config.group,
            tags=[str(tag) for tag in self.config.tags],
            id=run_id,
            resume="allow",
            name=name,
            config=dict(config),
            allow_val_change=True,  # paths and device may differ in a resumed process
            dir=run_dir,
            reinit="create_new",  # leaves W&B's global run alone
            settings=_SETTINGS,
        )
        return run

    def log(self, row: Mapping[str, Any]) -> None:
        """Log one checkpoint row: numbers as metrics against `edits`, texts into the summary.

        A row that is logged already is passed over; a missing value is not logged.
        """
        place = _place(row)
        numbers, texts = _numbers_and_texts(row)
        self._last = row
        if self._run is None or self._ledger is None or place in self._ledger.logged:
            return
        with self._unharmed(f"at {int(row['n'])} edits"):
            self._run.log(numbers, step=len(self._ledger.logged), commit=True)
            self._run.summary.update(texts)
            self._ledger.add(place)

    def finish(self, cases: pd.DataFrame) -> None:
        """Set the summary to the last row, upload the per-case rows, close the run."""
        run, ledger = self._run, self._ledger
        if run is None or ledger is None:
            return
        with self._unharmed("at the end of the run"):
            if self._last:
                numbers, texts = _numbers_and_texts(self._last)
                run.summary.update({**numbers, **texts})
            run.summary.update({CASES: _cases_table(cases)})
            run.log_artifact(_cases_artifact(f"cases-{run.id}", cases))
        with self._unharmed("while closing the run"):  # tried even where the artifact failed
            run.finish(exit_code=0)
        self._run = None
        if self.problem is None:
            ledger.close()

    def abort(self) -> None:
        """Close the run as failed; a resumed process can go on with it."""
        if self._run is None:
            return
        with self._unharmed("while closing an interrupted run"):
            self._run.finish(exit_code=1)
        self._run = None

    @contextmanager
    def _unharmed(self, when: str) -> Iterator[None]:
        """Turn any failure of the tracking into `problem` and go on without it."""
        try:
            yield
        except Exception as error:
            self._run = None
            self.problem = self.problem or (
                f"W&B tracking stopped {when} ({in_one_line(error)}); the stored results are not affected."
            )


def is_tracked(run_dir: Path, rows: Iterable[Mapping[str, Any]]) -> bool:
    """Whether W&B has these checkpoint rows of a run directory and its per-case rows."""
    ledger = _Ledger.read(run_dir / "wandb.json")
    return ledger is not None and ledger.finished and {_place(row) for row in rows} <= set(ledger.logged)


class _Ledger:
    """`wandb.json`: the W&B run of a run directory, which rows are logged there, and whether the cases are too."""

    def __init__(self, path: Path, run_id: str, logged: Sequence[str] = (), finished: bool = False) -> None:
        self.path = path
        self.run_id = run_id
        self.logged = list(logged)
        self.finished = finished

    @classmethod
    def read(cls, path: Path) -> "_Ledger | None":
        """The ledger at `path`, None where there is none."""
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            logged = [str(place) for place in content["logged"]]
            return cls(path, str(content["run_id"]), logged, bool(content["finished"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged; delete it to track the run as a new one.") from error

    def add(self, place: str) -> None:
        """Note that a row is logged; its cases are not yet."""
        self.logged.append(place)
        self.finished = False
        self.write()

    def close(self) -> None:
        """Note that the cases are there too."""
        self.finished = True
        self.write()

    def write(self) -> None:
        """Replace the file as a whole."""
        content = {"run_id": self.run_id, "logged": self.logged, "finished": self.finished}
        write_text(self.path, json.dumps(content) + "\n")


def _place(row: Mapping[str, Any]) -> str:
    """What makes a checkpoint row one of its kind in its run."""
    return f"{row['protocol']}/{int(row['n'])}"


def _numbers_and_texts(row: Mapping[str, Any]) -> tuple[dict[str, int | float], dict[str, str]]:
    """Split a checkpoint row into metrics by their dashboard names and texts; missing values drop out."""
    numbers: dict[str, int | float] = {"edits": int(row["n"])}
    texts: dict[str, str] = {}
    for key, value in row.items():
        plain = value.item() if isinstance(value, np.generic) else value
        if key in ("n", "protocol") or (pd.api.types.is_scalar(plain) and pd.isna(plain)):
            continue
        if isinstance(plain, int | float) and not isinstance(plain, bool):
            numbers[f"{'cost' if _COSTS.fullmatch(key) else row['protocol']}/{key}"] = plain
        else:
            texts[key] = str(plain)
    return numbers, texts


def _cases_table(cases: pd.DataFrame) -> "wandb.Table":
    """The last rows of `cases`, to browse."""
    import wandb  # noqa: PLC0415

    shown = cases.tail(_TABLE_ROWS)
    columns: list[str | int] = [str(column) for column in shown.columns]
    data: list[Iterable[Any]] = [[_cell(value) for value in row] for row in shown.itertuples(index=False, name=None)]
    return wandb.Table(columns=columns, data=data, allow_mixed_types=True)


def _cases_artifact(name: str, cases: pd.DataFrame) -> "wandb.Artifact":
    """All of `cases` as parquet."""
    import wandb  # noqa: PLC0415

    description = f"One row per case, checkpoint and protocol; the table {CASES} of the run shows the last of them."
    metadata = {"rows": len(cases), "table_rows": min(len(cases), _TABLE_ROWS)}
    artifact = wandb.Artifact(name, type="cases", description=description, metadata=metadata)
    with artifact.new_file("cases.parquet", mode="wb") as file:
        cases.to_parquet(file, index=False)
    return artifact


def _cell(value: Any) -> str | int | float | bool | None:
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return None
    return value if isinstance(value, str | int | float | bool) else str(value)


def in_one_line(error: BaseException) -> str:
    """An error's kind and message without line breaks."""
    return " ".join(f"{type(error).__name__}: {error}".split())
