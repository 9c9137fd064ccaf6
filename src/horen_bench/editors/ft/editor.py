"""Fine-tuning of one weight matrix on the edit alone: FT-L and FT-M, the weak baselines of the field.

Both train the weight with a fresh Adam per edit and stop once the loss is low; they differ in what the loss asks for.
FT-L (Meng et al. 2022, arXiv 2202.05262, and EasyEdit) asks for every target token at the last prompt position, FT-M
(EasyEdit) for the target as it follows the prompt.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.cases import EditCase
from horen_bench.editors.base import Editor, EditRecord, check_choice
from horen_bench.editors.locate_edit.target_vector import inputs_of
from horen_bench.errors import UserError
from horen_bench.models.architecture import decoder_layer_index
from horen_bench.models.partial import NotSupportedError, UpperLayers
from horen_bench.models.surgery import MasterWeights, PristineWeights
from horen_bench.prompts import EncodedEdit, encode_edit, encode_texts

Objective = Literal["prompt_last", "target_new"]
Engine = Literal["cached", "sequential"]


@dataclass(frozen=True, slots=True)
class Lesson:
    """What the model reads and what it must predict, as token ids.

    Attributes:
        ids: the sequence.
        labels: `K` tokens to predict.
        n_positions: the last positions that predict them: `K`, one each, or 1, which predicts them all.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    n_positions: int


@dataclass(frozen=True, slots=True)
class Trained:
    """How training went: the loss seen last (nats per token), steps taken, and why nothing was kept, if so."""

    loss: float
    steps: int
    problem: str | None = None


class UpperModel:
    """What a lesson needs of the model above the trained weight `W` `(d, m)`; the rest is run once.

    Nothing below `W` depends on it, and its layer adds `W x` last: a step computes `W x` anew at all `T` positions,
    runs the layers above, and takes logits where the lesson looks.

    Args:
        upper: the layers above the trained module.
        path: of the module.
        module: which holds `W`.
        weight: `W`.
        lesson: what is read.
    """

    def __init__(self, upper: UpperLayers, path: str, module: nn.Module, weight: Tensor, lesson: Lesson) -> None:
        self._upper, self._weight = upper, weight
        with torch.no_grad(), inputs_of({path: module}) as inputs:
            # All positions count as behind a prompt of one token, so that all of them enter the upper layers.
            self._states = upper.prepare([EncodedEdit(lesson.ids[:1], (*lesson.ids[1:], 0))])
            self._input = inputs[path]
            self._rest = self._states.hidden.float() - F.linear(self._input, weight).float()
        self._nothing = torch.zeros_like(self._states.module_output, dtype=torch.float32)
        self._labels = torch.tensor(lesson.labels, device=self._input.device)
        positions = torch.arange(len(lesson.ids), device=self._input.device)
        self._wanted = (positions >= len(lesson.ids) - lesson.n_positions)[None]

    def loss(self) -> Tensor:
        """Mean cross-entropy (nats) of the labels under the present weight."""
        said = F.linear(self._input, self._weight)
        states = replace(self._states, hidden=(self._rest + said.float()).to(said.dtype))
        logits = self._upper.logits(states, self._nothing, self._wanted)
        return F.cross_entropy(logits.expand(len(self._labels), -1), self._labels.to(logits.device))


