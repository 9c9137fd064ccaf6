"""ROME: one fact as one rank-one change of one down-projection (Meng et al. 2022, arXiv 2202.05262).

The down-projection `W` `(d, m)` is a memory: a key `k` `(m)` at the subject's last token calls up a value `(d)`. The
new value `v*` is trained so that the model says the target; `W <- W + v u^T` writes it with `u ~ C^-1 k`, which
disturbs the keys of general text least.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.editors.base import check_choice
from horen_bench.editors.locate_edit.contexts import Contexts, generate_contexts
from horen_bench.editors.locate_edit.editor import Engine, RewritingEditor
from horen_bench.editors.locate_edit.requests import Refused, Row, all_finite
from horen_bench.editors.locate_edit.target_vector import Hidden, Reading
from horen_bench.editors.shared.second_moments import Recipe, cholesky, second_moments

KeyMode = Literal["release", "mean", "prompt"]
Arithmetic = Literal["float32", "model"]

_SMALLEST = 1e-12  # of k . u, below which v = delta / (k . u) means nothing


class RomeEditor(RewritingEditor):
    """ROME on one model.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        seed: of the contexts.
        module: dotted path of the down-projection, e.g. `model.layers.5.mlp.down_proj`.
        hidden: constants of `Objective`; the vector belongs to the down-projection's output.
        covariance: whether `u = C^-1 k` (the paper), or `u = k`.
        key_mode: `release` takes the mean key over contexts for `u` and the bare prompt's to scale `v`; `mean` and
            `prompt` take one key in both places, as the paper's equations do.
        ridge: share of `trace(C)/m` added to the diagonal of `C`.
        statistics: constants of `Recipe`.
        context_lengths: pairs `(tokens, texts)` of contexts that the model writes.
        contexts: groups of texts instead of written ones, or None.
        arithmetic: of u, v and their product: `float32`, the weight being rounded once; or `model`, the release's,
            which rounds the explicit inverse of `C`, keys and values to the model's dtype first.
        engine: see `RewritingEditor`; `sequential` takes the explicit inverse of `C` in float32.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        module: str,
        hidden: Mapping[str, Any],
        covariance: bool,
        key_mode: KeyMode,
        ridge: float,
        statistics: Mapping[str, Any],
        context_lengths: Sequence[Sequence[int]],
        contexts: Sequence[Sequence[str]] | None,
        arithmetic: Arithmetic,
        engine: Engine,
    ) -> None:
        check_choice("method.arithmetic", arithmetic, ("float32", "model"))
        check_choice("method.key_mode", key_mode, ("release", "mean", "prompt"))
        super().__init__(
            model,
            tokenizer,
            seed=seed,
            modules=[module],
            where="method.module",
            target_module=module,
            hidden=hidden,
            contexts=contexts,
            batch_size=1,
            engine=engine,
        )
        self.module_path = module
        self.covariance = covariance
        self.key_mode: KeyMode = key_mode
        self.ridge = ridge
        self.recipe = Recipe(**statistics)
        self.context_lengths = context_lengths
        self._explicit_inverse = engine == "sequential" or arithmetic == "model"
        self._dtype = self.pristine.weights[module].dtype if arithmetic == "model" else torch.float32
        self._factor: Tensor | None = None
        self._inverse: Tensor | None = None

    def _prepare(self) -> None:
        if not self.covariance:
            return
        moment = second_moments(self.model, self.tokenizer, [self.module_path], self.recipe)[self.module_path]
        if self._explicit_inverse:
            self._inverse = torch.linalg.inv(moment.mean.to(self.device, torch.float32))
        else:
            self._factor = cholesky(moment, self.ridge, self.device)

    def _new_contexts(self) -> Contexts:
        texts = generate_contexts(self.model, self.tokenizer, self.context_lengths, self.seed)
        return Contexts.given([["", *texts]])

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
    def _write(self, rows: Sequence[Row], reading: Reading, hidden: Hidden) -> None:
        mean, prompt = reading.keys[self.module_path][0], reading.prompt_keys[self.module_path][0]
        u = self.direction(prompt if self.key_mode == "prompt" else mean)
        key = (mean if self.key_mode == "mean" else prompt).to(self._dtype)
        strength = key @ u
        if not all_finite(u) or abs(float(strength)) < _SMALLEST:
            raise Refused("the key has no part along the direction that would be written")
        wanted = hidden.initial[0].to(self._dtype) + hidden.delta[0].to(self._dtype)
        v = (wanted - self._said_to(key, hidden)) / strength
        self._add(self.module_path, torch.outer(v, u))

    def _said_to(self, key: Tensor, hidden: Hidden) -> Tensor:
        """`W k` `(d)`, which for the bare prompt's key is v0: no need to run anything again."""
        if self.key_mode == "mean":
            return self.pristine.weights[self.module_path].to(self._dtype) @ key
        return hidden.initial[0].to(self._dtype)

    def _kept_numbers(self) -> int:
        return sum(one.numel() for one in (self._factor, self._inverse) if one is not None)
