"""Training one entry's value with the base model frozen (paper E.4.1): the plain path, one edit at a time."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from horen_bench.editors.codebook.config import EarlyStopping
from horen_bench.editors.shared.optimizers import adam_rate
from horen_bench.models.prompt_hook import PromptHook, Respond
from horen_bench.prompts import EncodedEdit, announced_prompt

Value = dict[str, Tensor]
# Puts values `(R, ...)` into outputs `(B, T, d)` at the prompts, bool `(B, T)`, of rows `(R,)`.
Write = Callable[[Tensor, Tensor, Value, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Schedule:
    """How a value is trained: Adam's learning rate, the most steps, and when to stop before (None: never)."""

    learning_rate: float
    n_steps: int
    early_stopping: EarlyStopping | None


@dataclass(frozen=True, slots=True)
class ValueJob:
    """One value to train.

    Attributes:
        position: identifies the job to the caller.
        edit: prompt and target.
        start: the value to start from, on the CPU or the model's device.
    """

    position: int
    edit: EncodedEdit
    start: Value


@dataclass(frozen=True, slots=True)
class TrainedValue:
    """A trained value.

    Attributes:
        value: with early stopping the value of the lowest loss seen, without it the last one.
        losses: loss before each step, and at the end the loss that was seen last; nats per token.
        loss: the last loss known for `value`.
        steps: optimiser steps taken.
        finite: False if training met a non-finite loss, or its last step a value without a finite length; `value` is
            then the last sound one.
    """

    value: Value
    losses: list[float]
    loss: float
    steps: int
    finite: bool


def train_value(value: Mapping[str, Tensor], loss_of: Callable[[Value], Tensor], schedule: Schedule) -> TrainedValue:
    """Minimise `loss_of` over a value with a fresh Adam.

    The release takes all `n_steps` (`early_stopping=None`). With early stopping the loss is looked at
    before each step, so a value that is already good is not moved.
    """
    rule, n_steps = schedule.early_stopping, schedule.n_steps
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in value.items()}
    optimizer = torch.optim.Adam(leaves.values(), lr=adam_rate(schedule.learning_rate))
    best = TrainedValue(_copy(leaves), [], math.inf, 0, finite=True)
    losses: list[float] = []
    stale = 0
    for step in range(n_steps):
        loss = loss_of(leaves)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            return TrainedValue(best.value, losses, best.loss, step, finite=False)
        stale = 0 if losses[-1] < best.loss else stale + 1
        if losses[-1] < best.loss or rule is None:
            best = TrainedValue(_copy(leaves), losses, losses[-1], step, finite=True)
        if rule and (losses[-1] < rule.loss_bound or stale >= rule.patience):
            return TrainedValue(best.value, losses, best.loss, step, finite=True)
        for leaf, gradient in zip(leaves.values(), torch.autograd.grad(loss, list(leaves.values())), strict=True):
            leaf.grad = gradient
        optimizer.step()
    finite = all(bool(has_length(leaf[None])) for leaf in leaves.values())
    if rule or not finite:
        return TrainedValue(best.value, losses, best.loss, n_steps, finite=finite)
    return TrainedValue(_copy(leaves), losses, losses[-1] if losses else math.nan, n_steps, finite=True)


def train_on_whole_model(
    job: ValueJob, model: PreTrainedModel, hook: PromptHook, write: Write, schedule: Schedule
) -> TrainedValue:
    """One value on the whole model, one sequence at a time: the path that the fast one is compared with."""

    def loss_of(value: Value) -> Tensor:
        def respond(_inputs: Tensor, outputs: Tensor, prompts: Tensor) -> Tensor:
            row = {name: tensor[None] for name, tensor in value.items()}
            return write(outputs, prompts, row, outputs.new_zeros(1, dtype=torch.long))

        return edit_loss(model, hook, job.edit, respond)

    return train_value(job.start, loss_of, schedule)


def edit_loss(model: PreTrainedModel, hook: PromptHook, edit: EncodedEdit, respond: Respond) -> Tensor:
    """Mean token cross-entropy (nats) of the target given the prompt, with `respond` acting at the prompt."""
    ids = torch.tensor([edit.ids], device=model.device)
    mask = torch.arange(ids.shape[1], device=ids.device)[None] < len(edit.prompt)
    with announced_prompt(mask), hook.responding(respond):
        logits = model(input_ids=ids, use_cache=False).logits[0, len(edit.prompt) - 1 : -1]
    return F.cross_entropy(logits.float(), torch.tensor(edit.target, device=logits.device))


def waves(entries: Mapping[int, int]) -> Iterator[dict[int, int]]:
    """Edits in the order in which values can be trained: those of one entry one after the other, others side by side.

    Args:
        entries: the entry that each edit, by position, is written to.

    Yields:
        The same for the next edit of every entry that has one left.
    """
    chains: dict[int, deque[int]] = {}
    for position, entry in entries.items():
        chains.setdefault(entry, deque()).append(position)
    while chains:
        yield {chain.popleft(): entry for entry, chain in chains.items()}
        chains = {entry: chain for entry, chain in chains.items() if chain}


def has_length(values: Tensor) -> Tensor:
    """Whether each of `(B, ...)` has a finite Euclidean length, bool `(B,)`: a longer one no norm of a model takes."""
    return values.detach().flatten(1).square().sum(dim=1).isfinite()


def _copy(value: Mapping[str, Tensor]) -> Value:
    return {name: tensor.detach().clone() for name, tensor in value.items()}
