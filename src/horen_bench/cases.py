"""What an edit is: the one schema that every dataset yields and every editor reads."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Probe:
    """A question put to the edited model, with the answer it is scored against."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class EditCase:
    """One fact to write, and the questions that show what writing it did.

    Attributes:
        id: unique within its dataset.
        prompt: the edit prompt, without a trailing space.
        target: the answer to write, without a leading space.
        subject: the entity that the prompt is about; methods that locate a subject need it.
        paraphrases: other wordings of `prompt`; their answer is `target` (Gen).
        locality: unrelated questions whose answers must not move (Loc); the base model's answer is
            the reference, `Probe.answer` only fixes how many tokens are compared.
        hard_locality: further locality families by name (`same_subject`, `same_relation`), scored
            like `locality` and reported in columns of their own, never part of Loc.
        extras: further probes by name (`personas`, `mhop`, `held_out`), scored against
            `Probe.answer`.
    """

    id: str
    prompt: str
    target: str
    subject: str | None = None
    paraphrases: tuple[str, ...] = ()
    locality: tuple[Probe, ...] = ()
    hard_locality: Mapping[str, tuple[Probe, ...]] = field(default_factory=dict)
    extras: Mapping[str, tuple[Probe, ...]] = field(default_factory=dict)


def fingerprint(cases: Sequence[EditCase]) -> str:
    """Sixteen hex digits over everything that the cases say, in order: the same only for the same stream."""
    digest = hashlib.sha256()
    for case in cases:
        digest.update(repr(case).encode())
    return digest.hexdigest()[:16]
