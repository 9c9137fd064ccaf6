"""UnKE: unstructured knowledge editing (Deng et al., arXiv 2405.15349).

A target of a paragraph is written into one whole decoder block in two stages. The first finds the block's output at
the last prompt token that makes the frozen rest of the model say the target. The second trains all parameters of the
block until it gives that output there, and its old outputs at the prompt's other tokens and on random texts.
"""

import math
import time
from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.cases import EditCase, EditRecord
from horen_bench.editors.base import Editor
from horen_bench.editors.unke.block import BlockTarget, Comparison, optimizer, read_block
from horen_bench.editors.unke.compat import release_broadcast, release_cumsum, rotary_of
from horen_bench.editors.unke.config import UnkeConfig
from horen_bench.editors.unke.preservation import PreservedTexts
from horen_bench.editors.unke.values import TrainedOutputs, by_upper_layers, by_whole_model
from horen_bench.errors import UserError
from horen_bench.models.architecture import is_last_layer
from horen_bench.models.hooks import requiring_gradients
from horen_bench.models.partial import FastPath, UpperLayers
from horen_bench.models.surgery import MasterWeights, PristineParameters, bounded, check_writable
from horen_bench.prompts import EncodedEdit, PromptEncoder, pad

_NO_TOKEN = "prompt or target has no token"
_NO_TARGET = "the target vector was not finite; the case was not written"


