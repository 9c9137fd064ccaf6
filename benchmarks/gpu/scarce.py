"""Memory that does not do: real errors of a GPU's allocator, or made-up ones on a CPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

Site = tuple[type[Any], str, Callable[..., int]]


@contextmanager
def scarce_memory(device: str, action: Callable[[], object], room: float, site: Site) -> Iterator[Callable[[], int]]:
    """Run an action, and leave less memory than it took to what stands in the block.

    Args:
        device: `cuda`, where the allocator is given a limit; on `cpu` the method of `site` raises what it would.
        action: what takes the memory.
        room: share of it that is left.
        site: a class, the name of a method of it, and the size of the batch that a call of it works on.

    Yields:
        A function that gives the number of out-of-memory errors in the block so far.
    """
    with _limited_gpu(action, room) if device == "cuda" else _failing_method(action, room, site) as errors:
        yield errors


@contextmanager
def _limited_gpu(action: Callable[[], object], room: float) -> Iterator[Callable[[], int]]:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    action()
    taken = torch.cuda.max_memory_reserved() - before
    torch.cuda.empty_cache()
    known = _n_errors()
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((before + room * taken) / whole)
    try:
        yield lambda: _n_errors() - known
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _n_errors() -> int:
    return int(torch.cuda.memory_stats().get("num_ooms", 0))


@contextmanager
def _failing_method(action: Callable[[], object], room: float, site: Site) -> Iterator[Callable[[], int]]:
    owner, name, size = site
    sizes: list[int] = []
    plain = getattr(owner, name)
    n_errors = 0

    def noting(*arguments: Any) -> Any:
        sizes.append(size(*arguments))
        return plain(*arguments)

    def failing(*arguments: Any) -> Any:
        nonlocal n_errors
        if size(*arguments) > room * max(sizes):
            n_errors += 1
            raise torch.OutOfMemoryError("made up for the dry run")
        return plain(*arguments)

    with patch.object(owner, name, noting):
        action()
    with patch.object(owner, name, failing):
        yield lambda: n_errors
