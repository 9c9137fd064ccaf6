"""Damped Hopfield retrieval (paper Eqs. 2-3) and the energy of its undamped form (Appendix D).

Shapes: `q` queries `(B, m)`, `keys` `(C, m)`, both float. Keys of a narrower dtype than the queries are widened chunk
by chunk, so that scores are computed in the queries' dtype without a second copy of the codebook.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 8192  # keys widened at once


def hopfield_map(q: Tensor, keys: Tensor, beta: float, hidden: Tensor | None = None) -> Tensor:
    """One standard Hopfield update, `Phi(q) = K^T softmax(beta K q)`, `(B, m)`.

    Args:
        q: queries.
        keys: the codebook's.
        beta: inverse temperature.
        hidden: bool `(B, C)`, true where a query does not see a key.
    """
    weights = torch.softmax(beta * similarities(q, keys, hidden), dim=-1)
    if keys.dtype == q.dtype:
        return weights @ keys
    chunks = zip(torch.split(weights, _CHUNK, dim=1), torch.split(keys, _CHUNK), strict=True)
    return torch.stack([part @ chunk.to(q.dtype) for part, chunk in chunks]).sum(dim=0)


def similarities(q: Tensor, keys: Tensor, hidden: Tensor | None = None) -> Tensor:
    """Inner products `(B, C)`; minus infinity where a query does not see a key."""
    if keys.dtype == q.dtype:
        products = q @ keys.T
    else:
        products = torch.cat([q @ chunk.to(q.dtype).T for chunk in torch.split(keys, _CHUNK)], dim=1)
    return products if hidden is None else products.masked_fill_(hidden, -torch.inf)


def energy(q: Tensor, keys: Tensor, beta: float) -> Tensor:
    """`E(q) = |q|^2 / 2 - log(sum_i exp(beta <k_i, q>)) / beta`, `(B,)`; `hopfield_map` never raises it."""
    return 0.5 * q.square().sum(dim=-1) - torch.logsumexp(beta * q @ keys.T, dim=-1) / beta


def refine(
    q: Tensor,
    keys: Tensor,
    *,
    beta: float,
    alpha: float,
    steps: int,
    eps: float,
    normalize: bool = True,
    hidden: Tensor | None = None,
) -> Tensor:
    """Let queries relax towards the keys for at most `steps` damped steps (Eqs. 2-3).

    Each step retrieves `r = Phi(q)`, projects it to the unit sphere, and moves the query the share `alpha`
    of the way there, back on the sphere. A query that is closer than `eps` to its retrieval stays.

    Args:
        q: queries `(B, m)`, unit rows if `normalize`.
        keys: `(C, m)`, unit rows if `normalize`; C >= 1.
        beta: inverse temperature, > 0.
        alpha: damping in [0, 1]; 0 leaves queries alone.
        steps: most updates, >= 0.
        eps: distance below which a query has arrived, >= 0.
        normalize: False is the ablation of Table 10: neither retrieval nor query is projected.
        hidden: bool `(B, C)`, true where a query does not see a key.

    Returns:
        Refined queries `(B, m)`; unit rows if `normalize`.
    """
    for step in range(1, steps + 1):
        retrieved = hopfield_map(q, keys, beta, hidden)
        if normalize:
            retrieved = F.normalize(retrieved, dim=-1)
        moving = (retrieved - q).norm(dim=-1, keepdim=True) >= eps
        moved = (1 - alpha) * q + alpha * retrieved
        q = torch.where(moving, F.normalize(moved, dim=-1) if normalize else moved, q)
        # The host waits for the device here, so it looks only where that can save a step.
        if step < steps and not moving.any():
            break
    return q
