"""Short answers, compared token by token.

Protocols (one rule for every method in a table; paper E.3.1):

- `greedy` (default, paper Eq. 10-11): decode `|y|` tokens greedily, pure argmax whatever the checkpoint's
  `generation_config` says, cut at EOS; the decoded text, left-stripped and tokenised again, is compared with the
  answer position by position. Locality compares the tokens that base and edited model decoded.
- `teacher_forced`: the answer stands behind the prompt; the argmax at its positions is compared with it.
- `release`: what the published code does for the method at hand: `greedy` with a score of 0 on any length
  mismatch, locality over the last tokens of prompt plus output, and the checkpoint's `generation_config`, for
  HoReN and GRACE; `teacher_forced` for the rest.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from horen_bench.errors import UserError
from horen_bench.evaluation.decoding import greedy_decode
from horen_bench.evaluation.evaluator import Answer, Examiner
from horen_bench.evaluation.probes import Question
from horen_bench.metrics.token_match import agreement, same_length_accuracy, token_accuracy
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

TOKEN_PROTOCOLS = ("greedy", "teacher_forced", "release")


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
    raise UserError(f"protocol={name} compares no tokens; write one of {', '.join(TOKEN_PROTOCOLS)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenExaminer(Examiner):
    """Asks for as many tokens as an answer has, and compares them with it.

    Attributes:
        protocol: how to ask and compare.
    """

    protocol: Protocol
    _targets: dict[str, tuple[int, ...]] = field(default_factory=dict, init=False, repr=False)

    @property
    def cache_name(self) -> str:
        """The protocol, with its mode."""
        return self.protocol.cache_name

    def ask_batch(self, questions: Sequence[Question]) -> list[Answer]:
        """Free generation, or the answer given behind the prompt."""
        return self._generate(questions) if self.protocol.mode == "generate" else self._force(questions)

    def score(self, question: Question, answer: Answer, base: Answer) -> float:
        """Score of an answer, in [0, 1]."""
        if question.reference == "base":
            return agreement(base.ids, answer.ids)
        lengths = self.protocol.lengths
        accuracy = token_accuracy if lengths == "positionwise" else same_length_accuracy
        return accuracy(answer.scored_ids, self._target(question))

    def scores(
        self, questions: Sequence[Question], answers: Sequence[Answer], base: Sequence[Answer]
    ) -> list[dict[str, float]]:
        """The one score of the protocol."""
        return [{"": self.score(*one)} for one in zip(questions, answers, base, strict=True)]

    def text(self, answer: Answer) -> str:
        """An answer as text, for people."""
        return str(self.tokenizer.decode(list(answer.scored_ids), skip_special_tokens=True)).strip()

    def _target(self, question: Question) -> tuple[int, ...]:
        """Ids that an answer to the question is scored against."""
        if question.key not in self._targets:
            if self.protocol.mode == "generate":
                ids = tuple(encode_plain(self.tokenizer, [question.answer])[0])
            else:
                ids = encode_edit(self.tokenizer, question.prompt, question.answer, closed=False).target
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
        edits = [encode_edit(self.tokenizer, q.prompt, q.answer, closed=False) for q in questions]
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


def _until(ids: list[int], stop: Any) -> list[int]:
    return ids[: ids.index(stop)] if stop in ids else ids
