"""Questions a model on a prefix of the stream under one protocol; knows nothing about methods.

Protocols (one rule for every method in a table):

- `greedy` (default, paper Eq. 10-11): decode `|y|` tokens greedily, pure argmax whatever the checkpoint's
  `generation_config` says, cut at EOS; the decoded text, left-stripped and tokenised again, is compared with the
  answer position by position. Locality compares the tokens that base and edited model decoded.
- `teacher_forced`: the answer stands behind the prompt; the argmax at its positions is compared with it.
- `release`: what the published code does for the method at hand: `greedy` with a score of 0 on any length
  mismatch, locality over the last tokens of prompt plus output, and the checkpoint's `generation_config`, for
  HoReN and GRACE; `teacher_forced` for the rest.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.cases import EditCase, Probe
from horen_bench.errors import UserError
from horen_bench.metrics.tokens import agreement, same_length_accuracy, token_accuracy
from horen_bench.prompts import (
    announced_prompt,
    encode_continuations,
    encode_edit,
    encode_plain,
    encode_prompts,
    pad,
    pad_id_of,
)

Mode = Literal["generate", "teacher_forced"]
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Protocol:
    """How answers are obtained and compared.

    Attributes:
        name: the value of the `protocol` column.
        mode: free generation, or the answer given behind the prompt.
        lengths: `positionwise` counts missing tokens as wrong, `all_or_nothing` scores 0 on any mismatch.
        locality_window: compare the `generated` tokens, or the `tail` of prompt plus output (which
            contains prompt tokens when generation stops early).
        checkpoint_settings: decode under the checkpoint's `generation_config` (repetition penalty,
            several EOS ids) instead of pure argmax.
    """

    name: str
    mode: Mode
    lengths: Literal["positionwise", "all_or_nothing"] = "positionwise"
    locality_window: Literal["generated", "tail"] = "generated"
    checkpoint_settings: bool = False

    @property
    def cache_name(self) -> str:
        """Names the base model's answers under this protocol, which the release gives in two ways."""
        return f"{self.name}-{self.mode}"


_SAMPLING = 1  # keeps the draw of cases apart from other uses of the seed

PROTOCOL_NAMES = ("greedy", "teacher_forced", "release")


def protocol_of(name: str, release_mode: Mode) -> Protocol:
    """The protocol of a name, for a method that the release scores in `release_mode`.

    Raises:
        UserError: no such protocol.
    """
    if name == "greedy":
        return Protocol(name, "generate")
    if name == "teacher_forced" or (name == "release" and release_mode == "teacher_forced"):
        return Protocol(name, "teacher_forced")
    if name == "release":
        return Protocol(name, "generate", "all_or_nothing", "tail", checkpoint_settings=True)
    raise UserError(f"protocol={name} is unknown; write one of {', '.join(PROTOCOL_NAMES)}")


@dataclass(frozen=True, slots=True)
class Question:
    """One question about one case.

    Attributes:
        case: position of the case in the stream.
        family: the column that it counts in: `rel`, `gen`, `loc`, or the name of a probe family.
        reference: scored against the given answer, or against what the base model answers.
        prompt: the question.
        answer: the answer, without a leading space.
    """

    case: int
    family: str
    reference: Literal["answer", "base"]
    prompt: str
    answer: str

    @property
    def key(self) -> str:
        """Identifies what is asked, independent of case and family."""
        return hashlib.sha256(f"{self.prompt}\0{self.answer}".encode()).hexdigest()


def questions_about(cases: Sequence[EditCase], positions: Iterable[int] | None = None) -> list[Question]:
    """Every question that the cases ask, in case order, without probes of empty prompt or answer.

    Args:
        cases: the stream.
        positions: ask about these cases only, ascending; None: about all.
    """
    chosen = range(len(cases)) if positions is None else positions
    return [question for i in chosen for question in _questions_of(i, cases[i]) if _askable(question)]


def sample(n: int, at_most: int | None, seed: int) -> list[int]:
    """Positions of the cases that are questioned at checkpoint `n`: all, or a random sample of a fixed size.

    Each case gets its rank once, so the samples of a run's checkpoints overlap as much as they can, and do not depend
    on how far the stream goes.
    """
    if at_most is None or n <= at_most:
        return list(range(n))
    ranks = np.random.default_rng([seed, _SAMPLING]).random(n)
    return sorted(np.argpartition(ranks, at_most)[:at_most].tolist())


def _askable(question: Question) -> bool:
    return bool(question.prompt.strip() and question.answer.strip())


def _questions_of(index: int, case: EditCase) -> Iterable[Question]:
    yield Question(index, "rel", "answer", case.prompt, case.target)
    for paraphrase in case.paraphrases:
        yield Question(index, "gen", "answer", paraphrase, case.target)
    yield from _probes(index, {"loc": case.locality, **case.hard_locality}, "base")
    yield from _probes(index, case.extras, "answer")


