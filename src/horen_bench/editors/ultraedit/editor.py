"""UltraEdit: one forward and one backward pass, then a closed-form shift of several matrices (arXiv 2505.14679).

For each edited linear module the inputs `H` of some token rows and the loss gradients `G` with respect to its outputs
at these rows are kept. Both are normalised by running statistics; the rows' wanted output changes `V` follow from
them, and a ridge regression turns `V` into a change of the weight.

Shapes: `N` token rows of a turn; `d_in` and `d_out` of a module; `B` sequences of `T` tokens, `K` labels each.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from horen_bench.cases import EditCase
from horen_bench.editors.base import Editor, EditRecord, check_choice
from horen_bench.errors import UserError
from horen_bench.models.architecture import decoder_layer_index
from horen_bench.models.surgery import MasterWeights, PristineWeights
from horen_bench.prompts import encode_edit, encode_texts, pad, pad_id_of

_EPS = torch.finfo(torch.float32).eps
_NO_LABEL = -100

Shape = tuple[int, int]
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Regime:
    """What the two published codes do differently.

    Attributes:
        rows: token rows that are kept: of the whole `sentence`, or those that predict a token of the `answer`.
        normalizer: statistics over the rows of one turn (`per_turn`), or over those of all turns (`lifelong`).
        labels: ids of the answer as it follows the prompt (`answer`), or of the answer `alone`, with the special tokens
            that the tokenizer puts in front; then the padding of shorter answers in a micro-batch is trained on, too.
        dtype: of the weights that the published numbers were obtained with.
    """

    rows: Literal["sentence", "answer"]
    normalizer: Literal["per_turn", "lifelong"]
    labels: Literal["answer", "alone"]
    dtype: str

    def __post_init__(self) -> None:
        check_choice("method.regimes: rows", self.rows, ("sentence", "answer"))
        check_choice("method.regimes: normalizer", self.normalizer, ("per_turn", "lifelong"))
        check_choice("method.regimes: labels", self.labels, ("answer", "alone"))


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
class Sample:
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


class UltraEditEditor(Editor):
    """UltraEdit on one model.

    A turn keeps `N (d_in + d_out)` numbers of each module in the model's dtype and twice as many in float32 while it is
    written, so `edits_per_turn` bounds the memory. It sees the weights as they were at its start, and a last turn of a
    call may be short.

    Args:
        model: a causal language model; the weights of `modules` are changed in place.
        tokenizer: its tokenizer.
        seed: not used, the method draws nothing.
        modules: dotted paths of the edited linear modules; those of one shape share the statistics.
        learning_rate: eta, the step along the normalised gradient.
        regime: the entry of `regimes` to follow.
        regimes: `rows`, `normalizer`, `labels` and `dtype` by name, see `Regime`.
        edits_per_turn: cases that are written at once.
        micro_batch: cases of a turn that run through the model at once; the loss is a mean over them.
        master_weights: keep float32 values behind a half-precision model's weights; the published code does not.

    Raises:
        UserError: the model has no such modules, or a constant is out of its range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        modules: Sequence[str],
        learning_rate: float,
        regime: str,
        regimes: Mapping[str, Mapping[str, Any]],
        edits_per_turn: int,
        micro_batch: int,
        master_weights: bool,
    ) -> None:
        if regime not in regimes:
            raise UserError(f"method.regime must be one of {', '.join(map(str, regimes))}, got '{regime}'")
        if not learning_rate > 0:
            raise UserError(f"method.learning_rate must be > 0, got {learning_rate}")
        _check_count("edits_per_turn", edits_per_turn)
        _check_count("micro_batch", micro_batch)
        self.model = model
        self.tokenizer = tokenizer
        self.learning_rate = learning_rate
        self.regime = Regime(**regimes[regime])
        self.edits_per_turn = self.slice_size = edits_per_turn
        self.micro_batch = micro_batch
        self.pristine = PristineWeights(model, modules, where="method.modules")
        self._modules = {path: model.get_submodule(path) for path in modules}
        self._shapes = {path: _shape(path, module) for path, module in self._modules.items()}
        self._masters = MasterWeights(self.pristine.weights)
        self._keeps_masters = master_weights
        self.statistics = self._no_statistics()

    def _no_statistics(self) -> dict[Shape, RowStatistics]:
        device = next(iter(self.pristine.weights.values())).device
        return {shape: RowStatistics.empty(sum(shape), device) for shape in self._shapes.values()}

    # --- Turns ---------------------------------------------------------------------------------------------

    def edit(self, cases: Sequence[EditCase]) -> list[EditRecord]:
        """Write the cases in turns; the last turn of the call may be short."""
        return [record for turn in _in_parts(cases, self.edits_per_turn) for record in self._turn(turn)]

    def _turn(self, cases: Sequence[EditCase]) -> list[EditRecord]:
        started = time.perf_counter()
        samples = [self._sample(case) for case in cases]
        kept = [sample for sample in samples if sample]
        problem = self._write(kept) if kept else None
        seconds = (time.perf_counter() - started) / len(cases)
        return [
            _record(case, problem if sample else "prompt or target has no token", seconds)
            for case, sample in zip(cases, samples, strict=True)
        ]

    def _write(self, samples: Sequence[Sample]) -> str | None:
        """Write the samples of one turn; a sentence, and nothing changed, where that is not possible."""
        features, statistics = self._features(samples)
        shifts = {
            path: closed_form(features.pop(path), statistics[shape], self.learning_rate)
            for path, shape in self._shapes.items()
        }
        for path, shift in shifts.items():
            if not shift.bound() < torch.finfo(self.pristine.weights[path].dtype).max / 2:
                return f"the update of {path} was not finite; the turn's cases were not written"
        self.pristine.keep()
        for path, shift in shifts.items():
            self._add(path, shift)
        if self.regime.normalizer == "lifelong":
            self.statistics = statistics
        return None

    @torch.no_grad()
    def _add(self, path: str, shift: Shift) -> None:
        """Add a shift to a weight, which a linear module holds as `(d_out, d_in)`; rounded once, at the sum."""
        stored_as_is = isinstance(self._modules[path], Conv1D)
        a, b = (shift.left, shift.right) if stored_as_is else (shift.right, shift.left)
        weight = self.pristine.weights[path]
        if self._keeps_masters or weight.dtype == torch.float32:
            self._masters.of(path).addmm_(a.T, b)
            self._masters.write(path)
        else:
            weight.add_((a.T @ b).to(weight.dtype))

    # --- Features: inputs of the modules, gradients of their outputs ---------------------------------------

    def _sample(self, case: EditCase) -> Sample | None:
        """None where there is nothing to learn, or nothing to learn it from."""
        edit = encode_edit(self.tokenizer, case.prompt, case.target)
        if not edit.prompt or not edit.target:
            return None
        labels = edit.target
        if self.regime.labels == "alone":
            labels = tuple(encode_texts(self.tokenizer, [f" {case.target}"])[0])
        return Sample(edit.ids, labels[1 - len(edit.ids) :])

    def _features(self, samples: Sequence[Sample]) -> tuple[dict[str, Features], dict[Shape, RowStatistics]]:
        """Rows of a turn by module, and the statistics that include them. All see the weights at the turn's start."""
        statistics = dict(self.statistics)
        found: dict[str, list[Features]] = {path: [] for path in self._modules}
        for batch in self._micro_batches(samples):
            _, features = self.batch_features(batch)
            for path, shape in self._shapes.items():
                statistics[shape] = statistics[shape].updated(features[path].joined)
                found[path].append(features[path])
        return {path: _concatenated(parts) for path, parts in found.items()}, statistics

    def _micro_batches(self, samples: Sequence[Sample]) -> list[Sequence[Sample]]:
        """Neighbours side by side, the batch with most tokens first."""
        batches = _in_parts(samples, self.micro_batch)
        return sorted(batches, key=lambda batch: -sum(len(sample.ids) for sample in batch))

    def batch_features(self, samples: Sequence[Sample]) -> tuple[float, dict[str, Features]]:
        """Mean token cross-entropy (nats) of one micro-batch, and its rows by module.

        Weights need no gradient and get none; the backward pass ends at the lowest edited module.
        """
        device = self.model.device
        batch = pad([sample.ids for sample in samples], pad_id_of(self.tokenizer), device=device)
        labels = self._labels(samples).to(device)
        width = labels.shape[1]
        with torch.enable_grad(), _watched(self._modules) as (inputs, outputs):
            logits = self.model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                use_cache=False,
                logits_to_keep=width + 1,
            ).logits[:, :-1]
            loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=_NO_LABEL)
            gradients = torch.autograd.grad(loss, [outputs[path] for path in self._modules])
        rows = batch.attention_mask.bool()
        if self.regime.rows == "answer":
            rows = F.pad(labels != _NO_LABEL, (rows.shape[1] - 1 - width, 1))
        return loss.item(), {
            path: Features(inputs[path][rows.to(gradient.device)], gradient[rows.to(gradient.device)])
            for path, gradient in zip(self._modules, gradients, strict=True)
        }

    def _labels(self, samples: Sequence[Sample]) -> Tensor:
        """`(B, K)`, padded on the left: with what is not trained on, or as the release does with the pad token."""
        fill = pad_id_of(self.tokenizer) if self.regime.labels == "alone" else _NO_LABEL
        width = max(len(sample.labels) for sample in samples)
        return torch.tensor([[fill] * (width - len(sample.labels)) + list(sample.labels) for sample in samples])

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
        found = []
        if self.edits_per_turn > 1:
            found.append(f"edits were written in turns of {self.edits_per_turn}")
        dtype = str(self.model.dtype).removeprefix("torch.")
        if dtype not in ("float32", self.regime.dtype):
            found.append(
                f"weights are {dtype}; the published numbers were obtained in {self.regime.dtype}, "
                f"as model.dtype={self.regime.dtype} does"
            )
        return found


