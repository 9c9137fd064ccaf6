"""The hidden vector that makes the model say the target: what ROME calls v* and MEMIT z.

A vector `delta` is added to a module's output at the subject's last token and trained by Adam. Two readings of the
model serve it: `WholeModel` runs everything, as the published code does; `UpperModel` runs the layers above the module,
from the subject's last token on, with logits only where they are needed.
Shapes: `B` requests of a turn, `R` rows, `T` tokens, `d` hidden size, `m` input size of a down-projection, `V`
vocabulary.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from horen_bench.editors.locate_edit.requests import Row
from horen_bench.errors import UserError
from horen_bench.models.partial import UpperLayers, UpperStates
from horen_bench.prompts import Batch, EncodedEdit, pad

_LOSS_BOUND = 0.05  # nats; the published code stops below it
_NO_LABEL = -100


@dataclass(frozen=True, slots=True)
class Objective:
    """How `delta` is trained.

    Attributes:
        n_steps: most forward passes; the last one is not followed by a step.
        learning_rate: Adam's.
        weight_decay: omega, on `||delta|| / ||v0||^2`; the norm is not squared.
        clamp: c; `||delta||` is kept below `c ||v0||`.
        kl: kappa, on the drift of the next-token distribution at the subject in "SUBJECT is a".
    """

    n_steps: int
    learning_rate: float
    weight_decay: float
    clamp: float
    kl: float

    def __post_init__(self) -> None:
        if self.n_steps < 1:
            raise UserError(f"method.hidden.n_steps must be at least 1, got {self.n_steps}")
        for name in ("learning_rate", "clamp"):
            if not getattr(self, name) > 0:
                raise UserError(f"method.hidden.{name} must be > 0, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Hidden:
    """What was found for `B` requests.

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


