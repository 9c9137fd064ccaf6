"""Stage 2 of UnKE: all parameters of the block are trained until it gives the wanted outputs.

The block is called by itself with what the model passed to it: the mask and the rotary embeddings are the model's own,
whatever the architecture. Shapes: `B` sequences of `L` tokens, `d` hidden size.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from horen_bench.errors import UserError
from horen_bench.prompts import Batch, last_prompt_positions

Comparison = Literal["correct", "release_broadcast"]

# Not decayed in the published code; norms by other names, and biases, are.
_UNDECAYED = ("input_layernorm.weight", "post_attention_layernorm.weight")


@dataclass(frozen=True, slots=True)
class BlockTraining:
    """How the block is trained: AdamW on the whole batch.

    Attributes:
        n_steps: steps, neither more nor fewer.
        learning_rate: AdamW's, constant.
        weight_decay: AdamW's, on everything but the block's two layer norms.
    """

    n_steps: int
    learning_rate: float
    weight_decay: float

    def __post_init__(self) -> None:
        if not isinstance(self.n_steps, int) or self.n_steps < 1:
            raise UserError(f"method.block.n_steps must be a whole number of at least 1, got {self.n_steps!r}")
        if not self.learning_rate > 0:
            raise UserError(f"method.block.learning_rate must be > 0, got {self.learning_rate}")


@dataclass(frozen=True, slots=True)
class Lesson:
    """A padded batch as it enters the block, and what must come out; padding counts like text, as published.

    Attributes:
        args: with the hidden states `(B, L, d)` in front.
        kwargs: mask, positions, rotary embeddings: whatever this model passes to its blocks.
        mask: bool `(B, L)`, real tokens.
        outputs: `(B, L, d)`.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    mask: Tensor
    outputs: Tensor

    def with_last(self, vectors: Tensor) -> "Lesson":
        """With other wanted outputs, float32 `(B, d)`, at each sequence's last token."""
        at = last_prompt_positions(self.mask).to(self.outputs.device)
        rows = torch.arange(len(at), device=at.device)
        now = self.outputs[rows, at].float()
        wanted = (now + (vectors.to(now.device) - now)).to(self.outputs.dtype)
        return replace(self, outputs=self.outputs.index_put((rows, at), wanted))

    def with_counted_positions(self, rotary: nn.Module) -> "Lesson":
        """With positions counted over real tokens, 1 on padding, as the release calls the block."""
        positions = (self.mask.long().cumsum(dim=1) - 1).masked_fill(~self.mask, 1)
        embeddings = rotary(self.args[0], positions)
        return replace(self, kwargs={**self.kwargs, "position_ids": positions, "position_embeddings": embeddings})


class _Entered(Exception):  # noqa: N818 - no error, it ends a forward pass early
    """What enters the block was read."""


@torch.no_grad()
def read_block(model: PreTrainedModel, block: nn.Module, batch: Batch, *, whole: bool) -> Lesson:
    """What enters the block for a batch, and what it makes of it under its present weights.

    Args:
        model: the block's model.
        block: one of its decoder blocks.
        batch: tokens, padded on either side; positions are the model's own for it.
        whole: run all of the model, as published, not only what is below the block and then the block.
    """
    entering: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    leaving: list[Tensor] = []

    def enter(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entering.append((args, kwargs))
        if not whole:
            raise _Entered

    def leave(_block: nn.Module, _args: Any, output: Any) -> None:
        leaving.append(_hidden(output))

    handles = [block.register_forward_pre_hook(enter, with_kwargs=True), block.register_forward_hook(leave)]
    try:
        with suppress(_Entered):
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    args, kwargs = entering[0]
    outputs = leaving[0] if whole else _hidden(block(*args, **kwargs))
    return Lesson(args, kwargs, batch.attention_mask.bool(), outputs)


def mean_squared_error(block: nn.Module, lesson: Lesson, comparison: Comparison) -> Tensor:
    """Mean over sequences, positions and hidden units, in the model's dtype.

    With `release_broadcast` the first sequence's outputs stand for all, which is what the release computes under the
    version of transformers that it pins.
    """
    outputs = _hidden(block(*lesson.args, **lesson.kwargs))
    if comparison == "release_broadcast":
        outputs = outputs[:1].expand_as(lesson.outputs)
    return F.mse_loss(outputs, lesson.outputs)


def optimizer(trainees: Mapping[str, Tensor], how: BlockTraining) -> torch.optim.AdamW:
    """A fresh AdamW on tensors by parameter name."""
    decayed = [tensor for name, tensor in trainees.items() if not name.endswith(_UNDECAYED)]
    others = [tensor for name, tensor in trainees.items() if name.endswith(_UNDECAYED)]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=how.learning_rate, weight_decay=how.weight_decay)


@contextmanager
def asking_for_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within the block, frozen parameters have gradients."""
    asked = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, was in zip(parameters, asked, strict=True):
            parameter.requires_grad_(was)


def _hidden(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found