class UnkeEditor(Editor[UnkeConfig]):
    """UnKE on one model, whose block is changed in place; edits add up, as in the release.

    `seed` is not used: the only draw, of the texts to preserve, has the published code's own seed.

    Attributes:
        pristine: the block's parameters, and copies of them as they were received.
        texts: that are preserved.

    Raises:
        UserError: the model has no such block, or no rotary positions where `pos_ids=release_cumsum`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | PromptEncoder,
        config: UnkeConfig,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(model, tokenizer, config, seed=seed)
        self.slice_size = config.batch_size
        self.texts = PreservedTexts(config.preservation)
        self._block = check_writable(model, config.module, where="method.module")
        self.pristine = PristineParameters(
            {f"{config.module}.{name}": parameter for name, parameter in self._block.named_parameters()}
        )
        self._masters = MasterWeights(self.pristine.weights)
        self._comparison: Comparison = F.mse_loss if config.preserve == "correct" else release_broadcast
        self._rotary = rotary_of(model) if config.pos_ids == "release_cumsum" else None
        self._fast = FastPath(
            partial(UpperLayers, model, config.module),
            "target vectors were trained on the whole model",
            wanted=config.engine == "cached",
        )

    # --- Batches of cases ------------------------------------------------------------------------------------

    def edit(self, cases: Sequence[EditCase]) -> list[EditRecord]:
        """Write the cases in batches of `batch_size`, in order; texts to preserve are drawn anew for every batch."""
        size = self.config.batch_size
        return [record for at in range(0, len(cases), size) for record in self._write_batch(cases[at : at + size])]

    def _write_batch(self, cases: Sequence[EditCase]) -> list[EditRecord]:
        """Write one batch; what cannot be written is refused by name and the rest goes on."""
        started = time.perf_counter()
        encoded = [self.encoder.edit(case.prompt, case.target) for case in cases]
        edits = {i: edit for i, edit in enumerate(encoded) if edit.prompt and edit.target}
        undrawn = self.texts.state()
        texts = self.texts.draw()  # also where nothing can be written, so that later batches draw the same
        try:
            losses, problems = self._write_edits(edits, texts) if edits else ({}, {})
        except BaseException:
            self.texts.load(undrawn)
            raise
        seconds = (time.perf_counter() - started) / len(cases)
        steps = self.config.value.n_steps - 1 + self.config.block.n_steps
        return [
            EditRecord(case.id, "inserted", None, None, losses[i], steps, seconds)
            if i in losses
            else EditRecord(case.id, "failed", None, None, math.nan, 0, seconds, problems.get(i, _NO_TOKEN))
            for i, case in enumerate(cases)
        ]

    def _write_edits(
        self, edits: Mapping[int, EncodedEdit], texts: Sequence[str]
    ) -> tuple[dict[int, float], dict[int, str]]:
        """Both stages: the targets' losses (nats per token) where they are written, and elsewhere why not."""
        trained = self._target_vectors(list(edits.values()))
        finite = trained.finite()
        problems = {i: _NO_TARGET for i, fine in zip(edits, finite, strict=True) if not fine}
        kept = [i for i in edits if i not in problems]
        if kept:
            problem = self._train_block([edits[i] for i in kept], trained.vectors[finite], texts)
            problems |= dict.fromkeys(kept, problem) if problem else {}
        losses = dict(zip(edits, trained.losses[-1].tolist(), strict=True))
        return {i: loss for i, loss in losses.items() if i not in problems}, problems

    # --- Stage 1: the block's output ------------------------------------------------------------------------

    def _target_vectors(self, edits: Sequence[EncodedEdit]) -> TrainedOutputs:
        """Under the weights as they are at the start of the batch."""
        upper = self._fast.layers(max(len(edit.ids) for edit in edits))
        if upper is None:
            return by_whole_model(self.model, self._block, edits, self.config.value)
        return by_upper_layers(upper, edits, self.config.value)

    # --- Stage 2: the block's parameters --------------------------------------------------------------------

    def _train_block(self, edits: Sequence[EncodedEdit], vectors: Tensor, texts: Sequence[str]) -> str | None:
        """Train the block; a sentence where that fails. Then, or when interrupted, its parameters are put back.

        Args:
            edits: `B` of them.
            vectors: what the block must give at each prompt's last token, float32 `(B, d)`.
            texts: to preserve.
        """
        targets = self.block_targets(edits, vectors, texts)
        self.pristine.keep()
        trainees = self._trainees()
        before = {name: trainee.clone() for name, trainee in trainees.items()}
        try:
            errors = self._train(trainees, targets)
            finite = bounded(errors, *self._parameters())
        except BaseException:
            self._put_back(trainees, before)
            raise
        if not finite:
            self._put_back(trainees, before)
            return "the training of the block was not finite; its parameters were put back"
        return None

    def block_targets(
        self, edits: Sequence[EncodedEdit], vectors: Tensor, texts: Sequence[str]
    ) -> tuple[BlockTarget, BlockTarget]:
        """What is preserved, and the prompts with what is new at their ends.

        Raises:
            UserError: all texts are blank.
        """
        rows = [ids[: self.config.preservation.max_tokens] for ids in self.encoder.texts(texts) if ids]
        if not rows:
            raise UserError("method.preservation.corpus gave a sample of blank texts; leave them out of it")
        preserved = self._read(rows)
        prompts = self._read([edit.prompt for edit in edits]).with_last(vectors)
        if self._rotary is not None:
            return release_cumsum(preserved, self._rotary), release_cumsum(prompts, self._rotary)
        return preserved, prompts

    def _read(self, rows: Sequence[Sequence[int]]) -> BlockTarget:
        batch = pad(rows, self.encoder.pad_id, "right", device=self.model.device)
        return read_block(self.model, self._block, batch, whole=self.config.engine == "sequential")

    def _train(self, trainees: Mapping[str, Tensor], targets: Sequence[BlockTarget]) -> Tensor:
        """The two errors before each step, `(n_steps, 2)`."""
        adamw = optimizer(trainees, self.config.block)
        parameters = self._parameters()
        history: list[Tensor] = []
        for _ in range(self.config.block.n_steps):
            with requiring_gradients(parameters):
                errors = torch.stack([target.error(self._block, self._comparison) for target in targets])
                # An expert that no token was routed to has no part in the errors.
                gradients = torch.autograd.grad(errors.sum(), parameters, allow_unused=True, materialize_grads=True)
            history.append(errors.detach())
            for trainee, gradient in zip(trainees.values(), gradients, strict=True):
                trainee.grad = gradient.to(trainee.dtype)
            adamw.step()
            self._write_masters()
        for trainee in trainees.values():
            trainee.grad = None
        return torch.stack(history)

    def _parameters(self) -> list[nn.Parameter]:
        return list(self.pristine.weights.values())

    def _trainees(self) -> dict[str, Tensor]:
        """What the optimiser changes: the parameters themselves, or their masters."""
        if self.config.master_weights:
            return {name: self._masters.of(name) for name in self.pristine.weights}
        return {name: parameter.detach() for name, parameter in self.pristine.weights.items()}

    def _put_back(self, trainees: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
        for name, trainee in trainees.items():
            trainee.copy_(before[name])
            trainee.grad = None
        self._write_masters()

    def _write_masters(self) -> None:
        for name in self.pristine.weights:
            self._masters.write(name)

    # --- State ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """The block's parameters, their masters where there are any, and where the draw of texts is."""
        return {**self.pristine.state_dict(), **self._masters.state_dict(), "draws": self.texts.state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from saved parameters and draws."""
        if "draws" not in state:
            raise ValueError("the state lacks 'draws'; it is not one of this editor's")
        self.pristine.load_state_dict(state)
        self._masters.load_state_dict(state)
        self.texts.load(state["draws"])

    def detach(self) -> None:
        """Put the original parameters back."""
        self.pristine.restore()
        self._masters.clear()
        self.texts.reset()

    def side_parameters(self) -> int:
        """Numbers in the originals (as many as are trained), and in the masters where there are any."""
        return self.pristine.numel() + self._masters.numel()

    def warnings(self) -> list[str]:
        """Which of the release's faults were followed, the size of a batch, and what the dtype does."""
        config, sentences = self.config, self._fast.warnings()
        if config.preserve == "release_broadcast":
            sentences.append("every text was held to the first one's outputs, as in the release (preserve)")
        if config.pos_ids == "release_cumsum":
            sentences.append("padding had the release's positions in the training of the block (pos_ids)")
        if config.batch_size > 1:
            trained_once = f"the block was trained once for {config.batch_size} cases"
            sentences.append(f"{trained_once}; a turn ends at each checkpoint")
        dtype = next(iter(self.pristine.weights.values())).dtype
        if dtype != torch.float32 and not config.master_weights:
            sentences.append(f"the block was trained in {str(dtype).removeprefix('torch.')}, as published")
        if is_last_layer(self.model, config.module):
            sentences.append(f"{config.module} is the last layer: it can move the first token of an answer only")
        return sentences
