"""Stage 2 of UnKE: all parameters of the block are trained until it gives the outputs that it must give.

The block is called by itself with what the model passed to it: the mask and the rotary embeddings are the model's own,
whatever the architecture. Shapes: `B` sequences of `L` tokens, `d` hidden size.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from horen_bench.editors.shared.optimizers import adam_rate
from horen_bench.editors.unke.config import BlockTraining
from horen_bench.models.hooks import ending_before, first_tensor, outputs_of
from horen_bench.prompts import Batch, last_prompt_positions

Comparison = Callable[[Tensor, Tensor], Tensor]
"""Mean squared error over sequences, positions and hidden units, of outputs and what must come out, `(B, L, d)`."""

# Not decayed in the published code; norms by other names, and biases, are.
_UNDECAYED = ("input_layernorm.weight", "post_attention_layernorm.weight")


@dataclass(frozen=True, slots=True)
class BlockTarget:
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

    def with_last(self, vectors: Tensor) -> "BlockTarget":
        """With other outputs, float32 `(B, d)`, at each sequence's last token."""
        at = last_prompt_positions(self.mask).to(self.outputs.device)
        rows = torch.arange(len(at), device=at.device)
        now = self.outputs[rows, at].float()
        new = (now + (vectors.to(now.device) - now)).to(self.outputs.dtype)
        return replace(self, outputs=self.outputs.index_put((rows, at), new))

    def error(self, block: nn.Module, comparison: Comparison = F.mse_loss) -> Tensor:
        """How far the block is from it, a scalar in the model's dtype."""
        return comparison(first_tensor(block(*self.args, **self.kwargs)), self.outputs)


@torch.no_grad()
def read_block(model: PreTrainedModel, block: nn.Module, batch: Batch, *, whole: bool) -> BlockTarget:
    """What enters the block for a batch, and what it makes of it under its present weights.

    Args:
        model: the block's model.
        block: one of its decoder blocks.
        batch: tokens, padded on either side; positions are the model's own for it.
        whole: run all of the model, as published, not only what is below the block and then the block.
    """
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))

    with (
        block.register_forward_pre_hook(note, with_kwargs=True),
        outputs_of({"block": block}) as outputs,
        nullcontext() if whole else ending_before(block),
    ):
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    args, kwargs = calls[0]
    given = outputs["block"] if whole else first_tensor(block(*args, **kwargs))
    return BlockTarget(args, kwargs, batch.attention_mask.bool(), given)


def optimizer(trainees: Mapping[str, Tensor], how: BlockTraining) -> torch.optim.AdamW:
    """A fresh AdamW on tensors by parameter name."""
    decayed = [tensor for name, tensor in trainees.items() if not name.endswith(_UNDECAYED)]
    others = [tensor for name, tensor in trainees.items() if name.endswith(_UNDECAYED)]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=adam_rate(how.learning_rate), weight_decay=how.weight_decay)
