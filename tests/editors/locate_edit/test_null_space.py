"""Directions that general text hardly uses, and the memory of keys written there."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from horen_bench.editors.locate_edit.null_space import KeyMemory, NullSpace, null_space
from horen_bench.editors.shared.second_moments import SecondMoment
from horen_bench.errors import UserError

CPU = torch.device("cpu")


def moment_with(values: list[float]) -> tuple[SecondMoment, Tensor]:
    """A moment with given eigenvalues, and its eigenvectors."""
    q = torch.linalg.qr(torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(1))).Q
    return SecondMoment(q @ torch.diag(torch.tensor(values)) @ q.T * 10, 10), q


def test_null_space_is_spanned_by_eigenvectors_below_the_threshold(tmp_path: Path) -> None:
    moment, q = moment_with([5.0, 1.0, 0.01, 0.001])
    file = tmp_path / "space.safetensors"
    for _ in range(2):  # the second time from the file
        space = null_space(moment, 0.5, file, CPU)
        assert space.rank == 2
        torch.testing.assert_close(space.matrix(), q[:, 2:] @ q[:, 2:].T, rtol=0, atol=1e-5)
        rows = torch.randn(3, 4)
        torch.testing.assert_close(space.project(rows), rows @ space.matrix(), rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="no eigenvalue of the second moment is below"):
        null_space(moment, 1e-4, None, CPU)


def test_key_memory_solves_the_published_system_at_every_turn() -> None:
    generator = torch.Generator().manual_seed(2)
    space = NullSpace(torch.linalg.qr(torch.randn(12, 5, generator=generator)).Q)
    memory, p = KeyMemory(space, 0.7), space.matrix().double()
    for n in (1, 3, 1, 2, 9, 1):  # more keys in the end than the null space has directions
        keys, residual = torch.randn(n, 12, generator=generator), torch.randn(n, 6, generator=generator)
        k = keys.double().T
        system = p @ (k @ k.T + memory.moment().double()) + 0.7 * torch.eye(12)
        expected = torch.linalg.solve(system, p @ k @ residual.double()).T
        torch.testing.assert_close(memory.update(keys, residual).double(), expected, rtol=1e-4, atol=1e-5)
        memory = memory.extended(keys)
    a = memory.keys @ p.float()
    torch.testing.assert_close(
        memory.factor @ memory.factor.T, (a @ a.T + 0.7 * torch.eye(17)).double(), rtol=1e-4, atol=1e-4
    )
