"""WISE on one model: shards of edits, their merging, and inference through the router.

A shard is `save_freq` edits that share a side weight and a gradient mask. A finished shard is stored, the side weight
starts again from the module's own weight, and every `merge_freq` edits the stored shards become one. No shard depends
on another, so those of one call of `edit` are trained side by side.
Shapes: `m` input and `d` output size of the module.
"""

import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import ACT2FN

from horen_bench.cases import EditCase, EditRecord
from horen_bench.editors.base import Editor
from horen_bench.editors.shared.padding import check_padding
from horen_bench.editors.wise.compat import LocalityPrompts, scoring_missing_bias
from horen_bench.editors.wise.config import RepairConfig, WiseConfig
from horen_bench.editors.wise.irrelevant import DisjointPrompts
from horen_bench.editors.wise.layers import SideLayers, plain_pass
from horen_bench.editors.wise.masks import GradientMasks
from horen_bench.editors.wise.routing import Routed, TokenHook, route
from horen_bench.editors.wise.rows import TrainingRows, generated_templates, training_rows
from horen_bench.editors.wise.shards import NOTHING_RECORDED, OpenShard, SideWeights
from horen_bench.editors.wise.training import Activation, Extra, SideEdit, SideTrained, train_sides
from horen_bench.errors import UserError
from horen_bench.models.architecture import is_last_layer
from horen_bench.models.partial import FastPath
from horen_bench.models.surgery import check_plain_linear
from horen_bench.prompts import PromptEncoder

_ACTIVATION_KEYS = ("hidden_act", "activation_function", "hidden_activation", "activation")
_NOT_FINITE = "the loss was not finite; the side weight was put back"


