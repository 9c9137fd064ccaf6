"""What the model's context has no room for: cases that cannot be written, probes that cannot be evaluated."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from horen_bench.cases import EditCase, EditRecord
from horen_bench.models.architecture import context_length
from horen_bench.models.loading import LoadedModel
from horen_bench.prompts import PromptEncoder

_NAMED = 5  # ids that a warning lists


@dataclass(frozen=True, slots=True)
class ContextLimit:
    """Knows what is longer than the model's context.

    Attributes:
        encoder: of the model's prompts.
        positions: the context's length, tokens; None: no limit.
    """

    encoder: PromptEncoder
    positions: int | None
    _lengths: dict[tuple[str, str | None], int] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, loaded: LoadedModel) -> "ContextLimit":
        """The limit of a model."""
        return cls(loaded.encoder, context_length(loaded.model))

    def holds(self, prompt: str, answer: str | None) -> bool:
        """Whether a prompt fits with what follows it: all of an answer, or, if it is None, the first token of one."""
        return self.positions is None or self._n_tokens(prompt, answer) <= self.positions

    def refusal(self, case: EditCase) -> EditRecord | None:
        """The record of a case that no method can write: too long, or a target without tokens of its own; else None."""
        if problem := self.encoder.unreadable(case.target):
            return EditRecord(case.id, "failed", None, None, math.nan, 0, 0.0, problem)
        if self.holds(case.prompt, case.target):
            return None
        n_tokens = self._n_tokens(case.prompt, case.target)
        problem = f"prompt and target have {n_tokens} tokens, the model has {self.positions} positions"
        return EditRecord(case.id, "failed", None, None, math.nan, 0, 0.0, problem, too_long=True)

    def warnings(self, records: Sequence[EditRecord]) -> list[str]:
        """Which of the cases of a prefix were refused."""
        ids = [record.case_id for record in records if record.too_long]
        if not ids:
            return []
        n = len(records)
        return [
            f"N={n}: cases that are longer than the model's {self.positions} positions were not written, {len(ids)} of "
            f"{n}: {named(ids)}"
        ]

    def _n_tokens(self, prompt: str, answer: str | None) -> int:
        """Remembered: a case is written once and evaluated at every checkpoint."""
        pair = (prompt, answer)
        if pair not in self._lengths:
            whole = self.encoder.prompts([prompt])[0] if answer is None else self.encoder.edit(prompt, answer).ids
            self._lengths[pair] = len(whole) + (answer is None)
        return self._lengths[pair]


def named(ids: Sequence[str]) -> str:
    """The first few of some cases."""
    return ", ".join(ids[:_NAMED]) + (", ..." if len(ids) > _NAMED else "")
