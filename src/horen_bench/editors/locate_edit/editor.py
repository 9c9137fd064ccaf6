"""What every method that rewrites a down-projection does around its closed form: turns, refusals, state."""

import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.cases import EditCase
from horen_bench.editors.base import Editor, EditRecord, check_choice
from horen_bench.editors.locate_edit.contexts import Contexts
from horen_bench.editors.locate_edit.requests import Refused, Request, Row, all_finite, request_of, rows_of
from horen_bench.editors.locate_edit.target_vector import (
    Hidden,
    Objective,
    Reading,
    UpperModel,
    WholeModel,
    last_loss,
    optimise,
)
from horen_bench.errors import UserError
from horen_bench.models.architecture import decoder_layer_index
from horen_bench.models.partial import NotSupportedError, UpperLayers
from horen_bench.models.surgery import PristineWeights

Engine = Literal["cached", "sequential"]


class RewritingEditor(Editor):
    """A method that writes facts into down-projections, `W <- W + dW`, `W` `(d, m)`.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        seed: of the contexts.
        modules: dotted paths of the down-projections, lowest layer first.
        where: the configuration key that holds them, for messages.
        target_module: dotted path of the module whose output the hidden vector belongs to.
        hidden: constants of `Objective`.
        contexts: groups of texts before the prompt, or None to have the model write them at the first edit.
        batch_size: facts that are written in one turn.
        engine: `cached` runs the layers above the target module on cached states and solves small systems;
            `sequential` runs the whole model and solves the systems as they are published.

    Raises:
        UserError: a module is missing, or a constant is out of its range.
    """

    needs_subject: ClassVar[bool] = True

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        modules: Sequence[str],
        where: str,
        target_module: str,
        hidden: Mapping[str, Any],
        contexts: Sequence[Sequence[str]] | None,
        batch_size: int,
        engine: Engine,
    ) -> None:
        check_choice("method.engine", engine, ("cached", "sequential"))
        if not (isinstance(batch_size, int) and batch_size > 0):
            raise UserError(f"method.batch_size must be a whole number of at least 1, got {batch_size!r}")
        self.model = model
        self.tokenizer = tokenizer
        self.seed = seed
        self.pristine = PristineWeights(model, modules, where=where)
        layers = [_layer_of(path, where) for path in modules]
        if layers != sorted(layers):
            raise UserError(f"{where} must name the lowest layer first, got layers {layers}")
        self.engine = engine
        self.objective = Objective(**hidden)
        self.contexts = None if contexts is None else Contexts.given(contexts)
        self.slice_size = self._batch_size = batch_size
        self.n_edits = 0
        self.n_same_subject = 0
        self._projections: dict[str, nn.Module] = {path: model.get_submodule(path) for path in modules}
        self._target = model.get_submodule(target_module)
        self._target_layer = layers[-1]
        self._upper: UpperLayers | None = None
        self._no_upper: str | None = None
        self._ready = False

    @property
    def device(self) -> torch.device:
        """Where the rewritten weights are."""
        return next(iter(self.pristine.weights.values())).device

    # --- The method ------------------------------------------------------------------------------------

    @abstractmethod
    def _prepare(self) -> None:
        """Read what the method needs of the model as received; called once, before anything is written."""

    @abstractmethod
    def _new_contexts(self) -> Contexts:
        """Have the model, as received, write the contexts."""

    @abstractmethod
    def _write(self, rows: Sequence[Row], reading: Reading, hidden: Hidden) -> None:
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
        turns = range(0, len(cases), self._batch_size)
        return [record for start in turns for record in self._turn(cases[start : start + self._batch_size])]

    def _turn(self, cases: Sequence[EditCase]) -> list[EditRecord]:
        """Write one turn; what cannot be written is refused by name and the rest goes on."""
        started = time.perf_counter()
        problems: dict[int, str] = {}
        requests: dict[int, Request] = {}
        for i, case in enumerate(cases):
            try:
                requests[i] = request_of(self.tokenizer, case)
            except Refused as reason:
                problems[i] = str(reason)
        found = self._write_requests(requests, problems)
        self.n_edits += len(cases)
        self.n_same_subject += len(requests) - len({request.subject for request in requests.values()})
        seconds = (time.perf_counter() - started) / len(cases)
        return [
            EditRecord(case.id, "failed", None, None, float("nan"), 0, seconds, problems[i])
            if i in problems
            else EditRecord(case.id, "inserted", None, None, found[i][0], found[i][1], seconds)
            for i, case in enumerate(cases)
        ]

    def _write_requests(
        self, requests: Mapping[int, Request], problems: dict[int, str]
    ) -> dict[int, tuple[float, int]]:
        """Write what can be written; loss and steps by position, and the reason of each refusal in `problems`."""
        while chosen := {i: request for i, request in requests.items() if i not in problems}:
            rows = self._rows(list(chosen.values()))
            reading = self._reading(rows)
            hidden = optimise(reading, self.objective)
            bad = [i for i, vector in zip(chosen, hidden.target, strict=True) if not all_finite(vector)]
            if bad:
                problems |= dict.fromkeys(bad, "the optimised hidden vector is not finite")
                continue
            before = {path: weight.detach().clone() for path, weight in self.pristine.weights.items()}
            try:
                self._write(rows, reading, hidden)
            except Refused as reason:
                self._put_back(before)
                problems |= dict.fromkeys(chosen, str(reason))
                return {}
            except BaseException:
                self._put_back(before)
                raise
            return {i: (last_loss(hidden, k), len(hidden.losses[k]) - 1) for k, i in enumerate(chosen)}
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
        weight = self.pristine.weights[path]
        changed = (weight.float() + update.float()).to(weight.dtype)
        if not all_finite(changed):
            raise Refused("the update is not finite")
        self.pristine.keep()
        weight.copy_(changed)

    # --- Reading the model -----------------------------------------------------------------------------

    def _rows(self, requests: Sequence[Request]) -> list[Row]:
        if self.contexts is None:  # `_get_ready` makes them
            raise RuntimeError("no contexts")
        return rows_of(self.tokenizer, requests, self.contexts)

    def _reading(self, rows: Sequence[Row]) -> Reading:
        upper = self._upper_layers() if self.engine == "cached" else None
        if upper is None:
            return WholeModel(self.model, self._target, self._projections, rows)
        return UpperModel(upper, self._projections, rows)

    def _upper_layers(self) -> UpperLayers | None:
        """The layers above the target module, or None where the model does not fit; then `warnings` says so."""
        if self._upper is None and self._no_upper is None:
            try:
                self._upper = UpperLayers(self.model, self._target, self._target_layer)
            except NotSupportedError as reason:
                self._no_upper = f"hidden vectors were trained on the whole model: {reason}"
        return self._upper

    def _get_ready(self) -> None:
        """Statistics and contexts come from the model as received, so this is done before anything is written."""
        if not self._ready:
            self._prepare()
            if self.contexts is None:
                self.contexts = self._new_contexts()
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
        found = [self._no_upper] if self._no_upper else []
        if self._batch_size > 1:
            found.append(f"edits are written in turns of {self._batch_size}; a turn ends at each checkpoint")
        if self.n_same_subject:
            found.append(
                f"edits whose subject an earlier edit of the same turn has: {self.n_same_subject}; where their keys are"
                " alike, their targets average out"
            )
        return found


def _layer_of(path: str, where: str) -> int:
    layer = decoder_layer_index(path)
    if layer is None:
        raise UserError(f"{where}={path} is in no numbered layer")
    return layer
