"""The calls by which a run touches its files or asks for memory: counted, and one of them made to fail or to kill.

All of it is done by putting other functions into the modules of a process that ends with the run; nothing is undone.
Files are opened here with a raw layer of our own, so that a write is what reaches the system and no `write()` of a
buffer. Of native code (safetensors, Parquet) the call as a whole is a point, which leaves half a file behind.
"""

import builtins
import errno
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from types import FrameType
from typing import IO, Any, Literal

import pyarrow.parquet
import safetensors
import torch
from torch.utils._python_dispatch import TorchDispatchMode

Group = Literal["file", "memory"]
Mode = Literal["once", "lasting", "kill"]

PHASES = ("starting", "loading", "editing", "evaluation", "writing")
_PHASE_OF_ROOM = {"models": 1, "datasets": 1, "editors": 2, "evaluation": 3, "results": 4}
# What a full disk refuses; a broken one refuses all.
_WRITES = ("open to write", "write", "save", "make folder")
_PACKAGE = f"{os.sep}horen_bench{os.sep}"
_TEMPORARY = re.compile(r"^\.(.+?)\.[^.]+\.tmp$")


@dataclass(frozen=True, slots=True)
class Event:
    """One call.

    Attributes:
        group: what a trial counts by.
        kind: e.g. `write` or `rename`.
        what: the file, or the operation of torch.
        where: the innermost lines of the package that led to it.
    """

    group: Group
    kind: str
    what: str
    where: str


@dataclass(frozen=True, slots=True)
class Disturbance:
    """What happens at a call.

    Attributes:
        group: the calls that are counted.
        at: number of the call, from 0.
        mode: `once`: this call fails; `lasting`: all later ones of its nature as well; `kill`: the process ends here.
    """

    group: Group
    at: int
    mode: Mode