class WiseEditor(Editor[WiseConfig | RepairConfig]):
    """WISE on one model, whose weights are never changed.

    Attributes:
        weights: the side weights that the edits so far have left.
        shards_at_once: most shards of one call of `edit` that are trained side by side; above 1, the runner hands over
            the cases of so many shards at once.

    Raises:
        UserError: the model has no such linear module, or names no activation function; the file of irrelevant prompts
            cannot be read.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | PromptEncoder,
        config: WiseConfig | RepairConfig,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(model, tokenizer, config, seed=seed)
        self.side = side = config.side
        self.shards_at_once = side.shards_at_once
        self.slice_size = 1 if side.shards_at_once == 1 else side.shards_at_once * side.save_freq
        self._linear = check_plain_linear(model, config.module, where="method.module")
        self.weights = SideWeights(self._linear, side)
        self.irrelevant = (DisjointPrompts if side.loc_source == "disjoint" else LocalityPrompts)(side)
        self._activation = _activation_of(model)
        self._masks = GradientMasks(seed, side.mask_ratio, self.weights.base)
        self._templates = side.templates
        self._bias = self._linear.bias if side.add_bias else None
        self._fast = FastPath(
            partial(SideLayers, model, config.module),
            "every training step ran the whole model",
            wanted=side.engine == "cached",
        )
        self.hook = TokenHook(model, self._linear, self._respond)

    # --- Inference -------------------------------------------------------------------------------------

    def _respond(self, inputs: Tensor, outputs: Tensor, mask: Tensor) -> Tensor | None:
        return None if self.weights.empty else self.routed(inputs, outputs, mask).outputs

    @torch.no_grad()
    def routed(self, inputs: Tensor, outputs: Tensor, mask: Tensor) -> Routed:
        """Send rows `(B, T, m)` with the module's own outputs `(B, T, d)` through the weight that they call for."""
        live, memories = self.weights.candidates()
        if not self.side.add_bias:
            live = scoring_missing_bias(live, self._linear)
        return route(
            inputs,
            outputs,
            mask,
            live=live,
            memories=memories,
            act_ratio=self.side.act_ratio,
            activation=self._activation,
            bias=self._bias,
        )

    # --- Writing ---------------------------------------------------------------------------------------

    def expect(self, cases: Sequence[EditCase]) -> None:
        """Refuse cases that are tested on a prompt of the irrelevant list."""
        self.irrelevant.check(cases)

    def edit(self, cases: Sequence[EditCase]) -> list[EditRecord]:
        """Write the cases; each continues on the side weight of its shard, shards side by side."""
        self.expect(cases)
        check_padding(self.model)
        records: list[EditRecord] = []
        while len(records) < len(cases):
            n_borrowed = self.irrelevant.n_borrowed
            try:
                records += self._write_shards(self._next_shards(cases[len(records) :]))
            except BaseException:
                self.irrelevant.n_borrowed = n_borrowed
                raise
        return records

    def _next_shards(self, cases: Sequence[EditCase]) -> list[OpenShard]:
        """The open shard and those behind it, as far as the cases go and as many as are trained side by side."""
        shards: list[OpenShard] = []
        done, save_freq = 0, self.side.save_freq
        while done < len(cases) and len(shards) < self.shards_at_once:
            at = self.weights.n_edits + done
            room = save_freq - at % save_freq
            mask = self._masks.of(at // save_freq)
            shards.append(OpenShard(at, cases[done : done + room], mask, None, NOTHING_RECORDED))
            done += room
        live = self.weights.live
        shards[0].weight, shards[0].lowest = live.weight if live else None, self.weights.lowest
        return shards

    def _write_shards(self, shards: Sequence[OpenShard]) -> list[EditRecord]:
        """Train the shards in lockstep, edit by edit, and take them in one after the other."""
        records: list[list[EditRecord]] = [[] for _ in shards]
        for place, cases in enumerate(zip_longest(*(shard.cases for shard in shards))):
            started = time.perf_counter()
            trainable = [i for i, case in enumerate(cases) if case is not None and self._has_tokens(case)]
            edits = [self._side_edit(shards[i], place) for i in trainable]
            trained = dict(zip(trainable, self._train(edits), strict=True))
            for i, result in trained.items():
                shards[i].take(result)
            present = [i for i, case in enumerate(cases) if case is not None]
            seconds = (time.perf_counter() - started) / len(present)
            for i in present:
                records[i].append(record_of(cases[i], trained.get(i), seconds))
        for shard in shards:
            self.weights.take(shard)
        return [record for of_shard in records for record in of_shard]

    def _has_tokens(self, case: EditCase) -> bool:
        return bool(case.prompt.strip() and self.encoder.edit(case.prompt, case.target).target)

    def _side_edit(self, shard: OpenShard, place: int, teacher: Tensor | None = None) -> SideEdit:
        number = shard.start + place
        rows = self._rows(shard.cases[place], number)
        return SideEdit(rows, shard.mask, self.weights.start(shard.weight), number, teacher)

    def _train(self, edits: Sequence[SideEdit]) -> list[SideTrained]:
        """Train edits of different shards: in one pass, or one by one where only the whole model will do."""
        upper = self._fast.layers(max(edit.rows.input_ids.shape[1] for edit in edits)) if edits else None
        settings: dict[str, Any] = {"base": self.weights.base, "side": self.side, "act_weight": self.config.act_weight}
        if upper is not None:
            forward = upper.side_pass([edit.rows for edit in edits], self._bias, self._activation)
            return train_sides(edits, forward=forward, extra=self._extra(edits), **settings)
        trained = []
        for edit in edits:
            forward = plain_pass(self.model, self.hook, edit.rows, self._bias, self._activation)
            trained += train_sides([edit], forward=forward, extra=self._extra([edit]), **settings)
        return trained

    def _extra(self, edits: Sequence[SideEdit]) -> Extra | None:
        """A further term of the edits' losses; WISE has none."""
        return None

    def _rows(self, case: EditCase, turn: int) -> TrainingRows:
        """What a case is trained on; `turn` is the number of its training."""
        return training_rows(
            self.encoder,
            self._contexts(),
            prompt=case.prompt,
            target=case.target,
            irrelevant=self.irrelevant.of(case, turn),
            device=self.model.device,
        )

    def _contexts(self) -> list[str]:
        if self._templates is None:
            with self.hook.responding(lambda *_: None):
                self._templates = generated_templates(self.model, self.encoder)
        return self._templates

    # --- State -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """The live side weight, the stored ones, and the number of edits, from which shard and mask follow."""
        return {**self.weights.state_dict(), "n_borrowed": torch.tensor(self.irrelevant.n_borrowed)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from saved side weights."""
        if "n_borrowed" not in state:
            raise ValueError("the state lacks 'n_borrowed'; it is not one of this editor's")
        self.weights.load_state_dict(state)
        self.irrelevant.n_borrowed = int(state["n_borrowed"])

    def detach(self) -> None:
        """Take the hook out."""
        self.hook.remove()

    def side_parameters(self) -> int:
        """Numbers in side weights and their activations."""
        return self.weights.numel()

    def warnings(self) -> list[str]:
        """Where the irrelevant prompts are from, and limits where they apply."""
        sentences = [*self.irrelevant.warnings(), *self._fast.warnings()]
        if is_last_layer(self.model, self.config.module):
            sentences.append(f"{self.config.module} is in the last block: no attention sees what a side weight writes")
        return sentences


def record_of(case: EditCase, trained: SideTrained | None, seconds: float) -> EditRecord:
    """What happened to a case; `trained` is None where there was nothing to train on."""
    if trained is None or not trained.finite:
        problem = _NOT_FINITE if trained else "prompt or target has no token"
        return EditRecord(case.id, "failed", None, None, math.nan, 0, seconds, problem)
    return EditRecord(case.id, "inserted", None, None, trained.loss, trained.steps, seconds)


def _activation_of(model: PreTrainedModel) -> Activation:
    """The model's hidden activation function, which the release applies to the module's output."""
    config = model.config.get_text_config()
    name = next((value for key in _ACTIVATION_KEYS if (value := getattr(config, key, None))), None)
    if name not in ACT2FN:
        raise UserError(
            f"model: the configuration of {type(model).__name__} names no activation function that transformers knows "
            f"({', '.join(_ACTIVATION_KEYS)}), which this method measures a side weight's effect behind; take another "
            "model or method"
        )
    activation: Activation = ACT2FN[name]
    return activation
