"""Training one entry's value with the base model frozen (paper E.4.1): the plain path, one edit at a time."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from horen_bench.errors import UserError
from horen_bench.models.prompt_hook import PromptHook, Respond
from horen_bench.prompts import EncodedEdit, announced_prompt

Value = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class EarlyStopping:
    """When to stop before the last step.

    Attributes:
        loss_bound: stop once the mean token cross-entropy (nats) is below this.
        patience: stop after this many steps in a row without a new lowest loss.
    """

    loss_bound: float
    patience: int

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise UserError(f"method.early_stopping.patience must be at least 1, got {self.patience}")


@dataclass(frozen=True, slots=True)
class Schedule:
    """How a value is trained: Adam's learning rate, the most steps, and when to stop before (None: never)."""

    learning_rate: float
    n_steps: int
    early_stopping: EarlyStopping | None

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise UserError(f"the learning_rate of method.vector and method.lora must be > 0, got {self.learning_rate}")
        if self.n_steps < 0:
            raise UserError(f"method.n_steps must not be negative, got {self.n_steps}")


@dataclass(frozen=True, slots=True)
class Trained:
    """A trained value.

    Attributes:
        value: with early stopping the value of the lowest loss seen, without it the last one.
        losses: loss before each step, and at the end the loss that was seen last; nats per token.
        loss: the last loss known for `value`.
        steps: optimiser steps taken.
        finite: False if training met a non-finite loss and fell back to the last finite value.
    """

    value: Value
    losses: list[float]
    loss: float
    steps: int
    finite: bool


def train_value(value: Mapping[str, Tensor], loss_of: Callable[[Value], Tensor], schedule: Schedule) -> Trained:
    """Minimise `loss_of` over a value with a fresh Adam.

    The release takes all `n_steps` (`early_stopping=None`). With early stopping the loss is looked at
    before each step, so a value that is already good is not moved.
    """
    rule, n_steps = schedule.early_stopping, schedule.n_steps
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in value.items()}
    optimizer = torch.optim.Adam(leaves.values(), lr=schedule.learning_rate)
    best = Trained(_copy(leaves), [], math.inf, 0, finite=True)
    losses: list[float] = []
    stale = 0
    for step in range(n_steps):
        loss = loss_of(leaves)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            return Trained(best.value, losses, best.loss, step, finite=False)
        stale = 0 if losses[-1] < best.loss else stale + 1
        if losses[-1] < best.loss or rule is None:
            best = Trained(_copy(leaves), losses, losses[-1], step, finite=True)
        if rule and (losses[-1] < rule.loss_bound or stale >= rule.patience):
            return Trained(best.value, losses, best.loss, step, finite=True)
        for leaf, gradient in zip(leaves.values(), torch.autograd.grad(loss, list(leaves.values())), strict=True):
            leaf.grad = gradient
        optimizer.step()
    sound = all(bool(leaf.isfinite().all()) for leaf in leaves.values())
    if rule or not sound:
        return Trained(best.value, losses, best.loss, n_steps, finite=sound)
    return Trained(_copy(leaves), losses, losses[-1] if losses else math.nan, n_steps, finite=True)


def edit_loss(model: PreTrainedModel, hook: PromptHook, edit: EncodedEdit, respond: Respond) -> Tensor:
    """Mean token cross-entropy (nats) of the target given the prompt, with `respond` acting at the prompt.

    The whole model runs on the whole sequence: the plain path that every faster one is compared with.
    """
    ids = torch.tensor([edit.ids], device=model.device)
    mask = torch.arange(ids.shape[1], device=ids.device)[None] < len(edit.prompt)
    with announced_prompt(mask), hook.responding(respond):
        logits = model(input_ids=ids, use_cache=False).logits[0, len(edit.prompt) - 1 : -1]
    return F.cross_entropy(logits.float(), torch.tensor(edit.target, device=logits.device))


def _copy(value: Mapping[str, Tensor]) -> Value:
    return {name: tensor.detach().clone() for name, tensor in value.items()}
