"""What is evaluated: the probes of a stream's cases."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from horen_bench.cases import EditCase, Probe

Reference = Literal["answer", "base"]

_SAMPLING = 1  # keeps the draw of cases apart from other uses of the seed


@dataclass(frozen=True, slots=True)
class CaseProbe:
    """One probe of one case.

    Attributes:
        case: position of the case in the stream.
        family: the column that it counts in: `rel`, `gen`, `loc`, or the name of a probe family.
        reference: scored against the given answer, or against what the base model predicts.
        prompt: what the model goes on from.
        answer: the answer, without a leading space.
    """

    case: int
    family: str
    reference: Reference
    prompt: str
    answer: str

    @property
    def key(self) -> str:
        """Identifies what is predicted, independent of case and family."""
        return hashlib.sha256(f"{self.prompt}\0{self.answer}".encode()).hexdigest()


def probes_of(cases: Sequence[EditCase], positions: Iterable[int] | None = None) -> list[CaseProbe]:
    """Every probe of the cases, in case order, but for those of an empty prompt or answer.

    Args:
        cases: the stream.
        positions: of these cases only, ascending; None: of all.
    """
    places = range(len(cases)) if positions is None else positions
    every = (probe for i in places for probe in _probes_of(i, cases[i]))
    return [probe for probe in every if probe.prompt.strip() and probe.answer.strip()]


def sample(n: int, at_most: int | None, seed: int) -> list[int]:
    """Positions of the cases that are evaluated at checkpoint `n`: all, or a random sample of a fixed size.

    Each case gets its rank once, so the samples of a run's checkpoints overlap as much as they can, and do not depend
    on how far the stream goes.
    """
    if at_most is None or n <= at_most:
        return list(range(n))
    ranks = np.random.default_rng([seed, _SAMPLING]).random(n)
    return sorted(np.argpartition(ranks, at_most)[:at_most].tolist())


def _probes_of(position: int, case: EditCase) -> Iterable[CaseProbe]:
    yield CaseProbe(position, "rel", "answer", case.prompt, case.target)
    yield from _of_families(position, {"gen": case.paraphrases}, "answer")
    yield from _of_families(position, {"loc": case.locality, **case.hard_locality}, "base")
    yield from _of_families(position, case.extras, "answer")


def _of_families(position: int, families: Mapping[str, tuple[Probe, ...]], reference: Reference) -> Iterable[CaseProbe]:
    for family, probes in families.items():
        for probe in probes:
            yield CaseProbe(position, family, reference, probe.prompt, probe.answer)
