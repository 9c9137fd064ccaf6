"""What the published UnKE (ha11ucin8/HoReN @38bbf34, src/models/unke) does otherwise, and `compat=release` chooses."""

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from horen_bench.editors.unke.block import BlockTarget
from horen_bench.errors import UserError
from horen_bench.models.calls import takes


def release_broadcast(outputs: Tensor, expected: Tensor) -> Tensor:
    """`preserve=release_broadcast`: the first sequence's outputs stand for all, `(B, L, d)` both.

    So the release computes under the transformers that it pins, where a layer gives a tensor and `layer(...)[0]` is its
    first row.
    """
    return F.mse_loss(outputs[:1].expand_as(expected), expected)


def release_cumsum(target: BlockTarget, rotary: nn.Module) -> BlockTarget:
    """`pos_ids=release_cumsum`: positions are counted over real tokens, 1 on padding."""
    positions = (target.mask.long().cumsum(dim=1) - 1).masked_fill(~target.mask, 1)
    embeddings = rotary(target.args[0], positions)
    return replace(target, kwargs={**target.kwargs, "position_ids": positions, "position_embeddings": embeddings})


def rotary_of(model: PreTrainedModel) -> nn.Module:
    """The module that makes a model's rotary embeddings, the same for all of its layers.

    Raises:
        UserError: it has none, or (Gemma-3) one that makes several.
    """
    rotary: nn.Module | None = getattr(model.get_decoder(), "rotary_emb", None)
    if rotary is None or takes(rotary, "layer_type"):
        raise UserError(
            f"method.pos_ids=release_cumsum needs rotary positions of one kind, which {type(model).__name__} lacks; "
            "write arange"
        )
    return rotary
