"""The texts whose outputs an edit must leave alone: a few drawn for every batch of cases, published from Alpaca."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from horen_bench.editors.shared.corpora import read_rows, text_of
from horen_bench.editors.unke.config import Preservation
from horen_bench.errors import UserError

_SAMPLE_SEED = 2024  # the published code's, whatever the run's seed
_WHERE = "method.preservation.corpus"


class PreservedTexts:
    """A corpus and the generator that draws from it in stream order.

    Args:
        config: corpus, template, and how many texts a draw has.
    """

    def __init__(self, config: Preservation) -> None:
        self._config = config
        self._rows: Sequence[Any] | None = None
        self._random = random.Random(_SAMPLE_SEED)

    def draw(self) -> list[str]:
        """The texts of the next batch of cases, none twice; the corpus is read at the first draw.

        Raises:
            UserError: no such corpus, it is empty, or an item is no text.
        """
        if self._rows is None:
            self._rows = self._read()
        drawn = self._random.sample(range(len(self._rows)), min(self._config.n_texts, len(self._rows)))
        return [preserved_text(self._rows[i], self._config.template) for i in drawn]

    def _read(self) -> Sequence[Any]:
        try:
            rows = read_rows(self._config.corpus, _WHERE)
        except UserError as error:
            raise UserError(f"{error}; python -m horen_bench.datasets fetch alpaca gets the published one") from error
        if not len(rows):
            raise UserError(f"{_WHERE}={self._config.corpus} holds no text")
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
