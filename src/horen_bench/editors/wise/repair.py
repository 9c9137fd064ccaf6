"""REPAIR (arXiv 2510.01879): WISE's side memories, trained on batches of like edits, checked, and repaired.

`mode=paper` follows the paper where it is definite: edits come in windows, similar ones share a shard, a shard's first
edit teaches the others, shards that fail are dropped and trained again, and what is left is merged by loss.
`mode=released` is what the published code does: WISE, with a distillation that its configurations leave off.
Shapes: `m` input size of the module.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.cases import EditCase, EditRecord
from horen_bench.editors.shared.padding import check_padding
from horen_bench.editors.wise.compat import ReleasedDistillation
from horen_bench.editors.wise.config import RepairConfig
from horen_bench.editors.wise.distillation import distance_to_teacher, reference_of, teacher_of
from horen_bench.editors.wise.editor import WiseEditor, record_of
from horen_bench.editors.wise.repair_batches import (
    OpenBatch,
    TrainedShard,
    WindowEdit,
    gaussian,
    inconsistent,
    loss_aware_ties,
    packed,
    similarity_batches,
    unpacked,
)
from horen_bench.editors.wise.routing import Memory
from horen_bench.editors.wise.shards import NOTHING_RECORDED
from horen_bench.editors.wise.training import Extra, Labels, SideEdit, SideTrained
from horen_bench.models.architecture import linear_sizes
from horen_bench.models.calls import run
from horen_bench.prompts import PromptEncoder, last_prompt_positions, pad


class RepairEditor(WiseEditor):
    """REPAIR on one model.

    Attributes:
        n_shards: opened so far.
        n_trainings: of edits, repeated ones counted.
        pool: failures that wait for a repair.
        waiting: edits that the consistency filter has put off to the next window.

    Raises:
        UserError: as `WiseEditor`.
    """

    config: RepairConfig

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | PromptEncoder,
        config: RepairConfig,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(model, tokenizer, config, seed=seed)
        self.n_shards = 0
        self.n_trainings = 0
        self.pool: list[WindowEdit] = []
        self.waiting: list[WindowEdit] = []
        self.released: ReleasedDistillation | None = None
        if config.mode == "paper":
            self.slice_size = self._window_size * self._windows_at_once()
        elif config.distill == "logit":
            self.released = ReleasedDistillation(config)
            self.shards_at_once = self.slice_size = 1  # what the teacher is depends on the order of all edits

    @property
    def _window_size(self) -> int:
        return self.side.merge_freq

    # --- The schedule of the paper: windows, shards, feedback, merge -----------------------------------

    def edit(self, cases: Sequence[EditCase]) -> list[EditRecord]:
        """Write the cases window by window; one that is still open at the end is closed."""
        if self.config.mode == "released":
            return super().edit(cases)
        self.expect(cases)
        check_padding(self.model)
        records: list[EditRecord] = []
        size, at_once = self._window_size, self._windows_at_once()
        windows = [cases[at : at + size] for at in range(0, len(cases), size)]
        for start in range(0, len(windows), at_once):
            records += self._write_windows(windows[start : start + at_once])
        return records

    def flush(self) -> None:
        """Write what the consistency filter has put off, as a window of its own."""
        if self.waiting:
            self._write_windows([[]])

    def _windows_at_once(self) -> int:
        """Windows whose first trainings go side by side: one where a window's outcome tells what is in the next."""
        coupled = self.config.max_rounds > 0 or self.config.consistency is not None
        return 1 if coupled else max(1, self.shards_at_once * self.side.save_freq // self._window_size)

    def _write_windows(self, windows: Sequence[Sequence[EditCase]]) -> list[EditRecord]:
        """Write windows side by side; where that is interrupted, all is as it was before."""
        counters = self.n_shards, self.n_trainings, self.irrelevant.n_borrowed, self.weights.n_edits
        edits = [replace(edit) for edit in self.pool], [replace(edit) for edit in self.waiting]
        stored = list(self.weights.stored)
        try:
            return self._written_windows(windows)
        except BaseException:
            self.n_shards, self.n_trainings, self.irrelevant.n_borrowed, self.weights.n_edits = counters
            (self.pool, self.waiting), self.weights.stored = edits, stored
            raise

    def _written_windows(self, windows: Sequence[Sequence[EditCase]]) -> list[EditRecord]:
        started = time.perf_counter()
        edits = [[WindowEdit(case) for case in window] for window in windows]
        batches = [self._window_batches(window) for window in edits]
        shards = self._trained_batches([batch for of_window in batches for batch in of_window])
        for window, of_window in zip(edits, batches, strict=True):
            self._close_window([shards.pop(0) for _ in of_window])
            self.weights.n_edits += len(window)
        written = [edit for window in edits for edit in window]
        seconds = (time.perf_counter() - started) / max(1, len(written))
        return [self._record(edit, seconds) for edit in written]

    def _record(self, edit: WindowEdit, seconds: float) -> EditRecord:
        if edit in self.waiting:
            problem = "put off by the consistency filter; written with the next window or before the next evaluation"
            return EditRecord(edit.case.id, "inserted", None, None, math.nan, 0, seconds, problem)
        record = record_of(edit.case, edit.trained, seconds)
        if edit.trained is None and self._has_tokens(edit.case):
            return replace(record, problem="the prompt's feature is not finite; nothing was written")
        return record if record.action == "failed" else replace(record, steps=edit.steps)

    def _window_batches(self, new: Sequence[WindowEdit]) -> list[list[WindowEdit]]:
        """The window's batches, behind what waits; what the consistency filter finds too far from its seed waits."""
        edits = [*self.waiting, *(edit for edit in new if self._has_tokens(edit.case))]
        features = self._features([edit.case.prompt for edit in edits])
        finite: list[bool] = features.isfinite().all(dim=1).tolist()
        edits, features = [edit for edit, fine in zip(edits, finite, strict=True) if fine], features[finite]
        batches = similarity_batches(features, self.side.save_freq)
        limit = self.config.consistency
        far = [] if limit is None or not new else inconsistent(features, batches, limit)
        self.waiting = [edits[i] for i in far if not edits[i].deferred]
        for edit in self.waiting:
            edit.deferred = True
        return [[edits[i] for i in batch if edits[i] not in self.waiting] for batch in batches]

    @torch.no_grad()
    def _features(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors `(n, m)`: the module's input at the last token of each bare prompt, in the frozen model."""
        if not prompts:
            return torch.empty(0, linear_sizes(self._linear)[0])
        batch = pad(self.encoder.prompts(prompts), self.encoder.pad_id, device=self.model.device)
        features: list[Tensor] = []

        def read(inputs: Tensor, _outputs: Tensor, mask: Tensor) -> None:
            last = last_prompt_positions(mask)
            features.append(inputs[torch.arange(len(last), device=last.device), last].float())

        with self.hook.responding(read):
            run(self.model, batch)
        return F.normalize(features[0], dim=1)

    def _close_window(self, shards: list[TrainedShard]) -> None:
        """Check the shards of a window, repair and merge them."""
        finished = list(self.weights.stored)
        for _ in range(self.config.max_rounds):
            self.weights.stored = [*finished, *(shard.memory for shard in shards)]
            if not self._repair(shards):
                break
        self.weights.stored = [*finished, *self._merged_shards(shards)]
        self.pool = self._failures([edit for shard in shards for edit in shard.members])

    # --- Training --------------------------------------------------------------------------------------

    def _trained_batches(self, batches: Sequence[Sequence[WindowEdit]], noise: float = 0.0) -> list[TrainedShard]:
        """A shard per batch, as many side by side as the settings allow."""
        groups = [batches[at : at + self.shards_at_once] for at in range(0, len(batches), self.shards_at_once)]
        return [
            shard for group in groups for shard in self._side_by_side([self._opened(batch, noise) for batch in group])
        ]

    def _opened(self, members: Sequence[WindowEdit], noise: float) -> OpenBatch:
        """A fresh shard for a batch, with the next mask; its weight is the module's own, and noise."""
        number, first = self.n_shards, self.n_trainings
        self.n_shards, self.n_trainings = number + 1, first + len(members)
        base = self.weights.base
        weight = base + noise * gaussian(base, [self.seed, number]) if noise else None
        cases = [edit.case for edit in members]
        return OpenBatch(first, cases, self._masks.of(number), weight, NOTHING_RECORDED, members)

    def _side_by_side(self, opened: Sequence[OpenBatch]) -> list[TrainedShard]:
        """Train batches in lockstep, edit by edit; a batch's first edit teaches the others."""
        for place in range(max(len(batch.members) for batch in opened)):
            present = [batch for batch in opened if place < len(batch.members)]
            teachers = [teacher_of(batch.references, self.config) for batch in present]
            edits = [self._side_edit(batch, place, teacher) for batch, teacher in zip(present, teachers, strict=True)]
            for batch, edit, trained in zip(present, edits, self._train(edits), strict=True):
                member = batch.members[place]
                member.trained, member.steps = replace(trained, last=None), member.steps + trained.steps
                batch.take(trained)
                if trained.last is not None:
                    batch.references.append(reference_of(trained.last, edit, self.config))
        return [self._closed(batch) for batch in opened]

    def _closed(self, batch: OpenBatch) -> TrainedShard:
        trained = [edit.trained for edit in batch.members if edit.trained]
        losses = [result.loss for result in trained if math.isfinite(result.loss)]
        memory = Memory(self.weights.start(batch.weight), batch.lowest)
        return TrainedShard(memory, list(batch.members), sum(losses) / max(1, len(losses)))

    def _extra(self, edits: Sequence[SideEdit]) -> Extra | None:
        if self.released is not None:
            return self.released.extra(edits[0])
        if all(edit.teacher is None for edit in edits):
            return None
        spans = Labels.of([edit.rows for edit in edits]).spans
        return lambda done: torch.stack(
            [distance_to_teacher(done.of(i, span), edits[i], self.config) for i, span in enumerate(spans)]
        )

    def _train(self, edits: Sequence[SideEdit]) -> list[SideTrained]:
        trained = super()._train(edits)
        if self.released is not None:
            for edit, result in zip(edits, trained, strict=True):
                self.released.take(edit, result)
        return trained

    # --- Error feedback --------------------------------------------------------------------------------

    def _repair(self, shards: list[TrainedShard]) -> bool:
        """Prune the worst shard and train its edits and all failures again; False where nothing calls for it."""
        config = self.config
        failed = self._failures([edit for shard in shards for edit in shard.members])
        rates = [sum(edit in failed for edit in shard.members) / max(1, len(shard.members)) for shard in shards]
        pool_limit = self._window_size if config.pool_limit is None else config.pool_limit
        if not shards or not (max(rates) > config.prune_threshold or len(failed) > pool_limit):
            return False
        worst = max(range(len(shards)), key=lambda i: (rates[i], rates[i] * len(shards[i].members), -i))
        again = [edit for edit in failed if edit.retries < config.max_retries]
        again += [edit for edit in shards[worst].members if edit not in failed]
        if not again or self.n_trainings + len(again) > config.max_trainings:
            return False
        del shards[worst]
        for shard in shards:
            shard.members = [edit for edit in shard.members if edit not in again]
        shards[:] = [shard for shard in shards if shard.members]
        for edit in again:
            edit.retries += 1
        self.pool = [edit for edit in failed if edit not in again]
        like = similarity_batches(self._features([edit.case.prompt for edit in again]), self.side.save_freq)
        batches = [[again[i] for i in batch] for batch in like]
        shards += self._trained_batches(batches, config.prune_noise)
        return True

    def _failures(self, members: Sequence[WindowEdit]) -> list[WindowEdit]:
        """The pool with those members that the routed model gets wrong, and without those that it gets right."""
        shares = self._shares_right([edit.case for edit in members])
        waiting = [edit for edit in self.pool if edit not in members]
        threshold = self.config.error_threshold
        return [*waiting, *(edit for edit, share in zip(members, shares, strict=True) if share <= threshold)]

    @torch.no_grad()
    def _shares_right(self, cases: Sequence[EditCase]) -> list[float]:
        """Share of each target's tokens that the routed model predicts, with the target behind the prompt."""
        if not cases:
            return []
        edits = [self.encoder.edit(case.prompt, case.target) for case in cases]
        batch = pad([edit.ids for edit in edits], self.encoder.pad_id, device=self.model.device)
        logits = run(self.model, batch).logits
        right = (logits[:, :-1].argmax(dim=-1) == batch.input_ids[:, 1:]).float()
        return [row[-len(edit.target) :].mean().item() for row, edit in zip(right, edits, strict=True)]

    def _merged_shards(self, shards: Sequence[TrainedShard]) -> list[Memory]:
        """One memory of the shards that can be routed to, or none."""
        parts = [shard for shard in shards if shard.memory.activation < NOTHING_RECORDED]
        if not parts:
            return []
        weights, losses = [part.memory.weight for part in parts], [part.loss for part in parts]
        merged = loss_aware_ties(weights, self.weights.base, losses, self.config.loss_sensitivity)
        return [Memory(merged, min(part.memory.activation for part in parts))]

    # --- State -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """WISE's state, the counters, the failures that wait, and the teacher as released."""
        counters = torch.tensor([self.n_shards, self.n_trainings])
        state = super().state_dict()
        state |= {"counters": counters, "pool": packed(self.pool), "waiting": packed(self.waiting)}
        if self.released is not None and self.released.teacher is not None:
            state["teacher"] = self.released.teacher.clone()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from saved side weights and failures."""
        for name in ("counters", "pool", "waiting"):
            if name not in state:
                raise ValueError(f"the state lacks '{name}'; it is not one of this editor's")
        super().load_state_dict(state)
        self.n_shards, self.n_trainings = state["counters"].tolist()
        self.pool, self.waiting = unpacked(state["pool"]), unpacked(state["waiting"])
        if self.released is not None:
            teacher = state.get("teacher")
            self.released.teacher = None if teacher is None else teacher.to(self.weights.base.device)

    def warnings(self) -> list[str]:
        """WISE's, and the size of a window."""
        size = f"windows of {self._window_size} edits in batches of {self.side.save_freq}"
        windows = f"mode=paper works in {size}; a checkpoint closes an open window"
        own = windows if self.config.mode == "paper" else "mode=released is WISE with other constants"
        return [*super().warnings(), own]
