"""The target vector, which makes the model give the target: ROME's v*, MEMIT's z.

A vector `delta` is added to a module's output at the subject's last token and trained by Adam. `PerturbedWholeModel`
runs everything, as the published code does; `PerturbedUpperLayers` runs the layers above the module, from the subject's
last token on, with logits only where they are needed.
Shapes: `B` requests of a turn, `R` rows, `T` tokens, `d` hidden size, `m` input size of a down-projection, `V`
vocabulary.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from horen_bench.editors.locate_edit.config import TargetVectorTraining
from horen_bench.editors.locate_edit.requests import PromptRow
from horen_bench.editors.shared.optimizers import adam_rate
from horen_bench.models.calls import run
from horen_bench.models.hooks import as_sequences, ending_at, inputs_of, outputs_of, patched_output
from horen_bench.models.partial import UpperLayers, UpperStates
from horen_bench.models.surgery import all_finite
from horen_bench.prompts import EncodedEdit, pad

_LOSS_BOUND = 0.05  # nats; the published code stops below it
_NO_LABEL = -100


@dataclass(frozen=True, slots=True)
class TargetVectors:
    """What was trained for `B` requests.

    Attributes:
        initial: v0, the module's output at the subject's last token of the bare prompt, float32 `(B, d)`.
        delta: float32 `(B, d)`.
        losses: for each request and forward pass `(total, nll, kl, weight decay)`.
    """

    initial: Tensor
    delta: Tensor
    losses: list[list[tuple[float, ...]]]

    @property
    def target(self) -> Tensor:
        """V* or z, `(B, d)`."""
        return self.initial + self.delta

    def finite(self, i: int) -> bool:
        """Whether request `i` has a vector and losses that are numbers."""
        return all_finite(self.target[i]) and all(math.isfinite(total) for total, *_ in self.losses[i])

    def last_nll(self, i: int) -> float:
        """The target's mean token cross-entropy (nats) in the last forward pass of request `i`; NaN without any."""
        return self.losses[i][-1][1] if self.losses[i] else math.nan


