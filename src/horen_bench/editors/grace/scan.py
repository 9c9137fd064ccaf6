"""Distances to keys, and a block of queries on their way into a codebook of balls.

Shapes: `B` queries, `m` their size, `C` entries.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from horen_bench.editors.codebook.entries import BallCodebook

_KEYS_AT_ONCE = 4096  # cast to float32 together


def distances(queries: Tensor, keys: Tensor) -> Tensor:
    """Euclidean distances of queries `(B, m)` to keys `(C, m)`, float32 `(B, C)`; C >= 1.

    Taken from the differences: by way of inner products a distance of zero comes out as a thousandth of the vectors'
    length. Each pair's distance is the same whatever stands beside it.
    """
    exact = "donot_use_mm_for_euclid_dist"
    parts = [keys[start : start + _KEYS_AT_ONCE] for start in range(0, len(keys), _KEYS_AT_ONCE)]
    return torch.cat([torch.cdist(queries.float(), part.float(), compute_mode=exact) for part in parts], dim=1)


@dataclass(slots=True)
class BlockScan:
    """A block of queries on their way into the codebook.

    Keys never move, so all distances of a block are known beforehand; which rows have become entries, and how far they
    reach, is what each edit finds out from those before it.

    Attributes:
        size: number of entries from before the block.
        entries: nearest of those entries, `(B,)`.
        distances: distances to them, `(B,)`; infinite where there was none.
        among: distances of the queries `(B, B)` to one another's keys.
        lengths: Euclidean lengths of the queries.
        radii: of all entries, those of the block included.
        born: queries of the block that have become entries, in order.
    """

    size: int
    entries: NDArray[np.int64]
    distances: NDArray[np.float32]
    among: NDArray[np.float32]
    lengths: list[float]
    radii: list[np.float32]
    born: list[int] = field(default_factory=list)

    @classmethod
    def over(cls, queries: Tensor, codebook: BallCodebook) -> "BlockScan":
        """A scan that has not begun."""
        n = len(queries)
        among = distances(queries, queries.to(codebook.keys.dtype)).cpu().numpy()
        lengths, radii = queries.norm(dim=1).tolist(), list(codebook.radii.cpu().numpy())
        if len(codebook) == 0:
            return cls(0, np.zeros(n, np.int64), np.full(n, np.inf, np.float32), among, lengths, radii)
        nearest = distances(queries, codebook.keys).min(dim=1)
        entries, far = nearest.indices.cpu().numpy(), nearest.values.cpu().numpy()
        return cls(len(codebook), entries, far, among, lengths, radii)

    def nearest(self, i: int) -> tuple[int | None, np.float32]:
        """Nearest entry of query `i` and its distance; the oldest of equals."""
        if self.born:
            row = self.among[i, self.born]
            newest = int(row.argmin())
            if row[newest] < self.distances[i]:
                return self.size + newest, row[newest]
        return (int(self.entries[i]) if self.size else None), self.distances[i]
