"""UltraEdit: one forward and one backward pass, then a closed-form shift of several matrices (arXiv 2505.14679).

For each edited linear module the inputs `H` of some token rows and the loss gradients `G` with respect to its outputs
at these rows are kept. Both are normalised by running statistics; from them follow the changes `V` that the rows'
outputs shall have, and a ridge regression turns `V` into a change of the weight.

Shapes: `N` token rows of a turn; `d_in` and `d_out` of a module; `B` sequences of `T` tokens, `K` labels each.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.cases import EditCase, EditRecord
from horen_bench.editors.base import Editor
from horen_bench.editors.shared.padding import check_padding
from horen_bench.editors.ultraedit.config import UltraEditConfig
from horen_bench.errors import UserError
from horen_bench.models.architecture import PlainLinear, decoder_layer_index, linear_sizes, matrix_of
from horen_bench.models.calls import run
from horen_bench.models.hooks import as_sequences, inputs_of, patched_output
from horen_bench.models.surgery import MasterWeights, PristineWeights, all_finite
from horen_bench.prompts import PromptEncoder, pad

_EPS = torch.finfo(torch.float32).eps
_MOST = torch.finfo(torch.float32).max ** 0.5  # of an entry of a change; a row of larger ones has no length
_NO_LABEL = -100
_NO_TOKEN = "prompt or target has no token"

Shape = tuple[int, int]
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class RowStatistics:
    """Running mean and spread of rows, one value per column, float32.

    Attributes:
        n: rows seen.
        mean: `(d,)`.
        spread: `(d,)`; the published update adds `r` times the unbiased variance where a sum of squares would
            need `r - 1` times, so that the deviation is slightly too large.
    """

    n: int
    mean: Tensor
    spread: Tensor

    @classmethod
    def empty(cls, size: int, device: torch.device) -> "RowStatistics":
        """Of no rows."""
        return cls(0, torch.zeros(size, device=device), torch.zeros(size, device=device))

    def updated(self, rows: Tensor) -> "RowStatistics":
        """With `r` more rows `(r, d)`; a single row has no variance."""
        rows = rows.to(self.mean.device)
        r, n = len(rows), self.n + len(rows)
        change = rows.mean(dim=0) - self.mean
        variance = rows.var(dim=0) if r > 1 else torch.zeros_like(self.mean)
        spread = self.spread + r * variance + self.n * r * change.square() / n
        return RowStatistics(n, self.mean + r * change / n, spread)

    @property
    def deviation(self) -> Tensor:
        """`(d,)`."""
        return (self.spread / (self.n - 1 + _EPS)).sqrt()

    def normalized(self, rows: Tensor) -> Tensor:
        """Rows `(r, d)` with the mean taken off, in deviations."""
        return (rows - self.mean.to(rows.device)) / (self.deviation.to(rows.device) + _EPS)


@dataclass(frozen=True, slots=True)
class LabelledSentence:
    """A sentence and the labels of its last positions but one, as token ids."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Features:
    """Rows of one module in the model's dtype: inputs `(N, d_in)` and output gradients `(N, d_out)`."""

    inputs: Tensor
    gradients: Tensor

    @property
    def joined(self) -> Tensor:
        """float32 `(N, d_in + d_out)`."""
        return torch.cat([self.inputs.float(), self.gradients.float()], dim=1)


@dataclass(frozen=True, slots=True)
class Shift:
    """A change `left.T @ right` `(d_in, d_out)` of a matrix, kept as its float32 factors `(N, d_in)`, `(N, d_out)`."""

    left: Tensor
    right: Tensor

    def bound(self) -> float:
        """At least the largest entry of the change (Cauchy-Schwarz); NaN or infinite where an entry is."""
        return float(self.left.norm(dim=0).max() * self.right.norm(dim=0).max())