class Reading(Protocol):
    """A model that can be asked what it says under a `delta`.

    Attributes:
        keys: by down-projection, the mean key of each request, float32 `(B, m)`.
        prompt_keys: the same of the bare prompt alone.
        initial: v0, float32 `(B, d)`.
    """

    keys: dict[str, Tensor]
    prompt_keys: dict[str, Tensor]
    initial: Tensor

    @abstractmethod
    def read(self, delta: Tensor, open_: Tensor) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood `(B,)` in nats and log-probabilities after the subject `(B, V)`.

        Args:
            delta: `(B, d)`.
            open_: bool `(B,)`, the requests that matter; what is returned for the others is arbitrary.
        """


def optimise(reading: Reading, objective: Objective) -> Hidden:
    """Train one `delta` per request; requests do not see each other (Adam works on each number apart)."""
    initial = reading.initial
    delta = torch.zeros_like(initial, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=objective.learning_rate)
    open_ = torch.ones(len(initial), dtype=torch.bool, device=initial.device)
    losses: list[list[tuple[float, ...]]] = [[] for _ in initial]
    reference: Tensor | None = None
    scale = initial.norm(dim=1)
    for step in range(objective.n_steps):
        nll, essence = reading.read(delta, open_)
        reference = essence.detach() if reference is None else reference
        drift = objective.kl * F.kl_div(reference, essence, log_target=True, reduction="none").sum(dim=1)
        decay = objective.weight_decay * delta.norm(dim=1) / scale.square()
        total = nll + drift + decay
        parts = torch.stack([total, nll, drift, decay], dim=1).tolist()
        for i in open_.nonzero()[:, 0].tolist():
            losses[i].append(tuple(parts[i]))
        open_ = open_ & (total.detach() >= _LOSS_BOUND)
        if step == objective.n_steps - 1 or not open_.any():
            break
        (delta.grad,) = torch.autograd.grad(total[open_].sum(), delta)
        before = delta.detach().clone()
        adam.step()
        with torch.no_grad():
            length = delta.norm(dim=1)
            shrink = (objective.clamp * scale / length).clamp(max=1)
            delta.copy_(torch.where(open_[:, None], delta * shrink[:, None], before))
    return Hidden(initial, delta.detach(), losses)


class UpperModel:
    """The layers above the module, on states that do not depend on `delta`.

    Everything before the subject's last token and below the module is run once. In the row of the essence nothing
    behind the subject is run at all, as its distribution is read there.

    Args:
        upper: the layers above the module whose output `delta` is added to.
        projections: the down-projections whose keys are wanted, by path.
        rows: of `B` requests.
    """

    def __init__(self, upper: UpperLayers, projections: Mapping[str, nn.Module], rows: Sequence[Row]) -> None:
        self._upper = upper
        edits = [EncodedEdit(row.up_to_subject, (*row.ids[row.subject + 1 :], 0)) for row in rows]
        edits = [edit if row.labels else EncodedEdit(edit.prompt, (0,)) for edit, row in zip(edits, rows, strict=True)]
        at = max(len(edit.prompt) for edit in edits) - 1
        with inputs_of(projections) as inputs:
            self._states = upper.prepare(edits)
        values = {path: found[:, at].float() for path, found in inputs.items()}
        self.keys, self.prompt_keys = mean_keys(values, rows), prompt_keys(values, rows)
        self.initial = self._states.module_output[bare_rows(rows)].float()
        ends = [len(row.ids) - row.subject for row in rows]
        self._labels = _labels(ends, rows, self._states.targets.shape[1]).to(self.initial.device)
        self._owners = torch.tensor([row.owner for row in rows], device=self.initial.device)
        self._weights = torch.tensor([row.weight for row in rows], device=self.initial.device)
        self._selected: tuple[Tensor, Tensor, UpperStates] | None = None

    def read(self, delta: Tensor, open_: Tensor) -> tuple[Tensor, Tensor]:
        """See `Reading`."""
        rows, states = self._select(open_)
        labels = self._labels[rows, : states.targets.shape[1]]
        essence = self._weights[rows] == 0
        wanted = labels != _NO_LABEL
        wanted[essence, 0] = True
        logits = self._upper.logits(states, delta[self._owners[rows]], wanted)
        where = wanted.nonzero()[:, 0]
        return _nll_and_essence(
            logits, labels[wanted], rows[where], weights=self._weights, owners=self._owners, n_requests=len(delta)
        )

    def _select(self, open_: Tensor) -> tuple[Tensor, UpperStates]:
        """The rows of the requests that matter and their states."""
        if self._selected is None or not torch.equal(self._selected[0], open_):
            rows = open_[self._owners].nonzero()[:, 0]
            self._selected = (open_.clone(), rows, self._states.select(rows))
        return self._selected[1], self._selected[2]


class WholeModel:
    """The whole model on whole rows, with a hook that adds `delta`: what `UpperModel` is compared with.

    Args:
        model: the model.
        module: where `delta` is added to the output.
        projections: the down-projections whose keys are wanted, by path.
        rows: of `B` requests.
    """

    def __init__(
        self, model: PreTrainedModel, module: nn.Module, projections: Mapping[str, nn.Module], rows: Sequence[Row]
    ) -> None:
        self._model, self._module = model, module
        self._batch = pad([row.ids for row in rows], 0, "right", device=model.device)
        device = model.device
        self._at = torch.tensor([row.subject for row in rows], device=device)
        self._rows = torch.arange(len(rows), device=device)
        outputs: list[Tensor] = []
        with torch.no_grad(), inputs_of(projections) as inputs, changed_output(module, outputs.append):
            self._logits()
        values = {path: found[self._rows, self._at].float() for path, found in inputs.items()}
        self.keys, self.prompt_keys = mean_keys(values, rows), prompt_keys(values, rows)
        self.initial = outputs[0][self._rows, self._at][bare_rows(rows)].float()
        self._labels = _labels([len(row.ids) for row in rows], rows, self._batch.input_ids.shape[1]).to(device)
        self._owners = torch.tensor([row.owner for row in rows], device=device)
        self._weights = torch.tensor([row.weight for row in rows], device=device)

    def read(self, delta: Tensor, open_: Tensor) -> tuple[Tensor, Tensor]:
        """See `Reading`."""

        def add(output: Tensor) -> Tensor:
            here = (output[self._rows, self._at].float() + delta[self._owners]).to(output.dtype)
            return output.index_put((self._rows, self._at), here)

        with changed_output(self._module, add):
            logits = self._logits()
        wanted = self._labels != _NO_LABEL
        essence = self._weights == 0
        wanted[essence, self._at[essence]] = True
        where = wanted.nonzero()[:, 0]
        return _nll_and_essence(
            logits[wanted],
            self._labels[wanted],
            where,
            weights=self._weights,
            owners=self._owners,
            n_requests=len(delta),
        )

    def _logits(self) -> Tensor:
        batch: Batch = self._batch
        logits: Tensor = self._model(
            batch.input_ids, batch.attention_mask, position_ids=batch.position_ids, use_cache=False
        ).logits
        return logits


def _nll_and_essence(
    logits: Tensor, labels: Tensor, rows: Tensor, *, weights: Tensor, owners: Tensor, n_requests: int
) -> tuple[Tensor, Tensor]:
    """Weighted negative log-likelihood `(B,)` and the essence rows' log-probabilities `(B, V)`.

    Args:
        logits: `(N, V)` at the positions that are read.
        labels: `(N,)`; -100 where the essence is read.
        rows: `(N,)`, the row of each position.
        weights: `(R,)`.
        owners: `(R,)`.
        n_requests: `B`.
    """
    log_probs = logits.float().log_softmax(dim=-1)
    said = labels != _NO_LABEL
    n_labels = torch.zeros(len(owners), device=labels.device).index_add(
        0, rows[said], torch.ones_like(rows[said]).float()
    )
    share = weights[rows[said]] / n_labels[rows[said]]
    picked = log_probs[said].gather(1, labels[said][:, None])[:, 0]
    nll = log_probs.new_zeros(n_requests).index_add(0, owners[rows[said]], -share * picked)
    essence = log_probs.new_zeros(n_requests, log_probs.shape[1]).index_add(0, owners[rows[~said]], log_probs[~said])
    return nll, essence


def _labels(ends: Sequence[int], rows: Sequence[Row], width: int) -> Tensor:
    """`(R, width)`; each row's labels stand at the positions before its end, -100 elsewhere."""
    labels = torch.full((len(rows), width), _NO_LABEL)
    for i, (end, row) in enumerate(zip(ends, rows, strict=True)):
        if row.labels:
            labels[i, end - len(row.labels) : end] = torch.tensor(row.labels)
    return labels


