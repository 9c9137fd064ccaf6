"""REPAIR's batches: like edits together, those unlike their batch put off, and the shards of a window merged by loss.

Shapes: `m` input size of the module, `n` edits of a window.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from horen_bench.cases import EditCase, Probe
from horen_bench.editors.wise.routing import Memory
from horen_bench.editors.wise.shards import OpenShard
from horen_bench.editors.wise.training import SideTrained


@dataclass(slots=True, eq=False)
class WindowEdit:
    """One edit on its way through a window.

    Attributes:
        case: the edit.
        retries: how often it was trained again.
        deferred: whether the consistency filter has put it off, which it does once.
        trained: its last training.
        steps: SGD steps over all trainings.
    """

    case: EditCase
    retries: int = 0
    deferred: bool = False
    trained: SideTrained | None = None
    steps: int = 0


@dataclass(slots=True)
class OpenBatch(OpenShard):
    """A shard in training: the edits of its cases, and what those before leave for the next to follow."""

    members: Sequence[WindowEdit] = ()
    references: list[Tensor] = field(default_factory=list)


@dataclass(slots=True)
class TrainedShard:
    """A trained side memory, the edits that belong to it, and the mean of their last edit losses."""

    memory: Memory
    members: list[WindowEdit] = field(default_factory=list)
    loss: float = 0.0


def similarity_batches(features: Tensor, size: int) -> list[list[int]]:
    """Split edits into batches of like ones (paper, Algorithm 3).

    The edit with the largest mean cosine to all that are left opens a batch, its nearest ones follow by falling
    cosine; of equals the earlier.

    Args:
        features: unit vectors `(n, m)`.
        size: edits per batch; the last may have fewer.

    Returns:
        Indices, each batch with its seed first.
    """
    cosines, left = features @ features.T, list(range(len(features)))
    batches = []
    while left:
        rows = cosines[left][:, left]
        seed = left[int(rows.mean(dim=1).argmax())]
        others = sorted((i for i in left if i != seed), key=lambda i: (-cosines[seed, i].item(), i))
        batches.append([seed, *others[: size - 1]])
        left = [i for i in left if i not in batches[-1]]
    return batches


def inconsistent(features: Tensor, batches: Sequence[Sequence[int]], limit: float) -> list[int]:
    """Members too far from the seed of their batch, in order: one minus their cosine is at least `limit`.

    Args:
        features: unit vectors `(n, m)`.
        batches: of `similarity_batches`.
        limit: in [0, 2].
    """
    far = 1 - features @ features.T >= limit
    return sorted(i for seed, *others in batches for i in others if far[seed, i])


def loss_aware_ties(weights: Sequence[Tensor], base: Tensor, losses: Sequence[float], sensitivity: float) -> Tensor:
    """Merge weights, those of lower loss counting more (paper section 2.5, Algorithm 4).

    Where all that moved an element agree in sign, their weighted mean is taken; where they do not, the one with the
    largest weighted change, in full.

    Args:
        weights: `k` tensors of the shape of `base`.
        base: what they started from.
        losses: of each, nats.
        sensitivity: 0 makes them equal.

    Returns:
        The merged weight, in the dtype of `base`.
    """
    changes = torch.stack([weight.float() - base.float() for weight in weights])
    share = torch.softmax(-sensitivity * torch.tensor(losses), dim=0).to(base.device).view(-1, *([1] * base.dim()))
    moved = changes != 0
    total = (moved * share).sum(dim=0)
    mean = (changes * share).sum(dim=0) / torch.where(total == 0, torch.ones_like(total), total)
    strongest = changes.gather(0, (changes.abs() * share).argmax(dim=0, keepdim=True))[0]
    conflict = (changes > 0).any(dim=0) & (changes < 0).any(dim=0)
    return (base.float() + torch.where(conflict, strongest, mean)).to(base.dtype)


def gaussian(like: Tensor, seed: Sequence[int]) -> Tensor:
    """Standard normal numbers of a tensor's shape, the same on every device."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(like.shape)).to(like)


def packed(edits: Sequence[WindowEdit]) -> Tensor:
    """Edits as bytes for a state, uint8; what they were trained to is left out."""
    return torch.tensor(list(json.dumps([_plain(edit) for edit in edits]).encode()), dtype=torch.uint8)


def unpacked(saved: Tensor) -> list[WindowEdit]:
    """The edits that `packed` gave bytes of."""
    return [_edit(values) for values in json.loads(bytes(saved.tolist()))]


def _plain(edit: WindowEdit) -> dict[str, Any]:
    case = edit.case
    texts = {"id": case.id, "prompt": case.prompt, "target": case.target}
    locality = [[probe.prompt, probe.answer] for probe in case.locality]
    return {**texts, "locality": locality, "retries": edit.retries, "deferred": edit.deferred}


def _edit(values: Mapping[str, Any]) -> WindowEdit:
    locality = tuple(Probe(*pair) for pair in values["locality"])
    case = EditCase(values["id"], values["prompt"], values["target"], locality=locality)
    return WindowEdit(case, values["retries"], values["deferred"])
