"""Which sequences may share a padded batch, so that none changes what the model says of another.

Two things can go wrong in a batch. A model may not look at the attention mask (RWKV), so that padding in front of a row
is text to it. And rotary factors may follow the longest row (`longrope`, `dynamic`), which then changes the others.
The first is found out by a trial on the model itself, the second is read from its configuration.
"""

from collections.abc import Hashable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from horen_bench.errors import UserError, reason_of
from horen_bench.models.calls import run
from horen_bench.models.memory import is_out_of_memory
from horen_bench.prompts import pad

# Root mean square difference of logits over their spread: a mask that is not looked at gives about 1, rounding up to
# 1e-6 in float32, 1e-3 in TF32, 5e-2 in bfloat16, and more where it decides between two experts.
_TOLERANCE, _TOLERANCE_OF_HALF = 1e-2, 2e-1

_safe: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def together(model: PreTrainedModel, lengths: Sequence[int]) -> list[list[int]]:
    """Positions of the rows that may share a padded batch; all of them, on most models.

    The first call runs a trial of `pads_safely`: make it outside blocks that read or patch the model.

    Args:
        model: the model.
        lengths: tokens of each row.
    """
    by_length = not pads_safely(model)
    return grouped([(length_class(model, length), length if by_length else 0) for length in lengths])


def grouped(keys: Sequence[Hashable]) -> list[list[int]]:
    """Positions of equal keys, in the order in which these come up."""
    groups: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def length_class(model: PreTrainedModel, length: int) -> int:
    """Sequences of one class are rotated by the same factors; 0 for all sequences of models whose factors are fixed.

    `longrope` has one set of factors up to `original_max_position_embeddings` and another beyond, `dynamic` new ones
    for each length beyond `max_position_embeddings`.

    Args:
        model: the model.
        length: tokens of the sequence.
    """
    config = model.config.get_text_config()
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    kinds = [
        parameters,
        *(kind for kind in parameters.values() if isinstance(kind, dict)),
    ]  # one per layer type, or one
    classes = [0]
    for kind in kinds:
        if kind.get("rope_type") == "longrope":
            classes.append(int(length > kind["original_max_position_embeddings"]))
        elif kind.get("rope_type") == "dynamic":
            classes.append(max(0, length - config.max_position_embeddings))
    return max(classes)


@torch.no_grad()
def pads_safely(model: PreTrainedModel) -> bool:
    """Whether padding on the left leaves the logits of a row as they are, up to rounding; tried once per model.

    Raises:
        UserError: the model cannot be run on token ids, attention mask and positions alone.
    """
    if model not in _safe:
        rows = [trial_row(model, 0, 6), trial_row(model, 1, 3)]
        alone = torch.cat([_logits(model, [row])[0] for row in rows])
        longer, shorter = _logits(model, rows)
        _safe[model] = same_logits(model, torch.cat([longer, shorter[3:]]), alone)
    return _safe[model]


def trial_row(model: PreTrainedModel, number: int, length: int) -> list[int]:
    """Token ids to try a model on, as good as any others: without a tokenizer, and the same in every process."""
    vocabulary: int = model.config.get_text_config().vocab_size
    return [(11 + 31 * number + 7 * i) % vocabulary for i in range(length)]


def same_logits(model: PreTrainedModel, given: Tensor, reference: Tensor) -> bool:
    """Whether logits of one model, of one shape, differ by no more than rounding in its dtype.

    What is not finite in the reference (an edited model may overflow) says nothing.
    """
    finite = reference.isfinite()
    given, reference = given[finite].float(), reference[finite].float()
    if reference.numel() < 2:
        return True
    tolerance = _TOLERANCE if torch.finfo(model.dtype).bits > 16 else _TOLERANCE_OF_HALF
    difference = (given - reference).square().mean().sqrt()
    return bool(difference <= tolerance * reference.std())


def _logits(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """Logits of padded rows, `(B, T, V)`."""
    try:
        logits: Tensor = run(model, pad(rows, 0, device=model.device)).logits
    except UserError:
        raise
    except Exception as error:  # each architecture fails in its own way
        if is_out_of_memory(error):
            raise
        reason = reason_of(error, with_kind=True)
        raise UserError(
            f"{type(model).__name__} cannot be run on token ids, an attention mask and positions alone ({reason}); "
            "choose a decoder-only causal language model"
        ) from error
    return logits
