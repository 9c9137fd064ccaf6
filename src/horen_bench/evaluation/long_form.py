"""Long answers, written to their end and compared as texts (`protocol=text`, paper Table 7).

The model goes on greedily up to a token that ends its text (`stop_ids`), `max_new_tokens` or the end of its context;
special tokens are left out of the text. The reference is the answer given, or, for locality, what the unedited model
wrote.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from horen_bench.evaluation.decoding import greedy_decode, stop_ids
from horen_bench.evaluation.evaluator import Evaluator, Prediction
from horen_bench.evaluation.probes import CaseProbe
from horen_bench.metrics.similarity import Similarity
from horen_bench.metrics.text_scores import Standard, word_scores
from horen_bench.models.architecture import context_length

Pair = tuple[str, str]


class TextScorer:
    """All scores of a text against a reference; a pair is scored once, however often it comes back.

    Args:
        similarities: the scores that need a model.
    """

    def __init__(self, similarities: Sequence[Similarity]) -> None:
        self._similarities = similarities
        self._standard: Standard | None = None
        self._known: dict[Pair, dict[str, float]] = {}

    def __call__(self, pairs: Sequence[Pair]) -> list[dict[str, float]]:
        """Scores by name of each pair of prediction and reference."""
        self._standard = self._standard or Standard()
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self._known]
        for pair in new:
            self._known[pair] = word_scores(*pair, self._standard)
        for similarity in self._similarities:
            scores = similarity([text for text, _ in new], [reference for _, reference in new]) if new else []
            for pair, score in zip(new, scores, strict=True):
                self._known[pair][similarity.name] = score
        return [self._known[pair] for pair in pairs]

    def warnings(self) -> list[str]:
        """Why a score is missing."""
        return [similarity.problem for similarity in self._similarities if similarity.problem]


@dataclass(frozen=True, slots=True, kw_only=True)
class LongFormEvaluator(Evaluator):
    """Lets the model write, and scores what it wrote.

    Attributes:
        scorer: gives the scores.
        max_new_tokens: longest answer.
    """

    scorer: TextScorer
    max_new_tokens: int
    _texts: dict[tuple[int, ...], str] = field(default_factory=dict, init=False, repr=False)

    @property
    def cache_name(self) -> str:
        """The protocol, with the longest answer."""
        return f"text-{self.max_new_tokens}"

    def predict_batch(self, probes: Sequence[CaseProbe]) -> list[Prediction]:
        """What the model writes up to its end; where a prompt leaves no room in the context, nothing."""
        prompts = self.encoder.prompts([probe.prompt for probe in probes])
        room = [self._room(len(prompt)) for prompt in prompts]
        fitting = [i for i, n_tokens in enumerate(room) if n_tokens > 0]
        stop = stop_ids(self.model, self.encoder)
        predictions = [Prediction((), ())] * len(prompts)
        if fitting:
            lengths = [room[i] for i in fitting]
            rows = greedy_decode(self.model, [prompts[i] for i in fitting], lengths, self.encoder.pad_id, stop)
            for i, row in zip(fitting, rows, strict=True):
                predictions[i] = Prediction(tuple(row[:-1] if row[-1] in stop else row), ())
        return predictions

    def scores(
        self, probes: Sequence[CaseProbe], predictions: Sequence[Prediction], base: Sequence[Prediction]
    ) -> list[dict[str, float]]:
        """What the scorer gives, in one batch."""
        pairs = [
            (self.text(prediction), self.text(before) if probe.reference == "base" else probe.answer)
            for probe, prediction, before in zip(probes, predictions, base, strict=True)
        ]
        return self.scorer(pairs)

    def text(self, prediction: Prediction) -> str:
        """What was written, without special tokens and the white space around it."""
        if prediction.ids not in self._texts:
            text = str(self.encoder.tokenizer.decode(list(prediction.ids), skip_special_tokens=True)).strip()
            self._texts[prediction.ids] = text
        return self._texts[prediction.ids]

    def warnings(self) -> list[str]:
        """Why a score is missing, and that batches were smaller than set."""
        return [*Evaluator.warnings(self), *self.scorer.warnings()]

    def _room(self, n_prompt: int) -> int:
        """New tokens that a prompt of so many leaves room for."""
        context = context_length(self.model)
        return self.max_new_tokens if context is None else min(self.max_new_tokens, context - n_prompt)
