"""Training many values at once, each as if it were alone.

Losses are summed over edits and Adam works element by element, so rows share nothing: a value comes out as the plain
path (`training.train_value`) gives it, up to the order of floating-point sums. A row that is finished leaves the batch
and the next edit takes its place.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from horen_bench.editors.codebook.training import Schedule, Trained, Value
from horen_bench.models.partial import UpperLayers, UpperStates
from horen_bench.prompts import EncodedEdit

Added = Callable[[Value, Tensor], Tensor]

_BETAS = (0.9, 0.999)  # Adam's, as in torch.optim.Adam
_EPS = 1e-8
_CPU_BATCH = 256
_REPACK_SHARE = 8  # finished rows are taken out once they are one in so many


@dataclass(frozen=True, slots=True)
class Job:
    """One value to train.

    Attributes:
        position: identifies the job to the caller.
        edit: prompt and target.
        start: the value to start from, on the CPU or the model's device.
    """

    position: int
    edit: EncodedEdit
    start: Value


def train_values(
    jobs: Sequence[Job], upper: UpperLayers, added: Added, schedule: Schedule, batch_size: int | None = None
) -> Iterator[tuple[Job, Trained]]:
    """Train all jobs; yields each as it is finished, in no particular order.

    Args:
        jobs: what to train; jobs of similar length are put side by side.
        upper: the layers above the wrapped module.
        added: what values `(B, ...)` add to module outputs `(B, d)`.
        schedule: of every job.
        batch_size: rows trained side by side; None finds it from the device's free memory. Where the memory does not
            do, it is halved and the rows at hand start again.
    """
    queue = deque(sorted(jobs, key=lambda job: len(job.edit.ids)))
    size = batch_size or _fitting_batch(upper)
    running: _Rows | None = None
    while queue or running:
        try:
            if queue and (running is None or len(running) <= size // 2):
                fresh = [queue.popleft() for _ in range(min(size - (len(running) if running else 0), len(queue)))]
                running = _refilled(running, fresh, upper, added, schedule)
            assert running is not None
            yield from running.step()
            running = running.repacked()
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            at_hand = {job.position: job for job in [*(running.jobs if running else ()), *fresh]}
            queue.extendleft(at_hand.values())
            running, size = None, max(1, size // 2)
            torch.cuda.empty_cache()


def _refilled(
    running: "_Rows | None", jobs: list[Job], upper: UpperLayers, added: Added, schedule: Schedule
) -> "_Rows":
    fresh = _Rows.fresh(jobs, upper, added, schedule)
    return fresh if running is None else running.joined(fresh)


def _fitting_batch(upper: UpperLayers) -> int:
    """A number of rows that should fit the free memory of the model's GPU with room to spare."""
    device = upper.device
    if device.type != "cuda":
        return _CPU_BATCH
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(1024, int(0.5 * free / upper.bytes_per_edit())))


