"""Memory that runs out, on the host or on a device: what counts as that, and how it is said."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from horen_bench.errors import UserError

# A failed allocation on the CPU is a plain runtime error; so is one inside a GPU's libraries.
_SIGNS = ("DefaultCPUAllocator", "not enough memory", "out of memory", "Cannot allocate memory", "_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed, on the host or on a device: less at once may do."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


@contextmanager
def out_of_memory_in(activity: str, remedy: str) -> Iterator[None]:
    """Within the block, memory that runs out is a sentence.

    Args:
        activity: what the block does, behind "while".
        remedy: what to do about it.

    Raises:
        UserError: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"memory ran out while {activity} ({reason}); {remedy}") from error
