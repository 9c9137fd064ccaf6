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

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.cases import EditCase, Probe
from horen_bench.editors.base import EditRecord
from horen_bench.editors.wise.editor import NOTHING_RECORDED, WiseEditor, record_of
from horen_bench.editors.wise.routing import Memory
from horen_bench.editors.wise.rows import TrainingRows
from horen_bench.editors.wise.training import Extra, Forward, Pass, SideTrained
from horen_bench.errors import UserError
from horen_bench.prompts import encode_edit, encode_prompts, last_prompt_positions, pad, pad_id_of

Distill = Literal["logit", "none"]
Mode = Literal["paper", "released"]

_TEACHING_GROUPS = (1, 2, 3)  # groups whose first edit becomes the teacher in the published code


@dataclass(slots=True, eq=False)
class Sample:
    """One edit on its way through a window.

    Attributes:
        case: the edit.
        retries: how often it was trained again.
        trained: its last training.
        steps: SGD steps over all trainings.
    """

    case: EditCase
    retries: int = 0
    trained: SideTrained | None = None
    steps: int = 0


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
        distill: `logit` or `none`.
        distill_lambda: weight of the distillation.
        temperature: of the distillation.
        error_threshold: a sample whose share of right target tokens is at most this has failed.
        prune_threshold: a shard is pruned where more than this share of its members failed.
        pool_limit: or where more failures than this wait; None: `merge_freq`.
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
        error_threshold: float,
        prune_threshold: float,
        pool_limit: int | None,
        max_rounds: int,
        max_retries: int,
        max_trainings: int,
        loss_sensitivity: float,
    ) -> None:
        _check(mode, distill, temperature, error_threshold, prune_threshold)
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
        self.prune_threshold = prune_threshold
        self.pool_limit = self.merge_freq if pool_limit is None else pool_limit
        self.max_rounds = max_rounds
        self.max_retries = max_retries
        self.max_trainings = max_trainings
        self.loss_sensitivity = loss_sensitivity
        self.n_shards = 0
        self.n_trainings = 0
        self.pool: list[Sample] = []
        self._teacher: Tensor | None = None
        if mode == "paper":
            self.slice_size = self.merge_freq

    # --- The schedule of the paper: windows, shards, feedback, merge -----------------------------------

    def edit(self, cases: Sequence[EditCase]) -> list[EditRecord]:
        """Write the cases window by window; one that is still open at the end is closed."""
        if self.mode == "released":
            return super().edit(cases)
        windows = [cases[start : start + self.merge_freq] for start in range(0, len(cases), self.merge_freq)]
        return [record for window in windows for record in self._write_window(window)]

    def _write_window(self, cases: Sequence[EditCase]) -> list[EditRecord]:
        started = time.perf_counter()
        samples = [Sample(case) for case in cases]
        finished = list(self.memories)
        shards = self._trained_shards([one for one in samples if self._askable(one.case)])
        for _ in range(self.max_rounds):
            self.memories = [*finished, *(shard.memory for shard in shards)]
            if not self._repair(shards):
                break
        self.memories = [*finished, *self._merged_shards(shards)]
        members = [sample for shard in shards for sample in shard.members]
        self.pool = self._failures(members)
        self.n_edits += len(cases)
        seconds = (time.perf_counter() - started) / len(cases)
        return [replace(record_of(one.case, one.trained, seconds), steps=one.steps) for one in samples]

    def _trained_shards(self, samples: Sequence[Sample]) -> list[Shard]:
        if not samples:
            return []
        features = self._features([sample.case.prompt for sample in samples])
        batches = similarity_batches(features, self.save_freq)
        return [self._trained_shard([samples[i] for i in batch]) for batch in batches]

    @torch.no_grad()
    def _features(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors `(n, m)`: the module's input at the last token of each bare prompt, in the frozen model."""
        batch = pad(encode_prompts(self.tokenizer, prompts), pad_id_of(self.tokenizer), device=self.model.device)
        found: list[Tensor] = []

        def read(inputs: Tensor, _outputs: Tensor, mask: Tensor) -> None:
            last = last_prompt_positions(mask)
            found.append(inputs[torch.arange(len(last), device=last.device), last].float())

        with self.hook.responding(read):
            self.model(batch.input_ids, batch.attention_mask, position_ids=batch.position_ids, use_cache=False)
        return F.normalize(found[0], dim=1)

    def _trained_shard(self, samples: Sequence[Sample]) -> Shard:
        """Train one batch on a fresh side weight; the seed's last logits teach the others."""
        mask, weight, lowest = self._masks.of(self.n_shards), None, NOTHING_RECORDED
        teacher = _Teacher()
        for sample in samples:
            rows = self._rows(sample.case)
            extra = self._lesson(teacher.firsts, rows) if teacher.firsts is not None else None
            trained = self._train(rows, mask, weight, wrap=teacher.listening(rows), extra=extra)
            teacher.keep()
            weight, lowest = trained.weight, min(lowest, trained.activation)
            sample.trained, sample.steps = trained, sample.steps + trained.steps
            self.n_trainings += 1
        self.n_shards += 1
        losses = [sample.trained.loss for sample in samples if sample.trained and math.isfinite(sample.trained.loss)]
        assert weight is not None
        return Shard(Memory(weight, lowest), list(samples), sum(losses) / max(1, len(losses)))

    def _lesson(self, teacher: Tensor, rows: TrainingRows) -> Extra | None:
        """The distillation term: each row's logits at its last prompt token beside the seed's."""
        if self.distill == "none":
            return None
        return lambda done: (
            self.distill_lambda * distillation(teacher, done.logits[rows.first_targets], self.temperature)
        )

    def _turn(self) -> int:
        return self.n_trainings if self.mode == "paper" else self.n_edits

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
        shards += self._trained_shards(again)
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

    def _write_rows(self, rows: TrainingRows) -> SideTrained:
        """Train as WISE does, beside the teacher's logits where the published code has one at hand."""
        if self.distill == "none":
            return super()._write_rows(rows)
        start, mask = self.live.weight if self.live else None, self._masks.of(self.n_edits // self.save_freq)
        if self.n_edits not in [group * self.save_freq for group in _TEACHING_GROUPS]:
            return self._train(rows, mask, start, extra=self._released_lesson())
        teacher = _Teacher()
        trained = self._train(rows, mask, start, wrap=teacher.listening(rows))
        stopped_early = trained.steps < self.schedule.n_steps
        self._teacher = None if stopped_early else teacher.everything
        return trained

    def _released_lesson(self) -> Extra | None:
        """All rows and positions, cut to the shorter batch from the left."""
        teacher = self._teacher
        if teacher is None:
            return None

        def lesson(done: Pass) -> Tensor:
            assert done.everything is not None
            n_columns = min(teacher.shape[1], done.everything.shape[1])
            pair = (teacher[:, :n_columns].flatten(0, 1), done.everything[:, :n_columns].flatten(0, 1))
            return self.distill_lambda * distillation(*pair, self.temperature)

        return lesson

    # --- State -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """WISE's state, the counters, the failures that wait, and the teacher as released."""
        waiting = json.dumps([_plain(sample) for sample in self.pool]).encode()
        counters = torch.tensor([self.n_shards, self.n_trainings])
        state = {**super().state_dict(), "counters": counters, "pool": torch.tensor(list(waiting), dtype=torch.uint8)}
        if self._teacher is not None:
            state["teacher"] = self._teacher.clone()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from saved side weights and failures."""
        if "counters" not in state or "pool" not in state:
            raise ValueError("the state lacks 'counters' or 'pool'; it is not one of this editor's")
        super().load_state_dict(state)
        self.n_shards, self.n_trainings = state["counters"].tolist()
        self.pool = [_sample(one) for one in json.loads(bytes(state["pool"].tolist()))]
        teacher = state.get("teacher")
        self._teacher = None if teacher is None else teacher.to(self._linear.weight.device)

    def warnings(self) -> list[str]:
        """WISE's, and the size of a turn."""
        size = f"windows of {self.merge_freq} edits in batches of {self.save_freq}"
        turns = f"mode=paper works in {size}; a checkpoint closes an open window"
        return [*super().warnings(), turns if self.mode == "paper" else "mode=released is WISE with other constants"]


class _Teacher:
    """Listens to forward passes and keeps the last logits of the first edit that it hears."""

    def __init__(self) -> None:
        self.firsts: Tensor | None = None
        self.everything: Tensor | None = None
        self._heard: Tensor | None = None

    def listening(self, rows: TrainingRows) -> Any:
        """A wrapper for a forward pass on `rows`."""

        def wrap(forward: Forward) -> Forward:
            def heard(weight: Tensor) -> Pass:
                done = forward(weight)
                self._heard = done.logits.detach()[rows.first_targets]
                if done.everything is not None:
                    self.everything = done.everything.detach()
                return done

            return heard

        return wrap

    def keep(self) -> None:
        """The edit that was heard last is over; the first one's logits stay."""
        if self.firsts is None:
            self.firsts = self._heard


def _plain(sample: Sample) -> dict[str, Any]:
    case = sample.case
    locality = [[probe.prompt, probe.answer] for probe in case.locality]
    return {
        "id": case.id,
        "prompt": case.prompt,
        "target": case.target,
        "locality": locality,
        "retries": sample.retries,
    }


def _sample(values: Mapping[str, Any]) -> Sample:
    locality = tuple(Probe(*pair) for pair in values["locality"])
    return Sample(EditCase(values["id"], values["prompt"], values["target"], locality=locality), values["retries"])


def _check(mode: str, distill: str, temperature: float, error_threshold: float, prune_threshold: float) -> None:
    if mode not in ("paper", "released"):
        raise UserError(f"method.mode must be 'paper' or 'released', got '{mode}'")
    if distill not in ("logit", "none"):
        raise UserError(f"method.distill must be 'logit' or 'none', got '{distill}'")
    if not temperature > 0:
        raise UserError(f"method.temperature must be > 0, got {temperature}")
    for name, value in (("error_threshold", error_threshold), ("prune_threshold", prune_threshold)):
        if not 0 <= value <= 1:
            raise UserError(f"method.{name} must be in [0, 1], got {value}")
