"""REPAIR (arXiv 2510.01879): WISE's side memories, trained on batches of like edits, checked, and repaired.

`mode=paper` follows the paper where it is definite: edits come in windows, similar ones share a shard, a shard's first
edit teaches the others, shards that fail are dropped and trained again, and what is left is merged by loss.
`mode=released` is what the published code does: WISE, with a distillation that its configurations leave off.
Shapes: `m` input and `d` output size of the module.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.cases import EditCase, Probe
from horen_bench.editors.base import EditRecord, check_choice
from horen_bench.editors.wise.editor import NOTHING_RECORDED, OpenShard, WiseEditor, record_of
from horen_bench.editors.wise.routing import Memory
from horen_bench.editors.wise.training import Extra, Labels, Pass, SideEdit, SideTrained
from horen_bench.errors import UserError
from horen_bench.prompts import encode_edit, encode_prompts, last_prompt_positions, pad, pad_id_of

Distill = Literal["logit", "feature", "none"]
Mode = Literal["paper", "released"]

_TEACHING_GROUPS = (1, 2, 3)  # groups whose first edit becomes the teacher in the published code


@dataclass(slots=True, eq=False)
class Sample:
    """One edit on its way through a window.

    Attributes:
        case: the edit.
        retries: how often it was trained again.
        deferred: whether the consistency filter has put it off, which it does once.
        trained: its last training.
        steps: SGD steps over all trainings.
    """

    case: EditCase
    retries: int = 0
    deferred: bool = False
    trained: SideTrained | None = None
    steps: int = 0


@dataclass(slots=True)
class OpenBatch(OpenShard):
    """A shard in training: the samples of its cases, and what the ones before leave as a lesson to the next."""

    samples: Sequence[Sample] = ()
    heard: list[Tensor] = field(default_factory=list)


@dataclass(slots=True)
class Shard:
    """A trained side memory, the samples that belong to it, and the mean of their last edit losses."""

    memory: Memory
    members: list[Sample] = field(default_factory=list)
    loss: float = 0.0


def similarity_batches(features: Tensor, size: int) -> list[list[int]]:
    """Split samples into batches of like ones (paper, Algorithm 3).

    The sample with the largest mean cosine to all that are left opens a batch, its nearest ones follow by falling
    cosine; of equals the earlier.

    Args:
        features: unit vectors `(n, m)`.
        size: samples per batch; the last may have fewer.

    Returns:
        Indices, each batch with its seed first.
    """
    cosines, left = features @ features.T, list(range(len(features)))
    batches = []
    while left:
        rows = cosines[left][:, left]
        seed = left[int(rows.mean(dim=1).argmax())]
        others = sorted((i for i in left if i != seed), key=lambda i: (-cosines[seed, i].item(), i))
        batches.append([seed, *others[: size - 1]])
        left = [i for i in left if i not in batches[-1]]
    return batches


def inconsistent(features: Tensor, batches: Sequence[Sequence[int]], limit: float) -> list[int]:
    """Members too far from the seed of their batch, in order: one minus their cosine is at least `limit`.

    Args:
        features: unit vectors `(n, m)`.
        batches: of `similarity_batches`.
        limit: in [0, 2].
    """
    far = 1 - features @ features.T >= limit
    return sorted(i for seed, *others in batches for i in others if far[seed, i])


def loss_aware_ties(weights: Sequence[Tensor], base: Tensor, losses: Sequence[float], sensitivity: float) -> Tensor:
    """Merge weights, those of lower loss counting more (paper section 2.5, Algorithm 4).

    Where all that moved an element agree in sign, their weighted mean is taken; where they do not, the one with the
    largest weighted change, in full.

    Args:
        weights: `k` tensors of the shape of `base`.
        base: what they started from.
        losses: of each, nats.
        sensitivity: 0 makes them equal.

    Returns:
        The merged weight, in the dtype of `base`.
    """
    changes = torch.stack([weight.float() - base.float() for weight in weights])
    share = torch.softmax(-sensitivity * torch.tensor(losses), dim=0).to(base.device).view(-1, *([1] * base.dim()))
    moved = changes != 0
    total = (moved * share).sum(dim=0)
    mean = (changes * share).sum(dim=0) / torch.where(total == 0, torch.ones_like(total), total)
    strongest = changes.gather(0, (changes.abs() * share).argmax(dim=0, keepdim=True))[0]
    conflict = (changes > 0).any(dim=0) & (changes < 0).any(dim=0)
    return (base.float() + torch.where(conflict, strongest, mean)).to(base.dtype)


def distillation(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """Squared temperature times the mean divergence of student from teacher logits, both `(n, vocabulary)`."""
    wanted = torch.log_softmax(teacher / temperature, dim=-1)
    found = torch.log_softmax(student / temperature, dim=-1)
    return temperature**2 * F.kl_div(found, wanted, reduction="sum", log_target=True) / len(student)


def alignment(hidden: Tensor, first: Tensor, mean: Tensor, pull: float, spread: float) -> Tensor:
    """Feature distillation (paper Eq. 4), a scalar.

    Args:
        hidden: final hidden state of a sample, `(d,)`; only its direction counts.
        first: that of the batch's seed, a unit vector.
        mean: of the unit vectors of the batch so far.
        pull: weight of one minus the cosine to the seed, λ.
        spread: weight of the squared distance to the mean, ϑ.
    """
    direction = F.normalize(hidden.float(), dim=-1)
    return pull * (1 - direction @ first) + spread * (direction - mean).square().sum()


class RepairEditor(WiseEditor):
    """REPAIR on one model.

    Args:
        model: a causal language model; its weights are never changed.
        tokenizer: its tokenizer.
        seed: of the gradient masks.
        module: dotted path of the linear module that gets side weights.
        mode: `paper` or `released`.
        side: everything else that `WiseEditor` takes; `save_freq` is the size of a batch, `merge_freq` of a window.
        act_weight: weight of the activation loss.
        distill: `logit`, `feature` or `none`.
        distill_lambda: weight of the distillation.
        temperature: of `logit`.
        distill_spread: weight of the distance to the batch's mean, of `feature`.
        consistency: a sample whose cosine distance to the seed of its batch is at least this waits for the next window;
            None: none does.
        error_threshold: a sample whose share of right target tokens is at most this has failed.
        prune_threshold: a shard is pruned where more than this share of its members failed.
        pool_limit: or where more failures than this wait; None: `merge_freq`.
        prune_noise: standard deviation of what is added to the module's weight where trainings are repeated.
        max_rounds: prunings per window.
        max_retries: times that one sample is trained again.
        max_trainings: trainings of the whole stream, first ones not limited.
        loss_sensitivity: kappa of the merging.

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
        mode: Mode,
        side: Mapping[str, Any],
        act_weight: float,
        distill: Distill,
        distill_lambda: float,
        temperature: float,
        distill_spread: float,
        consistency: float | None,
        error_threshold: float,
        prune_threshold: float,
        prune_noise: float,
        pool_limit: int | None,
        max_rounds: int,
        max_retries: int,
        max_trainings: int,
        loss_sensitivity: float,
    ) -> None:
        _check_kind(mode, distill, consistency)
        if not temperature > 0:
            raise UserError(f"method.temperature must be > 0, got {temperature}")
        _check_range("error_threshold", error_threshold, high=1)
        _check_range("prune_threshold", prune_threshold, high=1)
        _check_range("prune_noise", prune_noise)
        super().__init__(model, tokenizer, seed=seed, module=module, **side)
        if mode == "released" and distill == "logit" and self.engine == "cached":
            raise UserError("method.mode=released distills all positions; set method.side.engine=sequential")
        if not self.retrieve:
            raise UserError("method.side.retrieve must be true; REPAIR routes among memories")
        self.schedule = replace(self.schedule, act_weight=act_weight)
        self.mode: Mode = mode
        self.distill: Distill = distill
        self.distill_lambda = distill_lambda
        self.temperature = temperature
        self.error_threshold = error_threshold
        self.distill_spread = distill_spread
        self.consistency = consistency
        self.prune_threshold = prune_threshold
        self.prune_noise = prune_noise
        self.pool_limit = self.merge_freq if pool_limit is None else pool_limit
        self.max_rounds = max_rounds
        self.max_retries = max_retries
        self.max_trainings = max_trainings
        self.loss_sensitivity = loss_sensitivity
        self.n_shards = 0
        self.n_trainings = 0
        self.pool: list[Sample] = []
        self.waiting: list[Sample] = []
        self._seed = seed
        self._teacher: Tensor | None = None
        if mode == "paper":
            self.slice_size = self.merge_freq * self._windows_at_once()
        elif distill == "logit":
            self.shards_at_once = self.slice_size = 1  # what the teacher is depends on the order of all edits

    # --- The schedule of the paper: windows, shards, feedback, merge -----------------------------------

    def edit(self, cases: Sequence[EditCase]) -> list[EditRecord]:
        """Write the cases window by window; one that is still open at the end is closed."""
        if self.mode == "released":
            return super().edit(cases)
        self.expect(cases)
        records: list[EditRecord] = []
        for start in range(0, len(cases), self.merge_freq * self._windows_at_once()):
            chosen = cases[start : start + self.merge_freq * self._windows_at_once()]
            records += self._write_windows(
                [chosen[at : at + self.merge_freq] for at in range(0, len(chosen), self.merge_freq)]
            )
        return records

    def settle(self) -> None:
        """Write what the consistency filter has put off, as a window of its own."""
        if self.waiting:
            self._write_windows([[]])

    def _windows_at_once(self) -> int:
        """Windows whose first trainings go side by side: one where a window's outcome tells what is in the next."""
        coupled = self.max_rounds > 0 or self.consistency is not None
        return 1 if coupled else max(1, self.shards_at_once * self.save_freq // self.merge_freq)

    def _write_windows(self, windows: Sequence[Sequence[EditCase]]) -> list[EditRecord]:
        started = time.perf_counter()
        samples = [[Sample(case) for case in window] for window in windows]
        batches = [self._window_batches(window) for window in samples]
        shards = self._trained_batches([batch for some in batches for batch in some])
        for window, some in zip(samples, batches, strict=True):
            self._close_window([shards.pop(0) for _ in some])
            self.n_edits += len(window)
        written = [sample for window in samples for sample in window]
        seconds = (time.perf_counter() - started) / max(1, len(written))
        return [self._record(sample, seconds) for sample in written]

    def _record(self, sample: Sample, seconds: float) -> EditRecord:
        if sample in self.waiting:
            problem = "put off by the consistency filter; written with the next window or before the next question"
            return EditRecord(sample.case.id, "inserted", None, None, math.nan, 0, seconds, problem)
        return replace(record_of(sample.case, sample.trained, seconds), steps=sample.steps)

    def _window_batches(self, new: Sequence[Sample]) -> list[list[Sample]]:
        """The window's batches, behind what waits; what the consistency filter finds too far from its seed waits."""
        samples = [*self.waiting, *(one for one in new if self._askable(one.case))]
        features, batches = self._batches(samples)
        far = [] if self.consistency is None or not new else inconsistent(features, batches, self.consistency)
        self.waiting = [samples[i] for i in far if not samples[i].deferred]
        for sample in self.waiting:
            sample.deferred = True
        return [[samples[i] for i in batch if samples[i] not in self.waiting] for batch in batches]

    def _batches(self, samples: Sequence[Sample]) -> tuple[Tensor, list[list[int]]]:
        """Features `(n, m)`, and the batches of like samples as indices."""
        features = self._features([sample.case.prompt for sample in samples])
        return features, similarity_batches(features, self.save_freq)

    def _close_window(self, shards: list[Shard]) -> None:
        """Check the shards of a window, repair and merge them."""
        finished = list(self.memories)
        for _ in range(self.max_rounds):
            self.memories = [*finished, *(shard.memory for shard in shards)]
            if not self._repair(shards):
                break
        self.memories = [*finished, *self._merged_shards(shards)]
        self.pool = self._failures([sample for shard in shards for sample in shard.members])

    def _trained_batches(self, batches: Sequence[Sequence[Sample]], noise: float = 0.0) -> list[Shard]:
        """A shard per batch, as many side by side as wanted."""
        groups = [batches[at : at + self.shards_at_once] for at in range(0, len(batches), self.shards_at_once)]
        return [shard for group in groups for shard in self._side_by_side([self._opened(one, noise) for one in group])]

    def _opened(self, samples: Sequence[Sample], noise: float) -> OpenBatch:
        """A fresh shard for a batch, with the next mask; its weight is the module's own, and noise."""
        number, first = self.n_shards, self.n_trainings
        self.n_shards, self.n_trainings = number + 1, first + len(samples)
        base = self._linear.weight.detach()
        weight = base + noise * gaussian(base, [self._seed, number]) if noise else None
        cases = [sample.case for sample in samples]
        return OpenBatch(first, cases, self._masks.of(number), weight, NOTHING_RECORDED, samples)

    def _side_by_side(self, opened: Sequence[OpenBatch]) -> list[Shard]:
        """Train batches in lockstep, sample by sample; a batch's first sample teaches the others."""
        for place in range(max(len(batch.samples) for batch in opened)):
            present = [batch for batch in opened if place < len(batch.samples)]
            edits = [
                replace(self._side_edit(batch.cases[place], batch, place), teacher=self._teacher_of(batch))
                for batch in present
            ]
            for batch, edit, trained in zip(present, edits, self._train(edits), strict=True):
                sample = batch.samples[place]
                sample.trained, sample.steps = replace(trained, last=None), sample.steps + trained.steps
                batch.take(trained)
                if trained.last is not None:
                    batch.heard.append(self._lesson_of(trained.last, edit))
        return [self._closed(batch) for batch in opened]

    def _closed(self, batch: OpenBatch) -> Shard:
        losses = [one.trained.loss for one in batch.samples if one.trained and math.isfinite(one.trained.loss)]
        memory = Memory(self._start(batch.weight), batch.lowest)
        return Shard(memory, list(batch.samples), sum(losses) / max(1, len(losses)))

    # --- Distillation ----------------------------------------------------------------------------------

    def _lesson_of(self, done: Pass, edit: SideEdit) -> Tensor:
        """What a sample tells the others, at the last prompt token.

        Each row's logits, `(R - 1, vocabulary)`, or the direction of the bare prompt's final hidden state, `(d,)`.
        """
        firsts = edit.rows.first_targets
        return F.normalize(done.hidden[firsts[0]].float(), dim=-1) if self.distill == "feature" else done.logits[firsts]

    def _teacher_of(self, batch: OpenBatch) -> Tensor | None:
        """The seed's logits; or its direction and the mean direction so far, `(2, d)`."""
        if self.distill == "none" or not batch.heard:
            return None
        if self.distill == "logit":
            return batch.heard[0]
        # A mean over the samples before, so that it does not move with the sample that is drawn to it.
        return torch.stack([batch.heard[0], torch.stack(batch.heard).mean(dim=0)])

    def _extra(self, edits: Sequence[SideEdit]) -> Extra | None:
        if self.mode == "released":
            return self._released_lesson(edits[0].number)
        if all(edit.teacher is None for edit in edits):
            return None
        spans = Labels.of([edit.rows for edit in edits]).spans
        return lambda done: torch.stack([self._distance(done.of(i, span), edits[i]) for i, span in enumerate(spans)])

    def _distance(self, done: Pass, edit: SideEdit) -> Tensor:
        """How far a sample is from its teacher, weighted."""
        firsts, teacher = edit.rows.first_targets, edit.teacher
        if teacher is None:
            return done.logits.new_zeros(())
        if self.distill == "feature":
            return alignment(done.hidden[firsts[0]], teacher[0], teacher[1], self.distill_lambda, self.distill_spread)
        return self.distill_lambda * distillation(teacher, done.logits[firsts], self.temperature)

    @torch.no_grad()
    def _features(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors `(n, m)`: the module's input at the last token of each bare prompt, in the frozen model."""
        if not prompts:
            return torch.empty(0, self._linear.in_features)
        batch = pad(encode_prompts(self.tokenizer, prompts), pad_id_of(self.tokenizer), device=self.model.device)
        found: list[Tensor] = []

        def read(inputs: Tensor, _outputs: Tensor, mask: Tensor) -> None:
            last = last_prompt_positions(mask)
            found.append(inputs[torch.arange(len(last), device=last.device), last].float())

        with self.hook.responding(read):
            self.model(batch.input_ids, batch.attention_mask, position_ids=batch.position_ids, use_cache=False)
        return F.normalize(found[0], dim=1)

    # --- Error feedback --------------------------------------------------------------------------------

    def _repair(self, shards: list[Shard]) -> bool:
        """Prune the worst shard and train its samples and all failures again; False where nothing calls for it."""
        failed = self._failures([sample for shard in shards for sample in shard.members])
        rates = [sum(one in failed for one in shard.members) / max(1, len(shard.members)) for shard in shards]
        if not shards or not (max(rates) > self.prune_threshold or len(failed) > self.pool_limit):
            return False
        worst = max(range(len(shards)), key=lambda i: (rates[i], rates[i] * len(shards[i].members), -i))
        again = [one for one in failed if one.retries < self.max_retries]
        again += [one for one in shards[worst].members if one not in failed]
        if not again or self.n_trainings + len(again) > self.max_trainings:
            return False
        del shards[worst]
        for shard in shards:
            shard.members = [one for one in shard.members if one not in again]
        shards[:] = [shard for shard in shards if shard.members]
        for sample in again:
            sample.retries += 1
        self.pool = [one for one in failed if one not in again]
        batches = [[again[i] for i in batch] for batch in self._batches(again)[1]]
        shards += self._trained_batches(batches, self.prune_noise)
        return True

    def _failures(self, members: Sequence[Sample]) -> list[Sample]:
        """The pool with those members that the routed model gets wrong, and without those that it gets right."""
        shares = self._shares_right([sample.case for sample in members])
        waiting = [one for one in self.pool if one not in members]
        wrong = [one for one, share in zip(members, shares, strict=True) if share <= self.error_threshold]
        return [*waiting, *wrong]

    @torch.no_grad()
    def _shares_right(self, cases: Sequence[EditCase]) -> list[float]:
        """Share of each target's tokens that the routed model predicts, with the target behind the prompt."""
        if not cases:
            return []
        edits = [encode_edit(self.tokenizer, case.prompt, case.target) for case in cases]
        batch = pad([edit.ids for edit in edits], pad_id_of(self.tokenizer), device=self.model.device)
        logits = self.model(batch.input_ids, batch.attention_mask, position_ids=batch.position_ids).logits
        right = (logits[:, :-1].argmax(dim=-1) == batch.input_ids[:, 1:]).float()
        return [row[-len(edit.target) :].mean().item() for row, edit in zip(right, edits, strict=True)]

    def _merged_shards(self, shards: Sequence[Shard]) -> list[Memory]:
        """One memory of the shards that can be routed to, or none."""
        parts = [shard for shard in shards if shard.memory.activation < NOTHING_RECORDED]
        if not parts:
            return []
        weights, losses = [part.memory.weight for part in parts], [part.loss for part in parts]
        merged = loss_aware_ties(weights, self._linear.weight.detach(), losses, self.loss_sensitivity)
        return [Memory(merged, min(part.memory.activation for part in parts))]

    # --- Distillation as released ----------------------------------------------------------------------

    def _train(self, edits: Sequence[SideEdit]) -> list[SideTrained]:
        """As WISE; in the published code some edits become the teacher of the later ones, unless they stop early."""
        trained = super()._train(edits)
        for edit, one in zip(edits, trained, strict=True):
            if self.mode == "released" and self.distill == "logit" and self._teaches(edit.number):
                whole = one.last is not None and one.steps == self.schedule.n_steps
                self._teacher = one.last.everything if one.last is not None and whole else None
        return trained

    def _teaches(self, number: int) -> bool:
        return number in [group * self.save_freq for group in _TEACHING_GROUPS]

    def _released_lesson(self, number: int) -> Extra | None:
        """All rows and positions, cut to the shorter batch from the left."""
        teacher = self._teacher
        if self.distill == "none" or teacher is None or self._teaches(number):
            return None

        def lesson(done: Pass) -> Tensor:
            assert done.everything is not None
            n_columns = min(teacher.shape[1], done.everything.shape[1])
            pair = (teacher[:, :n_columns].flatten(0, 1), done.everything[:, :n_columns].flatten(0, 1))
            return self.distill_lambda * distillation(*pair, self.temperature)[None]

        return lesson

    # --- State -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """WISE's state, the counters, the failures that wait, and the teacher as released."""
        counters = torch.tensor([self.n_shards, self.n_trainings])
        samples = {"pool": _bytes(self.pool), "waiting": _bytes(self.waiting)}
        state = {**super().state_dict(), "counters": counters, **samples}
        if self._teacher is not None:
            state["teacher"] = self._teacher.clone()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from saved side weights and failures."""
        for name in ("counters", "pool", "waiting"):
            if name not in state:
                raise ValueError(f"the state lacks '{name}'; it is not one of this editor's")
        super().load_state_dict(state)
        self.n_shards, self.n_trainings = state["counters"].tolist()
        self.pool, self.waiting = (_samples(state[name]) for name in ("pool", "waiting"))
        teacher = state.get("teacher")
        self._teacher = None if teacher is None else teacher.to(self._linear.weight.device)

    def warnings(self) -> list[str]:
        """WISE's, and the size of a turn."""
        size = f"windows of {self.merge_freq} edits in batches of {self.save_freq}"
        turns = f"mode=paper works in {size}; a checkpoint closes an open window"
        return [*super().warnings(), turns if self.mode == "paper" else "mode=released is WISE with other constants"]


def gaussian(like: Tensor, seed: Sequence[int]) -> Tensor:
    """Standard normal numbers of a tensor's shape, the same on every device."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(like.shape)).to(like)


def _bytes(samples: Sequence[Sample]) -> Tensor:
    text = json.dumps([_plain(sample) for sample in samples])
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _samples(saved: Tensor) -> list[Sample]:
    return [_sample(one) for one in json.loads(bytes(saved.tolist()))]


def _plain(sample: Sample) -> dict[str, Any]:
    case = sample.case
    locality = [[probe.prompt, probe.answer] for probe in case.locality]
    return {
        "id": case.id,
        "prompt": case.prompt,
        "target": case.target,
        "locality": locality,
        "retries": sample.retries,
        "deferred": sample.deferred,
    }


def _sample(values: Mapping[str, Any]) -> Sample:
    locality = tuple(Probe(*pair) for pair in values["locality"])
    return Sample(
        EditCase(values["id"], values["prompt"], values["target"], locality=locality),
        values["retries"],
        values["deferred"],
    )


def _check_kind(mode: str, distill: str, consistency: float | None) -> None:
    check_choice("method.mode", mode, ("paper", "released"))
    check_choice("method.distill", distill, ("logit", "feature", "none"))
    if mode == "released" and (distill == "feature" or consistency is not None):
        raise UserError("method.mode=released has neither distill=feature nor consistency; set method.mode=paper")
    if consistency is not None and not 0 < consistency <= 2:
        raise UserError(f"method.consistency must be in (0, 2] or null, got {consistency}; it is one minus a cosine")


def _check_range(name: str, value: float, high: float = math.inf) -> None:
    if not 0 <= value <= high:
        raise UserError(f"method.{name} must be in [0, {high:g}], got {value}")
