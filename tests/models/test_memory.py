"""What counts as memory that ran out, and how it is said."""

import pytest
import torch

from horen_bench.errors import UserError
from horen_bench.models.memory import is_out_of_memory, out_of_memory_in


def test_an_allocation_that_fails_on_the_cpu_is_memory_that_ran_out() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert is_out_of_memory(caught.value)
    with (
        pytest.raises(UserError, match=r"memory ran out while editing .*; edit less$"),
        out_of_memory_in("editing", "edit less"),
    ):
        torch.empty(1 << 50)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_other_errors_are_told_apart(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_other_errors_pass_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory_in("editing", "edit less"):
        raise RuntimeError("shapes")
