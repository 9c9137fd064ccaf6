"""Greedy decoding of many prompts at once, and how long it takes."""

from collections.abc import Collection, Sequence

import torch
from transformers import DynamicCache, PreTrainedModel

from horen_bench.evaluation.probes import CaseProbe
from horen_bench.profiling import Stopwatch
from horen_bench.prompts import PromptEncoder, pad

# What is timed, on every model alike; ours.
_TIMED_PROBES, _TIMED_TOKENS = 20, 8


def greedy_decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    n_tokens: Sequence[int],
    pad_id: int,
    stop: Collection[int] = (),
) -> list[list[int]]:
    """Argmax continuations of token id prompts, batched with a KV cache.

    A row leaves the batch when it has its tokens or ends in one of `stop`, so how long it is decoded depends on the
    row alone, and rows of one batch do not influence each other. Without `stop` EOS is a token like any other.

    Args:
        model: the model.
        prompts: `B` rows of token ids.
        n_tokens: new tokens per row, at least 1 each.
        pad_id: fills the padding.
        stop: ids that end a row.

    Returns:
        For row `i` its new ids: `n_tokens[i]` of them, or fewer and a stop id last.
    """
    batch = pad(prompts, pad_id, device=model.device)
    mask, positions = batch.attention_mask, batch.position_ids
    tokens, cache = batch.input_ids, DynamicCache(config=model.config)
    rows: list[list[int]] = [[] for _ in prompts]
    going = list(range(len(prompts)))
    while True:
        logits = model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, cache=cache, logits_to_keep=1
        ).logits
        new = logits[:, -1].argmax(dim=-1)
        for row, token in zip(going, new.tolist(), strict=True):
            rows[row].append(token)
        kept = [i for i, row in enumerate(going) if len(rows[row]) < n_tokens[row] and rows[row][-1] not in stop]
        if not kept:
            return rows
        if len(kept) < len(going):
            going = [going[i] for i in kept]
            staying = torch.tensor(kept, device=new.device)
            cache.batch_select_indices(staying)
            mask, positions, new = mask[staying], positions[staying], new[staying]
        tokens = new[:, None]
        mask = torch.cat([mask, mask.new_ones((mask.shape[0], 1))], dim=1)
        positions = positions[:, -1:] + 1


@torch.no_grad()
def inference_ms(model: PreTrainedModel, encoder: PromptEncoder, probes: Sequence[CaseProbe]) -> float:
    """Milliseconds that a model takes for one probe, decoding greedily without a batch; NaN without a probe.

    Every method is timed by this: the first `_TIMED_PROBES`, the tokens of each answer, at most `_TIMED_TOKENS`.
    """
    probes = probes[:_TIMED_PROBES]
    if not probes:
        return float("nan")
    prompts = encoder.prompts([probe.prompt for probe in probes])
    lengths = [min(len(ids), _TIMED_TOKENS) for ids in encoder.continuations([probe.answer for probe in probes])]
    greedy_decode(model, prompts[:1], lengths[:1], encoder.pad_id)  # the first call sets things up
    seconds = Stopwatch()
    for prompt, n_tokens in zip(prompts, lengths, strict=True):
        greedy_decode(model, [prompt], [n_tokens], encoder.pad_id)
    return 1000 * seconds.elapsed() / len(probes)
