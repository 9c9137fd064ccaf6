"""UnKE: unstructured knowledge editing (Deng et al., arXiv 2405.15349).

An answer of a paragraph is written into one whole decoder block in two stages. The first finds the block's output at
the last question token that makes the frozen rest of the model say the answer. The second trains all parameters of the
block until it gives that output there, and its old outputs at the question's other tokens and on random texts.
"""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.cases import EditCase
from horen_bench.editors.base import Editor, EditRecord, check_choice
from horen_bench.editors.unke.block import (
    BlockTraining,
    Comparison,
    Lesson,
    asking_for_gradients,
    mean_squared_error,
    optimizer,
    read_block,
)
from horen_bench.editors.unke.preservation import PreservedTexts
from horen_bench.editors.unke.values import Targets, ValueTraining, by_upper_layers, by_whole_model
from horen_bench.errors import UserError
from horen_bench.models.architecture import check_module, decoder_layer_index, is_last_layer
from horen_bench.models.partial import NotSupportedError, UpperLayers
from horen_bench.models.surgery import MasterWeights, PristineParameters
from horen_bench.prompts import EncodedEdit, encode_edit, encode_texts, pad, pad_id_of

Engine = Literal["cached", "sequential"]
Positions = Literal["arange", "release_cumsum"]

_NO_TOKEN = "prompt or target has no token"
_NO_TARGET = "the target vector was not finite; the case was not written"


