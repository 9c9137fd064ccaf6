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
from horen_bench.models.calls import run
from horen_bench.models.hooks import ending_at, outputs_of, patched_output
from horen_bench.models.padding import trial_row
from horen_bench.prompts import pad

WindowConfigT = TypeVar("WindowConfigT", bound=WindowConfig)


class WindowEditor(LocateEditEditor[WindowConfigT]):
    """A method that moves the output of the window's last block to `z`, a share in each layer."""

    _not_added: Sequence[str] = ()  # modules, known from the first edit on

    @property
    def _target_path(self) -> str:
        return block_of(self.config.modules[-1])

    def _grouped(self, texts: list[str]) -> list[list[str]]:
        """The bare prompt is a group of its own, so that it makes half of a key."""
        return [[""], texts]

    def _get_ready(self) -> None:
        if not self._ready:
            self._not_added = [path for path in self.config.modules if not self._is_added(path)]
        super()._get_ready()

    @torch.no_grad()
    def _is_added(self, path: str) -> bool:
        """Whether a change of a module's output is the same change of its block's output."""
        modules = {"module": self._projections[path], "block": self.model.get_submodule(block_of(path))}
        batch = pad([trial_row(self.model, 0, 4)], 0, device=self.model.device)

        def outputs() -> dict[str, Tensor]:
            with outputs_of(modules) as read, ending_at(modules["block"]):
                run(self.model, batch)
            return {key: output.float().flatten(0, -2)[-1] for key, output in read.items()}

        before = outputs()
        size = torch.maximum(before["module"].abs().mean(), before["block"].abs().mean() / 10)  # above rounding
        with patched_output(modules["module"], lambda output: output + size.to(output.dtype)):
            moved = outputs()["block"] - before["block"]
        return bool((moved - size).abs().median() < 0.05 * size)

    def warnings(self) -> list[str]:
        """Also where a layer does not pass on as it is what is written in it."""
        other = [
            f"what {path} gives is not added to the hidden states as it is (a norm, a gate or a factor follows): a "
            "write there moves them by another amount than the method's equations say"
            for path in self._not_added
        ]
        return [*super().warnings(), *other]

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
