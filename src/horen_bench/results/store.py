"""Run directories: what a run wrote down, in files that are whole at every moment.

A run is a stream of edits into one model by one method; its identity does not depend on how far the stream went or
on how the model was questioned, so N = 100 and N = 1000 of the same stream, under any protocol, share a directory:

    <results_dir>/runs/<model>-<method>-<dataset>-<identity>/
        config.yaml          the resolved configuration
        environment.json     versions, device, commit
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
from typing import Any
from zipfile import BadZipFile, ZipFile

import pandas as pd
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from horen_bench.errors import UserError
from horen_bench.results.atomic import replacing, unwritable, write_text

# Two processes that agree on these go on with one run; n, protocol, paths, device and the like may differ.
_LASTING = ("method", "locality", "eval_cases", "seed")
# The rest of a model's file reaches a run only through what the method interpolates from it.
_LASTING_OF_MODEL = ("name", "hub_id", "revision", "dtype")
# Where a data file lies says nothing; what it holds is compared by the hash of the cases in each row.
_PATHS = ("path", "paths", "train_path")

# Settings that came later: a run that has the value it always had keeps its identity.
_IMPLIED = {"template": "none", "text.max_new_tokens": 512}

_LOCK = ".lock"


def identity(config: Mapping[str, Any]) -> str:
    """Ten hex digits that name a run: a hash of its resolved configuration without the volatile parts."""
    lasting = {key: config[key] for key in _LASTING}
    if "statistics" in config["method"]:
        lasting["method"] = {**config["method"], "statistics": _lasting_statistics(config["method"]["statistics"])}
    lasting["dataset"] = {key: value for key, value in config["dataset"].items() if key not in (*_PATHS, "protocol")}
    lasting["model"] = {key: config["model"][key] for key in _LASTING_OF_MODEL}
    lasting |= {name: value for name, usual in _IMPLIED.items() if (value := _dotted(config, name, usual)) != usual}
    return hashlib.sha256(json.dumps(lasting, sort_keys=True).encode()).hexdigest()[:10]


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


def run_directory(config: Mapping[str, Any]) -> Path:
    """Where the run of a resolved configuration is kept."""
    names = [config[part]["name"] for part in ("model", "method", "dataset")]
    return Path(config["results_dir"]) / "runs" / "-".join([*names, identity(config)])


def _dotted(config: Mapping[str, Any], name: str, usual: Any) -> Any:
    part, _, key = name.rpartition(".")
    return (config.get(part, {}) if part else config).get(key, usual)


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

    def describe(self, config: str, environment: Mapping[str, Any], stream: Mapping[str, Any]) -> None:
        """Write `config.yaml`, `environment.json` and `stream.json`."""
        write_text(self.path / "config.yaml", config)
        write_text(self.path / "environment.json", json.dumps(environment, indent=2) + "\n")
        write_text(self.path / "stream.json", json.dumps(stream) + "\n")

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

    def save_state(self, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
        """Write where the stream stands, as one file.

        Args:
            tensors: the editor's state.
            progress: plain values (JSON).
        """
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with replacing(self._state) as temporary:
            save_file(contiguous, temporary, metadata={"progress": json.dumps(progress)})

    def load_state(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What `save_state` wrote last, or None.

        Raises:
            UserError: the file is damaged.
        """
        if not self._state.exists():
            return None
        try:
            with safe_open(self._state, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                progress: dict[str, Any] = json.loads(file.metadata()["progress"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self._state} is damaged ({error}); start the run again with force=true") from error
        return tensors, progress


def _place(row: Mapping[str, Any]) -> tuple[str, int]:
    """What makes a checkpoint row one of its kind in its run."""
    return row["protocol"], row["n"]


def in_a_sentence(error: Exception) -> str:
    """What an error says, in one line; of an error of the program also its kind."""
    said = " ".join(str(error).split())
    return said if isinstance(error, UserError) else f"{type(error).__name__}: {said}"


# --- What the base model answers ---------------------------------------------------------------------------


def cached_answers(
    path: Path, keys: Sequence[str], answer: Callable[[list[int]], list[dict[str, list[int]]]]
) -> list[dict[str, list[int]]]:
    """Look answers up by key; ask for those that the file lacks, and add them to it.

    Args:
        path: a JSON file of earlier answers, or where it shall be.
        keys: one per question.
        answer: called with the positions of the missing questions; token ids by name for each.
    """
    known = _cache(path)
    missing = [i for i, key in enumerate(keys) if key not in known]
    if missing:
        known |= dict(zip((keys[i] for i in missing), answer(missing), strict=True))
        known = _cache(path) | known  # with what another run has added meanwhile
        write_text(path, json.dumps(known))
    return [known[key] for key in keys]


def _cache(path: Path) -> dict[str, dict[str, list[int]]]:
    try:
        known: dict[str, dict[str, list[int]]] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}  # asked again and overwritten
    return known
