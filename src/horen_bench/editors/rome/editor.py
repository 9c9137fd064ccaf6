"""ROME: one fact as one rank-one change of one down-projection (Meng et al. 2022, arXiv 2202.05262).

The down-projection `W` `(d, m)` is a memory: a key `k` `(m)` at the subject's last token calls up a value `(d)`. The
new value `v*` is trained so that the model gives the target; `W <- W + v u^T` writes it with `u ~ C^-1 k`, which
disturbs the keys of general text least.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.editors.locate_edit.editor import LocateEditEditor
from horen_bench.editors.locate_edit.requests import PromptRow, Refused
from horen_bench.editors.locate_edit.target_vector import PerturbedModel, TargetVectors
from horen_bench.editors.rome.config import RomeConfig
from horen_bench.editors.shared.second_moments import cholesky
from horen_bench.models.surgery import all_finite
from horen_bench.prompts import PromptEncoder

_SMALLEST = 1e-12  # of k . u, below which v = delta / (k . u) means nothing


class RomeEditor(LocateEditEditor[RomeConfig]):
    """ROME on one model; `engine=sequential` takes the explicit inverse of `C` in float32, as published."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | PromptEncoder,
        config: RomeConfig,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(model, tokenizer, config, seed=seed)
        # The release (ha11ucin8/HoReN @38bbf34, src/models/rome) rounds all that follows to the model's dtype.
        self._dtype = self.pristine.weights[config.module].dtype if config.arithmetic == "model" else torch.float32
        self._factor: Tensor | None = None
        self._inverse: Tensor | None = None

    def _prepare(self) -> None:
        if not self.config.covariance:
            return
        moment = self._moments()[self.config.module]
        if self.config.engine == "sequential" or self.config.arithmetic == "model":
            self._inverse = torch.linalg.inv(moment.mean.to(self.device, torch.float32))
        else:
            self._factor = cholesky(moment, self.config.ridge, self.device)

    def _grouped(self, texts: list[str]) -> list[list[str]]:
        return [["", *texts]]

    # --- Left vector: where to write (paper 3.1, Eq. 2) ------------------------------------------------

    def direction(self, key: Tensor) -> Tensor:
        """The unit vector `u ~ C^-1 k`, `(m)` in the dtype of the arithmetic, for a key `(m)`."""
        if self._inverse is not None:
            u = self._inverse.to(self._dtype) @ key.to(self._dtype)
        elif self._factor is not None:
            u = torch.cholesky_solve(key.double()[:, None], self._factor)[:, 0]
        else:
            u = key.to(self._dtype)
        unit: Tensor = (u / u.norm()).to(self._dtype)
        return unit

    # --- Right vector and update: what to write --------------------------------------------------------

    @torch.no_grad()
    def _write(self, rows: Sequence[PromptRow], model: PerturbedModel, vectors: TargetVectors) -> None:
        path, mode = self.config.module, self.config.key_mode
        mean, prompt = model.keys[path][0], model.prompt_keys[path][0]
        u = self.direction(prompt if mode == "prompt" else mean)
        key = (mean if mode == "mean" else prompt).to(self._dtype)
        strength = key @ u
        if not all_finite(u) or abs(float(strength)) < _SMALLEST:
            raise Refused("the key has no part along the direction that would be written")
        target = vectors.initial[0].to(self._dtype) + vectors.delta[0].to(self._dtype)
        v = (target - self._present_value(key, vectors)) / strength
        self._add(path, torch.outer(v, u))

    def _present_value(self, key: Tensor, vectors: TargetVectors) -> Tensor:
        """What the module makes of a key, `(d)`; for the bare prompt's that is v0, and nothing need run again."""
        if self.config.key_mode == "mean":
            bias = self.pristine.modules[self.config.module].bias
            product = self.pristine.matrix(self.config.module).to(self._dtype) @ key
            return product if bias is None else product + bias.to(self._dtype)
        return vectors.initial[0].to(self._dtype)

    def _kept_numbers(self) -> int:
        return sum(matrix.numel() for matrix in (self._factor, self._inverse) if matrix is not None)
