"""Training side weights (paper section 2.3; objective and loop as in the release), several edits side by side.

Edits of different shards have nothing to do with one another: each is trained on a side weight of its own, and what
they share is one forward and one backward pass.
Shapes: `S` edits side by side, each `R` rows of its own `T` tokens, the last row irrelevant; `n` labels of all edits,
one edit after the other; `m` input and `d` output size of the module.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from horen_bench.editors.wise.rows import TrainingRows
from horen_bench.errors import UserError

Activation = Callable[[Tensor], Tensor]
Bounds = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass with the side weights.

    Attributes:
        logits: `(n, vocabulary)`, at the positions that predict a label, row after row.
        hidden: `(n, hidden size)`, the final hidden states that they are made of.
        moved: `(S, R)`, how far each row's output of the module moves, by `distances`, in the mean over its columns.
        everything: logits of all rows and positions, `(R, T, vocabulary)`, where one edit ran through the whole model.
    """

    logits: Tensor
    hidden: Tensor
    moved: Tensor
    everything: Tensor | None = None

    def of(self, edit: int, labels: slice) -> "Pass":
        """The part of one edit, whose labels are at `labels`."""
        return Pass(self.logits[labels], self.hidden[labels], self.moved[edit : edit + 1], self.everything)

    def detached(self) -> "Pass":
        """The same without gradients."""
        whole = None if self.everything is None else self.everything.detach()
        return Pass(self.logits.detach(), self.hidden.detach(), self.moved.detach(), whole)


Forward = Callable[[Tensor], Pass]  # of side weights (S, d, m)
Extra = Callable[[Pass], Tensor]  # a further term of each edit's loss, (S,)


@dataclass(frozen=True, slots=True)
class Margins:
    """Activation margins: irrelevant below `alpha`, edits above `beta`, and `gamma` between the two."""

    alpha: float
    beta: float
    gamma: float


@dataclass(frozen=True, slots=True)
class Stopping:
    """Stop once the loss is at most `loss` and its last change at most `change`."""

    loss: float
    change: float


@dataclass(frozen=True, slots=True)
class SideSchedule:
    """How a side weight is trained.

    Attributes:
        learning_rate: of SGD without momentum.
        weight_decay: added to the gradient behind the mask, so that it reaches every element.
        n_steps: most steps per edit.
        stopping: when to stop before.
        margins: of the activation loss.
        act_weight: weight of the activation loss; 1 in WISE.
        norm_constraint: farthest that an element may be from the module's own weight; None: any.
    """

    learning_rate: float
    weight_decay: float
    n_steps: int
    stopping: Stopping
    margins: Margins
    norm_constraint: float | None
    act_weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise UserError(f"method.learning_rate must be > 0, got {self.learning_rate}")
        if self.n_steps < 1:
            raise UserError(f"method.n_steps must be at least 1, got {self.n_steps}")
        if self.norm_constraint is not None and not self.norm_constraint > 0:
            raise UserError(f"method.norm_constraint must be > 0 or null, got {self.norm_constraint}")


@dataclass(frozen=True, slots=True)
class SideEdit:
    """One edit to train.

    Attributes:
        rows: what it is trained on.
        mask: 1 where the gradient passes, 0 elsewhere; `(d, m)`, the weight's dtype.
        start: the side weight before it, `(d, m)`; not changed.
        number: of the training, from 0.
        teacher: what an earlier edit left for it to follow.
    """

    rows: TrainingRows
    mask: Tensor
    start: Tensor
    number: int
    teacher: Tensor | None = None


@dataclass(frozen=True, slots=True)
class SideTrained:
    """A side weight after one edit.

    Attributes:
        weight: `(d, m)`.
        activation: mean distance of the edit's rows in the last finite pass; infinite if there was none.
        losses: edit and activation loss of every pass.
        loss: mean token cross-entropy (nats) of the last finite pass; NaN if there was none.
        steps: SGD steps taken.
        finite: False if a loss or the weight was not finite; `weight` is then the last one that was sound.
        last: the last finite pass of this edit, without gradient; None if there was none.
    """

    weight: Tensor
    activation: float
    losses: list[tuple[float, float]]
    loss: float
    steps: int
    finite: bool
    last: Pass | None


@dataclass(frozen=True, slots=True)
class Labels:
    """The labels of `S` edits, joined.

    Attributes:
        ids: int64 `(n,)`.
        owners: int64 `(n,)`, which of the `S * (R - 1)` edit rows each belongs to.
        windows: int64 `(S, R - 1)`, positions that a row's loss is averaged over: one more than it has labels, as the
            published window opens one position before the first of them, where the loss is 0.
        spans: where the labels of each edit are among the `n`.
    """

    ids: Tensor
    owners: Tensor
    windows: Tensor
    spans: list[slice]

    @classmethod
    def of(cls, rows: Sequence[TrainingRows]) -> "Labels":
        """Those of some edits, which have equally many rows."""
        n_rows = rows[0].labels.shape[0]
        windows = [(one.n_labels + 1).clamp(max=one.labels.shape[1] - 1) for one in rows]
        ends = torch.tensor([0, *(one.wanted_ids.numel() for one in rows)]).cumsum(0).tolist()
        return cls(
            torch.cat([one.wanted_ids for one in rows]),
            torch.cat([one.owners + i * n_rows for i, one in enumerate(rows)]),
            torch.stack(windows),
            [slice(*pair) for pair in pairwise(ends)],
        )


def edit_loss(logits: Tensor, labels: Labels) -> Tensor:
    """Cross-entropy of each row's labels over its window, then the mean over an edit's rows: `(S,)`."""
    device = logits.device
    per_token = F.cross_entropy(logits, labels.ids.to(device), reduction="none")
    sums = per_token.new_zeros(labels.windows.numel()).index_add(0, labels.owners.to(device), per_token)
    return (sums.view(labels.windows.shape) / labels.windows.to(device)).mean(dim=1)


