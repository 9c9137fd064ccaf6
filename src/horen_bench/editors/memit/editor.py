"""MEMIT: many facts by least squares over a window of layers (Meng et al. 2023, arXiv 2210.07229).

Per layer `dW = R A^T` with `(lambda C + K K^T) A = K`: keys `K`, the share `R` of the residual that the layer takes,
and the second moment `C` of general text. Earlier turns are not in the problem; only the weights remember them.
Shapes: `B` requests of a turn, `d` hidden size, `m` input size of a down-projection.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.editors.locate_edit.window import WindowEditor
from horen_bench.editors.memit.config import MemitConfig
from horen_bench.editors.shared.second_moments import cholesky
from horen_bench.prompts import PromptEncoder


class MemitEditor(WindowEditor[MemitConfig]):
    """MEMIT on one model; `engine=sequential` solves the `(m, m)` system at every turn, as published."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | PromptEncoder,
        config: MemitConfig,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(model, tokenizer, config, seed=seed)
        self._factors: dict[str, Tensor] = {}

    def _prepare(self) -> None:
        self._factors = {
            path: cholesky(moment, self.config.ridge, self.device) for path, moment in self._moments().items()
        }

    def _update(self, path: str, keys: Tensor, residual: Tensor) -> Tensor:
        columns, factor, moment_weight = keys.T.double(), self._factors[path], self.config.moment_weight
        if self.config.engine == "cached":
            # Woodbury: C is factored once for the whole stream, and a turn solves a system of its own size.
            whitened = torch.cholesky_solve(columns, factor) / moment_weight
            own = torch.eye(len(keys), dtype=torch.float64, device=keys.device) + columns.T @ whitened
            adjusted = torch.linalg.solve(own, whitened.T).T
        else:
            system = moment_weight * factor @ factor.T + columns @ columns.T
            adjusted = torch.linalg.solve(system, columns)
        change: Tensor = (residual.T.double() @ adjusted.T).float()
        return change

    def _kept_numbers(self) -> int:
        return sum(factor.numel() for factor in self._factors.values())
