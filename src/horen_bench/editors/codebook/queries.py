"""The query of a prompt: the mean of a module's input over the prompt's last tokens."""

import torch
from torch import Tensor


def suffix_mean(inputs: Tensor, mask: Tensor, ratio: float) -> Tensor:
    """Mean of `(B, T, m)` over the last `max(1, ceil(ratio * P))` of a row's `P` true positions, float32 `(B, m)`."""
    n_prompt = mask.sum(dim=1)
    # The product is rounded first: 0.14 * 50 is 7.000000000000001 and would pool a token too many.
    n_pooled = (n_prompt.double() * ratio).round(decimals=9).ceil().clamp(min=1)
    rank_from_end = n_prompt[:, None] - mask.cumsum(dim=1)
    pooled = mask & (rank_from_end < n_pooled[:, None])
    weights = pooled.float() / pooled.sum(dim=1, keepdim=True)
    # What is not pooled may not be finite, the first token in half precision above all: zero times that is no zero.
    return torch.einsum("bt,btm->bm", weights, torch.where(pooled[:, :, None], inputs.float(), 0))


def in_words(ratio: float) -> str:
    """Which tokens are pooled, such as `last 60% pooled`."""
    return f"last {ratio:.0%} pooled" if ratio else "last token"
