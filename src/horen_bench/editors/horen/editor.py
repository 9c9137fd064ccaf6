"""HoReN: a codebook read by normalized Hopfield retrieval (arXiv 2605.08143).

What it shares with other codebook editors (query, value, training, state) is in `codebook/editor.py`; here is how it
routes (sections 2.2-2.4). Shapes: `B` queries, `m` their size, `C` entries.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from horen_bench.editors.codebook import compat
from horen_bench.editors.codebook.adaptors import Adaptor, LoraAdaptor, VectorAdaptor
from horen_bench.editors.codebook.editor import CodebookEditor
from horen_bench.editors.codebook.hopfield import refine, similarities
from horen_bench.editors.codebook.queries import in_words
from horen_bench.editors.codebook.routing import Agreement, Decision, Matches, RouterDescription, same_tokens
from horen_bench.editors.horen.config import HorenConfig
from horen_bench.prompts import EncodedEdit

# Identical keys give equal scores up to the order of a dot product's additions; scores this close are a tie.
_TIE = 1e-6


class HorenEditor(CodebookEditor[HorenConfig]):
    """HoReN on one model."""

    agreements: ClassVar[Mapping[str, Agreement]] = {"tokens": same_tokens, "release": compat.same_row_mean}

    def new_adaptor(self, size: int) -> Adaptor:
        """A vector, or a LoRA map."""
        if self.config.adaptor == "vector":
            return VectorAdaptor(size, self.config.vector.learning_rate)
        lora = self.config.lora
        return LoraAdaptor(size, lora.learning_rate, lora.rank, lora.scale)

    # --- Match (2.3): damped Hopfield refinement, strict threshold, newest entry wins ties -------------

    def refined(self, queries: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Queries `(B, m)` after the Hopfield steps towards the keys; `hidden` as for `match`."""
        steps = dict(self.config.hopfield)
        return refine(queries, self.codebook.keys, normalize=self.config.normalize, hidden=hidden, **steps)

    def match(self, queries: Tensor, hidden: Tensor | None = None) -> Matches:
        """Route queries `(B, m)` against the codebook, which must hold an entry.

        Args:
            queries: unrefined.
            hidden: bool `(B, C)`, true where a query does not see an entry; None: it sees all.
        """
        keys = self.codebook.keys
        scores = similarities(self.refined(queries, hidden), keys, hidden)
        best = scores.amax(dim=1, keepdim=True)
        newest = keys.shape[0] - 1 - (scores >= best - _TIE).flip(dims=[1]).int().argmax(dim=1)
        return Matches(newest, best[:, 0], best[:, 0] > self.config.threshold)

    def similarity(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Inner product of each refined query with its key, `(B,)`; a cosine if `normalize`."""
        products: Tensor = torch.linalg.vecdot(self.refined(queries), keys.float())
        return products

    def describe_router(self) -> RouterDescription:
        """Pooling, number of Hopfield steps, threshold."""
        steps = f"T = {self.config.hopfield.steps}"
        return RouterDescription(
            stage=f"{in_words(self.config.pooling_ratio)}, {steps}",
            measure="cosine" if self.config.normalize else "inner product",
            threshold=self.config.threshold,
            rule=f"Hopfield, {steps}",
        )

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
