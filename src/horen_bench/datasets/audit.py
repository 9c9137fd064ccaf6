"""What a stream of cases is made of, and which of its locality probes its own edits touch.

A locality probe is *touched* if another edit of the stream ought to change its answer, or may:

- its prompt is the prompt or a paraphrase of another edit; or
- its prompt mentions the subject of another edit, as whole words; or
- its answer is the subject of another edit.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from horen_bench.cases import EditCase, Probe

_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Touched:
    """A locality probe that another edit touches.

    Attributes:
        case: position of the probe's case in the stream.
        probe: the probe.
        by: position of the first other edit that touches it.
    """

    case: int
    probe: Probe
    by: int


def touched_probes(cases: Sequence[EditCase]) -> list[Touched]:
    """The touched probes among `EditCase.locality`, in stream order.

    Every run of words of a probe is looked up among the subjects, so the time grows with the number of probes and
    not with its product with the number of edits.
    """
    index = _EditIndex(cases)
    return [
        Touched(i, probe, by)
        for i, case in enumerate(cases)
        for probe in case.locality
        if (by := index.other_edit_touching(probe, i)) is not None
    ]


class _EditIndex:
    """Finds the first edits of given prompts and subjects.

    Two of each are kept, in stream order: one of them is another edit than the one that asks.
    """

    def __init__(self, cases: Sequence[EditCase]) -> None:
        self._prompts: dict[str, list[int]] = {}
        self._subjects: dict[tuple[str, ...], list[int]] = {}
        for i, case in enumerate(cases):
            for prompt in {case.prompt, *(probe.prompt for probe in case.paraphrases)}:
                _keep_two(self._prompts.setdefault(prompt, []), i)
            if case.subject and (words := _words(case.subject)):
                _keep_two(self._subjects.setdefault(words, []), i)
        self._lengths = sorted({len(words) for words in self._subjects})

    def other_edit_touching(self, probe: Probe, case: int) -> int | None:
        candidates = [
            *self._prompts.get(probe.prompt, ()),
            *(edit for words in self._runs(probe.prompt) for edit in self._subjects.get(words, ())),
            *self._subjects.get(_words(probe.answer), ()),
        ]
        return min((edit for edit in candidates if edit != case), default=None)

    def _runs(self, text: str) -> Iterator[tuple[str, ...]]:
        words = _words(text)
        for length in self._lengths:
            for start in range(len(words) - length + 1):
                yield words[start : start + length]


def _keep_two(edits: list[int], edit: int) -> None:
    if len(edits) < 2:
        edits.append(edit)


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.casefold()))


@dataclass(frozen=True, slots=True)
class Composition:
    """Counts over a stream.

    Attributes:
        n: cases.
        coverage: cases that have at least one probe, by family (`paraphrases`, `subject` and the probes' names).
        probes: number of probes, by family.
        conflicts: cases whose prompt another case gives another target.
        duplicates: cases whose prompt and target an earlier case has too.
        same_paraphrase: cases with a paraphrase equal to the prompt.
        subject_outside: cases whose subject is not in the prompt.
        touched: locality probes that another edit touches.
    """

    n: int
    coverage: Mapping[str, int]
    probes: Mapping[str, int]
    conflicts: int
    duplicates: int
    same_paraphrase: int
    subject_outside: int
    touched: int


def composition(cases: Sequence[EditCase]) -> Composition:
    """Count what a stream is made of."""
    families = [_families(case) for case in cases]
    names = list(dict.fromkeys(name for one in families for name in one))
    targets: dict[str, set[str]] = {}
    for case in cases:
        targets.setdefault(case.prompt, set()).add(case.target)
    pairs = Counter((case.prompt, case.target) for case in cases)
    return Composition(
        n=len(cases),
        coverage={name: sum(bool(one.get(name)) for one in families) for name in names},
        probes={name: sum(one.get(name, 0) for one in families) for name in names},
        conflicts=sum(len(targets[case.prompt]) > 1 for case in cases),
        duplicates=sum(count - 1 for count in pairs.values()),
        same_paraphrase=sum(any(probe.prompt == case.prompt for probe in case.paraphrases) for case in cases),
        subject_outside=sum(bool(case.subject) and str(case.subject) not in case.prompt for case in cases),
        touched=len(touched_probes(cases)),
    )


def _families(case: EditCase) -> dict[str, int]:
    named = {"paraphrases": case.paraphrases, "locality": case.locality, **case.hard_locality, **case.extras}
    return {
        "subject": int(case.subject is not None),
        **{name: len(probes) for name, probes in named.items()},
    }
