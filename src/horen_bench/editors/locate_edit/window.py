"""Editors that spread a change over a window of layers: MEMIT's loop, which AlphaEdit shares.

Shapes: `B` requests of a turn, `q` layers, `d` hidden size, `m` input size of a down-projection.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from horen_bench.editors.locate_edit.config import WindowConfig
from horen_bench.editors.locate_edit.editor import LocateEditEditor
from horen_bench.editors.locate_edit.requests import PromptRow
from horen_bench.editors.locate_edit.target_vector import PerturbedModel, TargetVectors, keys_and_outputs
from horen_bench.editors.shared.second_moments import block_of

WindowConfigT = TypeVar("WindowConfigT", bound=WindowConfig)


class WindowEditor(LocateEditEditor[WindowConfigT]):
    """A method that moves the output of the window's last block to `z`, a share in each layer."""

    @property
    def _target_path(self) -> str:
        return block_of(self.config.modules[-1])

    def _grouped(self, texts: list[str]) -> list[list[str]]:
        """The bare prompt is a group of its own, so that it makes half of a key."""
        return [[""], texts]

    @abstractmethod
    def _update(self, path: str, keys: Tensor, residual: Tensor) -> Tensor:
        """The change `(d, m)` that maps keys `(B, m)` to residuals `(B, d)` as far as the method lets it."""

    @torch.no_grad()
    def _write(self, rows: Sequence[PromptRow], model: PerturbedModel, vectors: TargetVectors) -> None:
        """Layer by layer, lowest first, write an equal share of what is still missing."""
        self._write_layers(rows, model, vectors)

    def _write_layers(
        self, rows: Sequence[PromptRow], model: PerturbedModel, vectors: TargetVectors
    ) -> dict[str, Tensor]:
        """Write all layers; the keys `(B, m)` that each was written at."""
        written: dict[str, Tensor] = {}
        keys, current = model.keys, vectors.initial
        for i, path in enumerate(self.config.modules):
            # The first layer is as it was when the target vector was trained: its keys are known.
            if i > 0 or self.config.engine == "sequential":
                keys, current = self._keys_and_outputs(path, rows)
            residual = (vectors.target - current) / (len(self.config.modules) - i)
            self._add(path, self._update(path, keys[path], residual))
            written[path] = keys[path]
        return written

    def _keys_and_outputs(self, path: str, rows: Sequence[PromptRow]) -> tuple[dict[str, Tensor], Tensor]:
        return keys_and_outputs(self.model, self._target, {path: self._projections[path]}, rows)
