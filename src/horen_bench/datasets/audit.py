"""What a stream of cases is made of, which locality probes its own edits touch, and which paraphrases contradict.

A locality probe is *touched* if another edit of the stream ought to change its answer, or may:

- its prompt is the prompt or a paraphrase of another edit; or
- its prompt mentions the subject of another edit, as whole words in upper or lower case.

A subject of ordinary words only ("In", "It", "The Office") is mentioned only where it is written as the edit writes it,
with a capital, and no sentence begins there. A word is ordinary if it is in `_FUNCTION_WORDS`, or if the prompts and
paraphrases of two cases of the stream have it in lower case, outside the subject. So a stream that goes on can make a
word ordinary, and a probe untouched. That a probe's *answer* is another edit's subject does not count: an edit about
that subject does not change who or what is right for the probe.

How many locality probes of real files each rule calls touched (the first probe of each of 3,000 records of WikiBigEdit,
2,000 of ZsRE and 3,000 of CounterFact from ICT-STAR/LocFT, 1,304 of KnowEdit from YJiangcm/LTE, 1,000 of QAEdit from
WanliYoung/Revisit-Editing-Evaluation):

| rule | WikiBigEdit | ZsRE | CounterFact | KnowEdit ZsRE | QAEdit |
| --- | --- | --- | --- | --- | --- |
| any mention, or the answer is a subject | 1541 | 7 | 591 | 375 | 166 |
| any mention | 1536 | 5 | 222 | 374 | 166 |
| any mention by five letters or more | 23 | 5 | 211 | 365 | 87 |
| subjects that ten probes or fewer mention | 23 | 5 | 222 | 361 | 98 |
| function words must be written as titles | 25 | 3 | 222 | 374 | 151 |
| all ordinary words must (this rule) | 25 | 3 | 222 | 374 | 77 |

Three records of WikiBigEdit have the subjects "In" (in 1,466 probes) and "From" (71); of QAEdit "time", "song" and "I".
The 25 left there are mentions but for a few ("Tower" in "Tower Street", "brown" in "John Brown"). Rules on length or
frequency lose true mentions: "Rome" and "Guam", and subjects of KnowEdit that several edits are about.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from horen_bench.cases import EditCase, Probe

_WORD = re.compile(r"\w+")
_SENTENCE_END = re.compile(r"[.?!:]")
_N_CASES_OF_ORDINARY = 2  # one alone may be a name that somebody did not capitalise
_FUNCTION_WORDS = frozenset(
    _WORD.findall("""
    a about after all an and any are as at be been before between but by can could did do does during each for
    from had has have he her here him his how i if in into is it its me might must my no not of off on one or our
    out over she should so some than that the their them then there these they this those to under up us was we
    were what when where which who whom whose why will with would you your
    """)
)

Words = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Touched:
    """A locality probe that another edit touches.

    Attributes:
        case: position of the probe's case in the stream.
        probe: the probe.
        by: position of the first other edit that touches it.
        subject: the subject of that edit, which the probe mentions; None where the probe is the edit's own prompt or
            paraphrase.
    """

    case: int
    probe: Probe
    by: int
    subject: str | None = None


def touched_probes(cases: Sequence[EditCase]) -> list[Touched]:
    """The touched probes among `EditCase.locality`, in stream order.

    Every run of words of a probe is looked up among the subjects, so the time grows with the number of probes and
    not with its product with the number of edits.
    """
    index = _EditIndex(cases)
    return [
        Touched(i, probe, *touch)
        for i, case in enumerate(cases)
        for probe in case.locality
        if (touch := index.first_touch(probe, i)) is not None
    ]


def most_mentioned(touched: Iterable[Touched]) -> list[tuple[str, int]]:
    """Subjects that touched probes mention, with the number of probes, the most frequent first."""
    return Counter(each.subject for each in touched if each.subject is not None).most_common()


def dominating_mention(touched: Sequence[Touched]) -> str:
    """The words about a subject that a fifth of the touched probes or more mention, in brackets; else nothing."""
    subject, n = next(iter(most_mentioned(touched)), ("", 0))
    return f" ({n} of them because they mention {subject!r})" if n > 1 and 5 * n >= len(touched) else ""


class _EditIndex:
    """Finds the first edits of given prompts and subjects.

    Two of each are kept, in stream order: one of them is another edit than that of the probe.
    """

    def __init__(self, cases: Sequence[EditCase]) -> None:
        self._cases = cases
        self._prompts: dict[str, list[int]] = {}
        self._subjects: dict[Words, list[int]] = {}  # by words in lower case
        self._titles: dict[Words, list[int]] = {}  # subjects of ordinary words, as they are written
        ordinary = _ordinary_words(cases)
        for i, case in enumerate(cases):
            for prompt in {case.prompt, *(probe.prompt for probe in case.paraphrases)}:
                _keep_two(self._prompts.setdefault(prompt, []), i)
            if not (case.subject and (words := _words(case.subject))):
                continue
            folded = _folded(words)
            if not ordinary.issuperset(folded):
                _keep_two(self._subjects.setdefault(folded, []), i)
            elif words != folded:
                _keep_two(self._titles.setdefault(words, []), i)
        self._lengths = sorted({len(words) for words in (*self._subjects, *self._titles)})

    def first_touch(self, probe: Probe, case: int) -> tuple[int, str | None] | None:
        """Position of the first other edit that touches a probe of a case, and its subject if it is a mention."""
        same = min((edit for edit in self._prompts.get(probe.prompt, ()) if edit != case), default=None)
        mentioned = min((edit for edit in self._mentioned(probe.prompt) if edit != case), default=None)
        if mentioned is None or (same is not None and same <= mentioned):
            return None if same is None else (same, None)
        return mentioned, self._cases[mentioned].subject

    def _mentioned(self, text: str) -> Iterator[int]:
        words = _words(text)
        folded = _folded(words)
        starts = _sentence_starts(text) if self._titles else frozenset()
        for length in self._lengths:
            for start in range(len(words) - length + 1):
                yield from self._subjects.get(folded[start : start + length], ())
                if self._titles and start not in starts:
                    yield from self._titles.get(words[start : start + length], ())


def _ordinary_words(cases: Sequence[EditCase]) -> frozenset[str]:
    counts: Counter[str] = Counter()
    for case in cases:
        words = {word for text in (case.prompt, *(probe.prompt for probe in case.paraphrases)) for word in _words(text)}
        subject = _folded(_words(case.subject or ""))
        counts.update(word for word in words.difference(subject) if word.islower())
    return _FUNCTION_WORDS.union(word for word, n in counts.items() if n >= _N_CASES_OF_ORDINARY)


def _sentence_starts(text: str) -> frozenset[int]:
    """Numbers of the words of a text that a sentence begins with."""
    matches = list(_WORD.finditer(text))
    ends = [0, *(match.end() for match in matches)]
    return frozenset(
        i for i, match in enumerate(matches) if i == 0 or _SENTENCE_END.search(text, ends[i], match.start())
    )


def _keep_two(edits: list[int], edit: int) -> None:
    if len(edits) < 2:
        edits.append(edit)


def _words(text: str) -> Words:
    return tuple(_WORD.findall(text))


def _folded(words: Words) -> Words:
    return tuple(word.casefold() for word in words)


# --- Paraphrases -------------------------------------------------------------------------------------------


def contradicting_paraphrases(cases: Sequence[EditCase]) -> dict[str, int]:
    """Number of paraphrases by text, for texts that are given different targets as a paraphrase or as a prompt.

    No model can be right on all of them: they lower the Gen that can be reached.
    """
    targets: dict[str, set[str]] = {}
    for case in cases:
        for text, target in _statements(case):
            targets.setdefault(text, set()).add(target)
    paraphrases = (probe.prompt for case in cases for probe in case.paraphrases)
    return dict(Counter(text for text in paraphrases if len(targets[text]) > 1).most_common())


def paraphrase_warnings(cases: Sequence[EditCase]) -> list[str]:
    """A sentence if paraphrases of a stream contradict each other or its prompts."""
    counts = contradicting_paraphrases(cases)
    if not counts:
        return []
    text, n = next(iter(counts.items()))
    return [
        f"N={len(cases)}: {sum(counts.values())} paraphrases are given different targets, most often {text!r} ({n}); "
        "they cannot all be right and lower Gen"
    ]


def _statements(case: EditCase) -> Iterator[tuple[str, str]]:
    yield case.prompt, case.target
    for probe in case.paraphrases:
        yield probe.prompt, probe.answer


# --- Counts ------------------------------------------------------------------------------------------------


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
        contradicting: paraphrases that are given different targets.
        subject_outside: cases whose subject is not in the prompt.
        touched: locality probes that another edit touches.
    """

    n: int
    coverage: Mapping[str, int]
    probes: Mapping[str, int]
    conflicts: int
    duplicates: int
    same_paraphrase: int
    contradicting: int
    subject_outside: int
    touched: int