class UltraEditEditor(Editor[UltraEditConfig]):
    """UltraEdit on one model; the weights of `config.modules` are changed in place, and nothing is drawn.

    A turn keeps `N (d_in + d_out)` numbers of each module in the model's dtype and twice as many in float32 while it is
    written, so `edits_per_turn` bounds the memory. It sees the weights as they were at its start, and a last turn of a
    call may be short.

    Raises:
        UserError: the model has no such modules, or one is not linear or in no decoder layer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | PromptEncoder,
        config: UltraEditConfig,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(model, tokenizer, config, seed=seed)
        self.regime = config.published
        self.slice_size = config.edits_per_turn
        self.pristine = PristineWeights(model, config.modules, where="method.modules")
        self._modules = self.pristine.modules
        self._shapes = {path: _shape(path, module) for path, module in self._modules.items()}
        self._masters = MasterWeights(self.pristine.weights)
        self.statistics = self._no_statistics()

    def _no_statistics(self) -> dict[Shape, RowStatistics]:
        device = next(iter(self.pristine.weights.values())).device
        return {shape: RowStatistics.empty(sum(shape), device) for shape in self._shapes.values()}

    # --- Turns ---------------------------------------------------------------------------------------------

    def edit(self, cases: Sequence[EditCase]) -> list[EditRecord]:
        """Write the cases in turns; the last turn of the call may be short."""
        return [record for turn in _in_parts(cases, self.config.edits_per_turn) for record in self._turn(turn)]

    def _turn(self, cases: Sequence[EditCase]) -> list[EditRecord]:
        started = time.perf_counter()
        check_padding(self.model)
        sentences = [self._sentence(case) for case in cases]
        kept = {i: sentence for i, sentence in enumerate(sentences) if sentence}
        problems = dict.fromkeys(range(len(cases)), _NO_TOKEN) | dict.fromkeys(kept, self._write(list(kept.values())))
        if any(problems[i] for i in kept) and len(kept) > 1:
            bad = [i for i, sentence in kept.items() if not self._has_finite_features(sentence)]
            left = {i: sentence for i, sentence in kept.items() if i not in bad}
            if bad and left:
                problems |= dict.fromkeys(left, self._write(list(left.values())))
        seconds = (time.perf_counter() - started) / len(cases)
        return [_record(case, problems[i], seconds) for i, case in enumerate(cases)]

    def _has_finite_features(self, sentence: LabelledSentence) -> bool:
        """Whether a sentence by itself gives inputs and gradients that are numbers."""
        _, features = self.batch_features([sentence])
        return all(all_finite(part.inputs, part.gradients) for part in features.values())

    def _write(self, sentences: Sequence[LabelledSentence]) -> str | None:
        """Write the sentences of one turn; the problem, and nothing changed, where that is not possible."""
        if not sentences:
            return None
        features, statistics = self._features(sentences)
        shifts = {
            path: closed_form(features.pop(path), statistics[shape], self.config.learning_rate)
            for path, shape in self._shapes.items()
        }
        for path, shift in shifts.items():
            if not shift.bound() < min(_MOST, torch.finfo(self.pristine.weights[path].dtype).max / 2):
                return f"the update of {path} was not finite; the turn's cases were not written"
        self.pristine.keep()
        for path, shift in shifts.items():
            self._add(path, shift)
        if self.regime.normalizer == "lifelong":
            self.statistics = statistics
        return None

    @torch.no_grad()
    def _add(self, path: str, shift: Shift) -> None:
        """Add a shift to a weight; rounded once, at the sum."""
        matrix = self.pristine.matrix(path)
        if self.config.master_weights or matrix.dtype == torch.float32:
            matrix_of(self._modules[path], self._masters.of(path)).addmm_(shift.right.T, shift.left)
            self._masters.write(path)
        else:
            matrix.add_((shift.right.T @ shift.left).to(matrix.dtype))

    # --- Features: inputs of the modules, gradients of their outputs ---------------------------------------

    def _sentence(self, case: EditCase) -> LabelledSentence | None:
        """None where there is nothing to write, or nothing to write it behind."""
        edit = self.encoder.edit(case.prompt, case.target)
        if not edit.prompt or not edit.target:
            return None
        labels = edit.target
        if self.regime.labels == "alone":
            labels = tuple(self.encoder.texts([f" {case.target}"])[0])
        return LabelledSentence(edit.ids, labels[1 - len(edit.ids) :])

    def _features(
        self, sentences: Sequence[LabelledSentence]
    ) -> tuple[dict[str, Features], dict[Shape, RowStatistics]]:
        """Rows of a turn by module, and the statistics that include them. All see the weights at the turn's start."""
        statistics = dict(self.statistics)
        parts: dict[str, list[Features]] = {path: [] for path in self._modules}
        for batch in self._micro_batches(sentences):
            _, features = self.batch_features(batch)
            for path, shape in self._shapes.items():
                statistics[shape] = statistics[shape].updated(features[path].joined)
                parts[path].append(features[path])
        return {path: _concatenated(parts[path]) for path in parts}, statistics

    def _micro_batches(self, sentences: Sequence[LabelledSentence]) -> list[Sequence[LabelledSentence]]:
        """Neighbours side by side, the batch with most tokens first."""
        batches = _in_parts(sentences, self.config.micro_batch)
        return sorted(batches, key=lambda batch: -sum(len(sentence.ids) for sentence in batch))

    def batch_features(self, sentences: Sequence[LabelledSentence]) -> tuple[float, dict[str, Features]]:
        """Mean token cross-entropy (nats) of one micro-batch, and its rows by module.

        Weights need no gradient and get none; the backward pass ends at the lowest edited module.
        """
        device = self.model.device
        batch = pad([sentence.ids for sentence in sentences], self.encoder.pad_id, device=device)
        labels = self._labels(sentences).to(device)
        width = labels.shape[1]
        with torch.enable_grad(), _inputs_and_outputs(self._modules) as (inputs, outputs):
            logits = run(self.model, batch, logits_to_keep=width + 1).logits[:, :-1]
            loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=_NO_LABEL)
            gradients = torch.autograd.grad(loss, [outputs[path] for path in self._modules])
        rows = batch.attention_mask.bool()
        if self.regime.rows == "answer":
            rows = F.pad(labels != _NO_LABEL, (rows.shape[1] - 1 - width, 1))
        return loss.item(), {
            path: Features(_selected(inputs[path].detach(), rows), _selected(gradient, rows))
            for path, gradient in zip(self._modules, gradients, strict=True)
        }

    def _labels(self, sentences: Sequence[LabelledSentence]) -> Tensor:
        """`(B, K)`, padded on the left: with what is not trained on, or as the release does with the pad token."""
        fill = self.encoder.pad_id if self.regime.labels == "alone" else _NO_LABEL
        width = max(len(sentence.labels) for sentence in sentences)
        rows = [[fill] * (width - len(sentence.labels)) + list(sentence.labels) for sentence in sentences]
        return torch.tensor(rows)

    # --- State ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """The edited weights, their masters where there are any, and the statistics where they outlive a turn."""
        state = {**self.pristine.state_dict(), **self._masters.state_dict()}
        if self.regime.normalizer == "lifelong":
            for shape, statistics in self.statistics.items():
                name = _statistics_name(shape)
                state[f"{name}.n"] = torch.tensor(statistics.n)
                state[f"{name}.mean"] = statistics.mean.to("cpu", copy=True)
                state[f"{name}.spread"] = statistics.spread.to("cpu", copy=True)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from saved weights and statistics."""
        statistics = self._no_statistics()
        if self.regime.normalizer == "lifelong":
            statistics = {shape: _loaded(state, shape, empty.mean) for shape, empty in statistics.items()}
        self.pristine.load_state_dict(state)
        self._masters.load_state_dict(state)
        self.statistics = statistics

    def detach(self) -> None:
        """Put the original weights back."""
        self.pristine.restore()
        self._masters.clear()
        self.statistics = self._no_statistics()

    def side_parameters(self) -> int:
        """Numbers in the originals (as many as are edited), in the masters, and in statistics that outlive a turn."""
        kept = sum(2 * statistics.mean.numel() + 1 for statistics in self.statistics.values() if statistics.n)
        return self.pristine.numel() + self._masters.numel() + kept

    def warnings(self) -> list[str]:
        """Turns of several edits, and another half precision than the published one."""
        warnings = []
        if self.config.edits_per_turn > 1:
            warnings.append(f"edits were written in turns of {self.config.edits_per_turn}")
        dtype = str(self.model.dtype).removeprefix("torch.")
        if dtype not in ("float32", self.regime.dtype):
            warnings.append(
                f"weights are {dtype}; the published numbers were obtained in {self.regime.dtype}, "
                f"as model.dtype={self.regime.dtype} does"
            )
        return warnings


def closed_form(features: Features, statistics: RowStatistics, learning_rate: float) -> Shift:
    """The shift of one matrix: ridge regression of the output changes `V` on the raw inputs, in float32.

    `V_i = -eta |h_i|^2 g_i` with normalised `h_i` and `g_i`, then `(H^T H + I)^-1 H^T V`, which is the same as
    `H^T (H H^T + I)^-1 V`; the smaller of the two systems is solved.
    """
    inputs = features.inputs.float()
    n_rows, d_in = inputs.shape
    normalized = statistics.normalized(features.joined)
    keys, gradients = normalized[:, :d_in], normalized[:, d_in:]
    changes = -learning_rate * keys.square().sum(dim=1, keepdim=True) * gradients
    if n_rows <= d_in:
        gram = inputs @ inputs.T + torch.eye(n_rows, device=inputs.device)
        return Shift(inputs, torch.linalg.solve(gram, changes))
    gram = inputs.T @ inputs + torch.eye(d_in, device=inputs.device)
    return Shift(torch.linalg.solve(gram, inputs.T).T, changes)


@contextmanager
def _inputs_and_outputs(
    modules: Mapping[str, torch.nn.Module],
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Within the block, inputs and outputs of modules; the outputs have gradients although no weight has."""
    outputs: dict[str, Tensor] = {}

    def watch(path: str, output: Tensor) -> Tensor:
        outputs[path] = output.requires_grad_()
        return outputs[path].clone()  # some layers (Falcon's) add to it in place

    with ExitStack() as stack:
        for path, module in modules.items():
            stack.enter_context(patched_output(module, partial(watch, path)))
        yield stack.enter_context(inputs_of(modules)), outputs


