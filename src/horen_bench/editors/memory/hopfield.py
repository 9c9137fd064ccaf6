"""Damped Hopfield retrieval (paper Eqs. 2-3) and the energy of its undamped form (Appendix D).

Shapes: `q` queries `(B, m)`, `keys` `(C, m)`, both float.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def hopfield_map(q: Tensor, keys: Tensor, beta: float) -> Tensor:
    """One standard Hopfield update, `Phi(q) = K^T softmax(beta K q)`, `(B, m)`."""
    return torch.softmax(beta * q @ keys.T, dim=-1) @ keys


def energy(q: Tensor, keys: Tensor, beta: float) -> Tensor:
    """`E(q) = |q|^2 / 2 - log(sum_i exp(beta <k_i, q>)) / beta`, `(B,)`; `hopfield_map` never raises it."""
    return 0.5 * q.square().sum(dim=-1) - torch.logsumexp(beta * q @ keys.T, dim=-1) / beta


def refine(
    q: Tensor, keys: Tensor, *, beta: float, alpha: float, steps: int, eps: float, normalize: bool = True
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

    Returns:
        Refined queries `(B, m)`; unit rows if `normalize`.
    """
    for _ in range(steps):
        retrieved = hopfield_map(q, keys, beta)
        if normalize:
            retrieved = F.normalize(retrieved, dim=-1)
        moving = (retrieved - q).norm(dim=-1, keepdim=True) >= eps
        if not moving.any():
            break
        moved = (1 - alpha) * q + alpha * retrieved
        q = torch.where(moving, F.normalize(moved, dim=-1) if normalize else moved, q)
    return q
