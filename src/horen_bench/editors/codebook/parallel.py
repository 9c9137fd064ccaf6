"""Training many values at once, each as if it were alone.

Losses are summed over edits and Adam works element by element, so rows share nothing: a value comes out as the plain
path (`training.train_value`) gives it, up to the order of floating-point sums. A row that is finished leaves the batch
and the next edit takes its place.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from horen_bench.editors.codebook.training import Schedule, TrainedValue, Value, ValueJob, has_length
from horen_bench.models.memory import is_out_of_memory
from horen_bench.models.partial import UpperLayers, UpperStates

Added = Callable[[Value, Tensor], Tensor]

_BETAS = (0.9, 0.999)  # Adam's, as in torch.optim.Adam
_EPS = 1e-8
_MOST_GPU_ROWS, _MOST_CPU_ROWS = 1024, 256
_CPU_BUDGET = 2 << 30  # bytes; fixed, so that every machine trains in the same batches
_REPACK_SHARE = 8  # finished rows are taken out once they are one in so many

# What a step makes of a row: it goes on, its loss is not finite, early stopping ends it, it has taken all its steps, or
# the last of them broke its value.
_RUNNING, _FAILED, _STOPPED, _SPENT, _BROKEN = range(5)


def train_values(
    jobs: Sequence[ValueJob], upper: UpperLayers, added: Added, schedule: Schedule, batch_size: int | None = None
) -> Iterator[tuple[ValueJob, TrainedValue]]:
    """Train all jobs; yields each as it is finished, in no particular order.

    Args:
        jobs: what to train; jobs of similar length are put side by side.
        upper: the layers above the wrapped module.
        added: what values `(B, ...)` add to module outputs `(B, d)`.
        schedule: of every job.
        batch_size: rows trained side by side; None finds it from the model's shape and, on a GPU, the size of its
            memory. Where memory does not do, it is halved and the rows at hand start again.
    """
    queue = deque(sorted(jobs, key=lambda job: len(job.edit.ids)))
    size = batch_size or _fitting_batch(upper)
    running: _ValueRows | None = None
    while queue or running:
        fresh: list[ValueJob] = []
        try:
            if queue and (running is None or len(running) <= size // 2):
                room = size - (len(running) if running else 0)
                fresh = [queue.popleft() for _ in range(min(room, len(queue)))]
                running, fresh = _refilled(running, _ValueRows.fresh(fresh, upper, added, schedule)), []
            assert running is not None
            yield from running.step()
            running = running.repacked()
            continue
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not is_out_of_memory(error):
                raise
        # Behind the handler, whose traceback would keep the tensors of the failed step.
        at_hand = {job.position: job for job in [*(running.unfinished() if running else ()), *fresh]}
        queue.extendleft(reversed(at_hand.values()))
        running, size = None, max(1, min(size, len(at_hand)) // 2)
        torch.cuda.empty_cache()


def _refilled(running: "_ValueRows | None", fresh: "_ValueRows") -> "_ValueRows":
    return running.joined(fresh) if running else fresh


def _fitting_batch(upper: UpperLayers) -> int:
    """A number of rows that should fit: half of what the model leaves of its GPU's memory, a fixed budget on a CPU.

    What happens to be free is not asked: rows of another batch differ by rounding, and the same command on the same
    kind of device gives the same values.
    """
    device = upper.device
    if device.type != "cuda":
        return max(1, min(_MOST_CPU_ROWS, _CPU_BUDGET // upper.bytes_per_edit()))
    left = torch.cuda.get_device_properties(device).total_memory - upper.bytes_of_weights()
    fitting = max(1, min(_MOST_GPU_ROWS, left // 2 // upper.bytes_per_edit()))
    return int(2 ** math.floor(math.log2(fitting)))  # drivers differ in how much of the memory they report


@dataclass(slots=True)
class _ValueRows:
    """Values in training, one row each.

    `steps` and `stale` count per row; `best` and `best_loss` are of the lowest loss seen; `done` rows are finished but
    not yet taken out. `finished` is what the host knows of `done`, which is on the device.
    """

    jobs: list[ValueJob]
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
    finished: list[bool]
    upper: UpperLayers
    added: Added
    schedule: Schedule

    @classmethod
    def fresh(cls, jobs: list[ValueJob], upper: UpperLayers, added: Added, schedule: Schedule) -> "_ValueRows":
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
            finished=[False] * len(jobs),
            upper=upper,
            added=added,
            schedule=schedule,
        )

    def __len__(self) -> int:
        return len(self.jobs)

    def unfinished(self) -> list[ValueJob]:
        """The jobs whose value was not yielded yet."""
        return [job for job, finished in zip(self.jobs, self.finished, strict=True) if not finished]

    def step(self) -> Iterator[tuple[ValueJob, TrainedValue]]:
        """One step of every row that is not done; yields the rows that finish with it.

        All is decided on the device, so that the host waits for it once, at the end.
        """
        if self.schedule.n_steps == 0:
            for row in range(len(self)):
                yield self._finish(row, math.nan, _SPENT)
            return
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in self.leaves.items()}
        losses = self.upper.losses(self.states, self.added(leaves, self.states.module_output)).to(self.steps.device)
        gradients = torch.autograd.grad(torch.where(self.done, 0, losses).sum(), list(leaves.values()))
        losses = losses.detach()
        failed = ~self.done & ~losses.isfinite()
        self.done = self.done | failed
        stopped = self._stop_early(losses)
        self._update(dict(zip(leaves, gradients, strict=True)))
        outcomes = failed * _FAILED + stopped * _STOPPED + self._exhausted()
        table = torch.stack([losses, self.best_loss, outcomes.to(losses.dtype)], dim=1).tolist()
        for row, (loss, best_loss, outcome) in enumerate(table):
            if not self.finished[row]:
                self.losses[row].append(loss)
                if outcome != _RUNNING:
                    yield self._finish(row, best_loss, int(outcome))

    def _stop_early(self, losses: Tensor) -> Tensor:
        """Remember the best value of each row; which rows' losses are low enough or do not fall any more, `(B,)`."""
        improved = ~self.done & (losses < self.best_loss)
        self.stale = torch.where(improved, 0, self.stale + 1)
        rule = self.schedule.early_stopping
        kept = improved if rule else ~self.done
        self.best_loss = torch.where(kept, losses, self.best_loss)
        self.best = {name: torch.where(_like(kept, leaf), leaf, self.best[name]) for name, leaf in self.leaves.items()}
        if rule is None:
            return torch.zeros_like(self.done)
        stopping = ~self.done & ((losses < rule.loss_bound) | (self.stale >= rule.patience))
        self.done = self.done | stopping
        return stopping

    def _exhausted(self) -> Tensor:
        """Which rows have taken their last step, `(B,)`: `_SPENT`, or `_BROKEN` where it broke the value; else 0."""
        last = self.schedule.n_steps - 1
        if not any(len(losses) == last for losses in self.losses):
            return torch.zeros_like(self.steps)
        exhausted = ~self.done & (self.steps == self.schedule.n_steps)
        finite = torch.stack([has_length(leaf) for leaf in self.leaves.values()]).all(dim=0)
        self.done = self.done | exhausted
        return exhausted * torch.where(finite, _SPENT, _BROKEN)

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

    def _finish(self, row: int, best_loss: float, outcome: int) -> tuple[ValueJob, TrainedValue]:
        """The job of a row and its value; the row counts as finished."""
        losses = self.losses[row]
        use_best = outcome != _SPENT or self.schedule.early_stopping is not None
        value = {name: tensor[row].clone() for name, tensor in (self.best if use_best else self.leaves).items()}
        last = losses[-1] if losses else math.nan
        steps = len(losses) if outcome in (_SPENT, _BROKEN) else len(losses) - 1
        finite = outcome not in (_FAILED, _BROKEN)
        self.finished[row] = True
        loss = best_loss if use_best and losses else last
        return self.jobs[row], TrainedValue(value, losses, loss, steps, finite=finite)

    def repacked(self) -> "_ValueRows | None":
        """Without the finished rows, once they are many enough to be worth it; None when nothing is left."""
        n_done = sum(self.finished)
        if n_done == len(self):
            return None
        if n_done * _REPACK_SHARE < len(self):
            return self
        kept = [row for row, finished in enumerate(self.finished) if not finished]
        rows = torch.tensor(kept, device=self.steps.device)
        return replace(
            self,
            jobs=[self.jobs[row] for row in kept],
            states=self.states.select(rows),
            losses=[self.losses[row] for row in kept],
            finished=[False] * len(kept),
            **_combined(lambda tensor: tensor[rows], self),
        )

    def joined(self, other: "_ValueRows") -> "_ValueRows":
        """These rows and then the others."""
        return replace(
            self,
            jobs=self.jobs + other.jobs,
            states=self.states.joined(other.states),
            losses=self.losses + other.losses,
            finished=self.finished + other.finished,
            **_combined(lambda *tensors: torch.cat(tensors), self, other),
        )


def _combined(combine: Callable[..., Tensor], *parts: _ValueRows) -> dict[str, Any]:
    """What `combine` makes of each tensor of some rows."""

    def combined(name: str) -> Any:
        tensors = [getattr(part, name) for part in parts]
        if isinstance(tensors[0], dict):
            return {key: combine(*(value[key] for value in tensors)) for key in tensors[0]}
        return combine(*tensors)

    names = ("leaves", "first_moments", "second_moments", "best", "best_loss", "steps", "stale", "done")
    return {name: combined(name) for name in names}


def _like(rows: Tensor, tensor: Tensor) -> Tensor:
    """A `(B,)` tensor shaped to broadcast over `(B, ...)`."""
    return rows.view(-1, *([1] * (tensor.dim() - 1)))
