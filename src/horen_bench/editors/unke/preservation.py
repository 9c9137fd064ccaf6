"""The texts whose outputs an edit must leave alone: a few drawn for every turn, Alpaca in the published code."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from horen_bench.editors.shared.corpora import read_rows, text_of
from horen_bench.errors import UserError

_SAMPLE_SEED = 2024  # the published code's, whatever the run's seed
_WHERE = "method.preservation.corpus"


class PreservedTexts:
    """A corpus and the generator that draws from it in stream order.

    Args:
        corpus: as for `rewriting.corpus.read_corpus`; items with the fields `instruction`, `input` and `output`, as
            Alpaca has them, are put into the template, all others are taken as they are.
        template: what stands around an instruction, `{}` in its place; the output follows at once.
        n_texts: texts per draw, or as many as there are.
        max_tokens: tokens kept of a text; None: all.

    Raises:
        UserError: a constant is out of its range.
    """

    def __init__(self, *, corpus: str, template: str, n_texts: int, max_tokens: int | None) -> None:
        if "{}" not in template:
            raise UserError(f"method.preservation.template must hold {{}} for the instruction, got {template!r}")
        for name, value in {"n_texts": n_texts, "max_tokens": 1 if max_tokens is None else max_tokens}.items():
            if not isinstance(value, int) or value < 1:
                raise UserError(f"method.preservation.{name} must be a whole number of at least 1, got {value!r}")
        self.max_tokens = max_tokens
        self._source = corpus
        self._template = template
        self._n_texts = n_texts
        self._rows: Sequence[Any] | None = None
        self._random = random.Random(_SAMPLE_SEED)

    def draw(self) -> list[str]:
        """The texts of the next turn, none twice; the corpus is read at the first draw.

        Raises:
            UserError: no such corpus, it is empty, or an item is no text.
        """
        if self._rows is None:
            self._rows = self._read()
        chosen = self._random.sample(range(len(self._rows)), min(self._n_texts, len(self._rows)))
        return [preserved_text(self._rows[i], self._template) for i in chosen]

    def _read(self) -> Sequence[Any]:
        try:
            rows = read_rows(self._source, _WHERE)
        except UserError as error:
            raise UserError(f"{error}; python -m horen_bench.datasets fetch alpaca gets the published one") from error
        if not len(rows):
            raise UserError(f"{_WHERE}={self._source} holds no text")
        return rows

    def reset(self) -> None:
        """Draw from the start again."""
        self._random.seed(_SAMPLE_SEED)

    def state(self) -> Tensor:
        """Where the generator is, int64 `(625,)`."""
        return torch.tensor(self._random.getstate()[1])

    def load(self, state: Tensor) -> None:
        """Go on drawing from where `state` was taken."""
        version, _, gauss = self._random.getstate()
        self._random.setstate((version, tuple(state.tolist()), gauss))


def preserved_text(row: Any, template: str) -> str:
    """An item of the corpus as the model reads it."""
    if isinstance(row, Mapping) and {"instruction", "output"} <= row.keys():
        return template.replace("{}", f"{row['instruction']}{row.get('input', '')}") + str(row["output"])
    return text_of(row, _WHERE)
