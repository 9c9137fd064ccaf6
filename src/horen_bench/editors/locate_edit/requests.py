"""Requests: a fact with its subject found in the prompt, and the token rows that hold it in many contexts."""

from collections.abc import Sequence
from dataclasses import dataclass

from horen_bench.cases import EditCase
from horen_bench.editors.locate_edit.contexts import Contexts
from horen_bench.prompts import PromptEncoder

_ESSENCE = " is a"  # after the subject: the sentence whose meaning the edit must leave alone


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
        subject: position of the subject's last token.
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
    """Find the subject in a case's prompt.

    Raises:
        Refused: no subject, not exactly one place for it, or an empty target.
    """
    if not case.subject:
        raise Refused("the case has no subject, and the method writes at the subject's last token")
    if not case.target.strip():
        raise Refused("the target has no token")
    n_places = case.prompt.count(case.subject)
    if n_places == 0:
        raise Refused(f"the subject {case.subject!r} does not occur in the prompt")
    if n_places > 1:
        raise Refused(f"the subject {case.subject!r} occurs {n_places} times in the prompt, so its place is not clear")
    before, _, after = case.prompt.partition(case.subject)
    return Request(before, case.subject, after, tuple(encoder.continuations([case.target])[0]))


def rows_of(encoder: PromptEncoder, requests: Sequence[Request], contexts: Contexts) -> list[PromptRow]:
    """The rows of each request: one per distinct context, the bare prompt first, and the essence's last."""
    return [row for owner, request in enumerate(requests) for row in _rows(encoder, request, contexts, owner)]


def _rows(encoder: PromptEncoder, request: Request, contexts: Contexts, owner: int) -> list[PromptRow]:
    shares = contexts.shares()
    starts = [prefix + request.before + request.subject for prefix in shares]
    texts = [*(start + request.after for start in starts), request.subject + _ESSENCE]
    encoded = encoder.prompts([*texts, *starts, request.subject])
    sentences, upto = encoded[: len(texts)], encoded[len(texts) :]
    last = [len(ids) - 1 for ids in upto]
    fed = request.target[:-1]
    rows = [
        PromptRow((*ids, *fed), subject, owner, request.target, share.likelihood, share.key)
        for ids, subject, share in zip(sentences[:-1], last[:-1], shares.values(), strict=True)
    ]
    return [*rows, PromptRow(tuple(sentences[-1]), last[-1], owner, (), 0.0, 0.0)]
