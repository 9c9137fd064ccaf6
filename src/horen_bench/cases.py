"""What an edit is: the one schema that every dataset yields and every editor reads, and what editors report of it."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Action = Literal["inserted", "fine_tuned", "conflict", "failed"]


@dataclass(frozen=True, slots=True)
class Probe:
    """A prompt for the edited model, with the answer that its prediction is scored against."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class EditCase:
    """One fact to write, and the probes that show what writing it did.

    Attributes:
        id: unique within its dataset.
        prompt: the edit prompt, without a trailing space.
        target: the answer to write, without a leading space.
        subject: the entity that the prompt is about; methods that locate a subject need it.
        paraphrases: other wordings of `prompt`, whose answer is `target` (Gen).
        locality: unrelated probes whose predictions must not move (Loc); the base model's prediction
            is the reference, `Probe.answer` only fixes how many tokens are compared.
        hard_locality: further locality families by name (`same_subject`, `same_relation`), scored
            like `locality` and reported in columns of their own, never part of Loc.
        extras: further probes by name (`personas`, `mhop`, `held_out`), scored against
            `Probe.answer`.
    """

    id: str
    prompt: str
    target: str
    subject: str | None = None
    paraphrases: tuple[Probe, ...] = ()
    locality: tuple[Probe, ...] = ()
    hard_locality: Mapping[str, tuple[Probe, ...]] = field(default_factory=dict)
    extras: Mapping[str, tuple[Probe, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Route:
    """What a memory editor's router decided for one prompt.

    Attributes:
        entry: index of the best entry, or None while the memory is empty.
        score: its score as the method has it (HoReN: inner product or cosine; GRACE: Euclidean distance); NaN while
            the memory is empty.
        matched: whether the score passes the method's threshold, so that the entry acts.
        version: changes whenever the entry's value is written.
    """

    entry: int | None
    score: float
    matched: bool
    version: int = 0


@dataclass(frozen=True, slots=True)
class EditRecord:
    """What happened to one case.

    Attributes:
        case_id: the case.
        action: `inserted` (a new entry), `conflict` (a new entry beside a matching one with another
            label), `fine_tuned` (an old entry trained further), `failed` (nothing was written).
        entry: the entry that now holds the edit; None where the method has no entries or it failed.
        route: the router's decision before anything was written.
        loss: mean token cross-entropy in nats of the written value; NaN where nothing was trained.
        steps: optimiser steps taken.
        seconds: wall time of this case.
        problem: one sentence where something went wrong, else None.
        too_long: whether it failed because it does not fit the model's context.
    """

    case_id: str
    action: Action
    entry: int | None
    route: Route | None
    loss: float
    steps: int
    seconds: float
    problem: str | None = None
    too_long: bool = False


def fingerprint(cases: Sequence[EditCase]) -> str:
    """Sixteen hex digits over everything that the cases say, in order: the same only for the same stream."""
    digest = hashlib.sha256()
    for case in cases:
        digest.update(repr(case).encode())
    return digest.hexdigest()[:16]
