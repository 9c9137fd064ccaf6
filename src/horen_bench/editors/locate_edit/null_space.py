"""Directions that general text hardly uses, and the memory of keys written there (AlphaEdit).

Shapes: `B` keys, `N` keys written before, `m` input size of a down-projection, `r` protected directions.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from horen_bench.editors.shared.second_moments import SecondMoment, saved_tensors
from horen_bench.errors import UserError
from horen_bench.results.atomic import replacing


@dataclass(frozen=True, slots=True)
class NullSpace:
    """`P = I - U U^T`, the projection on the eigenvectors of `C` below a threshold.

    Attributes:
        protected: `U` `(m, r)`, the eigenvectors at or above the threshold; `P` itself is never stored.
    """

    protected: Tensor

    @property
    def rank(self) -> int:
        """Dimension of the null space, `trace P`."""
        return self.protected.shape[0] - self.protected.shape[1]

    def project(self, rows: Tensor) -> Tensor:
        """Rows `(B, m)` times `P`."""
        return rows - (rows @ self.protected) @ self.protected.T

    def matrix(self) -> Tensor:
        """`P` `(m, m)`."""
        return torch.eye(len(self.protected), device=self.protected.device) - self.protected @ self.protected.T


def null_space(moment: SecondMoment, threshold: float, cached: Path | None, device: torch.device) -> NullSpace:
    """From one symmetric eigendecomposition of `C` in float64, kept on disk.

    Time grows with `m^3`: minutes on a CPU at m = 14,336. Memory is about four `(m, m)` float64 matrices.

    Args:
        moment: of the down-projection's inputs.
        threshold: on eigenvalues of `C`, absolute; a direction strictly below it is free.
        cached: file of the protected directions, or None.
        device: where the null space is used.

    Raises:
        UserError: no direction is free.
    """
    protected = saved_tensors(cached, "protected").get("protected")
    if protected is None or len(protected) != len(moment.total):
        values, vectors = torch.linalg.eigh(moment.mean.to(device, torch.float64))
        protected = vectors[:, values >= threshold].float().contiguous()
        if cached is not None:
            with replacing(cached) as temporary:
                save_file({"protected": protected.cpu()}, temporary)
    space = NullSpace(protected.to(device))
    if space.rank == 0:
        raise UserError(
            f"method.nullspace_threshold={threshold}: no eigenvalue of the second moment is below, so that nothing "
            "could be written; raise it"
        )
    return space


class KeyMemory:
    """The keys of all former edits in one layer, and their part in AlphaEdit's least squares.

    The published code keeps `M = K'^T K'` `(m, m)` and solves a system of that size at every edit. With `A = K' P`, the
    inverse of `P M P + l2 I` on the null space is `(P - A^T (A A^T + l2 I)^-1 A) / l2`: a system of size `N`, whose
    Cholesky factor grows by a row per edit. `N m + N^2` numbers instead of `m^2`, fewer for N below about 0.6 m.

    Args:
        space: the null space.
        l2: lambda_2 > 0.
    """

    def __init__(self, space: NullSpace, l2: float) -> None:
        self.space = space
        self.l2 = l2
        self.keys = space.protected.new_zeros(0, len(space.protected))
        self.factor = self.keys.new_zeros(0, 0, dtype=torch.float64)

    def moment(self) -> Tensor:
        """`M` `(m, m)`."""
        return self.keys.T @ self.keys

    def update(self, keys: Tensor, residual: Tensor) -> Tensor:
        """The change `(d, m)` of `(P (K^T K + M) + l2 I) X = P K^T R`, transposed.

        Args:
            keys: `K` `(B, m)`.
            residual: `R` `(B, d)`.
        """
        projected = self.space.project(keys)
        whitened = self._whitened(projected)
        system = torch.eye(len(keys), device=keys.device) + projected @ whitened.T
        change: Tensor = residual.T @ torch.linalg.solve(system, whitened)
        return change

    def _whitened(self, projected: Tensor) -> Tensor:
        """Projected keys `(B, m)` times `(P M P + l2 I)^-1`."""
        if len(self.keys) == 0:
            return projected / self.l2
        shares = torch.cholesky_solve((self.keys @ projected.T).double(), self.factor).float()
        return (projected - self.space.project(shares.T @ self.keys)) / self.l2

    def extended(self, keys: Tensor) -> "KeyMemory":
        """With `(B, m)` more; the factor of `A A^T + l2 I` is extended, not computed again, NaN where that fails."""
        projected = self.space.project(keys)
        across = (self.keys @ projected.T).double()
        own = (keys @ projected.T).double() + self.l2 * torch.eye(len(keys), dtype=torch.float64, device=keys.device)
        left = torch.linalg.solve_triangular(self.factor, across, upper=False).T
        corner, failed = torch.linalg.cholesky_ex(own - left @ left.T)
        corner = torch.where(failed != 0, math.nan, corner)
        top = torch.cat([self.factor, torch.zeros_like(across)], dim=1)
        longer = KeyMemory(self.space, self.l2)
        longer.factor = torch.cat([top, torch.cat([left, corner], dim=1)])
        longer.keys = torch.cat([self.keys, keys])
        return longer

    def numel(self) -> int:
        """Numbers kept, the protected directions included."""
        return self.keys.numel() + self.factor.numel() + self.space.protected.numel()

    def state_dict(self) -> dict[str, Tensor]:
        """Keys and factor."""
        return {"keys": self.keys.clone(), "factor": self.factor.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take keys and factor that `state_dict` gave."""
        device = self.keys.device
        self.keys, self.factor = state["keys"].to(device, copy=True), state["factor"].to(device, copy=True)
