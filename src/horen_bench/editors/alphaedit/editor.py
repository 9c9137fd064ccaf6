"""AlphaEdit: MEMIT's window with every change kept out of the directions of general text (arXiv 2410.02355).

Per layer `(P (K K^T + M) + lambda_2 I) X = P K R^T` and `dW = X^T`: `P` projects on the null space of the second moment
of general text, `M` is the second moment of the keys of all former edits, which the editor owns and saves.
Shapes: `B` requests of a turn, `d` hidden size, `m` input size of a down-projection.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.editors.locate_edit.editor import Engine
from horen_bench.editors.locate_edit.null_space import KeyMemory, null_space
from horen_bench.editors.locate_edit.requests import Row
from horen_bench.editors.locate_edit.target_vector import Hidden, Reading
from horen_bench.editors.locate_edit.window import WindowEditor
from horen_bench.editors.shared.second_moments import cache_key, second_moments
from horen_bench.errors import UserError


class AlphaEditEditor(WindowEditor):
    """AlphaEdit on one model.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        seed: of the contexts.
        modules: dotted paths of the down-projections, lowest layer first.
        hidden: constants of `Objective`.
        nullspace_threshold: eigenvalues of `C` strictly below it span the null space; absolute.
        l2: lambda_2 > 0; how far a layer holds back.
        statistics: constants of `Recipe`.
        context_lengths: pairs `(tokens, texts)` of contexts that the model writes.
        contexts: two groups of texts instead of written ones, or None.
        batch_size: facts that are written in one turn.
        engine: see `RewritingEditor`; `sequential` solves the `(m, m)` system as published.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        modules: Sequence[str],
        hidden: Mapping[str, Any],
        nullspace_threshold: float,
        l2: float,
        statistics: Mapping[str, Any],
        context_lengths: Sequence[Sequence[int]],
        contexts: Sequence[Sequence[str]] | None,
        batch_size: int,
        engine: Engine,
    ) -> None:
        for name, value in (("nullspace_threshold", nullspace_threshold), ("l2", l2)):
            if not value > 0:
                raise UserError(f"method.{name} must be > 0, got {value}")
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
        self.nullspace_threshold = nullspace_threshold
        self.l2 = l2
        self.memory: dict[str, KeyMemory] = {}

    def _prepare(self) -> None:
        moments = second_moments(self.model, self.tokenizer, self.modules, self.recipe)
        for path, moment in moments.items():
            name = f"{cache_key(self.model, self.tokenizer, path, self.recipe)}-above-{self.nullspace_threshold:g}"
            cached = None if self.recipe.published else self.recipe.cache / f"{name}.safetensors"
            space = null_space(moment, self.nullspace_threshold, cached, self.device)
            self.memory[path] = KeyMemory(space, self.l2)

    @torch.no_grad()
    def _write(self, rows: Sequence[Row], reading: Reading, hidden: Hidden) -> None:
        """Write all layers, then remember the keys.

        The published code computes the keys again under the edited weights. They are the same: a layer's keys depend on
        the layers below alone, and those were final when the layer was written.
        """
        written = self._write_layers(rows, reading, hidden)
        for path, keys in written.items():
            remembered = self._keys_and_hidden(path, rows)[0][path] if self.engine == "sequential" else keys
            self.memory[path].append(remembered)

    def _update(self, path: str, keys: Tensor, residual: Tensor) -> Tensor:
        memory = self.memory[path]
        if self.engine == "cached":
            return memory.update(keys, residual)
        projection = memory.space.matrix()
        identity = torch.eye(len(projection), device=keys.device)
        system = projection @ (keys.T @ keys + memory.moment()) + self.l2 * identity
        change: Tensor = torch.linalg.solve(system, projection @ keys.T @ residual).T
        return change

    def _kept_numbers(self) -> int:
        return sum(memory.numel() for memory in self.memory.values())

    def state_dict(self) -> dict[str, Tensor]:
        """The rewritten weights and the keys of all edits."""
        kept = {
            f"memory.{path}.{name}": tensor.cpu()
            for path, memory in self.memory.items()
            if len(memory.keys)
            for name, tensor in memory.state_dict().items()
        }
        return {**super().state_dict(), **kept}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from saved weights and keys."""
        super().load_state_dict(state)
        for path, memory in self.memory.items():
            names = {name: f"memory.{path}.{name}" for name in ("keys", "factor")}
            if all(key in state for key in names.values()):
                memory.load_state_dict({name: state[key] for name, key in names.items()})

    def warnings(self) -> list[str]:
        """Also how much of each layer's space is free, which bounds what can be written there."""
        found = super().warnings()
        shares = {path: memory.space.rank / len(memory.space.protected) for path, memory in self.memory.items()}
        if shares:
            each = ", ".join(f"{path} {share:.1%}" for path, share in shares.items())
            found.append(f"null space, share of each layer's directions: {each}")
        for path, share in shares.items():
            if not 0.05 <= share <= 0.999:
                much = "everything" if share > 0.5 else "nothing"
                found.append(f"the null space of {path} is nearly {much}; check nullspace_threshold")
        return found
