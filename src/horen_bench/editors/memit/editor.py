"""MEMIT: many facts by least squares over a window of layers (Meng et al. 2023, arXiv 2210.07229).

Per layer `dW = R A^T` with `(lambda C + K K^T) A = K`: keys `K`, the share `R` of the residual that the layer takes,
and the second moment `C` of general text. Earlier turns are not in the problem; only the weights remember them.
Shapes: `B` requests of a turn, `d` hidden size, `m` input size of a down-projection.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.editors.locate_edit.editor import Engine
from horen_bench.editors.locate_edit.window import WindowEditor
from horen_bench.editors.shared.second_moments import cholesky, second_moments
from horen_bench.errors import UserError


class MemitEditor(WindowEditor):
    """MEMIT on one model.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        seed: of the contexts.
        modules: dotted paths of the down-projections, lowest layer first.
        hidden: constants of `Objective`.
        moment_weight: lambda > 0, what general text counts beside the keys of a turn.
        ridge: share of `trace(C)/m` added to the diagonal of `C`.
        statistics: constants of `Recipe`.
        context_lengths: pairs `(tokens, texts)` of contexts that the model writes.
        contexts: two groups of texts instead of written ones, or None.
        batch_size: facts that are written in one turn.
        engine: see `RewritingEditor`; `sequential` solves the `(m, m)` system at every turn, as published.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        modules: Sequence[str],
        hidden: Mapping[str, Any],
        moment_weight: float,
        ridge: float,
        statistics: Mapping[str, Any],
        context_lengths: Sequence[Sequence[int]],
        contexts: Sequence[Sequence[str]] | None,
        batch_size: int,
        engine: Engine,
    ) -> None:
        if not moment_weight > 0:
            raise UserError(f"method.moment_weight must be > 0, got {moment_weight}")
        super().__init__(
            model,
            tokenizer,
            seed=seed,
            modules=modules,
            hidden=hidden,
            statistics=statistics,
            context_lengths=context_lengths,
            contexts=contexts,
            batch_size=batch_size,
            engine=engine,
        )
        self.moment_weight = moment_weight
        self.ridge = ridge
        self._factors: dict[str, Tensor] = {}

    def _prepare(self) -> None:
        moments = second_moments(self.model, self.tokenizer, self.modules, self.recipe)
        self._factors = {path: cholesky(moment, self.ridge, self.device) for path, moment in moments.items()}

    def _update(self, path: str, keys: Tensor, residual: Tensor) -> Tensor:
        columns, factor = keys.T.double(), self._factors[path]
        if self.engine == "cached":
            # Woodbury: C is factored once for the whole stream, and a turn solves a system of its own size.
            whitened = torch.cholesky_solve(columns, factor) / self.moment_weight
            own = torch.eye(len(keys), dtype=torch.float64, device=keys.device) + columns.T @ whitened
            adjusted = torch.linalg.solve(own, whitened.T).T
        else:
            system = self.moment_weight * factor @ factor.T + columns @ columns.T
            adjusted = torch.linalg.solve(system, columns)
        change: Tensor = (residual.T.double() @ adjusted.T).float()
        return change

    def _kept_numbers(self) -> int:
        return sum(factor.numel() for factor in self._factors.values())
