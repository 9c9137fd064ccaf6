"""Stage 1 of UnKE: the block's output at the last prompt token that makes the rest of the model say the target.

Shapes: `B` edits, `d` hidden size.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from horen_bench.editors.shared.optimizers import adam_rate
from horen_bench.editors.unke.config import BlockOutputTraining
from horen_bench.models.calls import run
from horen_bench.models.hooks import outputs_of, patched_output
from horen_bench.models.partial import UpperLayers
from horen_bench.prompts import EncodedEdit, pad

Losses = Callable[[Tensor], Tensor]
"""Mean token cross-entropy (nats) of each target, `(B,)`, under a change `(B, d)` of the block's output."""


@dataclass(frozen=True, slots=True)
class TrainedOutputs:
    """Target vectors of `B` edits.

    Attributes:
        vectors: z, float32 `(B, d)`.
        losses: of each forward pass, without the decay, in nats per token, float32 `(n_steps, B)`.
    """

    vectors: Tensor
    losses: Tensor

    def finite(self) -> list[bool]:
        """For each edit, whether its vector and its losses are."""
        kept: list[bool] = (self.vectors.isfinite().all(dim=1) & self.losses.isfinite().all(dim=0)).tolist()
        return kept


def train(losses: Losses, initial: Tensor, how: BlockOutputTraining) -> TrainedOutputs:
    """Train one `delta` per edit; edits do not see each other (Adam works on each number apart).

    Args:
        losses: of the targets.
        initial: h0, the block's output at the last prompt token, float32 `(B, d)`.
        how: constants.
    """
    delta = torch.zeros_like(initial, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=adam_rate(how.learning_rate))
    length = initial.norm(dim=1)
    seen: list[Tensor] = []
    for step in range(how.n_steps):
        with torch.enable_grad():
            loss = losses(delta).to(delta.device)
            total = loss + how.weight_decay * delta.norm(dim=1) / length.square()
        seen.append(loss.detach())
        if step == how.n_steps - 1:
            break
        (delta.grad,) = torch.autograd.grad(total.sum(), delta)
        adam.step()
        with torch.no_grad():
            moved = delta.norm(dim=1)
            shrink = (how.clamp * length / moved).clamp(max=1)
            # A step beyond float32 is no step of length 0.
            delta.mul_(torch.where(moved.isfinite(), shrink, math.nan)[:, None])
    return TrainedOutputs(initial + delta.detach(), torch.stack(seen))


def by_upper_layers(upper: UpperLayers, edits: Sequence[EncodedEdit], how: BlockOutputTraining) -> TrainedOutputs:
    """Target vectors from the layers above the block alone; of what enters them, one position depends on `delta`."""
    states = upper.prepare(edits)
    return train(lambda delta: upper.losses(states, delta), states.module_output.float(), how)


def by_whole_model(
    model: PreTrainedModel, block: nn.Module, edits: Sequence[EncodedEdit], how: BlockOutputTraining
) -> TrainedOutputs:
    """Target vectors one after another from whole forward passes, as published."""
    results = [_alone_by_whole_model(model, block, edit, how) for edit in edits]
    return TrainedOutputs(
        torch.cat([result.vectors for result in results]),
        torch.cat([result.losses.to(results[0].losses) for result in results], dim=1),
    )


def _alone_by_whole_model(
    model: PreTrainedModel, block: nn.Module, edit: EncodedEdit, how: BlockOutputTraining
) -> TrainedOutputs:
    batch = pad([edit.ids[:-1]], 0, device=model.device)
    labels = torch.tensor(edit.target, device=model.device)
    at = len(edit.prompt) - 1

    def losses(delta: Tensor) -> Tensor:
        def add(output: Tensor) -> Tensor:
            changed = (output[:, at].float() + delta).to(output.dtype)
            return torch.cat([output[:, :at], changed[:, None], output[:, at + 1 :]], dim=1)

        with patched_output(block, add):
            logits = run(model, batch, logits_to_keep=len(labels)).logits[0]
        return F.cross_entropy(logits.float(), labels.to(logits.device))[None]

    with torch.no_grad(), outputs_of({"block": block}) as outputs:
        run(model, batch, logits_to_keep=1)
    return train(losses, outputs["block"][:, at].float(), how)
