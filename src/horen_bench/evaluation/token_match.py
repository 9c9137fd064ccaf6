"""Short answers, compared token by token.

Protocols (one rule for every method in a table; paper E.3.1):

- `greedy` (default, paper Eq. 10-11): decode greedily as many tokens as the answer has behind its prompt, `|y|`, pure
  argmax whatever the checkpoint's `generation_config` says but for the tokens that end a text; the decoded text,
  left-stripped and tokenised again, is compared position by position with the answer, treated alike. Locality compares
  the tokens that base and edited model decoded.
- `teacher_forced`: the answer stands behind the prompt; the argmax at its positions is compared with it.
- `release`: what the published code does for the method at hand: `greedy` with a score of 0 on any length
  mismatch, locality over the last tokens of prompt plus output, and the checkpoint's `generation_config`, for
  HoReN and GRACE; `teacher_forced` for the rest.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from horen_bench.config.schema import Mode, TokenProtocol
from horen_bench.errors import UserError
from horen_bench.evaluation.decoding import greedy_decode, stop_ids
from horen_bench.evaluation.evaluator import Evaluator, Prediction
from horen_bench.evaluation.probes import CaseProbe
from horen_bench.metrics.token_match import agreement, same_length_accuracy, token_accuracy
from horen_bench.models.calls import run
from horen_bench.models.padding import together
from horen_bench.prompts import EncodedEdit, announced_prompt, pad


@dataclass(frozen=True, slots=True)
class TokenMatchProtocol:
    """How predictions are made and compared.

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


