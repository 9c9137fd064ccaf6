"""Progress bars of a run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Task as ProgressTask
from rich.text import Text


class Bars(Progress):
    """Bars of things that are counted, each with its speed and a clock that runs also where a thing takes long.

    A context, in which they are shown.

    Args:
        console: where.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(
            TextColumn("{task.description:>30}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Speed(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )

    def bar(self, description: str, total: int, unit: str, done: int = 0) -> Callable[[int], None]:
        """Start a bar; what is returned moves it on by a count."""
        task = self.add_task(description, total=total, completed=done, unit=unit)
        return lambda count: self.advance(task, count)

    def say(self, sentence: str) -> None:
        """Print a sentence above the bars, as it is."""
        self.console.print(sentence, highlight=False, markup=False, soft_wrap=True)


class _Speed(ProgressColumn):
    """Items per second, in the task's own unit."""

    def render(self, task: ProgressTask) -> Text:
        """E.g. `12.3 edits/s`."""
        return Text(f"{task.speed:.1f} {task.fields['unit']}/s" if task.speed else "")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps the progress bars of loading a model out of ours."""
    from transformers.utils import logging  # noqa: PLC0415 - seconds that only models need

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
