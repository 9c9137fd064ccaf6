"""The batch that one edit is trained on: the edit behind every context, and one irrelevant prompt."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from horen_bench.prompts import PromptEncoder, pad

_NO_LABEL = -100
_OPENERS = ("I", "You", "Because", "Yes", "Q: ")
_NEW_TOKENS = (5, 10)  # of the two continuations of each opener


@dataclass(frozen=True, slots=True)
class TrainingRows:
    """`R` rows of `T` tokens, padded on the left: `R - 1` contexts of the edit, then the irrelevant prompt.

    Attributes:
        input_ids: int64 `(R, T)`.
        attention_mask: int64 `(R, T)`.
        labels: int64 `(R - 1, T)`; the id at every position whose prediction is trained, -100 elsewhere.
        predicting: bool `(R - 1, T)`, the positions whose logits predict a label.
        label_ids: int64 `(n,)`, the labels at `predicting`, row after row.
        owners: int64 `(n,)`, the row of each.
        n_labels: int64 `(R - 1,)`, labels per row.
        first_targets: int64 `(R - 1,)`, which of the `n` labels is the first token of each row's target.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    predicting: Tensor
    label_ids: Tensor
    owners: Tensor
    n_labels: Tensor
    first_targets: Tensor


def training_rows(
    encoder: PromptEncoder,
    templates: Sequence[str],
    *,
    prompt: str,
    target: str,
    irrelevant: str,
    device: torch.device,
) -> TrainingRows:
    """Encode one edit.

    A label is every token right of the longest templated prompt. All rows end together, so these are the target's
    tokens; where the irrelevant prompt is the longest row, they are as many more as it sticks out (as published).

    Args:
        encoder: of the model's tokenizer.
        templates: contexts, each with one `{}` for the prompt.
        prompt: the edit prompt.
        target: the answer to write.
        irrelevant: a prompt that must not be affected.
        device: where the tensors go.
    """
    edits = encoder.edits([(filled(template, prompt), target) for template in templates])
    batch = pad([*(edit.ids for edit in edits), encoder.prompts([irrelevant])[0]], encoder.pad_id, device=device)
    labels = batch.input_ids[:-1].masked_fill(batch.attention_mask[:-1] == 0, _NO_LABEL)
    labels[:, : max(len(edit.prompt) for edit in edits)] = _NO_LABEL
    n_targets = torch.tensor([len(edit.target) for edit in edits], device=device)
    predicting = F.pad(labels[:, 1:] != _NO_LABEL, (0, 1), value=False)
    n_labels = predicting.sum(dim=1)
    return TrainingRows(
        batch.input_ids,
        batch.attention_mask,
        labels,
        predicting,
        label_ids=labels.roll(-1, dims=1)[predicting],
        owners=predicting.nonzero()[:, 0],
        n_labels=n_labels,
        first_targets=n_labels.cumsum(dim=0) - torch.minimum(n_targets, n_labels),
    )


def filled(template: str, text: str) -> str:
    """The template with `text` in place of its last `{}`; other braces are text."""
    before, _, after = template.rpartition("{}")
    return before + text + after


def generated_templates(model: PreTrainedModel, encoder: PromptEncoder) -> list[str]:
    """The bare prompt and ten contexts: how the model goes on from five openers, greedily, for 5 and 10 tokens.

    Args:
        model: unedited, or with its editor silent.
        encoder: of its tokenizer.
    """
    batch = pad(encoder.texts(_OPENERS), encoder.pad_id, device=model.device)
    generate: Callable[..., Tensor] = getattr(model, "generate")  # noqa: B009 - its type is not declared
    templates = ["{}"]
    for n_tokens in _NEW_TOKENS:
        output = generate(
            batch.input_ids,
            attention_mask=batch.attention_mask,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            max_new_tokens=n_tokens,
            pad_token_id=encoder.pad_id,
        )
        texts = encoder.tokenizer.batch_decode(output, skip_special_tokens=True)
        templates += [f"{text} {{}}" for text in texts]
    return templates