class FineTuningEditor(Editor):
    """FT-L or FT-M on one model.

    Args:
        model: a causal language model; the weight of `module` is changed in place.
        tokenizer: its tokenizer.
        seed: not used, the method draws nothing.
        module: dotted path of the trained module, e.g. `model.layers.21.mlp.down_proj`.
        objective: `prompt_last` (FT-L) or `target_new` (FT-M).
        learning_rate: of Adam.
        weight_decay: of Adam, added to the gradient.
        n_steps: most Adam steps per edit.
        loss_bound: no further step once the loss (nats per token) is below it.
        norm_constraint: each entry stays within this distance of its value before the edit; None: anywhere.
        master_weights: train float32 values behind a half-precision weight; the published code trains, and keeps
            Adam's moments, in the model's dtype, where most of a small step is rounded away.
        engine: `cached` runs the layers above the module on cached states, `sequential` the whole model.

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
        objective: Objective,
        learning_rate: float,
        weight_decay: float,
        n_steps: int,
        loss_bound: float,
        norm_constraint: float | None,
        master_weights: bool,
        engine: Engine,
    ) -> None:
        check_choice("method.engine", engine, ("cached", "sequential"))
        check_choice("method.objective", objective, ("prompt_last", "target_new"))
        if not learning_rate > 0:
            raise UserError(f"method.learning_rate must be > 0, got {learning_rate}")
        if not isinstance(n_steps, int) or n_steps < 1:
            raise UserError(f"method.n_steps must be a whole number of at least 1, got {n_steps!r}")
        if norm_constraint is not None and not norm_constraint > 0:
            raise UserError(f"method.norm_constraint must be > 0, or null for none, got {norm_constraint}")
        self.model = model
        self.tokenizer = tokenizer
        self.path = module
        self.objective: Objective = objective
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.n_steps = n_steps
        self.loss_bound = loss_bound
        self.norm_constraint = norm_constraint
        self.pristine = PristineWeights(model, [module], where="method.module")
        self.weight = self.pristine.weights[module]
        self._masters = MasterWeights(self.pristine.weights)
        self._keeps_master = master_weights
        self.engine: Engine = engine
        self._upper: UpperLayers | None = None
        self._no_upper: str | None = None

    # --- Editing -------------------------------------------------------------------------------------------

    def edit(self, cases: Sequence[EditCase]) -> list[EditRecord]:
        """Train on one case after another."""
        return [self._edit_one(case) for case in cases]

    def _edit_one(self, case: EditCase) -> EditRecord:
        started = time.perf_counter()
        lesson = self._lesson(case)
        trained = self._train(lesson) if lesson else Trained(math.nan, 0, "prompt or target has no token")
        action: Literal["failed", "inserted"] = "failed" if trained.problem else "inserted"
        seconds = time.perf_counter() - started
        return EditRecord(case.id, action, None, None, trained.loss, trained.steps, seconds, trained.problem)

    def _lesson(self, case: EditCase) -> Lesson | None:
        """None where there is nothing to learn, or nothing to learn it from."""
        edit = encode_edit(self.tokenizer, case.prompt, case.target)
        if not edit.prompt or not edit.target:
            return None
        if self.objective == "target_new":
            return Lesson(edit.ids[:-1], edit.target, len(edit.target))
        # As published: special tokens of the target count, unknown ones do not.
        (alone,) = encode_texts(self.tokenizer, [f" {case.target}"])
        labels = tuple(token for token in alone if token != self.tokenizer.unk_token_id)
        return Lesson(edit.prompt, labels, 1) if labels else None

    def loss(self, lesson: Lesson) -> Tensor:
        """Mean cross-entropy (nats) of the labels, by the whole model."""
        ids = torch.tensor([lesson.ids], device=self.model.device)
        logits = self.model(input_ids=ids, use_cache=False, logits_to_keep=lesson.n_positions).logits[0]
        labels = torch.tensor(lesson.labels, device=logits.device)
        return F.cross_entropy(logits.float().expand(len(labels), -1), labels)

    def _loss_of(self, lesson: Lesson) -> Callable[[], Tensor]:
        """The loss as a function of the weight, which is the only thing that changes."""
        upper = self._upper_layers() if self.engine == "cached" else None
        if upper is None:
            return partial(self.loss, lesson)
        return UpperModel(upper, self.path, self.model.get_submodule(self.path), self.weight, lesson).loss

    def _upper_layers(self) -> UpperLayers | None:
        """The layers above the module, or None where the model does not fit; then `warnings` says so."""
        if self._upper is None and self._no_upper is None:
            try:
                self._upper = self._find_upper()
            except NotSupportedError as reason:
                self._no_upper = f"the weight was trained through the whole model: {reason}"
        return self._upper

    def _find_upper(self) -> UpperLayers:
        layer = decoder_layer_index(self.path)
        if layer is None:
            raise NotSupportedError(f"{self.path} is in no numbered layer")
        upper = UpperLayers(self.model, self.model.get_submodule(self.path), layer)
        if not upper.module_ends_layer:
            raise NotSupportedError(f"{self.path} is not what its layer adds last")
        return upper

    def _train(self, lesson: Lesson) -> Trained:
        """Train the weight in place; where that fails, or is interrupted, it is put back as it was before."""
        self.pristine.keep()
        trainee = self._masters.of(self.path) if self._keeps_master else self.weight.detach()
        before = trainee.clone()
        try:
            trained = self._minimise(lesson, trainee, before)
        except BaseException:
            self._write(trainee, before)
            raise
        finally:
            trainee.grad = None
        if trained.problem:
            self._write(trainee, before)
        return trained

    def _minimise(self, lesson: Lesson, trainee: Tensor, before: Tensor) -> Trained:
        optimizer = torch.optim.Adam([trainee], lr=self.learning_rate, weight_decay=self.weight_decay)
        loss, steps, loss_now = math.nan, 0, self._loss_of(lesson)
        for steps in range(self.n_steps + 1):
            if steps == self.n_steps:
                break
            with _asking_for_gradients(self.weight):
                current = loss_now()
                loss = current.item()
                if not math.isfinite(loss):
                    return Trained(math.nan, 0, "the loss was not finite; the weight was put back")
                if loss < self.loss_bound:
                    break
                (gradient,) = torch.autograd.grad(current, [self.weight])
            trainee.grad = gradient.to(trainee.dtype)
            optimizer.step()
            self._write(trainee, self._constrained(trainee, before))
        if not self.weight.isfinite().all():
            return Trained(math.nan, 0, "the update was not finite; the weight was put back")
        return Trained(loss, steps)

    def _constrained(self, trainee: Tensor, before: Tensor) -> Tensor:
        """The nearest values within the L-infinity ball around those before the edit."""
        if self.norm_constraint is None:
            return trainee
        return torch.clamp(trainee, min=before - self.norm_constraint, max=before + self.norm_constraint)

    def _write(self, trainee: Tensor, values: Tensor) -> None:
        if values is not trainee:
            trainee.copy_(values)
        self._masters.write(self.path)

    # --- State ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """The trained weight, and its master where there is one; Adam starts afresh with every edit."""
        return {**self.pristine.state_dict(), **self._masters.state_dict()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved weight."""
        self.pristine.load_state_dict(state)
        self._masters.load_state_dict(state)

    def detach(self) -> None:
        """Put the original weight back."""
        self.pristine.restore()
        self._masters.clear()

    def side_parameters(self) -> int:
        """Numbers in the original (as many as are trained), and in the master where there is one."""
        return self.pristine.numel() + self._masters.numel()

    def warnings(self) -> list[str]:
        """Whether the slow path was taken."""
        return [self._no_upper] if self._no_upper else []


@contextmanager
def _asking_for_gradients(weight: nn.Parameter) -> Iterator[None]:
    """Within the block, a frozen weight has gradients; nothing below it has, so that the backward pass ends there."""
    asked = weight.requires_grad
    weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        weight.requires_grad_(asked)
