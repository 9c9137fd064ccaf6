"""Joining the weights of several shards into one (TIES, arXiv 2306.01708)."""

from collections.abc import Sequence

import torch
from torch import Tensor


def ties(weights: Sequence[Tensor], base: Tensor, shares: Sequence[float], density: float) -> Tensor:
    """Merge weights that started from the same base.

    Per weight the largest differences to the base are kept, per element the sign with the larger sum wins, and the
    winners are averaged. An element that one weight alone moved keeps its full difference.

    Args:
        weights: `k` tensors of the shape of `base`.
        base: what they started from.
        shares: `k` positive shares; only their ratios matter.
        density: share of the elements, in [0, 1], that each difference keeps.

    Returns:
        The merged weight, in the dtype of `base`.
    """
    differences = torch.stack([trimmed(weight - base, density) for weight in weights])
    share = torch.tensor(shares, dtype=base.dtype, device=base.device).view(-1, *([1] * base.dim()))
    weighted = differences * share
    winner = torch.where(weighted.sum(dim=0) >= 0, 1.0, -1.0).to(base.dtype)
    kept = differences.sign() == winner
    total = (kept * share).sum(dim=0)
    return base + (weighted * kept).sum(dim=0) / torch.where(total == 0, torch.ones_like(total), total)


def trimmed(difference: Tensor, density: float) -> Tensor:
    """The `floor(density * numel)` largest elements by magnitude, 0 elsewhere."""
    flat = difference.flatten()
    kept = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view_as(difference)
