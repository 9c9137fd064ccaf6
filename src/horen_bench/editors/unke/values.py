"""Stage 1 of UnKE: the block's output at the last question token that makes the rest of the model say the answer.

Shapes: `B` edits, `d` hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from horen_bench.editors.locate_edit.target_vector import changed_output
from horen_bench.errors import UserError
from horen_bench.models.partial import UpperLayers
from horen_bench.prompts import EncodedEdit

Losses = Callable[[Tensor], Tensor]
"""Mean token cross-entropy (nats) of each answer, `(B,)`, under a change `(B, d)` of the block's output."""


@dataclass(frozen=True, slots=True)
class ValueTraining:
    """How a target vector is trained.

    Attributes:
        n_steps: forward passes; the last one is not followed by a step.
        learning_rate: Adam's.
        weight_decay: on `||delta|| / ||h0||^2`; the norm is not squared.
        clamp: `||delta||` is kept at no more than this many `||h0||`.
    """

    n_steps: int
    learning_rate: float
    weight_decay: float
    clamp: float

    def __post_init__(self) -> None:
        if not isinstance(self.n_steps, int) or self.n_steps < 1:
            raise UserError(f"method.value.n_steps must be a whole number of at least 1, got {self.n_steps!r}")
        for name in ("learning_rate", "clamp"):
            if not getattr(self, name) > 0:
                raise UserError(f"method.value.{name} must be > 0, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Targets:
    """What was found for `B` edits.

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


def train(losses: Losses, initial: Tensor, how: ValueTraining) -> Targets:
    """Train one `delta` per edit; edits do not see each other (Adam works on each number apart).

    Args:
        losses: of the answers.
        initial: h0, the block's output at the last question token, float32 `(B, d)`.
        how: constants.
    """
    delta = torch.zeros_like(initial, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=how.learning_rate)
    length = initial.norm(dim=1)
    seen: list[Tensor] = []
    for step in range(how.n_steps):
        with torch.enable_grad():
            answer = losses(delta).to(delta.device)
            total = answer + how.weight_decay * delta.norm(dim=1) / length.square()
        seen.append(answer.detach())
        if step == how.n_steps - 1:
            break
        (delta.grad,) = torch.autograd.grad(total.sum(), delta)
        adam.step()
        with torch.no_grad():
            delta.mul_((how.clamp * length / delta.norm(dim=1)).clamp(max=1)[:, None])
    return Targets(initial + delta.detach(), torch.stack(seen))


def by_upper_layers(upper: UpperLayers, edits: Sequence[EncodedEdit], how: ValueTraining) -> Targets:
    """Target vectors from the layers above the block alone; of what enters them, one position depends on `delta`."""
    states = upper.prepare(edits)
    return train(lambda delta: upper.losses(states, delta), states.module_output.float(), how)


def by_whole_model(
    model: PreTrainedModel, block: nn.Module, edits: Sequence[EncodedEdit], how: ValueTraining
) -> Targets:
    """Target vectors one after another from whole forward passes, as published."""
    found = [_one_by_whole_model(model, block, edit, how) for edit in edits]
    return Targets(
        torch.cat([one.vectors for one in found]), torch.cat([one.losses.to(found[0].losses) for one in found], dim=1)
    )


def _one_by_whole_model(model: PreTrainedModel, block: nn.Module, edit: EncodedEdit, how: ValueTraining) -> Targets:
    ids = torch.tensor([edit.ids[:-1]], device=model.device)
    labels = torch.tensor(edit.target, device=model.device)
    at = len(edit.prompt) - 1

    def losses(delta: Tensor) -> Tensor:
        def add(output: Tensor) -> Tensor:
            changed = (output[:, at].float() + delta).to(output.dtype)
            return torch.cat([output[:, :at], changed[:, None], output[:, at + 1 :]], dim=1)

        with changed_output(block, add):
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(labels)).logits[0]
        return F.cross_entropy(logits.float(), labels.to(logits.device))[None]

    outputs: list[Tensor] = []
    with torch.no_grad(), changed_output(block, outputs.append):
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return train(losses, outputs[0][:, at].float(), how)
