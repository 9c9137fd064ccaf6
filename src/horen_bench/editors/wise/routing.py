"""Which weight a sequence goes through (paper section 2.4): main, live side, or one of the stored memories.

One decision per row of a forward call, over the row's real tokens in that call. Shapes: `B` rows of `T` tokens, `m`
input and `d` output size of the module.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from horen_bench.editors.wise.training import Activation, distances
from horen_bench.models.prompt_hook import PromptHook

_LONG = 100  # tokens; a longer call is scored by its largest distance
MAIN, LIVE, FIRST_MEMORY = -1, 0, 1  # choices; memory k is FIRST_MEMORY + k


@dataclass(frozen=True, slots=True)
class Memory:
    """A side weight `(d, m)` and the smallest activation among its edits."""

    weight: Tensor
    activation: float


@dataclass(frozen=True, slots=True)
class Routed:
    """Decisions for `B` rows.

    Attributes:
        outputs: `(B, T, d)`.
        choices: int64 `(B,)`: MAIN, LIVE, or FIRST_MEMORY + index.
        scores: `(B, 1 + memories)`, of the live side weight and each memory.
    """

    outputs: Tensor
    choices: Tensor
    scores: Tensor


class TokenHook(PromptHook):
    """Hands over every forward call, decode steps too, with a mask of the real tokens among its own."""

    def _before_model(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        passed = self._signature.bind_partial(*args, **kwargs).arguments
        passed |= passed.get("kwargs", {})
        tokens = passed.get("input_ids")
        if tokens is None:
            tokens = passed["inputs_embeds"][..., 0]
        mask = passed.get("attention_mask")
        n_tokens = tokens.shape[1]
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= n_tokens:
            self._mask = mask[:, mask.shape[1] - n_tokens :].bool()
        else:
            self._mask = torch.ones_like(tokens, dtype=torch.bool)


def scores(side: Tensor, activated: Tensor, mask: Tensor, activation: Activation) -> Tensor:
    """`distances` per row, `(B,)`: mean over the true positions, past 100 of them the largest."""
    distance = distances(side, activated, activation)
    counts = mask.sum(dim=1)
    mean = (distance.float() * mask).sum(dim=1) / counts.clamp(min=1)
    largest = distance.masked_fill(~mask, 0).amax(dim=1)
    return torch.where(counts > _LONG, largest, mean.to(distance.dtype))


def route(
    inputs: Tensor,
    main: Tensor,
    mask: Tensor,
    *,
    live: Memory | None,
    memories: Sequence[Memory],
    act_ratio: float,
    activation: Activation,
    bias: Tensor | None,
) -> Routed:
    """Send each row through the weight whose output moves it most, if that is far enough.

    The live side weight acts unless its score is below its threshold. A memory takes over where its score is above its
    threshold and above the best so far; the live score counts as that even where the live weight does not act.

    Args:
        inputs: of the module, `(B, T, m)`.
        main: its own outputs, `(B, T, d)`.
        mask: bool `(B, T)`, true on real tokens.
        live: the side weight in training; None: it equals the module's own, and scores 0.
        memories: finished ones, in order.
        act_ratio: a threshold is this times the memory's activation.
        activation: the model's activation function.
        bias: what a side weight's output adds, `(d,)`.
    """
    activated = activation(main)
    outputs, best = main, torch.zeros(main.shape[0], dtype=main.dtype, device=main.device)
    choices = torch.full((main.shape[0],), MAIN, device=main.device)
    if live is not None:
        side = F.linear(inputs, live.weight, bias)
        best = scores(side, activated, mask, activation)
        outputs, choices = _taken(best >= live.activation * act_ratio, side, outputs, LIVE, choices)
    all_scores = [best]
    for index, memory in enumerate(memories):
        side = F.linear(inputs, memory.weight, bias)
        score = scores(side, activated, mask, activation)
        wins = (score > best) & (score > memory.activation * act_ratio)
        outputs, choices = _taken(wins, side, outputs, FIRST_MEMORY + index, choices)
        best = torch.where(wins, score, best)
        all_scores.append(score)
    return Routed(outputs, choices, torch.stack(all_scores, dim=1))


def _taken(rows: Tensor, side: Tensor, outputs: Tensor, choice: int, choices: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and choices with those of `rows`, bool `(B,)`, replaced."""
    return torch.where(rows[:, None, None], side, outputs), torch.where(rows, choice, choices)
