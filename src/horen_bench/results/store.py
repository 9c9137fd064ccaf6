"""Run directories: what a run wrote down, in files that are whole at every moment.

A run is a stream of edits into one model by one method; its identity does not depend on how far the stream went or
on how the model was evaluated, so N = 100 and N = 1000 of the same stream, under any protocol, share a directory:

    <results_dir>/runs/<model>-<method>-<dataset>-<identity>/
        config.yaml          the resolved configuration
        environment.json     schema of these files; versions, device, commit of every sitting
        stream.json          ids of the cases in order, and their hash
        checkpoints.csv      one row per checkpoint and protocol
        cases.parquet/       one file per checkpoint and protocol, one row per case
        state/               where the stream stands, to go on from
        failure.txt          why the last attempt failed, until one succeeds
        again/               what force=true has made so far; takes the place of the rest once it is finished

Every write goes to a temporary file that is flushed and renamed, so a process killed at any moment leaves
the old file or the new one. Nothing is pickled: CSV, Parquet, JSON, YAML, safetensors.

What is read is checked first. A row of `checkpoints.csv` ends in the SHA-256 of its own cells (`row_sha256`) and of its
file of cases (`cases_sha256`), the state carries that of its tensors and progress in its metadata, each base
prediction its own. A file that does not agree is named and not used; `python -m horen_bench.results verify` lists all.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO, StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile, ZipFile

import pandas as pd
from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open

from horen_bench.config.schema import Component, RunConfig
from horen_bench.errors import UserError
from horen_bench.results.atomic import flush_folder, make_folder, replacing, unreadable, unwritable, write_text

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = 3  # of the files below; one more whenever they cannot be read as before

# The rest of a model's file reaches a run only through what the method interpolates from it.
_LASTING_OF_MODEL = {"name", "hub_id", "revision", "dtype"}

_LOCK = ".lock"
_ROW_SUM, _CASES_SUM = "row_sha256", "cases_sha256"
_TEXTS = ("run", "cases", "weights", "slices")  # columns that may look like numbers
_NO_ROWS = pd.DataFrame({"n": pd.Series(dtype="int64"), "protocol": pd.Series(dtype=str)})
# A run that is made again, and how far its moving into the old one's place is.
_AGAIN, _FINISHED, _MOVING = "again", "again.finished", "again.moving"
_LOCK_SECONDS = 600  # to wait for another process that writes base predictions, which takes it seconds


def identity(config: RunConfig) -> str:
    """Ten hex digits that name a run: a hash of everything in its configuration that can change its numbers.

    Two processes that agree on it go on with one run; n, protocol, paths, device and the like may differ.
    """
    lasting: dict[str, Any] = {
        "model": config.model.model_dump(include=_LASTING_OF_MODEL),
        "method": _lasting(config.method),
        "dataset": _lasting(config.dataset),
        "locality": config.locality,
        "eval_cases": config.eval_cases,
        "seed": config.seed,
        "template": config.template,
        "text.max_new_tokens": config.text.max_new_tokens,
    }
    if config.template == "model":  # bare prompts know no date
        lasting["template_date"] = config.template_date
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


@dataclass(frozen=True, slots=True)
class StoredCell:
    """One row of `checkpoints.csv`, and what is wrong with it.

    Attributes:
        n: number of edits; None where the row does not say.
        protocol: its name.
        row_problem: why the row cannot be trusted, or None.
        cases_problem: why its per-case rows cannot, or None.
    """

    n: int | None
    protocol: str
    row_problem: str | None
    cases_problem: str | None


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

        What a killed process left half done is put in order first.

        Raises:
            UserError: another process holds it.
        """
        lock = FileLock(self.path / _LOCK, timeout=0)
        try:
            make_folder(self.path)
            lock.acquire()
        except Timeout:
            raise UserError(
                f"another process is working on this run ({self.path}); wait for it, or change the settings"
            ) from None
        except OSError as error:
            raise unwritable(self.path, error) from error
        try:
            self._put_in_order()
            yield
        finally:
            lock.release()

    def _put_in_order(self) -> None:
        try:
            for leftover in self.path.rglob(".*.tmp"):  # of a process that was killed while it wrote
                leftover.unlink()
            self._go_on_taking_over()
        except OSError as error:
            raise unwritable(self.path, error) from error

    def clear(self) -> None:
        """Forget everything that the run wrote, the lock apart."""
        for path in _within(self.path) if self.path.exists() else ():
            _remove(path)

    def describe(self, config: RunConfig, environment: Mapping[str, Any], stream: Mapping[str, Any]) -> None:
        """Write `config.yaml`, `stream.json`, and `environment.json` with the schema and one sitting more."""
        write_text(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config.plain())))
        sittings = [*self.sittings(), dict(environment)]
        write_text(self._environment, json.dumps({"schema": SCHEMA, "sittings": sittings}, indent=2) + "\n")
        write_text(self.path / "stream.json", json.dumps(stream) + "\n")

    def sittings(self) -> list[dict[str, Any]]:
        """Versions, device and commit of each process that worked on the run, in order."""
        try:
            sittings: list[dict[str, Any]] = json.loads(self._read(self._environment))["sittings"]
        except (ValueError, KeyError, TypeError):
            return []
        return sittings

    @staticmethod
    def _read(path: Path) -> str:
        """A small file's text, "" where there is none.

        Raises:
            UserError: the disk does not give it.
        """
        try:
            return path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise unreadable(path, error) from error

    def check_schema(self) -> None:
        """See that what is stored can be gone on with.

        Raises:
            UserError: another version of the program wrote it.
        """
        if self._checkpoints.exists() or self._state.exists():
            self._check_schema(self._schema())

    def _schema(self) -> object:
        try:
            return json.loads(self._read(self._environment))["schema"]
        except (ValueError, KeyError, TypeError):
            return None

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

    # --- A run that is made again ------------------------------------------------------------------------

    def again(self) -> "RunStore":
        """Where `force=true` works, so that nothing finished is given up for what may never be."""
        return RunStore(self.path / _AGAIN)

    def take_over(self) -> None:
        """Put the finished run of `again` in this one's place, which is deleted; hold the lock.

        A process killed in the middle leaves a folder whose name says how far it got; `locked` does the rest.
        """
        try:
            (self.path / _AGAIN).rename(self.path / _FINISHED)
            flush_folder(self.path)
            self._go_on_taking_over()
        except OSError as error:
            raise unwritable(self.path, error) from error

    def _go_on_taking_over(self) -> None:
        finished, moving = self.path / _FINISHED, self.path / _MOVING
        if finished.is_dir():
            for path in _within(self.path):
                if path != finished:
                    _remove(path)
            finished.rename(moving)
            flush_folder(self.path)
        if moving.is_dir():
            for path in _within(moving):
                path.rename(self.path / path.name)
            flush_folder(self.path)
            _remove(moving)

    # --- Failures --------------------------------------------------------------------------------------

    @contextmanager
    def failure_recorded(self) -> Iterator[None]:
        """Write down why the block failed; forget an earlier failure once it succeeds."""
        try:
            yield
        except Exception as error:
            with suppress(UserError):  # a disk that is full also of this: the error itself says so
                self.record_failure(in_a_sentence(error))
            raise
        self._failure.unlink(missing_ok=True)

    def record_failure(self, reason: str) -> None:
        """Write down why the run failed."""
        write_text(self._failure, reason + "\n")

    def failure(self) -> str | None:
        """Why the last attempt failed, or None."""
        try:
            return self._failure.read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return None

    # --- Results ---------------------------------------------------------------------------------------

    def checkpoints(self) -> pd.DataFrame:
        """The checkpoint rows, by protocol in order of `n`; empty if there is none.

        Raises:
            UserError: the file is damaged.
        """
        rows, texts = self._read_rows()
        for row in texts:
            if problem := _row_problem(row):
                raise self._damaged(self._checkpoints, problem)
        return rows

    def damage(self) -> str | None:
        """Why the stored rows cannot all be trusted, as `check` says it; None where they can."""
        try:
            self.check()
        except UserError as error:
            return str(error)
        return None

    def sound_checkpoints(self) -> pd.DataFrame:
        """The rows of a run that is all sound, and none of a damaged one: for what looks at many runs."""
        damaged = self.damage() is not None
        return _NO_ROWS.copy() if damaged else self.checkpoints()

    def _read_rows(self) -> tuple[pd.DataFrame, list[dict[str, str]]]:
        """The rows with their types and without checksums, and cell by cell as they stand in the file, unchecked."""
        try:
            data = self._checkpoints.read_bytes()
        except FileNotFoundError:
            return _NO_ROWS.copy(), []
        except IsADirectoryError as error:
            raise self._damaged(self._checkpoints, error) from error
        except OSError as error:
            raise unreadable(self._checkpoints, error) from error
        try:
            texts = _texts(data)
            rows = pd.read_csv(BytesIO(data), dtype=dict.fromkeys(_TEXTS, str))
        except ValueError as error:
            raise self._damaged(self._checkpoints, error) from error
        lacking = {"n", "protocol", _ROW_SUM, _CASES_SUM} - {*rows.columns}
        if lacking:
            if (schema := self._schema()) is not None:
                self._check_schema(schema)  # an older version's rows are not damaged
            raise self._damaged(self._checkpoints, f"it has no column {min(lacking)}")
        return rows.drop(columns=[_ROW_SUM, _CASES_SUM]), texts

    def rows(self) -> list[dict[str, Any]]:
        """The checkpoint rows as mappings.

        Raises:
            UserError: the file is damaged.
        """
        records = self.checkpoints().to_dict("records")
        return [{str(key): value for key, value in row.items()} for row in records]

    def cases(self) -> pd.DataFrame:
        """The per-case rows of all checkpoints, columns `n` and `protocol` first; empty if there is none.

        Raises:
            UserError: a file is damaged or missing.
        """
        self.check()
        parts = [pd.read_parquet(self._part(row)) for row in self.rows()]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()

    def check(self) -> None:
        """See that every row and every file of cases is as it was written.

        Raises:
            UserError: one is not.
        """
        for cell in self.cells():
            if cell.row_problem:
                raise self._damaged(self._checkpoints, cell.row_problem)
            if cell.cases_problem:
                raise self._damaged(self._cases, cell.cases_problem)

    def cells(self) -> list[StoredCell]:
        """Every stored row, sound or not.

        Raises:
            UserError: not even the rows can be told apart.
        """
        return [self._cell(row) for row in self._read_rows()[1]]

    def _cell(self, row: Mapping[str, str]) -> StoredCell:
        n = int(row["n"]) if row["n"].isdecimal() else None
        problem = None if n is None else self._cases_problem(n, row)
        return StoredCell(n, row["protocol"], _row_problem(row), problem)

    def _cases_problem(self, n: int, row: Mapping[str, str]) -> str | None:
        part = self._part({"n": n, "protocol": row["protocol"]})
        try:
            same = _sum_of(part) == row[_CASES_SUM]
        except FileNotFoundError:
            return f"{part.name} is missing"
        except IsADirectoryError:
            return f"{part.name} is a folder"
        except OSError as error:
            raise unreadable(part, error) from error
        return None if same else f"{part.name} does not agree with its checksum"

    def add_checkpoint(self, row: Mapping[str, Any], cases: pd.DataFrame) -> None:
        """Write the per-case rows, then the checkpoint's row, which makes them count.

        Args:
            row: the row; `n` and `protocol` name the checkpoint, None is a missing value.
            cases: one row per case.

        Raises:
            UserError: the disk refuses, or the rows that are stored are damaged.
        """
        self.checkpoints()
        with replacing(self._part(row)) as temporary:
            cases.to_parquet(temporary, index=False)
            sum_of_cases = _sum_of(temporary)
        (text,) = _texts(pd.DataFrame([{**row, _CASES_SUM: sum_of_cases}]).to_csv(index=False).encode())
        text[_ROW_SUM] = _sum_of_row(text)
        # Cells of other rows are written back letter by letter: their checksums are about these letters.
        others = [old for old in self._read_rows()[1] if _place(old) != _place(text)]
        ordered: list[dict[str, str]] = sorted([*others, text], key=_place)
        rows = pd.DataFrame(ordered).fillna("")
        with replacing(self._checkpoints) as temporary:
            rows[_sums_last(rows.columns)].to_csv(temporary, index=False)

    def _part(self, row: Mapping[str, Any]) -> Path:
        return self._cases / f"{row['n']:09d}-{row['protocol']}.parquet"

    def _damaged(self, path: Path, reason: object) -> UserError:
        """The sentence about a file of results that is not as it was written."""
        return UserError(
            f"{path} is damaged ({_in_one_line(reason)}); start the run again with force=true, or see what can be "
            f"trusted with python -m horen_bench.results verify {self.path}"
        )

    # --- State -----------------------------------------------------------------------------------------

    def save_state(self, tensors: Mapping[str, "Tensor"], progress: Mapping[str, Any]) -> None:
        """Write where the stream stands, as one file.

        Args:
            tensors: the editor's state.
            progress: plain values (JSON).
        """
        from safetensors.torch import save_file  # noqa: PLC0415 - imports torch, which reading rows does not need

        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        text = json.dumps(progress)
        metadata = {"schema": str(SCHEMA), "progress": text, "sha256": _sum_of_state(contiguous, text)}
        with replacing(self._state) as temporary:
            save_file(contiguous, temporary, metadata=metadata)

    def load_state(self) -> tuple[dict[str, "Tensor"], dict[str, Any]] | None:
        """What `save_state` wrote last, or None.

        Raises:
            UserError: the file is damaged, or another version of the program wrote it.
        """
        if not self._state.exists():
            return None
        if self._state.is_dir():
            raise self.unusable_state("it is a folder")
        try:
            with safe_open(self._state, framework="pt") as file:
                metadata = file.metadata() or {}
                self._check_schema(metadata.get("schema"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                progress: dict[str, Any] = json.loads(metadata["progress"])
                same = metadata["sha256"] == _sum_of_state(tensors, metadata["progress"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise self.unusable_state(error) from error
        except OSError as error:
            raise unreadable(self._state, error) from error
        if not same:
            raise self.unusable_state("it does not agree with its checksum")
        broken = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
        if broken:
            raise self.unusable_state(f"{broken[0]} holds numbers that are not finite")
        return tensors, progress

    def unusable_state(self, reason: object) -> UserError:
        """The sentence about a state that cannot be gone on from."""
        return UserError(
            f"{self._state} is damaged ({_in_one_line(reason)}); delete it to edit from the start of the stream again "
            "and keep the finished rows, or start the run again with force=true"
        )

    def saved_n(self) -> int:
        """Edits that the stored state holds; 0 where there is none that can be read."""
        try:
            with safe_open(self._state, framework="np") as file:
                return len(json.loads(file.metadata()["progress"])["records"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            return 0


def _within(folder: Path) -> list[Path]:
    """What lies in a folder, the lock apart."""
    return sorted(path for path in folder.iterdir() if path.name != _LOCK)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _place(row: Mapping[str, Any]) -> tuple[str, int]:
    """What makes a checkpoint row one of its kind in its run."""
    return row["protocol"], int(row["n"])


def in_a_sentence(error: Exception) -> str:
    """What an error says, in one line; of an error of the program also its kind."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {_in_one_line(error)}"


def _in_one_line(reason: object) -> str:
    return " ".join(str(reason).split()) or type(reason).__name__


# --- Checksums ---------------------------------------------------------------------------------------------


def _texts(data: bytes) -> list[dict[str, str]]:
    """The rows of a CSV file, each cell as it stands there; ValueError where it is none."""
    rows = pd.read_csv(StringIO(data.decode()), dtype=str, keep_default_na=False)
    return [{str(key): str(value) for key, value in row.items()} for row in rows.to_dict("records")]


def _sum_of_row(row: Mapping[str, str]) -> str:
    """SHA-256 over the cells that hold something: a later row may bring columns that this one lacks."""
    cells = {name: text for name, text in sorted(row.items()) if text and name != _ROW_SUM}
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def _row_problem(row: Mapping[str, str]) -> str | None:
    if row[_ROW_SUM] == _sum_of_row(row):
        return None
    return f"the row of N={row['n'] or '?'}, {row['protocol'] or '?'} does not agree with its checksum"


def _sums_last(columns: Iterable[str]) -> list[str]:
    return [*(name for name in columns if name not in (_CASES_SUM, _ROW_SUM)), _CASES_SUM, _ROW_SUM]


def _sum_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sum_of_state(tensors: Mapping[str, "Tensor"], progress: str) -> str:
    """SHA-256 over names, types, shapes and bytes of contiguous tensors on the CPU, and over the progress."""
    import torch  # noqa: PLC0415 - see `save_state`

    digest = hashlib.sha256(progress.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --- What the base model predicts --------------------------------------------------------------------------

Ids = dict[str, list[int]]  # token ids by name


def stored_predictions(
    path: Path,
    keys: Sequence[str],
    predict: Callable[[list[int]], list[Ids]],
    complain: Callable[[str], None] = lambda _: None,
) -> list[Ids]:
    """Look predictions up by key; make those that the file lacks or that are damaged there, and add them to it.

    Args:
        path: a JSON file of earlier predictions, or where it shall be; each is kept with its checksum.
        keys: one per probe.
        predict: called with the positions of the missing probes; token ids by name for each.
        complain: called with a sentence about what is damaged.
    """
    known = predictions_in(path, complain)
    missing = [i for i, key in enumerate(keys) if key not in known]
    if missing:
        known |= dict(zip((keys[i] for i in missing), predict(missing), strict=True))
        with _sole_writer(path.parent):
            known = predictions_in(path) | known  # with what another run has added meanwhile
            entries = {key: {**ids, "sha256": _sum_of_ids(path, key, ids)} for key, ids in known.items()}
            write_text(path, json.dumps(entries))
    return [known[key] for key in keys]


@contextmanager
def _sole_writer(folder: Path) -> Iterator[None]:
    """Hold a folder of base predictions; what a killed writer left in it is swept."""
    lock = FileLock(folder / _LOCK, timeout=_LOCK_SECONDS)
    try:
        make_folder(folder)
        lock.acquire()
    except Timeout:
        raise UserError(f"{folder} is held by another process; end that, and run the same command again") from None
    except OSError as error:
        raise unwritable(folder, error) from error
    try:
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def predictions_in(path: Path, complain: Callable[[str], None] = lambda _: None) -> dict[str, Ids]:
    """The predictions of a file that agree with their checksums, by key.

    Args:
        path: the file; none is one without predictions.
        complain: called with a sentence about the others.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        complain(f"{path} is damaged ({_in_one_line(error)}); its predictions are made again")
        return {}
    if not isinstance(entries, dict):
        complain(f"{path} is damaged (it holds no predictions); its predictions are made again")
        return {}
    sound = {key: ids for key, entry in entries.items() if (ids := _checked_ids(path, key, entry)) is not None}
    if len(sound) < len(entries):
        complain(f"{path} is damaged: {len(entries) - len(sound)} of {len(entries)} predictions are made again")
    return sound


def _checked_ids(path: Path, key: str, entry: object) -> Ids | None:
    """An entry's ids; None where they do not agree with its checksum, or it has none."""
    if not isinstance(entry, dict):
        return None
    ids = {name: value for name, value in entry.items() if name != "sha256"}
    return ids if entry.get("sha256") == _sum_of_ids(path, key, ids) else None


def _sum_of_ids(path: Path, key: str, ids: Mapping[str, object]) -> str:
    """SHA-256 over model and protocol, which the file's name tells, the probe's key, and the ids."""
    return hashlib.sha256(json.dumps([path.name, key, ids], sort_keys=True).encode()).hexdigest()
