"""Run directories: what a run wrote down, in files that are whole at every moment.

A run is a stream of edits into one model by one method; its identity does not depend on how far the stream went or
on how the model was evaluated, so N = 100 and N = 1000 of the same stream, under any protocol, share a directory:

    <results_dir>/runs/<model>-<method>-<dataset>-<identity>/
        config.yaml          the resolved configuration
        environment.json     schema of these files, versions, device, commit
        stream.json          ids of the cases in order, and their hash
        checkpoints.csv      one row per checkpoint and protocol
        cases.parquet/       one file per checkpoint and protocol, one row per case
        state/               where the stream stands, to go on from
        failure.txt          why the last attempt failed, until one succeeds

Every write goes to a temporary file that is flushed and renamed, so a process killed at any moment leaves
the old file or the new one. Nothing is pickled: CSV, Parquet, JSON, YAML, safetensors.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile, ZipFile

import pandas as pd
from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open

from horen_bench.config.schema import Component, RunConfig
from horen_bench.errors import UserError
from horen_bench.results.atomic import replacing, unwritable, write_text

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = 2  # of the files below; one more whenever they cannot be read as before

# The rest of a model's file reaches a run only through what the method interpolates from it.
_LASTING_OF_MODEL = {"name", "hub_id", "revision", "dtype"}

_LOCK = ".lock"


def identity(config: RunConfig) -> str:
    """Ten hex digits that name a run: a hash of everything in its configuration that can change its numbers.

    Two processes that agree on it go on with one run; n, protocol, paths, device and the like may differ.
    """
    lasting = {
        "model": config.model.model_dump(include=_LASTING_OF_MODEL),
        "method": _lasting(config.method),
        "dataset": _lasting(config.dataset),
        "locality": config.locality,
        "eval_cases": config.eval_cases,
        "seed": config.seed,
        "template": config.template,
        "text.max_new_tokens": config.text.max_new_tokens,
    }
    return hashlib.sha256(json.dumps(lasting, sort_keys=True).encode()).hexdigest()[:10]


def _lasting(part: Component) -> dict[str, Any]:
    """A part's class and lasting settings; of second moments it does not count where they are kept, only the rest."""
    lasting = {"_target_": f"{type(part).__module__}.{type(part).__qualname__}", **part.lasting()}
    if statistics := lasting.get("statistics"):
        lasting["statistics"] = _lasting_statistics(statistics)
    return lasting


