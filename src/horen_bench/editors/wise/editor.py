"""WISE on one model: shards of edits, their merging, and inference through the router.

A shard is `save_freq` edits that share a side weight and a gradient mask. A finished shard is stored, the side weight
starts again from the module's own weight, and every `merge_freq` edits the stored shards become one. No shard depends
on another, so those of one call of `edit` are trained side by side.
Shapes: `m` input and `d` output size of the module.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import ACT2FN

from horen_bench.cases import EditCase
from horen_bench.editors.base import Editor, EditRecord, check_choice
from horen_bench.editors.wise.irrelevant import check_disjoint, irrelevant_prompts
from horen_bench.editors.wise.layers import SideLayers, plain_pass
from horen_bench.editors.wise.masks import GradientMasks
from horen_bench.editors.wise.merging import ties
from horen_bench.editors.wise.routing import Memory, Routed, TokenHook, route
from horen_bench.editors.wise.rows import TrainingRows, generated_templates, training_rows
from horen_bench.editors.wise.training import (
    Activation,
    Extra,
    Margins,
    SideEdit,
    SideSchedule,
    SideTrained,
    Stopping,
    train_sides,
)
from horen_bench.errors import UserError
from horen_bench.models.architecture import check_linear, decoder_layer_index, is_last_layer
from horen_bench.models.partial import NotSupportedError
from horen_bench.prompts import encode_edit

Engine = Literal["cached", "sequential"]
LocSource = Literal["disjoint", "release"]

NOTHING_RECORDED = 1e9  # activation of a side weight before its first edit: no score reaches it
_NEW_SHARE = 0.4  # of the new shards together, where `retrieve` is off and an older merge is there


@dataclass(slots=True)
class OpenShard:
    """Edits that share a side weight, or those of them that are written now.

    Attributes:
        start: number of its first training.
        cases: in order.
        mask: of the gradient, `(d, m)`.
        weight: the side weight so far; None: nothing was trained.
        lowest: smallest activation so far.
    """

    start: int
    cases: Sequence[EditCase]
    mask: Tensor
    weight: Tensor | None
    lowest: float

    def take(self, trained: SideTrained) -> None:
        """Go on from an edit, unless it had no finite pass."""
        if math.isfinite(trained.activation):
            self.weight, self.lowest = trained.weight, min(self.lowest, trained.activation)


class WiseEditor(Editor):
    """WISE on one model.

    Args:
        model: a causal language model; its weights are never changed.
        tokenizer: its tokenizer.
        seed: of the gradient masks.
        module: dotted path of the linear module that gets side weights.
        retrieve: keep every merged memory and route among them (WISE-Retrieve); False: one merged weight (WISE-Merge).
        templates: contexts with one `{}` each, or None to let the unedited model write ten of them greedily.
        learning_rate: of SGD.
        weight_decay: of SGD; reaches masked elements too.
        n_steps: most steps per edit.
        early_stopping: `loss` and `change`, below which both training stops.
        act_margin: alpha, beta and gamma of the activation loss.
        act_ratio: a routing threshold is this times the smallest activation of a memory's edits.
        mask_ratio: share of the elements that a shard trains.
        norm_constraint: farthest that an element may move; None: any.
        save_freq: edits per shard.
        merge_freq: edits per merge, a multiple of `save_freq`.
        density: share of a shard's difference that TIES keeps.
        loc_source: where the irrelevant prompt of an edit is from. `disjoint`: a list that has nothing to do with the
            dataset, in turn; `release`: the case's own locality prompt, on which the editor is later tested.
        irrelevant_prompts: text file with a prompt a line for `disjoint`; None: a built-in list.
        add_bias: a side weight's output gets the module's bias; False drops it, as published.
        shards_at_once: most shards of one call of `edit` that are trained side by side; above 1, the runner hands over
            the cases of so many shards at once.
        engine: `cached` computes what lies below the module once per edit; `sequential` runs the whole model at every
            step. Same numbers up to rounding.

    Raises:
        UserError: the model has no such module, or a constant is out of its range.
    """

    release_mode: ClassVar[Literal["generate", "teacher_forced"]] = "teacher_forced"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        module: str,
        retrieve: bool,
        templates: Sequence[str] | None,
        learning_rate: float,
        weight_decay: float,
        n_steps: int,
        early_stopping: Mapping[str, Any],
        act_margin: Sequence[float],
        act_ratio: float,
        mask_ratio: float,
        norm_constraint: float | None,
        save_freq: int,
        merge_freq: int,
        density: float,
        loc_source: LocSource,
        irrelevant_prompts: str | None,
        add_bias: bool,
        shards_at_once: int,
        engine: Engine,
    ) -> None:
        check_choice("method.engine", engine, ("cached", "sequential"))
        check_choice("method.loc_source", loc_source, ("disjoint", "release"))
        _check_ranges(templates, act_margin, act_ratio, mask_ratio, density)
        _check_frequencies(save_freq, merge_freq, shards_at_once)
        linear = check_linear(model, module, where="method.module")
        self.model = model
        self.tokenizer = tokenizer
        self.module_path = module
        self.retrieve = retrieve
        self.act_ratio = act_ratio
        self.save_freq = save_freq
        self.merge_freq = merge_freq
        self.density = density
        self.loc_source: LocSource = loc_source
        self.add_bias = add_bias
        self.engine: Engine = engine
        self.shards_at_once = shards_at_once
        self.slice_size = 1 if shards_at_once == 1 else shards_at_once * save_freq
        self.schedule = SideSchedule(
            learning_rate, weight_decay, n_steps, Stopping(**early_stopping), Margins(*act_margin), norm_constraint
        )
        self.n_edits = 0
        self.live: Memory | None = None
        self.memories: list[Memory] = []
        self.merged: Memory | None = None
        self._lowest = NOTHING_RECORDED
        self._linear = linear
        self._activation = _activation_of(model)
        self._masks = GradientMasks(seed, mask_ratio, linear.weight)
        self._templates = list(templates) if templates else None
        self._irrelevant = _irrelevant_list(irrelevant_prompts)
        self._borrowed = 0
        self._upper: SideLayers | None = None
        self._no_upper: str | None = None
        self._one: Memory | None = None
        self.hook = TokenHook(model, linear, self._respond)

    # --- Inference -------------------------------------------------------------------------------------

    def _respond(self, inputs: Tensor, outputs: Tensor, mask: Tensor) -> Tensor | None:
        if self.live is None and not self.memories and self.merged is None:
            return None
        return self.routed(inputs, outputs, mask).outputs

    @torch.no_grad()
    def routed(self, inputs: Tensor, outputs: Tensor, mask: Tensor) -> Routed:
        """Send rows `(B, T, m)` with the module's own outputs `(B, T, d)` through the weight that they call for."""
        live, memories = (self.live, self.memories) if self.retrieve else (None, [self._one_weight()])
        if live is None and self._bias() is not self._linear.bias:
            live = Memory(self._linear.weight, NOTHING_RECORDED)  # scores the missing bias, as published
        return route(
            inputs,
            outputs,
            mask,
            live=live,
            memories=memories,
            act_ratio=self.act_ratio,
            activation=self._activation,
            bias=self._bias(),
        )

    def _bias(self) -> Tensor | None:
        return self._linear.bias if self.add_bias else None

    # --- Writing ---------------------------------------------------------------------------------------

    def expect(self, cases: Sequence[EditCase]) -> None:
        """Refuse cases that are tested on a prompt of the irrelevant list."""
        if self.loc_source == "disjoint":
            check_disjoint(self._irrelevant, cases)

    def edit(self, cases: Sequence[EditCase]) -> list[EditRecord]:
        """Write the cases; each continues on the side weight of its shard, shards side by side."""
        self.expect(cases)
        records: list[EditRecord] = []
        while len(records) < len(cases):
            records += self._write_shards(self._next_shards(cases[len(records) :]))
        return records

    def _next_shards(self, cases: Sequence[EditCase]) -> list[OpenShard]:
        """The open shard and those behind it, as far as the cases go and as many as are trained side by side."""
        shards: list[OpenShard] = []
        done = 0
        while done < len(cases) and len(shards) < self.shards_at_once:
            at = self.n_edits + done
            room = self.save_freq - at % self.save_freq
            mask = self._masks.of(at // self.save_freq)
            shards.append(OpenShard(at, cases[done : done + room], mask, None, NOTHING_RECORDED))
            done += room
        shards[0].weight, shards[0].lowest = self.live.weight if self.live else None, self._lowest
        return shards

    def _write_shards(self, shards: Sequence[OpenShard]) -> list[EditRecord]:
        """Train the shards in lockstep, edit by edit, and take them in one after the other."""
        records: list[list[EditRecord]] = [[] for _ in shards]
        for place, cases in enumerate(zip_longest(*(shard.cases for shard in shards))):
            started = time.perf_counter()
            chosen = [i for i, case in enumerate(cases) if case is not None and self._askable(case)]
            edits = [self._side_edit(cases[i], shards[i], place) for i in chosen]
            trained = dict(zip(chosen, self._train(edits), strict=True))
            for i, one in trained.items():
                shards[i].take(one)
            present = [i for i, case in enumerate(cases) if case is not None]
            seconds = (time.perf_counter() - started) / len(present)
            for i in present:
                records[i].append(record_of(cases[i], trained.get(i), seconds))
        for shard in shards:
            self._lowest = min(self._lowest, shard.lowest)
            self.live = None if shard.weight is None else Memory(shard.weight, self._lowest)
            self.n_edits += len(shard.cases)
            self._close_shard()
        self._one = None
        return [record for some in records for record in some]

    def _askable(self, case: EditCase) -> bool:
        return bool(case.prompt.strip() and encode_edit(self.tokenizer, case.prompt, case.target).target)

    def _side_edit(self, case: EditCase, shard: OpenShard, place: int) -> SideEdit:
        number = shard.start + place
        return SideEdit(self._rows(case, number), shard.mask, self._start(shard.weight), number)

    def _start(self, weight: Tensor | None) -> Tensor:
        """A side weight to go on from; None: the module's own."""
        return self._linear.weight.detach() if weight is None else weight

    def _train(self, edits: Sequence[SideEdit]) -> list[SideTrained]:
        """Train edits of different shards: in one pass, or one by one where only the whole model will do."""
        upper = self._upper_layers() if self.engine == "cached" and edits else None
        settings: dict[str, Any] = {"base": self._linear.weight.detach(), "schedule": self.schedule}
        if upper is not None:
            forward = upper.side_pass([edit.rows for edit in edits], self._bias(), self._activation)
            return train_sides(edits, forward=forward, extra=self._extra(edits), **settings)
        trained = []
        for edit in edits:
            forward = plain_pass(self.model, self.hook, edit.rows, self._bias(), self._activation)
            trained += train_sides([edit], forward=forward, extra=self._extra([edit]), **settings)
        return trained

    def _extra(self, edits: Sequence[SideEdit]) -> Extra | None:
        """A further term of the edits' losses; WISE has none."""
        return None

    def _upper_layers(self) -> SideLayers | None:
        """The fast path's layers, or None where the model does not fit it; then `warnings` says so."""
        if self._upper is None and self._no_upper is None:
            try:
                self._upper = SideLayers(self.model, self._linear, decoder_layer_index(self.module_path) or 0)
            except NotSupportedError as reason:
                self._no_upper = f"every training step ran the whole model: {reason}"
        return self._upper

    def _rows(self, case: EditCase, turn: int) -> TrainingRows:
        """What a case is trained on; `turn` is the number of its training."""
        return training_rows(
            self.tokenizer,
            self._contexts(),
            prompt=case.prompt,
            target=case.target,
            irrelevant=self._irrelevant_prompt(case, turn),
            device=self.model.device,
        )

    def _contexts(self) -> list[str]:
        if self._templates is None:
            with self.hook.responding(lambda *_: None):
                self._templates = generated_templates(self.model, self.tokenizer)
        return self._templates

    def _irrelevant_prompt(self, case: EditCase, turn: int) -> str:
        """The prompt that this edit must not affect."""
        if self.loc_source == "release":
            if case.locality:
                return case.locality[0].prompt
            self._borrowed += 1
        return self._irrelevant[turn % len(self._irrelevant)]

    # --- Shards and merging ----------------------------------------------------------------------------

    def _close_shard(self) -> None:
        """Store the side weight after `save_freq` edits, merge what is stored after `merge_freq`."""
        if self.n_edits % self.save_freq == 0:
            self.memories.append(self.live or Memory(self._linear.weight.detach().clone(), self._lowest))
            self._reset()
        if self.n_edits % self.merge_freq == 0:
            self._merge()

    def _reset(self) -> None:
        """The side weight starts again from the module's own; WISE-Merge keeps its smallest activation for good."""
        self.live = None
        if self.retrieve:
            self._lowest = NOTHING_RECORDED

    def _merge(self) -> None:
        if not self.retrieve:
            self.merged, self.memories = self._merged_with(self.memories), []
            return
        n_shards = self.merge_freq // self.save_freq
        shards = self.memories[-n_shards:]
        self.memories[-n_shards:] = [self._joined(shards, [1 / n_shards] * n_shards)]

    def _merged_with(self, shards: Sequence[Memory]) -> Memory:
        """The one weight of WISE-Merge with further shards in it; the older merge keeps the larger share."""
        if self.merged is None:
            return self._joined(shards, [1 / len(shards)] * len(shards))
        return self._joined([*shards, self.merged], [_NEW_SHARE / len(shards)] * len(shards) + [1 - _NEW_SHARE])

    def _joined(self, parts: Sequence[Memory], shares: Sequence[float]) -> Memory:
        weight = ties([part.weight for part in parts], self._linear.weight.detach(), shares, self.density)
        return Memory(weight, min(part.activation for part in parts))

    def _one_weight(self) -> Memory:
        """What WISE-Merge answers with: the merge, and in it what waits for the next one."""
        if self._one is None:
            waiting = [*self.memories, *([self.live] if self.live else [])]
            weight = self._merged_with(waiting) if waiting else self.merged
            assert weight is not None
            self._one = Memory(weight.weight, self._lowest)
        return self._one

    # --- State -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """The live side weight, the stored ones, and the number of edits, from which shard and mask follow."""
        state = {
            "n_edits": torch.tensor(self.n_edits),
            "n_borrowed": torch.tensor(self._borrowed),
            "lowest": torch.tensor(self._lowest, dtype=torch.float64),
            "memories.activations": torch.tensor([one.activation for one in self.memories], dtype=torch.float64),
        }
        state |= {f"memories.{i}": one.weight.clone() for i, one in enumerate(self.memories)}
        for name, one in (("live", self.live), ("merged", self.merged)):
            if one is not None:
                state[name] = one.weight.clone()
                state[f"{name}.activation"] = torch.tensor(one.activation, dtype=torch.float64)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from saved side weights."""
        for name in ("n_edits", "n_borrowed", "lowest", "memories.activations"):
            if name not in state:
                raise ValueError(f"the state lacks '{name}'; it is not one of this editor's")
        activations = state["memories.activations"].tolist()
        memories = [Memory(self._loaded(state, f"memories.{i}"), one) for i, one in enumerate(activations)]
        live, merged = (
            Memory(self._loaded(state, name), state[f"{name}.activation"].item()) if name in state else None
            for name in ("live", "merged")
        )
        self.memories, self.live, self.merged, self._one = memories, live, merged, None
        self.n_edits, self._borrowed = int(state["n_edits"]), int(state["n_borrowed"])
        self._lowest = state["lowest"].item()

    def _loaded(self, state: Mapping[str, Tensor], name: str) -> Tensor:
        weight = self._linear.weight
        if name not in state or state[name].shape != weight.shape:
            raise ValueError(f"the state has no '{name}' of shape {tuple(weight.shape)}, that of {self.module_path}")
        return state[name].to(weight, copy=True)

    def detach(self) -> None:
        """Take the hook out."""
        self.hook.remove()

    def side_parameters(self) -> int:
        """Numbers in side weights and their activations."""
        stored = [*self.memories, *(one for one in (self.live, self.merged) if one)]
        return len(stored) * (self._linear.weight.numel() + 1)

    def warnings(self) -> list[str]:
        """Where the irrelevant prompts are from, and limits where they apply."""
        found = [_source_sentence(self.loc_source)]
        if self._borrowed:
            found.append(f"{self._borrowed} cases have no locality prompt; theirs are from the disjoint list")
        if self._no_upper:
            found.append(self._no_upper)
        if is_last_layer(self.model, self.module_path):
            found.append(f"{self.module_path} is in the last block: no attention sees what a side weight writes")
        return found


def _source_sentence(source: LocSource) -> str:
    if source == "release":
        return (
            "loc_source=release: trained on the locality prompts of the cases that it is tested on; Loc is optimistic"
        )
    return "loc_source=disjoint: trained on irrelevant prompts that no case is tested on"


def record_of(case: EditCase, trained: SideTrained | None, seconds: float) -> EditRecord:
    """What happened to a case; `trained` is None where there was nothing to train on."""
    if trained is None:
        problem = "prompt or target has no token"
        return EditRecord(case.id, "failed", None, None, math.nan, 0, seconds, problem)
    doubt = None if trained.finite else "the loss was not finite; the last finite side weight was kept"
    written = trained.finite or trained.steps > 0
    return EditRecord(
        case.id, "inserted" if written else "failed", None, None, trained.loss, trained.steps, seconds, doubt
    )


def _irrelevant_list(path: str | None) -> list[str]:
    return list(irrelevant_prompts(path))


def _activation_of(model: PreTrainedModel) -> Activation:
    """The model's hidden activation function, which the release applies to the module's output."""
    config = model.config.get_text_config()
    name = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None)
    if name not in ACT2FN:
        raise UserError(f"method.module: {type(model).__name__} names no activation function that transformers knows")
    found: Activation = ACT2FN[name]
    return found


def _check_frequencies(save_freq: int, merge_freq: int, shards_at_once: int) -> None:
    if shards_at_once < 1:
        raise UserError(f"method.shards_at_once must be at least 1, got {shards_at_once}")
    if save_freq < 1 or merge_freq < 1 or merge_freq % save_freq:
        raise UserError(
            f"method.merge_freq must be a multiple of method.save_freq, got {merge_freq} and {save_freq}; "
            "whole shards are merged"
        )


def _check_ranges(
    templates: Sequence[str] | None, act_margin: Sequence[float], act_ratio: float, mask_ratio: float, density: float
) -> None:
    if templates is not None and not all("{}" in template for template in templates):
        raise UserError("every one of method.templates must hold '{}', where the prompt goes")
    if len(act_margin) != 3:
        raise UserError(f"method.act_margin must be [alpha, beta, gamma], got {list(act_margin)}")
    if not act_ratio > 0:
        raise UserError(f"method.act_ratio must be > 0, got {act_ratio}")
    if not 0 < mask_ratio <= 1:
        raise UserError(f"method.mask_ratio must be in (0, 1], got {mask_ratio}; it is the share that is trained")
    if not 0 < density <= 1:
        raise UserError(f"method.density must be in (0, 1], got {density}")
