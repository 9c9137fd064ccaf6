"""HoReN: a codebook read by normalized Hopfield retrieval (arXiv 2605.08143).

What it shares with other codebook editors (query, value, training, state) is in `memory/editor.py`; here is how it
routes (sections 2.2-2.4). Shapes: `B` queries, `m` their size, `C` entries.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.editors.base import check_choice
from horen_bench.editors.codebook.adaptors import Adaptor, LoraAdaptor, VectorAdaptor
from horen_bench.editors.codebook.editor import (
    CodebookEditor,
    Decision,
    Engine,
    LabelRule,
    Matches,
)
from horen_bench.editors.codebook.hopfield import refine, similarities
from horen_bench.errors import UserError
from horen_bench.prompts import EncodedEdit

# Identical keys give equal scores up to the order of a dot product's additions; scores this close are a tie.
_TIE = 1e-6


class HorenEditor(CodebookEditor):
    """HoReN on one model.

    Args:
        model: a causal language model; its weights are never changed.
        tokenizer: its tokenizer.
        seed: seeds the initial values.
        module: dotted path of the hooked linear module.
        threshold: tau; an entry acts if its score is strictly above it. A cosine in [-1, 1] if `normalize`.
        pooling_ratio: rho in [0, 1], share of the prompt's tokens, from the end, that make the query.
        normalize: project queries, keys and retrievals to the unit sphere; False is Table 10's ablation.
        hopfield: `beta` (> 0), `alpha` in [0, 1], `steps` (>= 0; 0: plain nearest key) and `eps` of the retrieval.
        adaptor: `vector` or `lora`, the form of a value.
        vector: `learning_rate` of vector values.
        lora: `learning_rate`, `rank` and `scale` of LoRA values.
        n_steps: as for `CodebookEditor`, like all that follow.
        early_stopping: `loss_bound` and `patience`, or None.
        label_rule: `tokens` or `release`.
        engine: `parallel` or `sequential`.
        train_batch: values trained side by side, or None.

    Raises:
        UserError: the model has no such module, or a constant is out of its range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        module: str,
        threshold: float,
        pooling_ratio: float,
        normalize: bool,
        hopfield: Mapping[str, Any],
        adaptor: Literal["vector", "lora"],
        vector: Mapping[str, Any],
        lora: Mapping[str, Any],
        n_steps: int,
        early_stopping: Mapping[str, Any] | None,
        label_rule: LabelRule,
        engine: Engine,
        train_batch: int | None,
    ) -> None:
        check_choice("method.adaptor", adaptor, ("vector", "lora"))
        _check_ranges(threshold, normalize, hopfield)
        self.threshold = threshold
        self.hopfield = dict(hopfield)
        super().__init__(
            model,
            tokenizer,
            seed=seed,
            module=module,
            pooling_ratio=pooling_ratio,
            normalize=normalize,
            adaptor=lambda size: _adaptor(adaptor, size, vector, lora),
            n_steps=n_steps,
            early_stopping=early_stopping,
            label_rule=label_rule,
            engine=engine,
            train_batch=train_batch,
        )

    # --- Match (2.3): damped Hopfield refinement, strict threshold, newest entry wins ties -------------

    def match(self, queries: Tensor, hidden: Tensor | None = None) -> Matches:
        """Route queries `(B, m)` against the codebook, which must hold an entry.

        Args:
            queries: unrefined.
            hidden: bool `(B, C)`, true where a query does not see an entry; None: it sees all.
        """
        keys = self.codebook.keys
        refined = refine(queries, keys, normalize=self.normalize, hidden=hidden, **self.hopfield)
        scores = similarities(refined, keys, hidden)
        best = scores.amax(dim=1, keepdim=True)
        newest = keys.shape[0] - 1 - (scores >= best - _TIE).flip(dims=[1]).int().argmax(dim=1)
        return Matches(newest, best[:, 0], best[:, 0] > self.threshold)

    # --- Writing (2.4): insert, or fine-tune the matched entry -----------------------------------------

    def decide(self, edits: Sequence[EncodedEdit], queries: Tensor) -> list[Decision]:
        """Route each edit against the codebook as it stands when its turn comes; insert the new keys.

        A block of edits is routed at once as if each of them inserted its key. That holds up to the first one that
        fine-tunes an entry instead; from there on the rest is routed again.
        """
        decisions: list[Decision] = []
        while len(decisions) < len(edits):
            done = len(decisions)
            block = slice(done, done + (self.block_size() if len(self.codebook) else 1))
            decisions += self._decide_block(edits[block], queries[block])
        return decisions

    def _decide_block(self, edits: Sequence[EncodedEdit], queries: Tensor) -> list[Decision]:
        """Decisions from the first edit of a block up to the first that inserts nothing."""
        before = len(self.codebook)
        for edit, query in zip(edits, queries, strict=True):
            self.codebook.append(query, edit.target, len(edit.prompt))
        if before == 0:
            return [Decision("inserted", 0, None)]
        newer = torch.ones((len(edits), len(edits)), dtype=torch.bool, device=queries.device).triu()
        hidden = F.pad(newer, (before, 0), value=False)
        decisions: list[Decision] = []
        for i, route in enumerate(self.as_routes(self.match(queries, hidden))):
            if route.matched and route.entry is not None and self.consistent(route.entry, edits[i]):
                self.codebook.truncate(before + i)
                return [*decisions, Decision("fine_tuned", route.entry, route)]
            decisions.append(Decision("conflict" if route.matched else "inserted", before + i, route))
        return decisions


def _adaptor(kind: str, size: int, vector: Mapping[str, Any], lora: Mapping[str, Any]) -> Adaptor:
    return VectorAdaptor(size, **vector) if kind == "vector" else LoraAdaptor(size, **lora)


def _check_ranges(threshold: float, normalize: bool, hopfield: Mapping[str, Any]) -> None:
    if normalize and not -1 <= threshold <= 1:
        raise UserError(f"method.threshold must be in [-1, 1], got {threshold}; scores of unit vectors are cosines")
    if set(hopfield) != {"beta", "alpha", "steps", "eps"}:
        raise UserError(f"method.hopfield must have beta, alpha, steps and eps, got {', '.join(map(str, hopfield))}")
    if not hopfield["beta"] > 0:
        raise UserError(f"method.hopfield.beta must be > 0, got {hopfield['beta']}")
    if not 0 <= hopfield["alpha"] <= 1:
        raise UserError(f"method.hopfield.alpha must be in [0, 1], got {hopfield['alpha']}")
    if hopfield["steps"] < 0 or hopfield["eps"] < 0:
        raise UserError(f"method.hopfield.steps and .eps must not be negative, got {dict(hopfield)}")