def _lasting_statistics(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of second moments: where they are kept says nothing, and of published ones only the contents count."""
    lasting = {key: value for key, value in settings.items() if key != "folder"}
    if settings.get("published"):
        files = sorted(Path(settings["published"]).expanduser().glob("*.npz"))
        lasting["published"] = [[file.name, _checksums(file)] for file in files]
    return lasting


def _checksums(archive: Path) -> list[int]:
    """CRC-32 of each member, read from the archive's directory: gigabytes are not read through."""
    try:
        with ZipFile(archive) as opened:
            return [member.CRC for member in opened.infolist()]
    except (BadZipFile, OSError) as error:
        raise UserError(f"method.statistics.published: {archive} cannot be read ({error})") from error


def run_directory(config: RunConfig) -> Path:
    """Where the run of a configuration is kept."""
    return Path(config.results_dir) / "runs" / "-".join([*config.names().values(), identity(config)])


class RunStore:
    """One run directory.

    Args:
        path: the directory; created when something is first written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._checkpoints = path / "checkpoints.csv"
        self._cases = path / "cases.parquet"
        self._state = path / "state" / "stream.safetensors"
        self._environment = path / "environment.json"
        self._failure = path / "failure.txt"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory; the lock goes with the process, however it ends.

        Raises:
            UserError: another process holds it.
        """
        lock = FileLock(self.path / _LOCK, timeout=0)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise UserError(
                f"another process is working on this run ({self.path}); wait for it, or change the settings"
            ) from None
        except OSError as error:
            raise unwritable(self.path, error) from error
        try:
            for leftover in self.path.rglob(".*.tmp"):  # of a process that was killed while it wrote
                leftover.unlink()
            yield
        finally:
            lock.release()

    def clear(self) -> None:
        """Forget everything that the run wrote, the lock apart."""
        for path in self.path.iterdir():
            if path.name == _LOCK:
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def describe(self, config: RunConfig, environment: Mapping[str, Any], stream: Mapping[str, Any]) -> None:
        """Write `config.yaml`, `environment.json` with the schema, and `stream.json`."""
        write_text(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config.plain())))
        write_text(self._environment, json.dumps({"schema": SCHEMA, **environment}, indent=2) + "\n")
        write_text(self.path / "stream.json", json.dumps(stream) + "\n")

    def check_schema(self) -> None:
        """See that what is stored can be gone on with.

        Raises:
            UserError: another version of the program wrote it.
        """
        if self._checkpoints.exists() or self._state.exists():
            try:
                schema = json.loads(self._environment.read_text(encoding="utf-8"))["schema"]
            except (OSError, ValueError, KeyError, TypeError):
                schema = None
            self._check_schema(schema)

    def _check_schema(self, schema: object) -> None:
        if str(schema) != str(SCHEMA):
            raise self.made_with(
                f"another version of the program (schema {'none' if schema is None else schema}, now {SCHEMA})"
            )

    def made_with(self, other: str) -> UserError:
        """The sentence about a run that cannot be gone on with, because it was made with something else."""
        return UserError(
            f"{self.path} was made with {other}; start again with force=true, or keep it by choosing another "
            "results_dir="
        )

    # --- Failures --------------------------------------------------------------------------------------

    @contextmanager
    def failure_recorded(self) -> Iterator[None]:
        """Write down why the block failed; forget an earlier failure once it succeeds."""
        try:
            yield
        except Exception as error:
            self.record_failure(in_a_sentence(error))
            raise
        self._failure.unlink(missing_ok=True)

    def record_failure(self, reason: str) -> None:
        """Write down why the run failed."""
        write_text(self._failure, reason + "\n")

    def failure(self) -> str | None:
        """Why the last attempt failed, or None."""
        return self._failure.read_text(encoding="utf-8").strip() if self._failure.exists() else None

    # --- Results ---------------------------------------------------------------------------------------

    def checkpoints(self) -> pd.DataFrame:
        """The checkpoint rows, by protocol in order of `n`; empty if there is none."""
        if not self._checkpoints.exists():
            return pd.DataFrame({"n": pd.Series(dtype="int64"), "protocol": pd.Series(dtype=str)})
        return pd.read_csv(self._checkpoints, dtype=dict.fromkeys(("run", "cases", "weights"), str))

    def rows(self) -> list[dict[str, Any]]:
        """The checkpoint rows as mappings."""
        records = self.checkpoints().to_dict("records")
        return [{str(key): value for key, value in row.items()} for row in records]

    def cases(self) -> pd.DataFrame:
        """The per-case rows of all checkpoints, columns `n` and `protocol` first; empty if there is none."""
        parts = [pd.read_parquet(part) for row in self.rows() if (part := self._part(row)).exists()]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()

    def add_checkpoint(self, row: Mapping[str, Any], cases: pd.DataFrame) -> None:
        """Write the per-case rows, then the checkpoint's row, which makes them count.

        Args:
            row: the row; `n` and `protocol` name the checkpoint, None is a missing value.
            cases: one row per case.
        """
        with replacing(self._part(row)) as temporary:
            cases.to_parquet(temporary, index=False)
        others = [old for old in self.rows() if _place(old) != _place(row)]
        rows = sorted([*others, dict(row)], key=_place)
        with replacing(self._checkpoints) as temporary:
            pd.DataFrame(rows).to_csv(temporary, index=False)

    def _part(self, row: Mapping[str, Any]) -> Path:
        return self._cases / f"{row['n']:09d}-{row['protocol']}.parquet"

    # --- State -----------------------------------------------------------------------------------------

    def save_state(self, tensors: Mapping[str, "Tensor"], progress: Mapping[str, Any]) -> None:
        """Write where the stream stands, as one file.

        Args:
            tensors: the editor's state.
            progress: plain values (JSON).
        """
        from safetensors.torch import save_file  # noqa: PLC0415 - imports torch, which reading rows does not need

        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with replacing(self._state) as temporary:
            save_file(contiguous, temporary, metadata={"schema": str(SCHEMA), "progress": json.dumps(progress)})

    def load_state(self) -> tuple[dict[str, "Tensor"], dict[str, Any]] | None:
        """What `save_state` wrote last, or None.

        Raises:
            UserError: the file is damaged, or another version of the program wrote it.
        """
        if not self._state.exists():
            return None
        try:
            with safe_open(self._state, framework="pt") as file:
                metadata = file.metadata() or {}
                self._check_schema(metadata.get("schema"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                progress: dict[str, Any] = json.loads(metadata["progress"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self._state} is damaged ({error}); start the run again with force=true") from error
        return tensors, progress


def _place(row: Mapping[str, Any]) -> tuple[str, int]:
    """What makes a checkpoint row one of its kind in its run."""
    return row["protocol"], row["n"]


def in_a_sentence(error: Exception) -> str:
    """What an error says, in one line; of an error of the program also its kind."""
    message = " ".join(str(error).split())
    return message if isinstance(error, UserError) else f"{type(error).__name__}: {message}"


# --- What the base model predicts --------------------------------------------------------------------------


def stored_predictions(
    path: Path, keys: Sequence[str], predict: Callable[[list[int]], list[dict[str, list[int]]]]
) -> list[dict[str, list[int]]]:
    """Look predictions up by key; make those that the file lacks, and add them to it.

    Args:
        path: a JSON file of earlier predictions, or where it shall be.
        keys: one per probe.
        predict: called with the positions of the missing probes; token ids by name for each.
    """
    known = _predictions_in(path)
    missing = [i for i, key in enumerate(keys) if key not in known]
    if missing:
        known |= dict(zip((keys[i] for i in missing), predict(missing), strict=True))
        known = _predictions_in(path) | known  # with what another run has added meanwhile
        write_text(path, json.dumps(known))
    return [known[key] for key in keys]


def _predictions_in(path: Path) -> dict[str, dict[str, list[int]]]:
    try:
        known: dict[str, dict[str, list[int]]] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}  # made again and overwritten
    return known
