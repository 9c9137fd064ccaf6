"""What is asked about the cases of a stream."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from horen_bench.cases import EditCase, Probe

_SAMPLING = 1  # keeps the draw of cases apart from other uses of the seed


@dataclass(frozen=True, slots=True)
class Question:
    """One question about one case.

    Attributes:
        case: position of the case in the stream.
        family: the column that it counts in: `rel`, `gen`, `loc`, or the name of a probe family.
        reference: scored against the given answer, or against what the base model answers.
        prompt: the question.
        answer: the answer, without a leading space.
    """

    case: int
    family: str
    reference: Literal["answer", "base"]
    prompt: str
    answer: str

    @property
    def key(self) -> str:
        """Identifies what is asked, independent of case and family."""
        return hashlib.sha256(f"{self.prompt}\0{self.answer}".encode()).hexdigest()


def questions_about(cases: Sequence[EditCase], positions: Iterable[int] | None = None) -> list[Question]:
    """Every question that the cases ask, in case order, without probes of empty prompt or answer.

    Args:
        cases: the stream.
        positions: ask about these cases only, ascending; None: about all.
    """
    chosen = range(len(cases)) if positions is None else positions
    return [question for i in chosen for question in _questions_of(i, cases[i]) if _askable(question)]


def sample(n: int, at_most: int | None, seed: int) -> list[int]:
    """Positions of the cases that are questioned at checkpoint `n`: all, or a random sample of a fixed size.

    Each case gets its rank once, so the samples of a run's checkpoints overlap as much as they can, and do not depend
    on how far the stream goes.
    """
    if at_most is None or n <= at_most:
        return list(range(n))
    ranks = np.random.default_rng([seed, _SAMPLING]).random(n)
    return sorted(np.argpartition(ranks, at_most)[:at_most].tolist())


def _askable(question: Question) -> bool:
    return bool(question.prompt.strip() and question.answer.strip())


def _questions_of(index: int, case: EditCase) -> Iterable[Question]:
    yield Question(index, "rel", "answer", case.prompt, case.target)
    for paraphrase in case.paraphrases:
        yield Question(index, "gen", "answer", paraphrase, case.target)
    yield from _probes(index, {"loc": case.locality, **case.hard_locality}, "base")
    yield from _probes(index, case.extras, "answer")


def _probes(
    index: int, families: Mapping[str, tuple[Probe, ...]], reference: Literal["answer", "base"]
) -> Iterable[Question]:
    for family, probes in families.items():
        for probe in probes:
            yield Question(index, family, reference, probe.prompt, probe.answer)