def composition(cases: Sequence[EditCase]) -> Composition:
    """Count what a stream is made of."""
    families = [_families(case) for case in cases]
    names = list(dict.fromkeys(name for family in families for name in family))
    targets: dict[str, set[str]] = {}
    for case in cases:
        targets.setdefault(case.prompt, set()).add(case.target)
    pairs = Counter((case.prompt, case.target) for case in cases)
    return Composition(
        n=len(cases),
        coverage={name: sum(bool(family.get(name)) for family in families) for name in names},
        probes={name: sum(family.get(name, 0) for family in families) for name in names},
        conflicts=sum(len(targets[case.prompt]) > 1 for case in cases),
        duplicates=sum(count - 1 for count in pairs.values()),
        same_paraphrase=sum(any(probe.prompt == case.prompt for probe in case.paraphrases) for case in cases),
        contradicting=sum(contradicting_paraphrases(cases).values()),
        subject_outside=sum(bool(case.subject) and str(case.subject) not in case.prompt for case in cases),
        touched=len(touched_probes(cases)),
    )


def _families(case: EditCase) -> dict[str, int]:
    named = {"paraphrases": case.paraphrases, "locality": case.locality, **case.hard_locality, **case.extras}
    return {
        "subject": int(case.subject is not None),
        **{name: len(probes) for name, probes in named.items()},
    }