def closed_form(features: Features, statistics: RowStatistics, learning_rate: float) -> Shift:
    """The shift of one matrix: ridge regression of the wanted output changes on the raw inputs, in float32.

    `V_i = -eta |h_i|^2 g_i` with normalised `h_i` and `g_i`, then `(H^T H + I)^-1 H^T V`, which is the same as
    `H^T (H H^T + I)^-1 V`; the smaller of the two systems is solved.
    """
    inputs = features.inputs.float()
    n_rows, d_in = inputs.shape
    normalized = statistics.normalized(features.joined)
    keys, gradients = normalized[:, :d_in], normalized[:, d_in:]
    wanted = -learning_rate * keys.square().sum(dim=1, keepdim=True) * gradients
    if n_rows <= d_in:
        gram = inputs @ inputs.T + torch.eye(n_rows, device=inputs.device)
        return Shift(inputs, torch.linalg.solve(gram, wanted))
    gram = inputs.T @ inputs + torch.eye(d_in, device=inputs.device)
    return Shift(torch.linalg.solve(gram, inputs.T).T, wanted)


@contextmanager
def _watched(modules: Mapping[str, torch.nn.Module]) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Within the block, note inputs and outputs of modules; the outputs ask for gradients although no weight does."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def noting(path: str) -> Any:
        def note(_module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[path] = args[0].detach()
            outputs[path] = output if output.requires_grad else output.requires_grad_()

        return note

    handles = [module.register_forward_hook(noting(path)) for path, module in modules.items()]
    try:
        yield inputs, outputs
    finally:
        for handle in handles:
            handle.remove()


def _in_parts(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _concatenated(parts: Sequence[Features]) -> Features:
    return Features(torch.cat([part.inputs for part in parts]), torch.cat([part.gradients for part in parts]))


def _record(case: EditCase, problem: str | None, seconds: float) -> EditRecord:
    return EditRecord(case.id, "failed" if problem else "inserted", None, None, math.nan, 0, seconds, problem)


def _shape(path: str, module: torch.nn.Module) -> Shape:
    """`(d_in, d_out)` of a linear module of a decoder layer; the head sees the positions of the labels only."""
    if decoder_layer_index(path) is None:
        raise UserError(f"method.modules={path} is in no decoder layer; name one such as model.layers.5.mlp.up_proj")
    if isinstance(module, torch.nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    raise UserError(f"method.modules={path} is a {type(module).__name__}; a linear module is needed")


def _statistics_name(shape: Shape) -> str:
    return f"normalizer.{shape[0]}x{shape[1]}"


def _loaded(state: Mapping[str, Tensor], shape: Shape, like: Tensor) -> RowStatistics:
    name = _statistics_name(shape)
    n, mean, spread = (state.get(f"{name}.{part}") for part in ("n", "mean", "spread"))
    if n is None or mean is None or spread is None or not mean.shape == spread.shape == like.shape:
        raise ValueError(f"the state lacks '{name}', or it is of another size; it is not one of this editor's")
    return RowStatistics(int(n), mean.to(like.device, copy=True), spread.to(like.device, copy=True))


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"method.{name} must be a whole number of at least 1, got {value!r}")
