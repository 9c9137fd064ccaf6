"""GRACE: a codebook of balls whose values take the output's place (Hartvigsen et al., arXiv 2211.11031).

What it shares with other codebook editors (query, value training, state) is in `codebook/editor.py`; here is how it
routes and how it writes. An entry is a ball around its key; a query inside the nearest ball has the module's output
replaced by the entry's value. Radii are split where targets conflict and expanded where they agree.

GRACE+Norm (HoReN's Table 9) is this class with pooled queries and keys on the unit sphere, where the distance `d` and
the cosine `c` are one thing said twice: `d^2 = 2 - 2c`. `threshold` fixes all radii at one cosine.
Shapes: `B` queries, `m` their size, `d` output size of the module, `C` entries.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.cases import Route
from horen_bench.editors.codebook import compat
from horen_bench.editors.codebook.adaptors import Adaptor, ReplacingAdaptor
from horen_bench.editors.codebook.editor import CodebookEditor
from horen_bench.editors.codebook.entries import BallCodebook
from horen_bench.editors.codebook.queries import in_words
from horen_bench.editors.codebook.routing import Agreement, Decision, Matches, RouterDescription, same_tokens
from horen_bench.editors.grace.config import GraceConfig
from horen_bench.editors.grace.scan import BlockScan, distances
from horen_bench.models.prompt_hook import PromptHook
from horen_bench.prompts import EncodedEdit, PromptEncoder, last_prompt_positions

_SPLIT_GAP = np.float32(1e-5)  # the release's: an old ball that is split ends this much before the middle
# Whether a query at a distance lies on the nearest key, and where a ball ends that is expanded to it, from the distance
# and the rounding of distances.
Reach = Callable[[np.float32, np.float32], tuple[bool, np.float32]]


class GraceEditor(CodebookEditor[GraceConfig]):
    """GRACE on one model.

    Attributes:
        first_radius: of a new ball.
        rounding: share of its length by which a query differs when it is read in another batch.
    """

    codebook_class: ClassVar[type[BallCodebook]] = BallCodebook
    codebook: BallCodebook
    agreements: ClassVar[Mapping[str, Agreement]] = {
        "tokens": same_tokens,
        "original": compat.same_row_mean,
        "release": compat.same_row_mean_reversed,
    }

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | PromptEncoder,
        config: GraceConfig,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(model, tokenizer, config, seed=seed)
        self.first_radius = np.float32(config.eps) if config.threshold is None else _radius_below(config.threshold)
        self.rounding = max(1e-5, 2 * torch.finfo(self.codebook.keys.dtype).eps)
        self._reach: Reach = compat.exact_reach if config.same_key == "release" else _reach
        if config.replacement != "replace_last" and config.engine == "parallel":
            self._fast.give_up(f"replacement={config.replacement} changes tokens before the last of the prompt")

    def new_adaptor(self, size: int) -> Adaptor:
        """A vector that takes the output's place."""
        return ReplacingAdaptor(size, self.config.vector.learning_rate)

    def new_hook(self) -> PromptHook:
        """Under `decode_lookup` it acts on generated tokens too, as the release does where it decodes with a cache."""
        module = self.model.get_submodule(self.config.module)
        return PromptHook(self.model, module, self._respond, decode_steps=self.config.decode_lookup)

    # --- Match: nearest ball, non-strict; the oldest of tied keys wins -----------------------------------

    def match(self, queries: Tensor) -> Matches:
        """Route queries `(B, m)` against the codebook, which must hold an entry; scores are distances."""
        nearest = distances(queries, self.codebook.keys).min(dim=1)
        return Matches(nearest.indices, nearest.values, nearest.values <= self.codebook.radii[nearest.indices])

    def routes(self, prompts: Sequence[str]) -> list[Route | None]:
        """The router's decision for each prompt; a score is the Euclidean distance to the nearest key.

        On the unit sphere the cosine is `1 - score^2 / 2`. Under `decode_lookup` the prompt does not decide alone what
        an answer meets, so there is no single decision to give.
        """
        return [None] * len(prompts) if self.config.decode_lookup else super().routes(prompts)

    def similarity(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Cosine of each query with its key if `normalize`, else their distance, `(B,)`."""
        scores: Tensor = (
            torch.linalg.vecdot(queries, keys.float())
            if self.config.normalize
            else torch.linalg.vector_norm(queries - keys.float(), dim=1)
        )
        return scores

    def describe_router(self) -> RouterDescription:
        """Pooling and the radius of a new ball."""
        radius, stage, rule = float(self.first_radius), in_words(self.config.pooling_ratio), "Euclidean distance"
        if self.config.normalize:
            return RouterDescription(stage, "cosine", 1 - radius**2 / 2, rule)
        return RouterDescription(stage, "distance", radius, rule)

    # --- Writing: the value replaces the output ----------------------------------------------------------

    def _written(self, outputs: Tensor, prompt_mask: Tensor, value: Mapping[str, Tensor], rows: Tensor) -> Tensor:
        """Outputs with values `(R, d)` in their place at the replaced positions of `rows` `(R,)`."""
        last = F.one_hot(last_prompt_positions(prompt_mask), prompt_mask.shape[1]).bool()
        places = {"replace_last": last, "replace_all": prompt_mask, "replace_prompt": prompt_mask & ~last}
        here = places[self.config.replacement][rows, :, None]
        replaced = torch.where(here, value["vector"][:, None].to(outputs.dtype), outputs[rows])
        return outputs.index_put((rows,), replaced)

    # --- Decisions: new ball, split, expansion, or the old ball trained on -------------------------------

    def decide(self, edits: Sequence[EncodedEdit], queries: Tensor) -> list[Decision]:
        """Replay the radius rule over the edits in order; makes the new entries."""
        decisions: list[Decision] = []
        while len(decisions) < len(edits):
            start = len(decisions)
            block = slice(start, start + self.block_size())
            decisions += self._decide_block(edits[block], queries[block])
        if self.config.value_init == "warm":
            self._start_at_outputs(decisions, edits)
        return decisions

    def _decide_block(self, edits: Sequence[EncodedEdit], queries: Tensor) -> list[Decision]:
        scan = BlockScan.over(queries, self.codebook)
        decisions = [self._decide_one(scan, i, edit, queries[i]) for i, edit in enumerate(edits)]
        self.codebook.radii.copy_(torch.from_numpy(np.array(scan.radii, dtype=np.float32)))
        return decisions

    def _decide_one(self, scan: BlockScan, i: int, edit: EncodedEdit, query: Tensor) -> Decision:
        """One edit; a fresh ball that does not touch the nearest one is new, whatever its label."""
        nearest, distance = scan.nearest(i)
        if nearest is None:
            return self._checked(scan, i, Decision("inserted", self._insert(scan, i, edit, query), None))
        radius = scan.radii[nearest]
        route = Route(nearest, float(distance), bool(distance <= radius), self.codebook.versions[nearest])
        if distance > (self.first_radius + radius if self.config.splits else radius):
            return self._checked(scan, i, Decision("inserted", self._insert(scan, i, edit, query), route))
        on_key, reach = self._reach(distance, np.float32(self.rounding * scan.lengths[i]))
        if on_key:
            self.codebook.relabel(nearest, edit.target, len(edit.prompt))
        elif not self.consistent(nearest, edit):
            new = self._insert(scan, i, edit, query)
            if self.config.splits:
                scan.radii[nearest], scan.radii[new] = distance / np.float32(2) - _SPLIT_GAP, distance / np.float32(2)
            return self._checked(scan, i, Decision("conflict", new, route))
        if distance > radius:
            scan.radii[nearest] = reach
        return Decision("fine_tuned", nearest, route)

    def _insert(self, scan: BlockScan, i: int, edit: EncodedEdit, query: Tensor) -> int:
        entry = self.codebook.append(query, edit.target, len(edit.prompt))
        scan.born.append(i)
        scan.radii.append(self.first_radius)
        return entry

    def _checked(self, scan: BlockScan, i: int, decision: Decision) -> Decision:
        """The decision to write a new entry, looked up once more: does the edit's own prompt reach it?"""
        entry, distance = scan.nearest(i)
        assert entry is not None
        radius = scan.radii[entry]
        if entry != decision.entry or distance > radius:
            problem = (
                f"entry {decision.entry} is not reached by its own prompt, which meets entry {entry} at distance "
                f"{distance:.3g}, radius {radius:.3g}; nothing was trained"
            )
            return Decision("failed", decision.entry, decision.route, problem)
        if radius <= self.rounding * scan.lengths[i]:
            problem = (
                f"the radius of entry {entry} is as small as rounding errors, {radius:.3g}: they decide who reaches it"
            )
            return Decision(decision.action, entry, decision.route, problem)
        return decision

    def _start_at_outputs(self, decisions: Sequence[Decision], edits: Sequence[EncodedEdit]) -> None:
        """Give new entries the module's output at the last prompt token as their first value."""
        new = [i for i, decision in enumerate(decisions) if decision.action != "fine_tuned"]
        if not new:
            return
        outputs = self.read_at_prompts(
            [edits[i].prompt for i in new],
            lambda _, outputs, mask: outputs[range(len(outputs)), last_prompt_positions(mask)].float(),
        )
        for i, output in zip(new, outputs, strict=True):
            self.codebook.set_value(decisions[i].entry, {"vector": output})


def _reach(distance: np.float32, rounding: np.float32) -> tuple[bool, np.float32]:
    """A query within rounding of a key lies on it, and an expanded ball reaches past its query by as much."""
    return bool(distance <= rounding), distance + rounding


def _radius_below(threshold: float) -> np.float32:
    """The largest distance of unit vectors whose cosine is strictly above a threshold."""
    return np.float32(np.nextafter(np.float32(math.sqrt(2 - 2 * threshold)), np.float32(-np.inf)))