class PerturbedModel(ABC):
    """A model that is run with a `delta` on a module's output.

    Args:
        rows: of `B` requests.
        inputs: by down-projection, what enters it at the subject's last token, `(R, m)`.
        outputs: the module's output there, `(R, d)`.
        labels: int64 `(R, T)`; -100 where a position has none.

    Attributes:
        keys: by down-projection, the mean key of each request, float32 `(B, m)`.
        prompt_keys: the same of the bare prompt alone.
        initial: v0, float32 `(B, d)`.
    """

    def __init__(
        self, rows: Sequence[PromptRow], inputs: Mapping[str, Tensor], outputs: Tensor, labels: Tensor
    ) -> None:
        values = {path: x.float() for path, x in inputs.items()}
        self.keys = mean_keys(values, rows)
        self.prompt_keys = {path: x[bare_rows(rows)] for path, x in values.items()}
        self.initial = outputs[bare_rows(rows)].float()
        self._labels = labels.to(outputs.device)
        self._owners = torch.tensor([row.owner for row in rows], device=outputs.device)
        self._weights = torch.tensor([row.weight for row in rows], device=outputs.device)

    @abstractmethod
    def nll_and_essence(self, delta: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood `(B,)` in nats and log-probabilities after the subject `(B, V)`.

        Args:
            delta: `(B, d)`.
            active: bool `(B,)`, the requests that matter; what is returned for the others is arbitrary.
        """

    def finite_keys(self, i: int) -> bool:
        """Whether all keys of request `i` are numbers."""
        return all_finite(*(keys[i] for keys in (*self.keys.values(), *self.prompt_keys.values())))

    def _summed(self, logits: Tensor, labels: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted negative log-likelihood `(B,)` and the essence rows' log-probabilities `(B, V)`.

        Args:
            logits: `(N, V)` at the positions that are read.
            labels: `(N,)`; -100 where the essence is read.
            rows: `(N,)`, the row of each position.
        """
        log_probs = logits.float().log_softmax(dim=-1)
        of_target = labels != _NO_LABEL
        rows, essence_rows, labels = rows[of_target], rows[~of_target], labels[of_target]
        n_labels = torch.zeros(len(self._owners), device=labels.device).index_add(
            0, rows, torch.ones_like(rows).float()
        )
        share = self._weights[rows] / n_labels[rows]
        picked = log_probs[of_target].gather(1, labels[:, None])[:, 0]
        nll = log_probs.new_zeros(len(self.initial)).index_add(0, self._owners[rows], -share * picked)
        essence = log_probs.new_zeros(len(self.initial), log_probs.shape[1])
        return nll, essence.index_add(0, self._owners[essence_rows], log_probs[~of_target])


def train_target_vectors(model: PerturbedModel, training: TargetVectorTraining) -> TargetVectors:
    """Train one `delta` per request; requests do not see each other (Adam works on each number apart)."""
    initial = model.initial
    delta = torch.zeros_like(initial, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=adam_rate(training.learning_rate))
    active = torch.ones(len(initial), dtype=torch.bool, device=initial.device)
    losses: list[list[tuple[float, ...]]] = [[] for _ in initial]
    reference: Tensor | None = None
    scale = initial.norm(dim=1)
    for step in range(training.n_steps):
        nll, essence = model.nll_and_essence(delta, active)
        reference = essence.detach() if reference is None else reference
        drift = training.kl * F.kl_div(reference, essence, log_target=True, reduction="none").sum(dim=1)
        decay = training.weight_decay * delta.norm(dim=1) / scale.square()
        total = nll + drift + decay
        parts = torch.stack([total, nll, drift, decay], dim=1).tolist()
        for i in active.nonzero()[:, 0].tolist():
            losses[i].append(tuple(parts[i]))
        active = active & (total.detach() >= _LOSS_BOUND)
        if step == training.n_steps - 1 or not active.any():
            break
        (delta.grad,) = torch.autograd.grad(total[active].sum(), delta)
        before = delta.detach().clone()
        adam.step()
        with torch.no_grad():
            length = delta.norm(dim=1)
            shrink = (training.clamp * scale / length).clamp(max=1)
            shrink = torch.where(length.isfinite(), shrink, math.nan)  # a step beyond float32 is no step of length 0
            delta.copy_(torch.where(active[:, None], delta * shrink[:, None], before))
    return TargetVectors(initial, delta.detach(), losses)


class PerturbedUpperLayers(PerturbedModel):
    """The layers above the module, on states that do not depend on `delta`.

    Everything before the subject's last token and below the module is run once. In the row of the essence nothing
    behind the subject is run at all, as its distribution is read there.

    Args:
        upper: the layers above the module whose output `delta` is added to.
        projections: the down-projections whose keys are taken, by path.
        rows: of `B` requests.
    """

    def __init__(self, upper: UpperLayers, projections: Mapping[str, nn.Module], rows: Sequence[PromptRow]) -> None:
        self._upper = upper
        edits = [EncodedEdit(row.up_to_subject, (*row.ids[row.subject + 1 :], 0)) for row in rows]
        edits = [edit if row.labels else EncodedEdit(edit.prompt, (0,)) for edit, row in zip(edits, rows, strict=True)]
        subject = max(len(edit.prompt) for edit in edits) - 1
        with inputs_of(projections) as inputs:
            self._states = upper.prepare(edits)
        shape = (len(edits), subject + max(len(edit.target) for edit in edits))
        ends = [len(row.ids) - row.subject for row in rows]
        super().__init__(
            rows,
            {path: as_sequences(x, shape)[:, subject] for path, x in inputs.items()},
            self._states.module_output,
            labels_before(ends, rows, self._states.targets.shape[1]),
        )
        self._selected: tuple[Tensor, Tensor, UpperStates] | None = None

    def nll_and_essence(self, delta: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """See `PerturbedModel`."""
        rows, states = self._select(active)
        labels = self._labels[rows, : states.targets.shape[1]]
        essence = self._weights[rows] == 0
        is_read = labels != _NO_LABEL
        is_read[essence, 0] = True
        logits = self._upper.logits(states, delta[self._owners[rows]], is_read)
        where = is_read.nonzero()[:, 0]
        return self._summed(logits, labels[is_read], rows[where])

    def _select(self, active: Tensor) -> tuple[Tensor, UpperStates]:
        """The rows of the requests that matter and their states."""
        if self._selected is None or not torch.equal(self._selected[0], active):
            rows = active[self._owners].nonzero()[:, 0]
            self._selected = (active.clone(), rows, self._states.select(rows))
        return self._selected[1], self._selected[2]


class PerturbedWholeModel(PerturbedModel):
    """The whole model on whole rows, with a hook that adds `delta`: what `PerturbedUpperLayers` is compared with.

    Args:
        model: the model.
        module: where `delta` is added to the output.
        projections: the down-projections whose keys are taken, by path.
        rows: of `B` requests.
    """

    def __init__(
        self, model: PreTrainedModel, module: nn.Module, projections: Mapping[str, nn.Module], rows: Sequence[PromptRow]
    ) -> None:
        self._model, self._module = model, module
        self._batch = pad([row.ids for row in rows], 0, "right", device=model.device)
        self._subjects = torch.tensor([row.subject for row in rows], device=model.device)
        self._rows = torch.arange(len(rows), device=model.device)
        with torch.no_grad(), inputs_of(projections) as inputs, outputs_of({"": module}) as outputs:
            self._logits()
        super().__init__(
            rows,
            {path: self._at_subjects(x) for path, x in inputs.items()},
            self._at_subjects(outputs[""]),
            labels_before([len(row.ids) for row in rows], rows, self._batch.input_ids.shape[1]),
        )

    def nll_and_essence(self, delta: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """See `PerturbedModel`."""

        def add(output: Tensor) -> Tensor:
            here = (self._at_subjects(output).float() + delta[self._owners]).to(output.dtype)
            sequences = as_sequences(output, self._batch.input_ids.shape)
            return sequences.index_put((self._rows, self._subjects), here).view_as(output)

        with patched_output(self._module, add):
            logits = self._logits()
        is_read = self._labels != _NO_LABEL
        essence = self._weights == 0
        is_read[essence, self._subjects[essence]] = True
        return self._summed(logits[is_read], self._labels[is_read], is_read.nonzero()[:, 0])

    def _at_subjects(self, states: Tensor) -> Tensor:
        """Of what a module reads or gives, `(R, ...)` at each row's subject."""
        return as_sequences(states, self._batch.input_ids.shape)[self._rows, self._subjects]

    def _logits(self) -> Tensor:
        logits: Tensor = run(self._model, self._batch).logits
        return logits


def labels_before(ends: Sequence[int], rows: Sequence[PromptRow], width: int) -> Tensor:
    """`(R, width)`; each row's labels stand at the positions before its end, -100 elsewhere."""
    labels = torch.full((len(rows), width), _NO_LABEL)
    for i, (end, row) in enumerate(zip(ends, rows, strict=True)):
        if row.labels:
            labels[i, end - len(row.labels) : end] = torch.tensor(row.labels)
    return labels


# --- Keys ------------------------------------------------------------------------------------------------


def bare_rows(rows: Sequence[PromptRow]) -> list[int]:
    """Position of each request's first row, its bare prompt."""
    return [i for i, row in enumerate(rows) if i == 0 or rows[i - 1].owner != row.owner]


def mean_keys(inputs: Mapping[str, Tensor], rows: Sequence[PromptRow]) -> dict[str, Tensor]:
    """Weighted means `(B, m)` of the rows' inputs `(R, m)`."""
    shares = torch.zeros(rows[-1].owner + 1, len(rows))
    for i, row in enumerate(rows):
        shares[row.owner, i] = row.key_weight
    return {path: shares.to(x.device) @ x for path, x in inputs.items()}


@torch.no_grad()
def keys_and_outputs(
    model: PreTrainedModel, last: nn.Module, projections: Mapping[str, nn.Module], rows: Sequence[PromptRow]
) -> tuple[dict[str, Tensor], Tensor]:
    """Mean keys `(B, m)` by path and the output `(B, d)` of `last`, the highest module, under the present weights.

    One forward pass over contexts and prompts up to the subject, which ends where `last` has run.
    """
    kept = [row for row in rows if row.key_weight > 0]
    batch = pad([row.up_to_subject for row in kept], 0, device=model.device)
    with inputs_of(projections) as inputs, outputs_of({"": last}) as outputs, ending_at(last):
        run(model, batch)
    shape = batch.input_ids.shape
    last_inputs = {path: as_sequences(x, shape)[:, -1].float() for path, x in inputs.items()}
    return mean_keys(last_inputs, kept), as_sequences(outputs[""], shape)[bare_rows(kept), -1].float()