class UnkeEditor(Editor):
    """UnKE on one model; edits add up, as in the release.

    Args:
        model: a causal language model in evaluation mode; the parameters of the block are changed in place.
        tokenizer: its tokenizer.
        seed: not used; the only draw, of the texts to preserve, has the published code's own seed.
        module: dotted path of the decoder block, e.g. `model.layers.7`.
        value: constants of `ValueTraining`, stage 1.
        block: constants of `BlockTraining`, stage 2.
        preservation: constants of `PreservedTexts`.
        preserve: `correct`, or `release_broadcast`: every text is held to the first one's outputs.
        pos_ids: rotary positions of the block's calls in stage 2: `arange`, as in the model's own forward pass, or
            `release_cumsum`, which differs on padding.
        batch_size: cases that share one training of the block; more than 1 is another method.
        master_weights: train float32 values behind half-precision parameters; the published code trains, and keeps
            AdamW's moments, in the model's dtype, where most of a small step is rounded away.
        engine: `cached` runs only what an edit changes; `sequential` runs the whole model, as published. Same numbers
            up to rounding.

    Raises:
        UserError: the model has no such block, or a constant is out of its range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        module: str,
        value: Mapping[str, Any],
        block: Mapping[str, Any],
        preservation: Mapping[str, Any],
        preserve: Comparison,
        pos_ids: Positions,
        batch_size: int,
        master_weights: bool,
        engine: Engine,
    ) -> None:
        check_choice("method.preserve", preserve, ("correct", "release_broadcast"))
        check_choice("method.pos_ids", pos_ids, ("arange", "release_cumsum"))
        check_choice("method.engine", engine, ("cached", "sequential"))
        if not isinstance(batch_size, int) or batch_size < 1:
            raise UserError(f"method.batch_size must be a whole number of at least 1, got {batch_size!r}")
        self.model = model
        self.tokenizer = tokenizer
        self.module = module
        self.value = ValueTraining(**value)
        self.training = BlockTraining(**block)
        self.texts = PreservedTexts(**preservation)
        self.preserve: Comparison = preserve
        self.pos_ids: Positions = pos_ids
        self.slice_size = self._batch_size = batch_size
        self.engine: Engine = engine
        self._block = check_module(model, module, where="method.module")
        self._layer = _layer_of(module)
        self.pristine = PristineParameters({f"{module}.{name}": one for name, one in self._block.named_parameters()})
        self._masters = MasterWeights(self.pristine.weights)
        self._keeps_masters = master_weights
        self._rotary = _rotary_of(model) if pos_ids == "release_cumsum" else None
        self._upper: UpperLayers | None = None
        self._no_upper: str | None = None

    # --- Turns ---------------------------------------------------------------------------------------------

    def edit(self, cases: Sequence[EditCase]) -> list[EditRecord]:
        """Write the cases in turns of `batch_size`, in order; texts to preserve are drawn anew for every turn."""
        starts = range(0, len(cases), self._batch_size)
        return [record for start in starts for record in self._turn(cases[start : start + self._batch_size])]

    def _turn(self, cases: Sequence[EditCase]) -> list[EditRecord]:
        """Write one turn; what cannot be written is refused by name and the rest goes on."""
        started = time.perf_counter()
        texts = self.texts.draw()  # also where nothing can be written, so that later turns draw the same
        encoded = [encode_edit(self.tokenizer, case.prompt, case.target) for case in cases]
        edits = {i: edit for i, edit in enumerate(encoded) if edit.prompt and edit.target}
        losses, problems = self._write_edits(edits, texts) if edits else ({}, {})
        seconds = (time.perf_counter() - started) / len(cases)
        steps = self.value.n_steps - 1 + self.training.n_steps
        return [
            EditRecord(case.id, "inserted", None, None, losses[i], steps, seconds)
            if i in losses
            else EditRecord(case.id, "failed", None, None, math.nan, 0, seconds, problems.get(i, _NO_TOKEN))
            for i, case in enumerate(cases)
        ]

    def _write_edits(
        self, edits: Mapping[int, EncodedEdit], texts: Sequence[str]
    ) -> tuple[dict[int, float], dict[int, str]]:
        """Both stages: the answers' losses (nats per token) where they are written, and elsewhere why not."""
        targets = self._target_vectors(list(edits.values()))
        finite = targets.finite()
        problems = {i: _NO_TARGET for i, fine in zip(edits, finite, strict=True) if not fine}
        kept = [i for i in edits if i not in problems]
        if kept:
            problem = self._train_block([edits[i] for i in kept], targets.vectors[finite], texts)
            problems |= dict.fromkeys(kept, problem) if problem else {}
        losses = dict(zip(edits, targets.losses[-1].tolist(), strict=True))
        return {i: loss for i, loss in losses.items() if i not in problems}, problems

    # --- Stage 1: the block's output ------------------------------------------------------------------------

    def _target_vectors(self, edits: Sequence[EncodedEdit]) -> Targets:
        """Under the weights as they are at the start of the turn."""
        upper = self._upper_layers() if self.engine == "cached" else None
        if upper is None:
            return by_whole_model(self.model, self._block, edits, self.value)
        return by_upper_layers(upper, edits, self.value)

    def _upper_layers(self) -> UpperLayers | None:
        """The layers above the block, or None where the model does not fit; then `warnings` says so."""
        if self._upper is None and self._no_upper is None:
            try:
                self._upper = UpperLayers(self.model, self._block, self._layer)
            except NotSupportedError as reason:
                self._no_upper = f"target vectors were trained on the whole model: {reason}"
        return self._upper

    # --- Stage 2: the block's parameters --------------------------------------------------------------------

    def _train_block(self, edits: Sequence[EncodedEdit], vectors: Tensor, texts: Sequence[str]) -> str | None:
        """Train the block; a sentence where that fails. Then, or when interrupted, its parameters are put back.

        Args:
            edits: `B` of them.
            vectors: what the block must give at each question's last token, float32 `(B, d)`.
            texts: to preserve.
        """
        lessons = self.lessons(edits, vectors, texts)
        self.pristine.keep()
        trainees = self._trainees()
        before = {name: trainee.clone() for name, trainee in trainees.items()}
        try:
            losses = self._train(trainees, lessons)
            finite = bool(losses.isfinite().all()) and all(bool(one.isfinite().all()) for one in self._parameters())
        except BaseException:
            self._put_back(trainees, before)
            raise
        if not finite:
            self._put_back(trainees, before)
            return "the training of the block was not finite; its parameters were put back"
        return None

    def lessons(self, edits: Sequence[EncodedEdit], vectors: Tensor, texts: Sequence[str]) -> tuple[Lesson, Lesson]:
        """What is preserved, and the questions with what is new at their ends."""
        rows = [ids[: self.texts.max_tokens] for ids in encode_texts(self.tokenizer, texts) if ids]
        if not rows:
            raise UserError("method.preservation.corpus gave a sample of blank texts; leave them out of it")
        preserved = self._lesson(rows)
        questions = self._lesson([edit.prompt for edit in edits]).with_last(vectors)
        if self._rotary is not None:
            return preserved.with_counted_positions(self._rotary), questions.with_counted_positions(self._rotary)
        return preserved, questions

    def _lesson(self, rows: Sequence[Sequence[int]]) -> Lesson:
        batch = pad(rows, pad_id_of(self.tokenizer), "right", device=self.model.device)
        return read_block(self.model, self._block, batch, whole=self.engine == "sequential")

    def _train(self, trainees: Mapping[str, Tensor], lessons: Sequence[Lesson]) -> Tensor:
        """The two errors before each step, `(n_steps, 2)`."""
        adamw = optimizer(trainees, self.training)
        parameters = self._parameters()
        seen: list[Tensor] = []
        for _ in range(self.training.n_steps):
            with asking_for_gradients(parameters):
                errors = torch.stack([mean_squared_error(self._block, one, self.preserve) for one in lessons])
                gradients = torch.autograd.grad(errors.sum(), parameters)
            seen.append(errors.detach())
            for trainee, gradient in zip(trainees.values(), gradients, strict=True):
                trainee.grad = gradient.to(trainee.dtype)
            adamw.step()
            self._write_masters()
        for trainee in trainees.values():
            trainee.grad = None
        return torch.stack(seen)

    def _parameters(self) -> list[nn.Parameter]:
        return list(self.pristine.weights.values())

    def _trainees(self) -> dict[str, Tensor]:
        """What the optimiser changes: the parameters themselves, or their masters."""
        if self._keeps_masters:
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
        """Which of the release's faults were followed, the size of a turn, and what the dtype does."""
        found = [self._no_upper] if self._no_upper else []
        if self.preserve == "release_broadcast":
            found.append("every text was held to the first one's outputs, as in the release (preserve)")
        if self.pos_ids == "release_cumsum":
            found.append("padding had the release's positions in the training of the block (pos_ids)")
        if self._batch_size > 1:
            found.append(f"the block was trained once for {self._batch_size} cases; a turn ends at each checkpoint")
        dtype = next(iter(self.pristine.weights.values())).dtype
        if dtype != torch.float32 and not self._keeps_masters:
            found.append(f"the block was trained in {str(dtype).removeprefix('torch.')}, as published")
        if is_last_layer(self.model, self.module):
            found.append(f"{self.module} is the last layer: it can move the first token of an answer only")
        return found


def _layer_of(path: str) -> int:
    """Number of the decoder layer that is the block itself."""
    layer = decoder_layer_index(path)
    if layer is None or not path.endswith(f".{layer}"):
        raise UserError(f"method.module must be a whole decoder layer such as model.layers.7, got {path}")
    return layer


def _rotary_of(model: PreTrainedModel) -> nn.Module:
    rotary: nn.Module | None = getattr(model.get_decoder(), "rotary_emb", None)
    if rotary is None:
        raise UserError(
            f"method.pos_ids=release_cumsum needs rotary positions, which {type(model).__name__} lacks; write arange"
        )
    return rotary