@dataclass(slots=True)
class _Rows:
    """Values in training, one row each.

    `steps` and `stale` count per row; `best` and `best_loss` are of the lowest loss seen; `done` rows are finished but
    not yet taken out.
    """

    jobs: list[Job]
    states: UpperStates
    leaves: Value
    first_moments: Value
    second_moments: Value
    best: Value
    best_loss: Tensor
    steps: Tensor
    stale: Tensor
    done: Tensor
    losses: list[list[float]]
    upper: UpperLayers
    added: Added
    schedule: Schedule

    @classmethod
    def fresh(cls, jobs: list[Job], upper: UpperLayers, added: Added, schedule: Schedule) -> "_Rows":
        """Rows before their first step."""
        states = upper.prepare([job.edit for job in jobs])
        device = states.module_output.device
        leaves = {name: torch.stack([job.start[name].to(device) for job in jobs]) for name in jobs[0].start}
        counts = torch.zeros(len(jobs), dtype=torch.long, device=device)
        return cls(
            jobs=jobs,
            states=states,
            leaves=leaves,
            first_moments={name: torch.zeros_like(leaf) for name, leaf in leaves.items()},
            second_moments={name: torch.zeros_like(leaf) for name, leaf in leaves.items()},
            best={name: leaf.clone() for name, leaf in leaves.items()},
            best_loss=torch.full((len(jobs),), math.inf, device=device),
            steps=counts,
            stale=counts.clone(),
            done=counts.bool(),
            losses=[[] for _ in jobs],
            upper=upper,
            added=added,
            schedule=schedule,
        )

    def __len__(self) -> int:
        return len(self.jobs)

    def step(self) -> Iterator[tuple[Job, Trained]]:
        """One step of every row that is not done; yields the rows that finish with it."""
        if self.schedule.n_steps == 0:
            yield from self._finish(~self.done, torch.ones_like(self.done), use_best=True)
            return
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in self.leaves.items()}
        losses = self.upper.losses(self.states, self.added(leaves, self.states.module_output)).to(self.steps.device)
        gradients = torch.autograd.grad(losses[~self.done].sum(), list(leaves.values()))
        losses = losses.detach()
        alive = ~self.done
        for row, loss in zip(alive.nonzero()[:, 0].tolist(), losses[alive].tolist(), strict=True):
            self.losses[row].append(loss)
        finite = losses.isfinite()
        yield from self._finish(alive & ~finite, finite, use_best=True)
        yield from self._stop_early(losses)
        self._update(dict(zip(leaves, gradients, strict=True)))
        exhausted = ~self.done & (self.steps == self.schedule.n_steps)
        if exhausted.any():
            sound = torch.stack([leaf.flatten(1).isfinite().all(dim=1) for leaf in self.leaves.values()]).all(dim=0)
            yield from self._finish(exhausted & ~sound, sound, use_best=True)
            yield from self._finish(exhausted & sound, sound, use_best=self.schedule.early_stopping is not None)

    def _stop_early(self, losses: Tensor) -> Iterator[tuple[Job, Trained]]:
        """Remember the best value of each row; finish rows whose loss is low enough or does not fall any more."""
        improved = ~self.done & (losses < self.best_loss)
        self.stale = torch.where(improved, 0, self.stale + 1)
        rule = self.schedule.early_stopping
        kept = improved if rule else ~self.done
        self.best_loss = torch.where(kept, losses, self.best_loss)
        self.best = {name: torch.where(_like(kept, leaf), leaf, self.best[name]) for name, leaf in self.leaves.items()}
        if rule:
            stopping = ~self.done & ((losses < rule.loss_bound) | (self.stale >= rule.patience))
            yield from self._finish(stopping, torch.ones_like(self.done), use_best=True)

    def _update(self, gradients: Value) -> None:
        """Adam on every row that is not done, with the row's own step count (torch.optim.Adam's arithmetic)."""
        alive = ~self.done
        self.steps = self.steps + alive
        for name, gradient in gradients.items():
            kept = _like(alive, gradient)
            steps = _like(self.steps.clamp(min=1).double(), gradient)
            first = torch.lerp(self.first_moments[name], gradient, 1 - _BETAS[0])
            second = _BETAS[1] * self.second_moments[name] + (1 - _BETAS[1]) * gradient.square()
            scale = (self.schedule.learning_rate / (1 - _BETAS[0] ** steps)).float()
            root = (1 - _BETAS[1] ** steps).sqrt().float()
            moved = self.leaves[name] - scale * first / (second.sqrt() / root + _EPS)
            self.first_moments[name] = torch.where(kept, first, self.first_moments[name])
            self.second_moments[name] = torch.where(kept, second, self.second_moments[name])
            self.leaves[name] = torch.where(kept, moved, self.leaves[name])

    def _finish(self, rows: Tensor, finite: Tensor, *, use_best: bool) -> Iterator[tuple[Job, Trained]]:
        chosen = rows.nonzero()[:, 0].tolist()
        self.done = self.done | rows
        values = self.best if use_best else self.leaves
        for row in chosen:
            losses = self.losses[row]
            last = losses[-1] if losses else math.nan
            loss = float(self.best_loss[row]) if use_best and losses else last
            value = {name: tensor[row].clone() for name, tensor in values.items()}
            yield self.jobs[row], Trained(value, losses, loss, int(self.steps[row]), finite=bool(finite[row]))

    def repacked(self) -> "_Rows | None":
        """Without the finished rows, once they are many enough to be worth it; None when nothing is left."""
        n_done = int(self.done.sum())
        if n_done == len(self):
            return None
        if n_done * _REPACK_SHARE < len(self):
            return self
        rows = (~self.done).nonzero()[:, 0]
        chosen = rows.tolist()
        return self._with(
            [self.jobs[row] for row in chosen],
            self.states.select(rows),
            [self.losses[row] for row in chosen],
            lambda tensor, _other: tensor[rows],
            self,
        )

    def joined(self, other: "_Rows") -> "_Rows":
        """These rows and then the others."""
        jobs, losses = self.jobs + other.jobs, self.losses + other.losses
        return self._with(jobs, self.states.joined(other.states), losses, lambda a, b: torch.cat([a, b]), other)

    def _with(
        self,
        jobs: list[Job],
        states: UpperStates,
        losses: list[list[float]],
        combine: Callable[[Tensor, Tensor], Tensor],
        other: "_Rows",
    ) -> "_Rows":
        def both(name: str) -> Any:
            mine, its = getattr(self, name), getattr(other, name)
            if isinstance(mine, dict):
                return {key: combine(mine[key], its[key]) for key in mine}
            return combine(mine, its)

        tensors = ("leaves", "first_moments", "second_moments", "best", "best_loss", "steps", "stale", "done")
        return _Rows(
            jobs=jobs,
            states=states,
            losses=losses,
            upper=self.upper,
            added=self.added,
            schedule=self.schedule,
            **{name: both(name) for name in tensors},
        )


def _like(rows: Tensor, tensor: Tensor) -> Tensor:
    """A `(B,)` tensor shaped to broadcast over `(B, ...)`."""
    return rows.view(-1, *([1] * (tensor.dim() - 1)))
