"""Scores of long answers as words, under their true names (paper Table 7 calls `bleu1_bp` "BLEU").

`bleu1_bp`, `rouge1`, `rouge2` and `rougeL` are what the HoReN release computes (`src/evaluate/evaluate_uns.py`
@38bbf34, which takes ROUGE from the PyPI package `rouge` 1.0.1): case and punctuation count, n-grams are counted once,
and recall alone is reported, which a longer answer can only raise; hence precision and `length` beside it.
`Standard` holds what the same names usually stand for. Every score is in [0, 1], `sacrebleu` in [0, 100]; higher is
better.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple


class Overlap(NamedTuple):
    """Shares of the reference that a text has (recall) and of the text that the reference has (precision)."""

    recall: float
    precision: float


def bleu1_bp(prediction: str, reference: str) -> float:
    """Clipped unigram precision over words split at white space, times BLEU's brevity penalty; 0 if one is empty."""
    predicted, expected = prediction.split(), reference.split()
    if not predicted or not expected:
        return 0.0
    precision = sum((Counter(predicted) & Counter(expected)).values()) / len(predicted)
    return precision * min(1.0, math.exp(1 - len(expected) / len(predicted)))


def rouge1(prediction: str, reference: str) -> Overlap:
    """Overlap of the sets of words."""
    return _rouge_n(prediction, reference, 1)


def rouge2(prediction: str, reference: str) -> Overlap:
    """Overlap of the sets of word pairs; a pair may cross the end of a sentence."""
    return _rouge_n(prediction, reference, 2)


def rougeL(prediction: str, reference: str) -> Overlap:  # noqa: N802 - the score's name
    """Words in a longest common subsequence of some sentence of each, as shares of all different words."""
    predicted, expected = _sentences(_as_published(prediction)), _sentences(reference)
    common = {word for first in expected for second in predicted for word in _common_subsequence(first, second)}
    return _overlap(len(common), len(set(_joined(expected))), len(set(_joined(predicted))))


def n_words(text: str) -> float:
    """Length of a text in words split at white space."""
    return float(len(text.split()))


class Standard:
    """The scores of the packages `sacrebleu` and `rouge-score`, which are built once."""

    def __init__(self) -> None:
        from rouge_score.rouge_scorer import RougeScorer  # noqa: PLC0415 - seconds that only long answers need
        from sacrebleu.metrics.bleu import BLEU  # noqa: PLC0415

        self._bleu = BLEU(effective_order=True)
        self._rouge = RougeScorer(["rouge1", "rouge2", "rougeL"])

    def __call__(self, prediction: str, reference: str) -> dict[str, float]:
        """Sentence BLEU-4 (13a tokens, smoothed, in [0, 100]); F1 and recall of ROUGE-1, -2 and -L."""
        scores = {"sacrebleu": float(self._bleu.sentence_score(prediction, [reference]).score)}
        for name, score in self._rouge.score(reference, prediction).items():
            scores[f"rouge_score_{name}_f1"] = float(score.fmeasure)
            scores[f"rouge_score_{name}_recall"] = float(score.recall)
        return scores


def word_scores(prediction: str, reference: str, standard: Standard) -> dict[str, float]:
    """Every score here, by name."""
    rouge = {"rouge1": rouge1, "rouge2": rouge2, "rougeL": rougeL}
    overlaps = {name: score(prediction, reference) for name, score in rouge.items()}
    return {
        "bleu1_bp": bleu1_bp(prediction, reference),
        **{f"{name}_recall": overlap.recall for name, overlap in overlaps.items()},
        **{f"{name}_precision": overlap.precision for name, overlap in overlaps.items()},
        **standard(prediction, reference),
        "length": n_words(prediction),
    }


def _as_published(prediction: str) -> str:
    """The release appends a space to what has none, so that no text is empty."""
    return prediction if " " in prediction else f"{prediction} "


def _sentences(text: str) -> list[list[str]]:
    """Words of each piece between periods; a piece of white space alone is one empty word."""
    return [" ".join(piece.split()).split(" ") for piece in text.split(".") if piece]


def _joined(sentences: Sequence[Sequence[str]]) -> list[str]:
    return [word for sentence in sentences for word in sentence]


def _rouge_n(prediction: str, reference: str, n: int) -> Overlap:
    predicted, expected = (_ngrams(_joined(_sentences(text)), n) for text in (_as_published(prediction), reference))
    return _overlap(len(predicted & expected), len(expected), len(predicted))


def _ngrams(words: Sequence[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def _overlap(common: int, expected: int, predicted: int) -> Overlap:
    return Overlap(common / expected if expected else 0.0, common / predicted if predicted else 0.0)


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> set[str]:
    """Words of one longest common subsequence; of several, the one that `rouge` finds."""
    lengths = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, word in enumerate(first):
        above, row = lengths[i], lengths[i + 1]
        for j, other in enumerate(second):
            row[j + 1] = above[j] + 1 if word == other else max(above[j + 1], row[j])
    common: set[str] = set()
    i, j = len(first), len(second)
    while i and j:
        if first[i - 1] == second[j - 1]:
            i, j = i - 1, j - 1
            common.add(first[i])
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return common