def _selected(states: Tensor, rows: Tensor) -> Tensor:
    """Of what a module reads or gives, what stands at the true ones of `(B, T)` tokens, `(N, ...)`."""
    return as_sequences(states, rows.shape)[rows.to(states.device)]


def _in_parts(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _concatenated(parts: Sequence[Features]) -> Features:
    return Features(torch.cat([part.inputs for part in parts]), torch.cat([part.gradients for part in parts]))


def _record(case: EditCase, problem: str | None, seconds: float) -> EditRecord:
    return EditRecord(case.id, "failed" if problem else "inserted", None, None, math.nan, 0, seconds, problem)


def _shape(path: str, module: PlainLinear) -> Shape:
    """`(d_in, d_out)` of a linear module of a decoder layer; the head sees the positions of the labels only."""
    if decoder_layer_index(path) is None:
        raise UserError(f"method.modules={path} is in no decoder layer; name one such as model.layers.5.mlp.up_proj")
    return linear_sizes(module)


def _statistics_name(shape: Shape) -> str:
    return f"normalizer.{shape[0]}x{shape[1]}"


def _loaded(state: Mapping[str, Tensor], shape: Shape, like: Tensor) -> RowStatistics:
    name = _statistics_name(shape)
    n, mean, spread = (state.get(f"{name}.{part}") for part in ("n", "mean", "spread"))
    if n is None or mean is None or spread is None or not mean.shape == spread.shape == like.shape:
        raise ValueError(f"the state lacks '{name}', or it is of another size; it is not one of this editor's")
    return RowStatistics(int(n), mean.to(like.device, copy=True), spread.to(like.device, copy=True))