def _probes(
    index: int, families: Mapping[str, tuple[Probe, ...]], reference: Literal["answer", "base"]
) -> Iterable[Question]:
    for family, probes in families.items():
        for probe in probes:
            yield Question(index, family, reference, probe.prompt, probe.answer)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said: the ids that locality compares, and those that are scored against an answer."""

    ids: tuple[int, ...]
    scored_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Examiner:
    """Asks questions of one model under one protocol, in batches sorted by length.

    Args:
        model: the model, edited or not.
        tokenizer: its tokenizer.
        protocol: how to ask and compare.
        batch_size: prompts per forward pass.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    protocol: Protocol
    batch_size: int = 64
    _targets: dict[str, tuple[int, ...]] = field(default_factory=dict, init=False, repr=False)

    @torch.no_grad()
    def ask(self, questions: Sequence[Question], progress: Progress = lambda _: None) -> list[Answer]:
        """The model's answers, in the order of the questions.

        Args:
            questions: what to ask.
            progress: called with the number of questions answered since the last call.
        """
        ask_batch = self._generate if self.protocol.mode == "generate" else self._force
        order = sorted(range(len(questions)), key=lambda i: len(questions[i].prompt))
        answers: dict[int, Answer] = {}
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            answers.update(zip(chosen, ask_batch([questions[i] for i in chosen]), strict=True))
            progress(len(chosen))
        return [answers[i] for i in range(len(questions))]

    def score(self, question: Question, answer: Answer, base: Answer) -> float:
        """Score of an answer, in [0, 1]."""
        if question.reference == "base":
            return agreement(base.ids, answer.ids)
        lengths = self.protocol.lengths
        accuracy = token_accuracy if lengths == "positionwise" else same_length_accuracy
        return accuracy(answer.scored_ids, self._target(question))

    def text(self, answer: Answer) -> str:
        """An answer as text, for people."""
        return str(self.tokenizer.decode(list(answer.scored_ids), skip_special_tokens=True)).strip()

    def _target(self, question: Question) -> tuple[int, ...]:
        """Ids that an answer to the question is scored against."""
        if question.key not in self._targets:
            if self.protocol.mode == "generate":
                ids = tuple(encode_plain(self.tokenizer, [question.answer])[0])
            else:
                ids = encode_edit(self.tokenizer, question.prompt, question.answer).target
            self._targets[question.key] = ids
        return self._targets[question.key]

    def _generate(self, questions: Sequence[Question]) -> list[Answer]:
        """Decode as many tokens as each answer has behind its prompt, in one padded batch."""
        prompts = encode_prompts(self.tokenizer, [q.prompt for q in questions])
        lengths = [len(ids) for ids in encode_continuations(self.tokenizer, [q.answer for q in questions])]
        if self.protocol.checkpoint_settings:
            new = [self._under_checkpoint_settings(p, n) for p, n in zip(prompts, lengths, strict=True)]
        else:
            new = greedy_decode(self.model, prompts, lengths, pad_id_of(self.tokenizer))
            new = [_until(ids, self.tokenizer.eos_token_id) for ids in new]
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        again = encode_plain(self.tokenizer, [text.lstrip() for text in texts])
        return [
            Answer(self._locality_ids(question, prompt, ids), tuple(scored))
            for question, prompt, ids, scored in zip(questions, prompts, new, again, strict=True)
        ]

    def _locality_ids(self, question: Question, prompt: list[int], new: list[int]) -> tuple[int, ...]:
        if self.protocol.locality_window == "generated":
            return tuple(new)
        return tuple((prompt + new)[-len(self._target(question)) :])

    def _under_checkpoint_settings(self, prompt: list[int], n_tokens: int) -> list[int]:
        """One unpadded prompt decoded as the release does."""
        ids = torch.tensor([prompt], device=self.model.device)
        pad_id = pad_id_of(self.tokenizer)
        generate: Callable[..., Tensor] = getattr(self.model, "generate")  # noqa: B009 - its type is not declared
        output = generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            max_new_tokens=n_tokens,
            pad_token_id=pad_id,
        )
        new: list[int] = output[0, len(prompt) :].tolist()
        return new

    def _force(self, questions: Sequence[Question]) -> list[Answer]:
        """The argmax at each position of the answer, with the answer behind the prompt."""
        edits = [encode_edit(self.tokenizer, q.prompt, q.answer) for q in questions]
        device = self.model.device
        batch = pad([edit.ids for edit in edits], pad_id_of(self.tokenizer), device=device)
        n_target = torch.tensor([len(edit.target) for edit in edits], device=device)
        from_end = batch.input_ids.shape[1] - torch.arange(batch.input_ids.shape[1], device=device)
        is_prompt = batch.attention_mask.bool() & (from_end[None] > n_target[:, None])
        with announced_prompt(is_prompt):
            logits = self.model(
                batch.input_ids, batch.attention_mask, position_ids=batch.position_ids, use_cache=False
            ).logits
        predicted = logits.argmax(dim=-1).tolist()
        rows = [tuple(row[-1 - len(edit.target) : -1]) for row, edit in zip(predicted, edits, strict=True)]
        return [Answer(row, row) for row in rows]


def greedy_decode(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], n_tokens: Sequence[int], pad_id: int
) -> list[list[int]]:
    """Argmax continuations of token id prompts, batched with a KV cache.

    EOS is a token like any other here; callers cut at it. So how long a row is decoded depends on its
    own length alone, and rows of one batch do not influence each other.

    Args:
        model: the model.
        prompts: `B` rows of token ids.
        n_tokens: new tokens wanted per row, at least 1 each.
        pad_id: fills the padding.

    Returns:
        `n_tokens[i]` new ids for row `i`.
    """
    batch = pad(prompts, pad_id, device=model.device)
    mask, positions = batch.attention_mask, batch.position_ids
    tokens, cache = batch.input_ids, DynamicCache(config=model.config)
    found: list[Tensor] = []
    for step in range(max(n_tokens)):
        logits = model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, cache=cache, logits_to_keep=1
        ).logits
        found.append(logits[:, -1].argmax(dim=-1))
        if step + 1 < max(n_tokens):
            tokens = found[-1][:, None]
            mask = torch.cat([mask, mask.new_ones((mask.shape[0], 1))], dim=1)
            positions = positions[:, -1:] + 1
    rows: list[list[int]] = torch.stack(found, dim=1).tolist()
    return [row[:n] for row, n in zip(rows, n_tokens, strict=True)]


def _until(ids: list[int], stop: Any) -> list[int]:
    return ids[: ids.index(stop)] if stop in ids else ids