class Points:
    """Counts the calls of this process and disturbs one.

    Args:
        folders: whose files count.
        disturbance: None only counts.
        phase: a byte that always holds the position in `PHASES` of what is going on.
        noted: called with each call that is counted, and with the first one that is disturbed.
    """

    def __init__(
        self, folders: Sequence[Path], disturbance: Disturbance | None, phase: mmap, noted: Callable[[Event], object]
    ) -> None:
        self._folders = tuple(f"{os.path.abspath(folder)}{os.sep}" for folder in folders)  # noqa: PTH100 - keeps links
        self._disturbance = disturbance
        self._phase = phase
        self._noted = noted
        self._counts: dict[str, int] = {"file": 0, "memory": 0}
        self._lasting: str | None = None  # kind of the call that began it

    # --- Counting ----------------------------------------------------------------------------------------

    def hit(self, group: Group, kind: str, what: str, half: Callable[[], object] = lambda: None) -> None:
        """A call is about to be made.

        Args:
            group: see `Event`.
            kind: see `Event`.
            what: see `Event`.
            half: does a part of it, which a failure leaves behind.

        Raises:
            OSError, SafetensorError, MemoryError, RuntimeError: it is the one that fails.
        """
        lines = _lines_of_package(sys._getframe(1))
        self._phase[0] = _phase(lines)
        number = self._counts[group]
        self._counts[group] += 1
        plan = self._disturbance
        if plan is None:
            self._noted(Event(group, kind, what, " < ".join(lines[:2])))
        elif group == plan.group and (number == plan.at or self._goes_on(kind)):
            if number == plan.at:
                self._noted(Event(group, kind, what, " < ".join(lines[:2])))
            if plan.mode == "lasting" and self._lasting is None:
                self._lasting = kind
            half()
            if plan.mode == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise _error(kind, what, plan.at)

    def _goes_on(self, kind: str) -> bool:
        """Whether a disk that is full since an earlier call refuses this one; a broken one refuses everything."""
        return self._lasting is not None and (self._lasting not in _WRITES or kind in _WRITES)

    def concerns(self, path: object) -> bool:
        """Whether a path lies in one of the folders."""
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        return f"{os.path.abspath(os.fsdecode(path))}{os.sep}".startswith(self._folders)  # noqa: PTH100 - keeps links

    # --- Putting it in place -----------------------------------------------------------------------------

    def install(self) -> None:
        """See every call from now on, in all modules that are loaded; allocations only within `allocations()`."""
        opened = self._opened
        builtins.open = io.open = opened  # type: ignore[assignment]  # all overloads in one
        for name, kind in (("mkdir", "make folder"), ("unlink", "remove"), ("rmdir", "remove"), ("listdir", "list")):
            _everywhere(getattr(os, name), self._of_path(getattr(os, name), kind))
        _everywhere(os.scandir, self._of_path(os.scandir, "list"))
        _everywhere(os.open, self._system_open(os.open))
        _everywhere(os.fsync, self._fsync(os.fsync))
        for rename in (os.replace, os.rename):
            _everywhere(rename, self._of_path(rename, "rename", position=1))
        _everywhere(safetensors.serialize_file, self._saved(safetensors.serialize_file))
        _everywhere(pyarrow.parquet.write_table, self._saved(pyarrow.parquet.write_table))
        _everywhere(safetensors.safe_open, self._of_path(safetensors.safe_open, "load"))
        _everywhere(pyarrow.parquet.read_table, self._of_path(pyarrow.parquet.read_table, "load"))

    def allocations(self) -> TorchDispatchMode:
        """A context in which every operation of torch that makes a tensor is a point."""
        return _Allocations(self)

    def _opened(  # noqa: PLR0917 - the built-in's
        self,
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> IO[Any]:
        if not self.concerns(file):
            return _open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        writes = bool(set(mode) & set("wax+"))
        self.hit("file", "open to write" if writes else "open to read", label(file))
        raw = _Raw(self, file, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        buffered: Any = (io.BufferedRandom if "+" in mode else io.BufferedWriter if writes else io.BufferedReader)(raw)
        if "b" in mode:
            return buffered  # type: ignore[no-any-return]
        text = io.TextIOWrapper(buffered, encoding, errors, newline)
        text.mode = mode  # type: ignore[misc]  # as the built-in does
        return text

    def _of_path(self, original: Callable[..., Any], kind: str, position: int = 0) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            path = args[position] if len(args) > position else "."
            if self.concerns(path) or kwargs.get("dir_fd") is not None:
                self.hit("file", kind, label(path))
            return original(*args, **kwargs)

        return call

    def _system_open(self, original: Callable[..., int]) -> Callable[..., int]:
        def call(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            if self.concerns(path):
                writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
                self.hit("file", "open to write" if writes else "open to read", label(path))
            return original(path, flags, *args, **kwargs)

        return call

    def _fsync(self, original: Callable[[int], None]) -> Callable[[Any], None]:
        def call(file: Any) -> None:
            self.hit("file", "fsync", "")
            original(file)

        return call

    def _saved(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """A native writer of whole files, whose second argument is a path or, of Parquet, an open file."""

        def call(*args: Any, **kwargs: Any) -> Any:
            place = args[1]

            def half() -> None:
                if hasattr(place, "write"):
                    place.write(b"PAR1")  # how such a file begins
                else:
                    original(*args, **kwargs)
                    os.truncate(place, Path(place).stat().st_size // 2)

            if hasattr(place, "write"):
                self.hit("file", "save", "parquet", half)
            elif self.concerns(place):
                self.hit("file", "save", label(place), half)
            return original(*args, **kwargs)

        return call


_open = io.open


class _Raw(io.FileIO):
    """A file whose reads and writes are points."""

    def __init__(self, points: Points, file: Any, mode: str) -> None:
        super().__init__(file, mode)
        self._points, self._label = points, label(file)

    def write(self, data: Any) -> int:
        """A write of which a failure leaves half."""
        content = bytes(data)
        self._points.hit("file", "write", self._label, lambda: super(_Raw, self).write(content[: len(content) // 2]))
        return super().write(content)

    def readinto(self, buffer: Any) -> int:
        """A read."""
        self._points.hit("file", "read", self._label)
        return super().readinto(buffer)

    def readall(self) -> bytes:
        """A read to the end."""
        self._points.hit("file", "read", self._label)
        return super().readall()


class _Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's base has no annotations
    def __init__(self, points: Points) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._points = points

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace == "aten" and not func.is_view and not func._schema.is_mutable:
            self._points.hit("memory", "allocation", str(func))
        return func(*args, **(kwargs or {}))


def _error(kind: str, what: str, number: int) -> Exception:
    """What such a call raises when it fails: the words are those of the real ones."""
    if kind == "allocation":
        return (
            MemoryError(),
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 0 bytes free."),
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
                "to allocate 4194304 bytes. Error code 12 (Cannot allocate memory)"
            ),
        )[number % 3]
    if kind == "save" and what.endswith(".safetensors"):
        return safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    code = errno.ENOSPC if kind in _WRITES else errno.EIO
    return OSError(code, os.strerror(code), what)


def label(path: Any) -> str:
    """The name of a file; of a temporary one that of the file whose place it takes."""
    name = Path(os.fsdecode(path)).name
    temporary = _TEMPORARY.match(name)
    return temporary[1] if temporary else name


def _everywhere(original: object, replacement: object) -> None:
    """Put another function into every module that holds one, under whatever name."""
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is original:
                setattr(module, name, replacement)


def _lines_of_package(frame: FrameType | None) -> list[str]:
    """Where the package stands, innermost first: `editors/base.py:12`."""
    lines = []
    while frame is not None:
        _, inside, name = frame.f_code.co_filename.rpartition(_PACKAGE)
        if inside:
            lines.append(f"{name}:{frame.f_lineno}")
        frame = frame.f_back
    return lines


def _phase(lines: Sequence[str]) -> int:
    """What is going on: writing where the innermost line is the store's, else what the outermost room is for."""
    rooms = [Path(line.partition(":")[0]).parts[0] for line in lines]
    if rooms[:1] == ["results"]:
        return PHASES.index("writing")
    return next((_PHASE_OF_ROOM[room] for room in reversed(rooms) if room in _PHASE_OF_ROOM), 0)