def distances(side: Tensor, activated: Tensor, activation: Activation) -> Tensor:
    """Norm of what a side weight changes behind the model's activation function, `(...)`.

    Args:
        side: output with the side weight, `(..., d)`.
        activated: the module's own output behind the activation function, `(..., d)`.
        activation: that function.
    """
    found: Tensor = torch.linalg.vector_norm(activation(side) - activated, dim=-1)
    return found


def margin_loss(edits: Tensor, irrelevant: Tensor, margins: Margins) -> Tensor:
    """Activation loss (paper Eq. 6), each hinge averaged over the rows that violate it: `(...)`.

    Args:
        edits: mean distance of each edit row, `(..., R - 1)`.
        irrelevant: mean distance of the irrelevant row, `(...)`.
        margins: what must lie between them.
    """
    held = irrelevant[..., None]
    return (
        _mean_positive(held - edits + margins.gamma)
        + _mean_positive(held - margins.alpha)
        + _mean_positive(margins.beta - edits)
    )


def _mean_positive(values: Tensor) -> Tensor:
    violated = values > 0
    return (values * violated).sum(dim=-1) / violated.sum(dim=-1).clamp(min=1)


def train_sides(
    edits: Sequence[SideEdit],
    *,
    base: Tensor,
    forward: Forward,
    schedule: SideSchedule,
    extra: Extra | None = None,
) -> list[SideTrained]:
    """Train each edit's side weight; one that is done waits for the others.

    Args:
        edits: of different shards.
        base: the module's own weight, `(d, m)`.
        forward: the pass with their side weights.
        schedule: step size, margins, when to stop.
        extra: a further term of the loss.
    """
    labels, bounds = Labels.of([edit.rows for edit in edits]), _bounds(base, schedule.norm_constraint)
    weights = torch.stack([edit.start for edit in edits]).requires_grad_()
    sound = weights.detach().clone()
    progress = [_Progress() for _ in edits]
    for _ in range(schedule.n_steps):
        done = forward(weights)
        of_edit = edit_loss(done.logits, labels)
        of_margins = margin_loss(done.moved[:, :-1], done.moved[:, -1], schedule.margins).to(of_edit.device)
        loss = of_edit + schedule.act_weight * of_margins
        if extra is not None:
            loss = loss + extra(done)
        told = [of_edit, of_margins, loss, done.moved[:, :-1].mean(dim=1)]
        values = torch.stack([one.detach().float().to(loss.device) for one in told], dim=1).tolist()
        for i, one in enumerate(progress):
            one.hear(values[i], done, schedule.stopping)
        running = [i for i, one in enumerate(progress) if one.running]
        if not running:
            break
        (gradient,) = torch.autograd.grad(loss.sum(), [weights])
        for i in running:
            sound[i].copy_(weights[i].detach())
            _descend(weights.detach()[i], gradient[i], edits[i].mask, bounds, schedule)
    after = weights.detach()
    return [one.result(i, after[i], sound[i], edits[i], labels.spans[i]) for i, one in enumerate(progress)]


@dataclass(slots=True)
class _Progress:
    """Where the training of one edit stands."""

    losses: list[tuple[float, float]] = field(default_factory=list)
    activation: float = math.inf
    edit: float = math.nan
    before_last: float = 0.0
    last: float = 1e9
    steps: int = 0
    running: bool = True
    finite: bool = True
    done: Pass | None = None

    def hear(self, values: Sequence[float], done: Pass, stopping: Stopping) -> None:
        """Take in a pass; the edit runs on unless its loss has settled or is not finite."""
        if not self.running:
            return
        of_edit, of_margins, total, activation = values
        self.losses.append((of_edit, of_margins))
        self.finite = math.isfinite(total)
        if self.finite:
            self.edit, self.activation, self.done = of_edit, activation, done
        settled = abs(self.last - self.before_last) <= stopping.change and self.last <= stopping.loss
        self.running = self.finite and not settled
        if self.running:
            self.before_last, self.last, self.steps = self.last, total, self.steps + 1

    def result(self, i: int, weight: Tensor, sound: Tensor, edit: SideEdit, labels: slice) -> SideTrained:
        """What came out for edit `i`; `sound` is its weight before the last step."""
        finite = self.finite and bool(weight.isfinite().all())
        return SideTrained(
            weight=(weight if finite else sound).clone(),
            activation=self.activation,
            losses=self.losses,
            loss=_per_token(self.edit, edit.rows),
            steps=self.steps if finite else max(0, self.steps - 1),
            finite=finite,
            last=self.done.of(i, labels).detached() if self.done else None,
        )


@torch.no_grad()
def _descend(weight: Tensor, gradient: Tensor, mask: Tensor, bounds: Bounds | None, schedule: SideSchedule) -> None:
    """One SGD step on the masked gradient, in the model's dtype, then the norm constraint; changes `weight`."""
    gradient.mul_(mask).add_(weight, alpha=schedule.weight_decay)
    weight.add_(gradient, alpha=-schedule.learning_rate)
    if bounds is not None:
        torch.clamp(weight, min=bounds[0], max=bounds[1], out=weight)


def _bounds(base: Tensor, constraint: float | None) -> Bounds | None:
    return None if constraint is None else (base - constraint, base + constraint)


def _per_token(loss: float, rows: TrainingRows) -> float:
    """The edit loss without the extra position in each row's average; exact where rows have equally many labels."""
    n_labels = rows.wanted_ids.numel() / rows.labels.shape[0]
    return loss * min(n_labels + 1, rows.labels.shape[1] - 1) / n_labels
