"""AlphaEdit: MEMIT's window with every change kept out of the directions of general text (arXiv 2410.02355).

Per layer `(P (K K^T + M) + lambda_2 I) X = P K R^T` and `dW = X^T`: `P` projects on the null space of the second moment
of general text, `M` is the second moment of the keys of all former edits, which the editor owns and saves.
Shapes: `B` requests of a turn, `d` hidden size, `m` input size of a down-projection.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.editors.alphaedit.config import AlphaEditConfig
from horen_bench.editors.locate_edit.null_space import KeyMemory, null_space
from horen_bench.editors.locate_edit.requests import PromptRow, Refused
from horen_bench.editors.locate_edit.target_vector import PerturbedModel, TargetVectors
from horen_bench.editors.locate_edit.window import WindowEditor
from horen_bench.editors.shared.second_moments import cache_folder, cache_keys
from horen_bench.models.surgery import all_finite
from horen_bench.prompts import PromptEncoder


class AlphaEditEditor(WindowEditor[AlphaEditConfig]):
    """AlphaEdit on one model; `engine=sequential` solves the `(m, m)` system as published."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | PromptEncoder,
        config: AlphaEditConfig,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(model, tokenizer, config, seed=seed)
        self.memory: dict[str, KeyMemory] = {}

    def _prepare(self) -> None:
        threshold, statistics, moments = self.config.nullspace_threshold, self.config.statistics, self._moments()
        keys = {} if statistics.published else cache_keys(self.model, self.encoder, list(moments), statistics)
        for path, moment in moments.items():
            cached = cache_folder(statistics) / f"{keys[path]}-above-{threshold:g}.safetensors" if keys else None
            space = null_space(moment, threshold, cached, self.device)
            self.memory[path] = KeyMemory(space, self.config.l2)

    @torch.no_grad()
    def _write(self, rows: Sequence[PromptRow], model: PerturbedModel, vectors: TargetVectors) -> None:
        """Write all layers, then remember the keys.

        The published code computes the keys again under the edited weights. They are the same: a layer's keys depend on
        the layers below alone, and those were final when the layer was written.
        """
        written = self._write_layers(rows, model, vectors)
        if self.config.engine == "sequential":
            written = {path: self._keys_and_outputs(path, rows)[0][path] for path in written}
        extended = {path: self.memory[path].extended(keys) for path, keys in written.items()}
        if not all(all_finite(memory.factor) for memory in extended.values()):
            raise Refused("its keys cannot be told from those of earlier edits; a larger method.l2 lets them")
        self.memory |= extended

    def _update(self, path: str, keys: Tensor, residual: Tensor) -> Tensor:
        memory = self.memory[path]
        if self.config.engine == "cached":
            return memory.update(keys, residual)
        projection = memory.space.matrix()
        identity = torch.eye(len(projection), device=keys.device)
        system = projection @ (keys.T @ keys + memory.moment()) + self.config.l2 * identity
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
        warnings = super().warnings()
        shares = {path: memory.space.rank / len(memory.space.protected) for path, memory in self.memory.items()}
        if shares:
            each = ", ".join(f"{path} {share:.1%}" for path, share in shares.items())
            warnings.append(f"null space, share of each layer's directions: {each}")
        for path, share in shares.items():
            if not 0.05 <= share <= 0.999:
                much = "everything" if share > 0.5 else "nothing"
                warnings.append(f"the null space of {path} is nearly {much}; check nullspace_threshold")
        return warnings
