"""Fine-tuning of one weight matrix on the edit alone: FT-L and FT-M, the weak baselines of the field.

Both train the weight with a fresh Adam per edit and stop once the loss is low; they differ in what the loss is over.
FT-L (Meng et al. 2022, arXiv 2202.05262, and EasyEdit) wants every target token at the last prompt position, FT-M
(EasyEdit) the target as it follows the prompt.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.cases import Action, EditCase, EditRecord
from horen_bench.editors.base import Editor
from horen_bench.editors.ft.config import FineTuningConfig
from horen_bench.editors.shared.optimizers import adam_rate
from horen_bench.models.architecture import PlainLinear, matrix_of
from horen_bench.models.calls import run
from horen_bench.models.hooks import inputs_of, requiring_gradients
from horen_bench.models.partial import FastPath, NotSupportedError, UpperLayers
from horen_bench.models.surgery import MasterWeights, PristineWeights, bounded
from horen_bench.prompts import EncodedEdit, PromptEncoder, pad


@dataclass(frozen=True, slots=True)
class TrainingExample:
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
class FineTuningOutcome:
    """How training went: the last loss (nats per token), steps taken, and why nothing was kept, if so."""

    loss: float
    steps: int
    problem: str | None = None


class LossAbove:
    """The loss of one example as a function of the trained weight `W` `(d, m)`; what it does not change is run once.

    Nothing below `W` depends on it, and its layer adds `W x` last: a step computes `W x` anew at all `T` positions,
    runs the layers above, and takes logits where the example has labels.

    Args:
        upper: the layers above the trained module.
        module: which holds `W`.
        example: what is read.
    """

    def __init__(self, upper: UpperLayers, module: PlainLinear, example: TrainingExample) -> None:
        self._upper, self._module = upper, module
        with torch.no_grad(), inputs_of({"": module}) as inputs:
            # All positions count as behind a prompt of one token, so that all of them enter the upper layers.
            self._states = upper.prepare([EncodedEdit(example.ids[:1], (*example.ids[1:], 0))])
            self._input = inputs[""]
            self._rest = self._states.hidden.float() - self._product().float()
        self._nothing = torch.zeros_like(self._states.module_output, dtype=torch.float32)
        self._labels = torch.tensor(example.labels, device=self._input.device)
        positions = torch.arange(len(example.ids), device=self._input.device)
        self._is_read = (positions >= len(example.ids) - example.n_positions)[None]

    def __call__(self) -> Tensor:
        """Mean cross-entropy (nats) of the labels under the present weight."""
        product = self._product()
        states = replace(self._states, hidden=(self._rest + product.float()).to(product.dtype))
        logits = self._upper.logits(states, self._nothing, self._is_read)
        return F.cross_entropy(logits.expand(len(self._labels), -1), self._labels.to(logits.device))

    def _product(self) -> Tensor:
        """`W x` `(1, T, d)`, without the module's bias."""
        return F.linear(self._input, matrix_of(self._module))


