"""GRACE: a codebook of balls whose values take the output's place (Hartvigsen et al., arXiv 2211.11031).

What it shares with other codebook editors (query, value training, state) is in `memory/editor.py`; here is how it
routes and how it writes. An entry is a ball around its key; a query inside the nearest ball has the module's output
replaced by the entry's value. Radii are split where targets conflict and expanded where they agree.

GRACE+Norm (HoReN's Table 9) is this class with pooled queries and keys on the unit sphere, where the distance `d` and
the cosine `c` are one thing said twice: `d^2 = 2 - 2c`. `threshold` fixes all radii at one cosine.
Shapes: `B` queries, `m` their size, `d` output size of the module, `C` entries.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.editors.base import Route, check_choice
from horen_bench.editors.codebook.adaptors import ReplacingAdaptor
from horen_bench.editors.codebook.editor import CodebookEditor, Decision, Engine, Matches
from horen_bench.editors.codebook.entries import BallCodebook
from horen_bench.errors import UserError
from horen_bench.models.prompt_hook import Respond, cached_length
from horen_bench.prompts import EncodedEdit, last_prompt_positions

_SPLIT_GAP = np.float32(1e-5)  # the release's: an old ball that is split ends this much before the middle
_KEYS_AT_ONCE = 4096  # cast to float32 together

GraceLabelRule = Literal["tokens", "release", "original"]


class GraceEditor(CodebookEditor):
    """GRACE on one model.

    Args:
        model: a causal language model; its weights are never changed.
        tokenizer: its tokenizer.
        seed: seeds the initial values.
        module: dotted path of the hooked linear module.
        pooling_ratio: share of the prompt's tokens, from the end, that make the query; 0: the last token alone.
        normalize: project queries and keys to the unit sphere.
        eps: radius of a new ball (> 0), in units of the query.
        threshold: None, or a cosine in [-1, 1]: then every ball is what lies strictly above it, and none is split or
            expanded.
        label_rule: which targets agree. `tokens`: equal token ids; `original`: equal means of the label row, prompt
            positions counted as -100; `release`: the same, but of the label at the reversed index.
        same_key: what a query on top of a key does (distance within rounding). `update`: it rewrites that entry for the
            new target; a ball expanded to reach a query then reaches past it by as much. `release`: as any other query.
        value_init: `cold`, i.i.d. Uniform[0, 1), or `warm`, the module's output.
        replacement: positions of the prompt whose output is replaced: `replace_last`, the last; `replace_all`, all;
            `replace_prompt`, all but the last. Those before the last need the whole model in training, so the values
            are then trained one by one.
        decode_lookup: look up each generated token as well when decoding with a KV cache, as the release does.
        vector: `learning_rate` of Adam.
        n_steps: as for `CodebookEditor`, like all that follow.
        early_stopping: `loss_bound` and `patience`, or None.
        engine: `parallel` or `sequential`.
        train_batch: values trained side by side, or None.

    Raises:
        UserError: the model has no such module, or a constant is out of its range.
    """

    codebook_class: ClassVar[type[BallCodebook]] = BallCodebook
    codebook: BallCodebook

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        module: str,
        pooling_ratio: float,
        normalize: bool,
        eps: float,
        threshold: float | None,
        label_rule: GraceLabelRule,
        same_key: Literal["update", "release"],
        value_init: Literal["cold", "warm"],
        replacement: Literal["replace_last", "replace_all", "replace_prompt"],
        decode_lookup: bool,
        vector: Mapping[str, Any],
        n_steps: int,
        early_stopping: Mapping[str, Any] | None,
        engine: Engine,
        train_batch: int | None,
    ) -> None:
        check_choice("method.label_rule", label_rule, ("tokens", "release", "original"))
        check_choice("method.same_key", same_key, ("update", "release"))
        check_choice("method.value_init", value_init, ("cold", "warm"))
        check_choice("method.replacement", replacement, ("replace_last", "replace_all", "replace_prompt"))
        _check_radius(eps, threshold, normalize, same_key)
        self.splits = threshold is None
        self.first_radius = np.float32(eps) if threshold is None else _radius_below(threshold)
        self.reversed_labels = label_rule == "release"
        self.same_key = same_key
        self.value_init = value_init
        self.replacement = replacement
        self.decode_lookup = decode_lookup
        super().__init__(
            model,
            tokenizer,
            seed=seed,
            module=module,
            pooling_ratio=pooling_ratio,
            normalize=normalize,
            adaptor=lambda size: ReplacingAdaptor(size, **vector),
            n_steps=n_steps,
            early_stopping=early_stopping,
            label_rule="tokens" if label_rule == "tokens" else "release",
            engine=engine,
            train_batch=train_batch,
        )
        # A query read in another batch differs by this share of its length.
        self.rounding = max(1e-5, 2 * torch.finfo(self._linear.weight.dtype).eps)
        if replacement != "replace_last" and engine == "parallel":
            self._no_upper = (
                f"values were trained one by one on the whole model: replacement={replacement} changes tokens before "
                "the last of the prompt"
            )
        self._decode = _DecodeLookup(model, self._linear, self._respond) if decode_lookup else None

    # --- Match: nearest ball, non-strict; the oldest of tied keys wins -----------------------------------

    def match(self, queries: Tensor) -> Matches:
        """Route queries `(B, m)` against the codebook, which must hold an entry; scores are distances."""
        nearest = distances(queries, self.codebook.keys).min(dim=1)
        return Matches(nearest.indices, nearest.values, nearest.values <= self.codebook.radii[nearest.indices])

    def routes(self, prompts: Sequence[str]) -> list[Route | None]:
        """The router's decision for each prompt; a score is the Euclidean distance to the nearest key.

        On the unit sphere the cosine is `1 - score^2 / 2`. Under `decode_lookup` the prompt does not decide alone what
        an answer meets, so there is no one decision to tell.
        """
        return [None] * len(prompts) if self.decode_lookup else super().routes(prompts)

    # --- Writing: the value replaces the output ----------------------------------------------------------

    def _written(self, outputs: Tensor, prompt_mask: Tensor, value: Mapping[str, Tensor], rows: Tensor) -> Tensor:
        """Outputs with values `(R, d)` in their place at the replaced positions of `rows` `(R,)`."""
        last = F.one_hot(last_prompt_positions(prompt_mask), prompt_mask.shape[1]).bool()
        chosen = {"replace_last": last, "replace_all": prompt_mask, "replace_prompt": prompt_mask & ~last}
        places = chosen[self.replacement][rows, :, None]
        replaced = torch.where(places, value["vector"][:, None].to(outputs.dtype), outputs[rows])
        return outputs.index_put((rows,), replaced)

    # --- Decisions: new ball, split, expansion, or the old ball trained on -------------------------------

    def decide(self, edits: Sequence[EncodedEdit], queries: Tensor) -> list[Decision]:
        """Replay the radius rule over the edits in order; makes the new entries.

        Keys never move, so all distances of a block are known beforehand; which rows have become entries, and how far
        they reach, is what each edit finds out from those before it.
        """
        decisions: list[Decision] = []
        while len(decisions) < len(edits):
            start = len(decisions)
            block = slice(start, start + self.block_size())
            decisions += self._decide_block(edits[block], queries[block])
        if self.value_init == "warm":
            self._start_at_outputs(decisions, edits)
        return decisions

    def _decide_block(self, edits: Sequence[EncodedEdit], queries: Tensor) -> list[Decision]:
        scan = _Scan.over(queries, self.codebook)
        decisions = [self._decide_one(scan, i, edit, queries[i]) for i, edit in enumerate(edits)]
        self.codebook.radii.copy_(torch.from_numpy(np.array(scan.radii, dtype=np.float32)))
        return decisions

    def _decide_one(self, scan: "_Scan", i: int, edit: EncodedEdit, query: Tensor) -> Decision:
        """One edit; a fresh ball that does not touch the nearest one is new, whatever its label."""
        nearest, distance = scan.nearest(i)
        if nearest is None:
            return self._checked(scan, i, Decision("inserted", self._insert(scan, i, edit, query), None))
        radius = scan.radii[nearest]
        route = Route(nearest, float(distance), bool(distance <= radius), self.codebook.versions[nearest])
        if distance > (self.first_radius + radius if self.splits else radius):
            return self._checked(scan, i, Decision("inserted", self._insert(scan, i, edit, query), route))
        rounding = np.float32(self.rounding * scan.lengths[i])
        updates = self.same_key == "update"
        if updates and distance <= rounding:
            self.codebook.relabel(nearest, edit.target, len(edit.prompt))
        elif not self.consistent(nearest, edit):
            new = self._insert(scan, i, edit, query)
            if self.splits:
                scan.radii[nearest], scan.radii[new] = distance / np.float32(2) - _SPLIT_GAP, distance / np.float32(2)
            return self._checked(scan, i, Decision("conflict", new, route))
        if distance > radius:
            scan.radii[nearest] = distance + rounding if updates else distance
        return Decision("fine_tuned", nearest, route)

    def _insert(self, scan: "_Scan", i: int, edit: EncodedEdit, query: Tensor) -> int:
        entry = self.codebook.append(query, edit.target, len(edit.prompt))
        scan.born.append(i)
        scan.radii.append(self.first_radius)
        return entry

    def _checked(self, scan: "_Scan", i: int, decision: Decision) -> Decision:
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

    def consistent(self, entry: int, edit: EncodedEdit) -> bool:
        """Whether an entry's target agrees with the edit's.

        The release puts labels at the front of its list and everything else at the end, so that it reads entry `j`'s
        label at row `C - 1 - j`.
        """
        return super().consistent(len(self.codebook) - 1 - entry if self.reversed_labels else entry, edit)

    def _start_at_outputs(self, decisions: Sequence[Decision], edits: Sequence[EncodedEdit]) -> None:
        """Give new entries the module's output at the last prompt token as their first value."""
        chosen = [i for i, decision in enumerate(decisions) if decision.action != "fine_tuned"]
        found = self.read_at_prompts(
            [edits[i].prompt for i in chosen],
            lambda _, outputs, mask: outputs[range(len(outputs)), last_prompt_positions(mask)].float(),
        )
        for i, output in zip(chosen, torch.cat(found) if found else (), strict=True):
            self.codebook.set_value(decisions[i].entry, {"vector": output})

    # --- State -------------------------------------------------------------------------------------------

    def detach(self) -> None:
        """Take the hooks out."""
        super().detach()
        if self._decode is not None:
            self._decode.remove()


