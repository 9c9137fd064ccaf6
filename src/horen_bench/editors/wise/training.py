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

from horen_bench.editors.wise.config import SideMemoryConfig, SideStopping
from horen_bench.editors.wise.rows import TrainingRows
from horen_bench.models.surgery import bounded

Activation = Callable[[Tensor], Tensor]
Bounds = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class SidePass:
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

    def of(self, edit: int, labels: slice) -> "SidePass":
        """The part of one edit, whose labels are at `labels`."""
        return SidePass(self.logits[labels], self.hidden[labels], self.moved[edit : edit + 1], self.everything)

    def detached(self) -> "SidePass":
        """The same without gradients."""
        whole = None if self.everything is None else self.everything.detach()
        return SidePass(self.logits.detach(), self.hidden.detach(), self.moved.detach(), whole)


Forward = Callable[[Tensor], SidePass]  # of side weights (S, d, m)
Extra = Callable[[SidePass], Tensor]  # a further term of each edit's loss, (S,)


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
        activation: mean distance of the edit's rows in the last pass.
        losses: edit and activation loss of every pass.
        loss: mean token cross-entropy (nats) of the last pass.
        steps: SGD steps taken.
        finite: False if a loss or the weight was not finite. The edit has failed then: `weight` is that of its start,
            `activation` infinite, `loss` NaN, `steps` 0, `last` None.
        last: the last pass of this edit, without gradient.
    """

    weight: Tensor
    activation: float
    losses: list[tuple[float, float]]
    loss: float
    steps: int
    finite: bool
    last: SidePass | None


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
        windows = [(edit.n_labels + 1).clamp(max=edit.labels.shape[1] - 1) for edit in rows]
        ends = torch.tensor([0, *(edit.label_ids.numel() for edit in rows)]).cumsum(0).tolist()
        return cls(
            torch.cat([edit.label_ids for edit in rows]),
            torch.cat([edit.owners + i * n_rows for i, edit in enumerate(rows)]),
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
    distance: Tensor = torch.linalg.vector_norm(activation(side) - activated, dim=-1)
    return distance


def margin_loss(edits: Tensor, irrelevant: Tensor, margins: Sequence[float]) -> Tensor:
    """Activation loss (paper Eq. 6), each hinge averaged over the rows that violate it: `(...)`.

    Args:
        edits: mean distance of each edit row, `(..., R - 1)`.
        irrelevant: mean distance of the irrelevant row, `(...)`.
        margins: alpha, beta and gamma: irrelevant rows below alpha, edits above beta, and gamma between the two.
    """
    alpha, beta, gamma = margins
    held = irrelevant[..., None]
    return _mean_positive(held - edits + gamma) + _mean_positive(held - alpha) + _mean_positive(beta - edits)


def _mean_positive(values: Tensor) -> Tensor:
    violated = values > 0
    return (values * violated).sum(dim=-1) / violated.sum(dim=-1).clamp(min=1)


def train_sides(
    edits: Sequence[SideEdit],
    *,
    base: Tensor,
    forward: Forward,
    side: SideMemoryConfig,
    act_weight: float,
    extra: Extra | None = None,
) -> list[SideTrained]:
    """Train each edit's side weight; one that is done waits for the others.

    Args:
        edits: of different shards.
        base: the module's own weight, `(d, m)`.
        forward: the pass with their side weights.
        side: step size, margins, when to stop.
        act_weight: weight of the activation loss.
        extra: a further term of the loss.
    """
    labels, bounds = Labels.of([edit.rows for edit in edits]), _bounds(base, side.norm_constraint)
    weights = torch.stack([edit.start for edit in edits]).requires_grad_()
    progress = [_SideProgress() for _ in edits]
    for _ in range(side.n_steps):
        done = forward(weights)
        of_edit = edit_loss(done.logits, labels)
        of_margins = margin_loss(done.moved[:, :-1], done.moved[:, -1], side.act_margin).to(of_edit.device)
        loss = of_edit + act_weight * of_margins
        if extra is not None:
            loss = loss + extra(done)
        columns = [of_edit, of_margins, loss, done.moved[:, :-1].mean(dim=1)]
        values = torch.stack([column.detach().float().to(loss.device) for column in columns], dim=1).tolist()
        for i, state in enumerate(progress):
            state.take(values[i], done, side.early_stopping)
        running = [i for i, state in enumerate(progress) if state.running]
        if not running:
            break
        (gradient,) = torch.autograd.grad(loss.sum(), [weights])
        for i in running:
            _descend(weights.detach()[i], gradient[i], edits[i].mask, bounds, side)
    after = weights.detach()
    return [state.result(i, after[i], edits[i], labels.spans[i]) for i, state in enumerate(progress)]


@dataclass(slots=True)
class _SideProgress:
    """Where the training of one edit stands."""

    losses: list[tuple[float, float]] = field(default_factory=list)
    activation: float = math.inf
    edit: float = math.nan
    before_last: float = 0.0
    last: float = 1e9
    steps: int = 0
    running: bool = True
    finite: bool = True
    done: SidePass | None = None

    def take(self, values: Sequence[float], done: SidePass, stopping: SideStopping) -> None:
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

    def result(self, i: int, weight: Tensor, edit: SideEdit, labels: slice) -> SideTrained:
        """What came out for edit `i`, whose side weight is now `weight`."""
        if self.done is None or not (self.finite and bounded(weight)):
            return SideTrained(edit.start.clone(), math.inf, self.losses, math.nan, steps=0, finite=False, last=None)
        return SideTrained(
            weight=weight.clone(),
            activation=self.activation,
            losses=self.losses,
            loss=_per_token(self.edit, edit.rows),
            steps=self.steps,
            finite=True,
            last=self.done.of(i, labels).detached(),
        )


@torch.no_grad()
def _descend(weight: Tensor, gradient: Tensor, mask: Tensor, bounds: Bounds | None, side: SideMemoryConfig) -> None:
    """One SGD step on the masked gradient, in the model's dtype, then the norm constraint; changes `weight`."""
    gradient.mul_(mask).add_(weight, alpha=side.weight_decay)
    weight.add_(gradient, alpha=-side.learning_rate)
    if bounds is not None:
        torch.clamp(weight, min=bounds[0], max=bounds[1], out=weight)


def _bounds(base: Tensor, constraint: float | None) -> Bounds | None:
    return None if constraint is None else (base - constraint, base + constraint)


def _per_token(loss: float, rows: TrainingRows) -> float:
    """The edit loss without the extra position in each row's average; exact where rows have equally many labels."""
    n_labels = rows.label_ids.numel() / rows.labels.shape[0]
    return loss * min(n_labels + 1, rows.labels.shape[1] - 1) / n_labels
