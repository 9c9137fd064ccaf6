"""Training the side weight on one edit (paper section 2.3; objective and loop as in the release).

Shapes: `R` rows of `T` tokens, the last row irrelevant; `m` input and `d` output size of the module.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from horen_bench.editors.wise.rows import TrainingRows
from horen_bench.errors import UserError

Activation = Callable[[Tensor], Tensor]
Bounds = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass with the side weight.

    Attributes:
        logits: `(n, vocabulary)`, at the positions that predict a label, row after row.
        moved: `(R, T)`, how far the side weight moves the module's output, by `distances`.
        everything: logits of all rows and positions, `(R, T, vocabulary)`, where the pass has them.
    """

    logits: Tensor
    moved: Tensor
    everything: Tensor | None = None


Forward = Callable[[Tensor], Pass]  # of a side weight (d, m)
Extra = Callable[[Pass], Tensor]  # a further term of the loss


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
class SideTrained:
    """A side weight after one edit.

    Attributes:
        weight: `(d, m)`.
        activation: mean distance of the edit's rows in the last finite pass; infinite if there was none.
        losses: edit and activation loss of every pass.
        loss: mean token cross-entropy (nats) of the last finite pass; NaN if there was none.
        steps: SGD steps taken.
        finite: False if a loss or the weight was not finite; `weight` is then the last one that was sound.
    """

    weight: Tensor
    activation: float
    losses: list[tuple[float, float]]
    loss: float
    steps: int
    finite: bool


def edit_loss(logits: Tensor, rows: TrainingRows) -> Tensor:
    """Cross-entropy of each row's labels over one more than their number, then the mean over rows.

    The published window of a row opens one position before its first label, where the loss is 0.
    """
    device, n_columns = logits.device, rows.labels.shape[1]
    per_token = F.cross_entropy(logits, rows.wanted_ids.to(device), reduction="none")
    sums = per_token.new_zeros(len(rows.n_labels)).index_add(0, rows.owners.to(device), per_token)
    return (sums / (rows.n_labels.to(device) + 1).clamp(max=n_columns - 1)).mean()


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
    """Activation loss (paper Eq. 6), each hinge averaged over the rows that violate it.

    Args:
        edits: mean distance of each edit row, `(R - 1,)`.
        irrelevant: mean distance of the irrelevant row, a scalar.
        margins: what must lie between them.
    """
    return (
        _mean_positive(irrelevant - edits + margins.gamma)
        + _mean_positive((irrelevant - margins.alpha)[None])
        + _mean_positive(margins.beta - edits)
    )


def _mean_positive(values: Tensor) -> Tensor:
    violated = values > 0
    return torch.where(violated, values, torch.zeros_like(values)).sum() / violated.sum().clamp(min=1)


def train_side(
    start: Tensor,
    *,
    base: Tensor,
    mask: Tensor,
    rows: TrainingRows,
    forward: Forward,
    schedule: SideSchedule,
    extra: Extra | None = None,
) -> SideTrained:
    """Train the side weight on one edit.

    Args:
        start: side weight before it, `(d, m)`; not changed.
        base: the module's own weight.
        mask: 1 where the gradient passes, 0 elsewhere; `(d, m)`, the weight's dtype.
        rows: the edit.
        forward: the pass with a side weight.
        schedule: step size, margins, when to stop.
        extra: a further term of the loss.
    """
    weight, sound = start.clone().requires_grad_(), start.clone()
    bounds = _bounds(base, schedule.norm_constraint)
    losses: list[tuple[float, float]] = []
    before_last, last, edit, distance, steps = 0.0, 1e9, math.nan, math.inf, 0
    for step in range(schedule.n_steps):
        done = forward(weight)
        moved = done.moved.mean(dim=1)
        of_edit = edit_loss(done.logits, rows)
        of_margins = margin_loss(moved[:-1], moved[-1], schedule.margins)
        loss = of_edit + schedule.act_weight * of_margins
        if extra is not None:
            loss = loss + extra(done)
        losses.append((of_edit.item(), of_margins.item()))
        total = loss.item()
        if not math.isfinite(total):
            return SideTrained(sound, distance, losses, edit, max(0, steps - 1), finite=False)
        edit, distance = _per_token(losses[-1][0], rows), moved[:-1].mean().item()
        if abs(last - before_last) <= schedule.stopping.change and last <= schedule.stopping.loss:
            break
        (gradient,) = torch.autograd.grad(loss, [weight])
        sound.copy_(weight.detach())
        _descend(weight, gradient, mask, bounds, schedule)
        before_last, last, steps = last, total, step + 1
    if not bool(weight.isfinite().all()):
        return SideTrained(sound, distance, losses, edit, steps - 1, finite=False)
    return SideTrained(weight.detach(), distance, losses, edit, steps, finite=True)


@torch.no_grad()
def _descend(weight: Tensor, gradient: Tensor, mask: Tensor, bounds: Bounds | None, schedule: SideSchedule) -> None:
    """One SGD step on the masked gradient, in the model's dtype, then the norm constraint."""
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