def protocol_of(name: str, release_mode: Mode) -> TokenMatchProtocol:
    """The protocol of a name, for a method that the release scores in `release_mode`.

    Raises:
        UserError: no such protocol.
    """
    if name == "greedy":
        return TokenMatchProtocol(name, "generate")
    if name == "teacher_forced" or (name == "release" and release_mode == "teacher_forced"):
        return TokenMatchProtocol(name, "teacher_forced")
    if name == "release":
        return TokenMatchProtocol(name, "generate", "all_or_nothing", "tail", checkpoint_settings=True)
    raise UserError(f"protocol={name} compares no tokens; write one of {', '.join(get_args(TokenProtocol))}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenMatchEvaluator(Evaluator):
    """Predicts as many tokens as an answer has, and compares them with it.

    Attributes:
        protocol: how to predict and compare.
    """

    protocol: TokenMatchProtocol
    _targets: dict[str, tuple[int, ...]] = field(default_factory=dict, init=False, repr=False)

    @property
    def cache_name(self) -> str:
        """The protocol, with its mode: under `release` the base model is evaluated in two ways."""
        return f"{self.protocol.name}-{self.protocol.mode}"

    def predict_batch(self, probes: Sequence[CaseProbe]) -> list[Prediction]:
        """Free generation, or the argmax with the answer behind the prompt."""
        return self._generate(probes) if self.protocol.mode == "generate" else self._force(probes)

    def score(self, probe: CaseProbe, prediction: Prediction, base: Prediction) -> float:
        """Score of a prediction, in [0, 1]."""
        if probe.reference == "base":
            return agreement(base.ids, prediction.ids)
        accuracy = token_accuracy if self.protocol.lengths == "positionwise" else same_length_accuracy
        return accuracy(prediction.scored_ids, self._target(probe))

    def scores(
        self, probes: Sequence[CaseProbe], predictions: Sequence[Prediction], base: Sequence[Prediction]
    ) -> list[dict[str, float]]:
        """The one score of the protocol."""
        return [{"": self.score(*each)} for each in zip(probes, predictions, base, strict=True)]

    def text(self, prediction: Prediction) -> str:
        """A prediction as text, for people."""
        return str(self.encoder.tokenizer.decode(list(prediction.scored_ids), skip_special_tokens=True)).strip()

    def _target(self, probe: CaseProbe) -> tuple[int, ...]:
        """Ids that a prediction for the probe is scored against."""
        if probe.key not in self._targets:
            if self.protocol.mode == "teacher_forced":
                ids = self.encoder.edit(probe.prompt, probe.answer, closed=False).target
            else:
                answer = probe.answer if self.protocol.checkpoint_settings else probe.answer.lstrip()
                ids = tuple(self.encoder.plain([answer])[0])
            self._targets[probe.key] = ids
        return self._targets[probe.key]

    def _generate(self, probes: Sequence[CaseProbe]) -> list[Prediction]:
        """Decode as many tokens as each answer has behind its prompt, or, in the release, alone with a space."""
        edits = self.encoder.edits([(probe.prompt, probe.answer) for probe in probes], closed=False)
        prompts = [list(edit.prompt) for edit in edits]
        if self.protocol.checkpoint_settings:
            alone = self.encoder.plain([f" {probe.answer}" for probe in probes])
            new = [self._under_checkpoint_settings(p, len(ids)) for p, ids in zip(prompts, alone, strict=True)]
        else:
            lengths = [len(edit.target) for edit in edits]
            stop = stop_ids(self.model, self.encoder)
            new = [_until(ids, stop) for ids in greedy_decode(self.model, prompts, lengths, self.encoder.pad_id)]
        again = self.encoder.plain([text.lstrip() for text in self._decoded(new)])
        return [
            Prediction(self._locality_ids(probe, prompt, ids), tuple(scored))
            for probe, prompt, ids, scored in zip(probes, prompts, new, again, strict=True)
        ]

    def _decoded(self, rows: list[list[int]]) -> list[str]:
        """The texts as they were said; the release tidies spaces where the tokenizer's settings say so."""
        tidy = None if self.protocol.checkpoint_settings else False
        return list(
            self.encoder.tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=tidy)
        )

    def _locality_ids(self, probe: CaseProbe, prompt: list[int], new: list[int]) -> tuple[int, ...]:
        if self.protocol.locality_window == "generated":
            return tuple(new)
        return tuple((prompt + new)[-len(self._target(probe)) :])

    def _under_checkpoint_settings(self, prompt: list[int], n_tokens: int) -> list[int]:
        """One unpadded prompt decoded as the release does."""
        ids = torch.tensor([prompt], device=self.model.device)
        generate: Callable[..., Tensor] = getattr(self.model, "generate")  # noqa: B009 - its type is not declared
        output = generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            max_new_tokens=n_tokens,
            pad_token_id=self.encoder.pad_id,
        )
        new: list[int] = output[0, len(prompt) :].tolist()
        return new

    def _force(self, probes: Sequence[CaseProbe]) -> list[Prediction]:
        """The argmax at each position of the answer, with the answer behind the prompt."""
        edits = self.encoder.edits([(probe.prompt, probe.answer) for probe in probes], closed=False)
        rows: dict[int, tuple[int, ...]] = {}
        for batch in together(self.model, [len(edit.ids) for edit in edits]):
            rows |= zip(batch, self._forced([edits[i] for i in batch]), strict=True)
        return [Prediction(rows[i], rows[i]) for i in range(len(edits))]

    def _forced(self, edits: Sequence[EncodedEdit]) -> list[tuple[int, ...]]:
        """The argmax at the targets' positions, in one padded batch."""
        device = self.model.device
        batch = pad([edit.ids for edit in edits], self.encoder.pad_id, device=device)
        n_target = torch.tensor([len(edit.target) for edit in edits], device=device)
        from_end = batch.input_ids.shape[1] - torch.arange(batch.input_ids.shape[1], device=device)
        is_prompt = batch.attention_mask.bool() & (from_end[None] > n_target[:, None])
        with announced_prompt(is_prompt):
            logits = run(self.model, batch).logits
        predicted = logits.argmax(dim=-1).tolist()
        return [tuple(row[-1 - len(edit.target) : -1]) for row, edit in zip(predicted, edits, strict=True)]


def _until(ids: list[int], stop: Collection[int]) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids) if token in stop), len(ids))]