# --- Keys ------------------------------------------------------------------------------------------------


def bare_rows(rows: Sequence[Row]) -> list[int]:
    """Position of each request's first row, its bare prompt."""
    return [i for i, row in enumerate(rows) if i == 0 or rows[i - 1].owner != row.owner]


def mean_keys(values: Mapping[str, Tensor], rows: Sequence[Row]) -> dict[str, Tensor]:
    """Weighted means `(B, m)` of the rows' inputs `(R, m)`."""
    shares = torch.zeros(rows[-1].owner + 1, len(rows))
    for i, row in enumerate(rows):
        shares[row.owner, i] = row.key_weight
    return {path: shares.to(found.device) @ found for path, found in values.items()}


def prompt_keys(values: Mapping[str, Tensor], rows: Sequence[Row]) -> dict[str, Tensor]:
    """The bare prompts' inputs `(B, m)`."""
    return {path: found[bare_rows(rows)] for path, found in values.items()}


class _Reached(Exception):  # noqa: N818 - no error, it ends a forward pass early
    """All that is wanted was read."""


@torch.no_grad()
def keys_and_hidden(
    model: PreTrainedModel, last: nn.Module, projections: Mapping[str, nn.Module], rows: Sequence[Row]
) -> tuple[dict[str, Tensor], Tensor]:
    """Mean keys `(B, m)` by path and the output `(B, d)` of `last`, the highest module, under the present weights.

    One forward pass over contexts and prompts up to the subject, which ends where `last` has spoken.
    """
    kept = [row for row in rows if row.key_weight > 0]
    batch = pad([row.up_to_subject for row in kept], 0, device=model.device)
    found: list[Tensor] = []

    def stop(output: Tensor) -> None:
        found.append(output)
        raise _Reached

    with inputs_of(projections) as inputs, changed_output(last, stop), suppress(_Reached):
        model(batch.input_ids, batch.attention_mask, position_ids=batch.position_ids, use_cache=False)
    values = {path: one[:, -1].float() for path, one in inputs.items()}
    return mean_keys(values, kept), found[0][bare_rows(kept), -1].float()


@contextmanager
def inputs_of(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Collect each module's input `(R, T, m)` in the forward pass inside the block."""
    found: dict[str, Tensor] = {}

    def reader(path: str) -> Any:
        def read(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[path] = args[0]

        return read

    with ExitStack() as stack:
        for path, module in modules.items():
            stack.callback(module.register_forward_pre_hook(reader(path)).remove)
        yield found


@contextmanager
def changed_output(module: nn.Module, change: Any) -> Iterator[None]:
    """Inside the block a module's output, tensor or head of a tuple, is what `change` returns, if it returns any."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        new = change(output[0] if isinstance(output, tuple) else output)
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def last_loss(hidden: Hidden, i: int) -> float:
    """The target's mean token cross-entropy (nats) in the last forward pass of request `i`."""
    return hidden.losses[i][-1][1] if hidden.losses[i] else math.nan
