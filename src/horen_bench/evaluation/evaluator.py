"""What all protocols share: probes in, predictions and scores out."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from horen_bench.evaluation.decoding import decoding_drawbacks
from horen_bench.evaluation.probes import CaseProbe
from horen_bench.models.memory import is_out_of_memory
from horen_bench.prompts import PromptEncoder

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model predicts: the ids that locality compares, and those that are scored against an answer."""

    ids: tuple[int, ...]
    scored_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluator(ABC):
    """Evaluates one model under one protocol, in batches sorted by length.

    Attributes:
        model: the model, edited or not.
        encoder: turns prompts into its token ids.
        batch_size: prompts per forward pass.
    """

    model: PreTrainedModel
    encoder: PromptEncoder
    batch_size: int = 64
    _fitting: list[int] = field(default_factory=list, init=False, repr=False)  # batch sizes after memory ran out

    @property
    @abstractmethod
    def cache_name(self) -> str:
        """Names the base model's predictions, which depend on nothing else here."""

    @torch.no_grad()
    def predict(self, probes: Sequence[CaseProbe], advance: Advance = lambda _: None) -> list[Prediction]:
        """The model's predictions, in the order of the probes.

        Where memory does not do for a batch, on the host or a device, it is halved, and stays so.

        Args:
            probes: what to predict.
            advance: called with the number of probes that are done since the last call.
        """
        order = sorted(range(len(probes)), key=lambda i: len(probes[i].prompt))
        predictions: dict[int, Prediction] = {}
        while len(predictions) < len(order):
            batch = order[len(predictions) : len(predictions) + self._size()]
            try:
                fresh = self.predict_batch([probes[i] for i in batch])
            except (RuntimeError, MemoryError) as error:
                if len(batch) == 1 or not is_out_of_memory(error):
                    raise
                self._fitting.append(len(batch) // 2)
            else:
                predictions.update(zip(batch, fresh, strict=True))
                advance(len(batch))
                continue
            torch.cuda.empty_cache()  # behind the handler, whose traceback would keep what the batch held
        return [predictions[i] for i in range(len(probes))]

    def _size(self) -> int:
        """Prompts per forward pass, as far as is known."""
        return self._fitting[-1] if self._fitting else self.batch_size

    @abstractmethod
    def predict_batch(self, probes: Sequence[CaseProbe]) -> list[Prediction]:
        """The model's predictions for probes that fit one batch."""

    @abstractmethod
    def scores(
        self, probes: Sequence[CaseProbe], predictions: Sequence[Prediction], base: Sequence[Prediction]
    ) -> list[dict[str, float]]:
        """Scores of each prediction by name, the same names for every probe; "" is the score of a protocol's own.

        Args:
            probes: what was predicted.
            predictions: of the evaluated model.
            base: of the unedited model, the reference of some probes.
        """

    @abstractmethod
    def text(self, prediction: Prediction) -> str:
        """A prediction as text."""

    def warnings(self) -> list[str]:
        """Sentences that whoever reads the scores must know: that batches were smaller than set, or decoding slow."""
        drawbacks = decoding_drawbacks(self.model)
        if not self._fitting:
            return drawbacks
        return [
            f"memory ran out: probes were evaluated {self._size()} at a time instead of batch_size={self.batch_size}",
            *drawbacks,
        ]
