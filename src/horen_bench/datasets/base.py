"""What datasets of files share: the head of a stream in file order, and the rule on conflicting prompts."""

import gc
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from horen_bench.cases import EditCase
from horen_bench.config.schema import Conflicts
from horen_bench.datasets.records import Record, read_records
from horen_bench.errors import UserError


def stream_head(
    read: Callable[[int | None], list[EditCase]], n: int, conflicts: Conflicts, where: str
) -> list[EditCase]:
    """The first `n` cases of what `read` gives, after the rule on conflicts.

    Args:
        read: called with the number of cases that are enough, or None for all.
        n: how many.
        conflicts: what becomes of cases that give one prompt different targets: `keep` them all,
            `drop_earlier` (the last target wins), `drop_later` (the first one wins).
        where: the source, for the message.

    Raises:
        UserError: there are fewer, or the rule leaves fewer.
    """
    cases = read(n if conflicts == "keep" else None)
    if n > len(cases):
        raise UserError(f"n={n} is more than {where} holds; write n={len(cases)} or less")
    if conflicts == "keep":
        return cases[:n]
    kept = without_conflicts(cases, conflicts)
    if n > len(kept):
        raise UserError(
            f"n={n} is more than dataset.conflicts={conflicts} leaves of {where}, {len(kept)} of {len(cases)} cases; "
            f"write n={len(kept)} or less, or dataset.conflicts=keep"
        )
    return kept[:n]


def cases_of_file(
    path: Path, case_of: Callable[[Record], EditCase], enough: int | None, how_to_get: str
) -> list[EditCase]:
    """The cases of a file, in order.

    Every record is read, also those that are not wanted: a damaged file is refused at once, and not after a
    week of the edits that came before the damage.

    Args:
        path: the file.
        case_of: makes a case of a record.
        enough: keep no more than so many.
        how_to_get: end of the sentence for a missing file.

    Raises:
        UserError: the file is missing or damaged, or a record is not of the schema.
    """
    where = str(path)
    with _collector_paused():
        records = read_records(path, how_to_get)
        cases = (case_of(Record.of(value, i, where)) for i, value in enumerate(records))
        head = list(islice(cases, enough))
        deque(cases, maxlen=0)  # reads the rest, keeps nothing of it
    return head


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Without the cyclic collector: it walks a million new objects again and again, a third of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def without_conflicts(cases: Sequence[EditCase], conflicts: Conflicts) -> list[EditCase]:
    """Cases in order, less those that contradict the kept target of their prompt.

    Exact repetitions of the kept target stay.
    """
    in_order = cases if conflicts == "drop_earlier" else reversed(cases)
    kept = {case.prompt: case.target for case in in_order}
    return [case for case in cases if kept[case.prompt] == case.target]
