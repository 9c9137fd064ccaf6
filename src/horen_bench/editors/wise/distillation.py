"""REPAIR's distillation: what an edit leaves for the others of its batch to follow, and how far they are from it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from horen_bench.editors.wise.config import RepairConfig
from horen_bench.editors.wise.training import SideEdit, SidePass


def divergence(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """Squared temperature times the mean divergence of student from teacher logits, both `(n, vocabulary)`."""
    expected = torch.log_softmax(teacher / temperature, dim=-1)
    given = torch.log_softmax(student / temperature, dim=-1)
    return temperature**2 * F.kl_div(given, expected, reduction="sum", log_target=True) / len(student)


def alignment(hidden: Tensor, first: Tensor, mean: Tensor, pull: float, spread: float) -> Tensor:
    """Feature distillation (paper Eq. 4), a scalar.

    Args:
        hidden: final hidden state of an edit, `(d,)`; only its direction counts.
        first: that of the batch's seed, a unit vector.
        mean: of the unit vectors of the batch so far.
        pull: weight of one minus the cosine to the seed, λ.
        spread: weight of the squared distance to the mean, ϑ.
    """
    direction = F.normalize(hidden.float(), dim=-1)
    return pull * (1 - direction @ first) + spread * (direction - mean).square().sum()


def reference_of(done: SidePass, edit: SideEdit, config: RepairConfig) -> Tensor:
    """What an edit shows to the others of its batch, at the last prompt token.

    Each row's logits, `(R - 1, vocabulary)`, or the direction of the bare prompt's final hidden state, `(d,)`.
    """
    firsts = edit.rows.first_targets
    return F.normalize(done.hidden[firsts[0]].float(), dim=-1) if config.distill == "feature" else done.logits[firsts]


def teacher_of(references: Sequence[Tensor], config: RepairConfig) -> Tensor | None:
    """What the next edit of a batch follows: the seed's logits; or its direction and the mean one so far, `(2, d)`."""
    if config.distill == "none" or not references:
        return None
    if config.distill == "logit":
        return references[0]
    # A mean over the edits before, so that it does not move with the edit that is drawn to it.
    return torch.stack([references[0], torch.stack(list(references)).mean(dim=0)])


def distance_to_teacher(done: SidePass, edit: SideEdit, config: RepairConfig) -> Tensor:
    """How far an edit is from its teacher, weighted; a scalar."""
    firsts, teacher = edit.rows.first_targets, edit.teacher
    if teacher is None:
        return done.logits.new_zeros(())
    if config.distill == "feature":
        return alignment(done.hidden[firsts[0]], teacher[0], teacher[1], config.distill_lambda, config.distill_spread)
    return config.distill_lambda * divergence(teacher, done.logits[firsts], config.temperature)
