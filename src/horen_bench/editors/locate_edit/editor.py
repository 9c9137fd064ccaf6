"""What every method that rewrites a down-projection does around its closed form: turns, refusals, state."""

import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.cases import EditCase, EditRecord
from horen_bench.editors.base import Editor
from horen_bench.editors.locate_edit.config import LocateEditConfig
from horen_bench.editors.locate_edit.contexts import Contexts, generate_contexts
from horen_bench.editors.locate_edit.requests import PromptRow, Refused, Request, request_of, rows_of
from horen_bench.editors.locate_edit.target_vector import (
    PerturbedModel,
    PerturbedUpperLayers,
    PerturbedWholeModel,
    TargetVectors,
    train_target_vectors,
)
from horen_bench.editors.shared.padding import check_padding
from horen_bench.editors.shared.second_moments import SecondMoment, second_moments
from horen_bench.errors import UserError
from horen_bench.models.architecture import decoder_layer_index
from horen_bench.models.partial import FastPath, UpperLayers
from horen_bench.models.surgery import PristineWeights, bounded
from horen_bench.prompts import PromptEncoder

LocateEditConfigT = TypeVar("LocateEditConfigT", bound=LocateEditConfig)


class LocateEditEditor(Editor[LocateEditConfigT]):
    """A method that writes facts into down-projections, `W <- W + dW`, `W` `(d, m)`.

    Raises:
        UserError: a module is missing or in no numbered layer, or the layers are not in ascending order.

    Attributes:
        pristine: the rewritten weights, and as they were received.
        contexts: texts before a prompt; None until the model has written them.
        n_edits: cases so far.
        n_same_subject: cases whose subject another case of the same turn has.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | PromptEncoder,
        config: LocateEditConfigT,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(model, tokenizer, config, seed=seed)
        paths = config.projections
        self.pristine = PristineWeights(model, paths, where=config.where)
        layers = [_layer_of(path, config.where) for path in paths]
        if layers != sorted(layers):
            raise UserError(f"{config.where} must name the lowest layer first, got layers {layers}")
        self.slice_size = config.edits_per_turn
        self.contexts = None if config.contexts is None else Contexts.given(config.contexts)
        self.n_edits = 0
        self.n_same_subject = 0
        self._projections: dict[str, nn.Module] = {path: model.get_submodule(path) for path in paths}
        self._target = model.get_submodule(self._target_path)
        self._fast = FastPath(
            partial(UpperLayers, model, self._target_path),
            "target vectors were trained on the whole model",
            wanted=config.engine == "cached",
        )
        self._ready = False

    @property
    def device(self) -> torch.device:
        """Where the rewritten weights are."""
        return next(iter(self.pristine.weights.values())).device

    # --- The method ------------------------------------------------------------------------------------

    @property
    def _target_path(self) -> str:
        """Dotted path of the module whose output the target vector belongs to."""
        return self.config.projections[-1]

    @abstractmethod
    def _prepare(self) -> None:
        """Read what the method needs of the model as received; called once, before anything is written."""

    @abstractmethod
    def _grouped(self, texts: list[str]) -> list[list[str]]:
        """Contexts, in groups, that are made of texts that the model wrote."""

    @abstractmethod
    def _write(self, rows: Sequence[PromptRow], model: PerturbedModel, vectors: TargetVectors) -> None:
        """Write one turn of requests.

        Raises:
            Refused: it cannot be written; weights may be half changed and are put back by the caller.
        """

    # --- The contract ----------------------------------------------------------------------------------

    def edit(self, cases: Sequence[EditCase]) -> list[EditRecord]:
        """Write the cases in turns of `batch_size`, in order."""
        if not cases:
            return []
        self._get_ready()
        size = self.config.edits_per_turn
        return [record for start in range(0, len(cases), size) for record in self._turn(cases[start : start + size])]

    def _turn(self, cases: Sequence[EditCase]) -> list[EditRecord]:
        """Write one turn; what cannot be written is refused by name and the rest goes on."""
        started = time.perf_counter()
        problems: dict[int, str] = {}
        requests: dict[int, Request] = {}
        for i, case in enumerate(cases):
            try:
                requests[i] = request_of(self.encoder, case)
            except Refused as reason:
                problems[i] = str(reason)
        outcomes = self._write_requests(requests, problems)
        self.n_edits += len(cases)
        self.n_same_subject += len(requests) - len({request.subject for request in requests.values()})
        seconds = (time.perf_counter() - started) / len(cases)
        return [
            EditRecord(case.id, "failed", None, None, float("nan"), 0, seconds, problems[i])
            if i in problems
            else EditRecord(case.id, "inserted", None, None, *outcomes[i], seconds)
            for i, case in enumerate(cases)
        ]

    def _write_requests(
        self, requests: Mapping[int, Request], problems: dict[int, str]
    ) -> dict[int, tuple[float, int]]:
        """Write what can be written; loss and steps by position, and the reason of each refusal in `problems`."""
        while left := {i: request for i, request in requests.items() if i not in problems}:
            rows = self._rows(list(left.values()))
            model = self._perturbed_model(rows)
            vectors = train_target_vectors(model, self.config.hidden)
            bad = [i for k, i in enumerate(left) if not (vectors.finite(k) and model.finite_keys(k))]
            if bad:
                problems |= dict.fromkeys(bad, "its key, its loss or the trained target vector is not finite")
                continue
            before = {path: weight.detach().clone() for path, weight in self.pristine.weights.items()}
            try:
                self._write(rows, model, vectors)
            except Refused as reason:
                self._put_back(before)
                problems |= dict.fromkeys(left, str(reason))
                return {}
            except BaseException:
                self._put_back(before)
                raise
            return {i: (vectors.last_nll(k), len(vectors.losses[k]) - 1) for k, i in enumerate(left)}
        return {}

    @torch.no_grad()
    def _put_back(self, before: Mapping[str, Tensor]) -> None:
        for path, weight in self.pristine.weights.items():
            weight.copy_(before[path])

    @torch.no_grad()
    def _add(self, path: str, update: Tensor) -> None:
        """Add `(d, m)` to a weight in float32, rounded to the weight's dtype once.

        Raises:
            Refused: the result is not finite.
        """
        matrix = self.pristine.matrix(path)
        changed = (matrix.float() + update.float()).to(matrix.dtype)
        if not bounded(changed):
            raise Refused("the update is not finite")
        self.pristine.keep()
        matrix.copy_(changed)

    # --- Reading the model -----------------------------------------------------------------------------

    def _moments(self) -> dict[str, SecondMoment]:
        """Second moments of what enters the down-projections on general text, by path."""
        return second_moments(self.model, self.encoder, self.config.projections, self.config.statistics)

    def _rows(self, requests: Sequence[Request]) -> list[PromptRow]:
        if self.contexts is None:  # `_get_ready` makes them
            raise RuntimeError("no contexts")
        return rows_of(self.encoder, requests, self.contexts)

    def _perturbed_model(self, rows: Sequence[PromptRow]) -> PerturbedModel:
        upper = self._fast.layers(max(len(row.ids) for row in rows))
        if upper is None:
            return PerturbedWholeModel(self.model, self._target, self._projections, rows)
        return PerturbedUpperLayers(upper, self._projections, rows)

    def _get_ready(self) -> None:
        """Statistics and contexts come from the model as received, so this is done before anything is written."""
        if not self._ready:
            check_padding(self.model)
            self._prepare()
            if self.contexts is None:
                texts = generate_contexts(self.model, self.encoder, self.config.context_lengths, self.seed)
                self.contexts = Contexts.given(self._grouped(texts))
            self._ready = True

    # --- State -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """The rewritten weights, the contexts and what was counted."""
        contexts = {} if self.contexts is None else {"contexts": self.contexts.to_tensor()}
        counts = {"n_edits": torch.tensor(self.n_edits), "n_same_subject": torch.tensor(self.n_same_subject)}
        return {**counts, **contexts, **self.pristine.state_dict()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from saved weights; what is read of the model as received is read first."""
        for name in ("n_edits", "n_same_subject"):
            if name not in state:
                raise ValueError(f"the state lacks '{name}'; it is not one of this editor's")
        if "contexts" in state:
            self.contexts = Contexts.from_tensor(state["contexts"])
        self._get_ready()
        self.pristine.load_state_dict(state)
        self.n_edits, self.n_same_subject = int(state["n_edits"]), int(state["n_same_subject"])

    def detach(self) -> None:
        """Write the original weights back."""
        self.pristine.restore()

    def side_parameters(self) -> int:
        """Numbers in the copies of the original weights, and in what the method itself keeps."""
        return self.pristine.numel() + self._kept_numbers()

    def _kept_numbers(self) -> int:
        """Numbers that the method keeps beside the copies."""
        return 0

    def warnings(self) -> list[str]:
        """Whether the slow path was taken, the size of a turn, and facts about one subject in the same turn."""
        warnings = self._fast.warnings()
        if self.config.edits_per_turn > 1:
            size = self.config.edits_per_turn
            warnings.append(f"edits are written in turns of {size}; a turn ends at each checkpoint")
        if self.n_same_subject:
            warnings.append(
                f"edits whose subject an earlier edit of the same turn has: {self.n_same_subject}; where their keys are"
                " alike, their targets average out"
            )
        return warnings


def _layer_of(path: str, where: str) -> int:
    layer = decoder_layer_index(path)
    if layer is None:
        raise UserError(f"{where}={path} is in no numbered layer")
    return layer