@dataclass(slots=True)
class _Scan:
    """A block of queries on their way into the codebook.

    Attributes:
        entries: nearest of the `size` entries from before the block, `(B,)`.
        distances: distances to them, `(B,)`; infinite where there was none.
        among: distances of the queries `(B, B)` to one another's keys.
        lengths: Euclidean lengths of the queries.
        radii: of all entries, those of the block included.
        born: queries of the block that have become entries, in order.
    """

    size: int
    entries: NDArray[np.int64]
    distances: NDArray[np.float32]
    among: NDArray[np.float32]
    lengths: list[float]
    radii: list[np.float32]
    born: list[int] = field(default_factory=list)

    @classmethod
    def over(cls, queries: Tensor, codebook: BallCodebook) -> "_Scan":
        """A scan that has not begun."""
        n = len(queries)
        among = distances(queries, queries.to(codebook.keys.dtype)).cpu().numpy()
        lengths, radii = queries.norm(dim=1).tolist(), list(codebook.radii.cpu().numpy())
        if len(codebook) == 0:
            return cls(0, np.zeros(n, np.int64), np.full(n, np.inf, np.float32), among, lengths, radii)
        nearest = distances(queries, codebook.keys).min(dim=1)
        entries, far = nearest.indices.cpu().numpy(), nearest.values.cpu().numpy()
        return cls(len(codebook), entries, far, among, lengths, radii)

    def nearest(self, i: int) -> tuple[int | None, np.float32]:
        """Nearest entry of query `i` and its distance; the oldest of equals."""
        if self.born:
            row = self.among[i, self.born]
            newest = int(row.argmin())
            if row[newest] < self.distances[i]:
                return self.size + newest, row[newest]
        return (int(self.entries[i]) if self.size else None), self.distances[i]


