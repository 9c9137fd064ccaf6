"""What every step stands on: rows that are written at once, time that ends, measurements that may fail."""

import csv
import gc
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf

SECONDS = "seconds"  # the figure that ends a measurement
FAILED = "failed"  # or the one that says that there is none, with the reason as its note
WHOLE = "whole step"  # the measurement that stands for a step, start of its process included
_SETTINGS = Path(__file__).parents[1] / "gpu.yaml"


@dataclass(frozen=True, slots=True)
class Figure:
    """A number or a word that was measured."""

    name: str
    value: float | str
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """A figure as it stands in the file, every field a text.

    Attributes:
        device: what it was measured on.
        date: the day.
        step: of the suite.
        measurement: part of the step that is measured, and repeated, as a whole.
        figure: its name.
        value: a number or a word.
        unit: of the number.
        note: a sentence, where there is one.
    """

    device: str
    date: str
    step: str
    measurement: str
    figure: str
    value: str
    unit: str
    note: str

    @property
    def number(self) -> float | None:
        """The value, where it is a number."""
        try:
            return float(self.value)
        except ValueError:
            return None


class Rows:
    """The rows of one device in one file, which grows by appending and may hold those of other devices.

    Args:
        path: of the file; made at the first row.
        device: name of the device.
    """

    def __init__(self, path: Path, device: str) -> None:
        self.path = path
        self.device = device
        self._rows: list[Row] = []
        self._read = 0

    def all(self) -> list[Row]:
        """The latest row of each figure; the failure of an attempt is forgotten once a later one came to its end."""
        self._refresh()
        latest: dict[tuple[str, str, str], Row] = {}
        for row in self._rows:
            if row.figure == SECONDS:
                latest.pop((row.step, row.measurement, FAILED), None)
            latest[row.step, row.measurement, row.figure] = row
        return list(latest.values())

    def finished(self, step: str, measurement: str) -> bool:
        """Whether a measurement came to its end and none of it failed later."""
        figures = {row.figure for row in self.all() if (row.step, row.measurement) == (step, measurement)}
        return SECONDS in figures and FAILED not in figures

    def failures(self, step: str) -> list[str]:
        """The measurements of a step that failed, the whole step left out."""
        failed = [row.measurement for row in self.all() if (row.step, row.figure) == (step, FAILED)]
        return [measurement for measurement in failed if measurement != WHOLE]

    def number(self, step: str, measurement: str, figure: str) -> float | None:
        """A number that was measured, or None."""
        key = (step, measurement, figure)
        return next((row.number for row in self.all() if (row.step, row.measurement, row.figure) == key), None)

    def add(self, step: str, measurement: str, figure: Figure, note: str = "") -> None:
        """Append a row; it is on the disk when this returns."""
        value = figure.value if isinstance(figure.value, str) else f"{figure.value:.6g}"
        row = Row(self.device, time.strftime("%Y-%m-%d"), step, measurement, figure.name, value, figure.unit, note)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if is_new:
                writer.writerow(column.name for column in fields(Row))
            writer.writerow(getattr(row, column.name) for column in fields(Row))
            file.flush()
            os.fsync(file.fileno())

    def _refresh(self) -> None:
        """Read the file again where it has grown, by another process too."""
        size = self.path.stat().st_size if self.path.exists() else 0
        if size != self._read:
            with self.path.open(newline="", encoding="utf-8") as file:
                rows = [Row(**row) for row in csv.DictReader(file)]
            self._rows, self._read = [row for row in rows if row.device == self.device], size


class Clock:
    """Time up to a moment, in seconds since the epoch, so that a child process shares it."""

    def __init__(self, until: float) -> None:
        self.until = until

    def left(self) -> float:
        """Seconds; negative once the time is over."""
        return self.until - time.time()


@dataclass(slots=True)
class Step:
    """What a step gets.

    Attributes:
        name: of the step.
        settings: its part of `gpu.yaml`.
        device: `cuda` or `cpu`.
        rows: where figures go.
        clock: its time.
        again: measure what is there already once more.
    """

    name: str
    settings: Mapping[str, Any]
    device: str
    rows: Rows
    clock: Clock
    again: bool = False

    def measure(self, measurement: str, action: Callable[[], Iterable[Figure]]) -> None:
        """Write down each figure as soon as it is there.

        A measurement that fails leaves its reason, and the next goes on. What came to its end earlier is skipped.
        """
        if self.rows.finished(self.name, measurement) and not self.again:
            return
        if self.clock.left() <= 0:
            self._failed(measurement, "not measured: the step's time was over; run the same command again to go on")
            return
        started = time.perf_counter()
        try:
            for figure in action():
                self.rows.add(self.name, measurement, figure)
        except Exception as error:  # whatever it is: the other measurements are worth having
            self._failed(measurement, sentence(error))
        else:
            self.rows.add(self.name, measurement, Figure(SECONDS, time.perf_counter() - started, "s"))
        if self.device == "cuda":
            gc.collect()  # an editor and its hook hold each other, and through them a codebook of gigabytes
            torch.cuda.empty_cache()

    def _failed(self, measurement: str, reason: str) -> None:
        self.rows.add(self.name, measurement, Figure(FAILED, ""), reason)


def sentence(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


class Settings:
    """`gpu.yaml`, or with the dry run's sizes in place."""

    def __init__(self, *, dry: bool) -> None:
        loaded = OmegaConf.load(_SETTINGS)
        assert isinstance(loaded, DictConfig)
        changes = loaded.pop("dry")
        self._values: DictConfig | ListConfig = OmegaConf.merge(loaded, changes) if dry else loaded

    @cached_property
    def values(self) -> dict[str, Any]:
        """Plain values by name."""
        return {str(key): value for key, value in dict(OmegaConf.to_container(self._values)).items()}  # type: ignore[arg-type]
