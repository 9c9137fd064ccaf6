"""Contexts: short beginnings, written by the model itself, that a prompt is put after."""

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from horen_bench.models.calls import run
from horen_bench.prompts import PromptEncoder, pad

_SEEDS = ("The", "Therefore", "Because", "I", "You")
_TOP_K = 5


@dataclass(frozen=True, slots=True)
class ContextShare:
    """What one context counts in the mean log-likelihood and in the mean key."""

    likelihood: float
    key: float


@dataclass(frozen=True, slots=True)
class Contexts:
    """Texts that stand before a prompt, in groups; the bare prompt has the empty one.

    Attributes:
        groups: the log-likelihood is a mean over all texts, the key a mean over groups of the means inside.
    """

    groups: tuple[tuple[str, ...], ...]

    def shares(self) -> dict[str, ContextShare]:
        """The distinct texts in order of first use, with what they count: equal rows need to be run only once."""
        n_texts = sum(map(len, self.groups))
        shares: dict[str, ContextShare] = {}
        for group in self.groups:
            for text in group:
                old = shares.get(text, ContextShare(0.0, 0.0))
                key = 1 / (len(self.groups) * len(group))
                shares[text] = ContextShare(old.likelihood + 1 / n_texts, old.key + key)
        return shares

    def to_tensor(self) -> Tensor:
        """The texts as UTF-8 JSON, uint8."""
        return torch.tensor(list(json.dumps(self.groups).encode()), dtype=torch.uint8)

    @classmethod
    def from_tensor(cls, saved: Tensor) -> "Contexts":
        """The contexts of `to_tensor`."""
        return cls.given(json.loads(bytes(saved.tolist()).decode()))

    @classmethod
    def given(cls, groups: Sequence[Sequence[str]]) -> "Contexts":
        """Contexts from plain lists."""
        return cls(tuple(tuple(group) for group in groups))


def generate_contexts(
    model: PreTrainedModel, encoder: PromptEncoder, lengths: Sequence[Sequence[int]], seed: int
) -> list[str]:
    """Let the model continue five seed words, top-5 sampling at temperature 1.

    The generator is private, on the CPU, and probabilities are float32: the same model gives the same texts whatever
    else was drawn in the process.

    Args:
        model: in the state that the texts shall come from, usually unedited.
        encoder: of its tokenizer.
        lengths: pairs `(tokens, texts)`; `tokens` counts BOS and seed word, `texts` is rounded down to a multiple of 5.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    texts: list[str] = []
    for n_tokens, n_texts in lengths:
        seeds = [word for word in _SEEDS for _ in range(n_texts // len(_SEEDS))]
        rows = _continue(model, encoder.prompts(seeds), n_tokens, encoder.pad_id, generator)
        texts += [_clean(encoder.tokenizer.decode(row, skip_special_tokens=True)) for row in rows]
    return texts


@torch.no_grad()
def _continue(
    model: PreTrainedModel, rows: list[list[int]], n_tokens: int, pad_id: int, generator: torch.Generator
) -> list[list[int]]:
    """Rows lengthened to `n_tokens`; they are too short for a cache to pay."""
    while short := [row for row in rows if len(row) < n_tokens]:
        batch = pad(short, pad_id, "right", device=model.device)
        logits = run(model, batch).logits
        ends = torch.tensor([len(row) - 1 for row in short], device=logits.device)
        best = logits[torch.arange(len(short), device=ends.device), ends].float().cpu().topk(_TOP_K)
        drawn = torch.multinomial(best.values.softmax(dim=-1), 1, generator=generator)
        for row, token in zip(short, best.indices.gather(1, drawn)[:, 0].tolist(), strict=True):
            row.append(token)
    return rows


def _clean(text: object) -> str:
    """The text as the beginning of a sentence to come."""
    plain = unicodedata.normalize("NFKD", str(text)).replace("\n\n", " ").replace("<|endoftext|>", "")
    return plain.replace("{", "").replace("}", "") + ". "
