"""Cases that the model's context has no room for."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from horen_bench.cases import EditCase, EditRecord
from horen_bench.models.architecture import context_length
from horen_bench.models.loading import LoadedModel
from horen_bench.prompts import PromptEncoder

_NAMED = 5  # ids that a warning lists


@dataclass(frozen=True, slots=True)
class ContextLimit:
    """Refuses cases that are longer than the model's context.

    Attributes:
        encoder: of the model's prompts.
        positions: the context's length, tokens; None: no limit.
    """

    encoder: PromptEncoder
    positions: int | None

    @classmethod
    def of(cls, loaded: LoadedModel) -> "ContextLimit":
        """The limit of a model."""
        return cls(loaded.encoder, context_length(loaded.model))

    def refusal(self, case: EditCase) -> EditRecord | None:
        """The record of a case that cannot be written; None where it fits."""
        if self.positions is None:
            return None
        n_tokens = len(self.encoder.edit(case.prompt, case.target).ids)
        if n_tokens <= self.positions:
            return None
        problem = f"prompt and target have {n_tokens} tokens, the model has {self.positions} positions"
        return EditRecord(case.id, "failed", None, None, math.nan, 0, 0.0, problem, too_long=True)

    def warnings(self, records: Sequence[EditRecord]) -> list[str]:
        """Which of the cases of a prefix were refused."""
        ids = [record.case_id for record in records if record.too_long]
        if not ids:
            return []
        n = len(records)
        named = ", ".join(ids[:_NAMED]) + (", ..." if len(ids) > _NAMED else "")
        return [
            f"N={n}: cases that are longer than the model's {self.positions} positions were not written, {len(ids)} of "
            f"{n}: {named}"
        ]
