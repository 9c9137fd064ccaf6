"""Editors that spread a change over a window of layers: MEMIT's loop, which AlphaEdit shares.

Shapes: `B` requests of a turn, `q` layers, `d` hidden size, `m` input size of a down-projection.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.editors.locate_edit.contexts import Contexts, generate_contexts
from horen_bench.editors.locate_edit.editor import Engine, RewritingEditor
from horen_bench.editors.locate_edit.requests import Row
from horen_bench.editors.locate_edit.target_vector import Hidden, Reading, keys_and_hidden
from horen_bench.editors.shared.second_moments import Recipe, block_of
from horen_bench.errors import UserError


class WindowEditor(RewritingEditor):
    """A method that moves the output of the window's last block to `z`, a share in each layer.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        seed: of the contexts.
        modules: dotted paths of the down-projections, lowest layer first.
        hidden: constants of `Objective`; the vector belongs to the output of the last module's block.
        statistics: constants of `Recipe`.
        context_lengths: pairs `(tokens, texts)` of contexts that the model writes.
        contexts: two groups of texts instead of written ones, or None.
        batch_size: facts that are written in one turn.
        engine: see `RewritingEditor`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        modules: Sequence[str],
        hidden: Mapping[str, Any],
        statistics: Mapping[str, Any],
        context_lengths: Sequence[Sequence[int]],
        contexts: Sequence[Sequence[str]] | None,
        batch_size: int,
        engine: Engine,
    ) -> None:
        if not modules:
            raise UserError("method.modules must name at least one module")
        super().__init__(
            model,
            tokenizer,
            seed=seed,
            modules=modules,
            where="method.modules",
            target_module=block_of(modules[-1]),
            hidden=hidden,
            contexts=contexts,
            batch_size=batch_size,
            engine=engine,
        )
        self.modules = list(modules)
        self.recipe = Recipe(**statistics)
        self.context_lengths = context_lengths

    def _new_contexts(self) -> Contexts:
        """The bare prompt is a group of its own, so that it makes half of a key."""
        return Contexts.given([[""], generate_contexts(self.model, self.tokenizer, self.context_lengths, self.seed)])

    @abstractmethod
    def _update(self, path: str, keys: Tensor, residual: Tensor) -> Tensor:
        """The change `(d, m)` that maps keys `(B, m)` to residuals `(B, d)` as far as the method wants it."""

    @torch.no_grad()
    def _write(self, rows: Sequence[Row], reading: Reading, hidden: Hidden) -> None:
        """Layer by layer, lowest first, write an equal share of what is still missing."""
        self._write_layers(rows, reading, hidden)

    def _write_layers(self, rows: Sequence[Row], reading: Reading, hidden: Hidden) -> dict[str, Tensor]:
        """Write all layers; the keys `(B, m)` that each was written at."""
        written: dict[str, Tensor] = {}
        keys, current = reading.keys, hidden.initial
        for i, path in enumerate(self.modules):
            # The first layer is as it was when the hidden vector was trained: its keys are known.
            if i > 0 or self.engine == "sequential":
                keys, current = self._keys_and_hidden(path, rows)
            residual = (hidden.target - current) / (len(self.modules) - i)
            self._add(path, self._update(path, keys[path], residual))
            written[path] = keys[path]
        return written

    def _keys_and_hidden(self, path: str, rows: Sequence[Row]) -> tuple[dict[str, Tensor], Tensor]:
        return keys_and_hidden(self.model, self._target, {path: self._projections[path]}, rows)
