"""Which elements of a shard's weight are trained: the release's own random numbers."""

import torch
from numpy.random import RandomState
from torch import Tensor

_CHUNK = 1 << 22  # numbers drawn at once


class GradientMasks:
    """Random masks, one per shard, from one Mersenne Twister stream: shard `s` owns its `s`-th block of numbers.

    A function of `(seed, ratio, shape, shard)` alone, so nothing need be saved to go on with a stream.

    Args:
        seed: of the stream.
        ratio: share of the elements that are trained, in (0, 1].
        like: gives shape, dtype and device of the masks.
    """

    def __init__(self, seed: int, ratio: float, like: Tensor) -> None:
        self._seed = seed
        self._ratio = ratio
        self._like = like
        self._random = RandomState(seed)
        self._next = 0
        self._last: tuple[int, Tensor] | None = None

    def of(self, shard: int) -> Tensor:
        """The mask of a shard: 1 on trained elements, 0 elsewhere."""
        if self._last is None or self._last[0] != shard:
            if shard < self._next:
                self._random, self._next = RandomState(self._seed), 0
            while self._next < shard:
                self._block(keep=False)
            self._last = (shard, self._block(keep=True).to(self._like))
        return self._last[1]

    def _block(self, *, keep: bool) -> Tensor:
        mask = torch.empty(self._like.numel() if keep else 0, dtype=torch.bool)
        for start in range(0, self._like.numel(), _CHUNK):
            numbers = self._random.random_sample(min(_CHUNK, self._like.numel() - start))
            if keep:
                mask[start : start + len(numbers)] = torch.from_numpy(numbers < self._ratio)
        self._next += 1
        return mask.view(self._like.shape) if keep else mask