class FineTuningEditor(Editor[FineTuningConfig]):
    """FT-L or FT-M on one model; the weight of `config.module` is changed in place, and nothing is drawn.

    Raises:
        UserError: the model has no such module.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | PromptEncoder,
        config: FineTuningConfig,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(model, tokenizer, config, seed=seed)
        self.pristine = PristineWeights(model, [config.module], where="method.module")
        self.weight = self.pristine.weights[config.module]
        self._masters = MasterWeights(self.pristine.weights)
        self._fast = FastPath(
            self._layers_above,
            "the weight was trained through the whole model",
            wanted=config.engine == "cached",
        )

    # --- Editing -------------------------------------------------------------------------------------------

    def edit(self, cases: Sequence[EditCase]) -> list[EditRecord]:
        """Train on one case after another."""
        return [self._edit_one(case) for case in cases]

    def _edit_one(self, case: EditCase) -> EditRecord:
        started = time.perf_counter()
        example = self._example(case)
        if example is None:
            outcome = FineTuningOutcome(math.nan, 0, "prompt or target has no token")
        else:
            outcome = self._train(example)
        seconds = time.perf_counter() - started
        action: Action = "failed" if outcome.problem else "inserted"
        return EditRecord(case.id, action, None, None, outcome.loss, outcome.steps, seconds, outcome.problem)

    def _example(self, case: EditCase) -> TrainingExample | None:
        """None where there is nothing to train, or nothing to train it from."""
        edit = self.encoder.edit(case.prompt, case.target)
        if not edit.prompt or not edit.target:
            return None
        if self.config.objective == "target_new":
            return TrainingExample(edit.ids[:-1], edit.target, len(edit.target))
        # As published: special tokens of the target count, unknown ones do not.
        (alone,) = self.encoder.texts([f" {case.target}"])
        labels = tuple(token for token in alone if token != self.encoder.tokenizer.unk_token_id)
        return TrainingExample(edit.prompt, labels, 1) if labels else None

    def loss(self, example: TrainingExample) -> Tensor:
        """Mean cross-entropy (nats) of the labels, by the whole model."""
        batch = pad([example.ids], 0, device=self.model.device)
        logits = run(self.model, batch, logits_to_keep=example.n_positions).logits[0]
        labels = torch.tensor(example.labels, device=logits.device)
        return F.cross_entropy(logits.float().expand(len(labels), -1), labels)

    def _loss_of(self, example: TrainingExample) -> Callable[[], Tensor]:
        """The loss as a function of the weight, which is the only thing that changes."""
        upper = self._fast.layers(len(example.ids))
        if upper is None:
            return partial(self.loss, example)
        return LossAbove(upper, self.pristine.modules[self.config.module], example)

    def _layers_above(self) -> UpperLayers:
        upper = UpperLayers(self.model, self.config.module)
        if not upper.module_ends_layer:
            raise NotSupportedError(f"{self.config.module} is not what its layer adds last")
        return upper

    def _train(self, example: TrainingExample) -> FineTuningOutcome:
        """Train the weight in place; where that fails, or is interrupted, it is put back as it was before."""
        self.pristine.keep()
        trainee = self._masters.of(self.config.module) if self.config.master_weights else self.weight.detach()
        before = trainee.clone()
        try:
            outcome = self._minimise(example, trainee, before)
        except BaseException:
            self._write(trainee, before)
            raise
        finally:
            trainee.grad = None
        if outcome.problem:
            self._write(trainee, before)
        return outcome

    def _minimise(self, example: TrainingExample, trainee: Tensor, before: Tensor) -> FineTuningOutcome:
        rate, decay = adam_rate(self.config.learning_rate), self.config.weight_decay
        optimizer = torch.optim.Adam([trainee], lr=rate, weight_decay=decay)
        loss, steps, loss_now = math.nan, 0, self._loss_of(example)
        for steps in range(self.config.n_steps + 1):
            if steps == self.config.n_steps:
                break
            with requiring_gradients([self.weight]):
                current = loss_now()
                loss = current.item()
                if not math.isfinite(loss):
                    return FineTuningOutcome(math.nan, 0, "the loss was not finite; the weight was put back")
                if loss < self.config.loss_bound:
                    break
                (gradient,) = torch.autograd.grad(current, [self.weight])
            trainee.grad = gradient.to(trainee.dtype)
            optimizer.step()
            self._write(trainee, self._constrained(trainee, before))
        if not bounded(self.weight):
            return FineTuningOutcome(math.nan, 0, "the update was not finite; the weight was put back")
        return FineTuningOutcome(loss, steps)

    def _constrained(self, trainee: Tensor, before: Tensor) -> Tensor:
        """The nearest values within the L-infinity ball around those before the edit."""
        radius = self.config.norm_constraint
        return trainee if radius is None else torch.clamp(trainee, min=before - radius, max=before + radius)

    def _write(self, trainee: Tensor, values: Tensor) -> None:
        if values is not trainee:
            trainee.copy_(values)
        self._masters.write(self.config.module)

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
        return self._fast.warnings()
