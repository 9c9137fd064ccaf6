"""Requests: a fact with its subject found in the prompt, and the token rows that hold it in many contexts."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from horen_bench.cases import EditCase
from horen_bench.editors.locate_edit.contexts import Contexts
from horen_bench.prompts import PromptEncoder

_ESSENCE = " is a"  # after the subject: the sentence whose meaning the edit must leave alone
# As Unicode names begin of letters of scripts that write no spaces between words, or particles onto them.
_RUN_ON = (
    *("CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "YI SYLLABLE", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"),
    *("HANGUL", "ARABIC", "HEBREW"),
)


class Refused(Exception):  # noqa: N818 - a verdict on a case, no defect
    """A case cannot be written; the message is one sentence that says why."""


@dataclass(frozen=True, slots=True)
class Request:
    """One fact: the prompt is `before + subject + after`, and `target` are the ids of what must follow."""

    before: str
    subject: str
    after: str
    target: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One sequence of tokens about a request.

    Attributes:
        ids: the sequence; a context row ends with the last target token but one.
        subject: position of the token that holds the subject's last character, and may hold more.
        owner: number of the request in its turn.
        labels: ids that the last `len(labels)` positions must predict; none in the row of the essence.
        weight: share of the row in its request's mean log-likelihood.
        key_weight: share of the row in its request's key.
    """

    ids: tuple[int, ...]
    subject: int
    owner: int
    labels: tuple[int, ...]
    weight: float
    key_weight: float

    @property
    def up_to_subject(self) -> tuple[int, ...]:
        """The ids up to the subject's last token: all that a key depends on."""
        return self.ids[: self.subject + 1]


def request_of(encoder: PromptEncoder, case: EditCase) -> Request:
    """Find the subject in a case's prompt, as a word of its own: "Ann" is not in "Annapolis".

    Raises:
        Refused: no subject, not exactly one place for it, or a target that is empty or cannot be read.
    """
    if not (case.subject and case.subject.strip()):
        raise Refused("the case has no subject, and the method writes at the subject's last token")
    if not case.target.strip():
        raise Refused("the target has no token")
    if problem := encoder.unreadable(case.target):
        raise Refused(problem)
    start = _place(case.prompt, case.subject)
    end = start + len(case.subject)
    ((_, token),) = encoder.located([case.prompt], [end])
    if token < 0:
        raise Refused(f"the tokenizer has no token for the subject {case.subject!r}")
    target = encoder.edit(case.prompt, case.target, closed=False).target
    return Request(case.prompt[:start], case.subject, case.prompt[end:], target)


def _place(prompt: str, subject: str) -> int:
    """Where the subject begins in the prompt, characters.

    Raises:
        Refused: not exactly one place.
    """
    inside = [match.start() for match in re.finditer(re.escape(subject), prompt)]
    words = [start for start in inside if _stands_alone(prompt, start, start + len(subject))]
    if not words:
        how = " as a word, only inside another" if inside else ""
        raise Refused(f"the subject {subject!r} does not occur in the prompt{how}")
    if len(words) > 1:
        raise Refused(f"the subject {subject!r} occurs {len(words)} times in the prompt, so its place is not clear")
    return words[0]


def _stands_alone(text: str, start: int, end: int) -> bool:
    """Whether no word goes on over either end of a part of a text."""
    return not any(0 < i < len(text) and all(map(_in_word, text[i - 1 : i + 1])) for i in (start, end))


def _in_word(char: str) -> bool:
    """Whether a character binds to its neighbours: a letter, digit or combining mark, save of scripts that run on."""
    word = char == "_" or char.isalnum() or unicodedata.category(char).startswith("M")
    return word and not unicodedata.name(char, "").startswith(_RUN_ON)


def rows_of(encoder: PromptEncoder, requests: Sequence[Request], contexts: Contexts) -> list[PromptRow]:
    """The rows of each request: one per distinct context, the bare prompt first, and the essence's last."""
    return [row for owner, request in enumerate(requests) for row in _rows(encoder, request, contexts, owner)]


def _rows(encoder: PromptEncoder, request: Request, contexts: Contexts, owner: int) -> list[PromptRow]:
    shares = contexts.shares()
    starts = [*(prefix + request.before + request.subject for prefix in shares), request.subject]
    rests = [*(request.after for _ in shares), _ESSENCE]
    texts = [start + rest for start, rest in zip(starts, rests, strict=True)]
    *sentences, (essence, essence_subject) = encoder.located(texts, list(map(len, starts)))
    fed = request.target[:-1]
    rows = [
        PromptRow((*ids, *fed), subject, owner, request.target, share.likelihood, share.key)
        for (ids, subject), share in zip(sentences, shares.values(), strict=True)
    ]
    return [*rows, PromptRow(tuple(essence), essence_subject, owner, (), 0.0, 0.0)]