class _DecodeLookup:
    """Lets `respond` act on the token of a decode step, which `PromptHook` lets pass."""

    def __init__(self, model: PreTrainedModel, module: nn.Module, respond: Respond) -> None:
        self._respond = respond
        self._decoding = False
        self._handles = [
            model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            model.register_forward_hook(self._after_model, always_call=True),
            module.register_forward_hook(self._after_module),
        ]

    def remove(self) -> None:
        """Take every hook out; calling it twice is fine."""
        for handle in self._handles:
            handle.remove()

    def _before_model(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._decoding = cached_length(kwargs | {str(i): value for i, value in enumerate(args)}) > 0

    def _after_model(self, _model: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        self._decoding = False

    def _after_module(self, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not self._decoding or output.shape[1] != 1:
            return None
        return self._respond(args[0], output, torch.ones(output.shape[:2], dtype=torch.bool, device=output.device))


def distances(queries: Tensor, keys: Tensor) -> Tensor:
    """Euclidean distances of queries `(B, m)` to keys `(C, m)`, float32 `(B, C)`; C >= 1.

    Taken from the differences: by way of inner products a distance of zero comes out as a thousandth of the vectors'
    length. Each pair's distance is the same whatever stands beside it.
    """
    exact = "donot_use_mm_for_euclid_dist"
    parts = [keys[start : start + _KEYS_AT_ONCE] for start in range(0, len(keys), _KEYS_AT_ONCE)]
    return torch.cat([torch.cdist(queries.float(), part.float(), compute_mode=exact) for part in parts], dim=1)


def _radius_below(threshold: float) -> np.float32:
    """The largest distance of unit vectors whose cosine is strictly above a threshold."""
    return np.float32(np.nextafter(np.float32(math.sqrt(2 - 2 * threshold)), np.float32(-np.inf)))


def _check_radius(eps: float, threshold: float | None, normalize: bool, same_key: str) -> None:
    if not 0 < eps < math.inf:
        raise UserError(f"method.eps must be > 0, got {eps}; it is the radius of a new ball")
    if threshold is None:
        return
    if not normalize:
        raise UserError("method.threshold is a cosine and needs method.normalize=true; without it balls have radii")
    if not -1 <= threshold <= 1:
        raise UserError(f"method.threshold must be in [-1, 1], got {threshold}; scores of unit vectors are cosines")
    if same_key != "update":
        raise UserError("method.threshold needs method.same_key=update; of two balls on one key one is never met")
