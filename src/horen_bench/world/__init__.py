"""The made-up world that the embedded model knows and the embedded edits are about.

A subject has two facts and is a pure function of the world's seed and its number. The first
`n_trained` subjects are what the model is trained on; after them come as many unknown ones as a
stream needs.
"""

import random
from dataclasses import dataclass

from horen_bench.cases import Probe
from horen_bench.world.names import subject_names
from horen_bench.world.relations import RELATIONS, Relation, answer_pools, pick
from horen_bench.world.trivia import trivia

__all__ = ["RELATIONS", "Fact", "Relation", "Subject", "World", "pick"]

_BY_KIND = {kind: tuple(r for r in RELATIONS if r.kind == kind) for kind in ("person", "work", "org", "place", "star")}
# Kinds take turns in proportion to their relations, so that every relation has about as many facts.
_TURNS = tuple(relation.kind for relation in RELATIONS)
_RANKS = tuple(_TURNS[:turn].count(kind) for turn, kind in enumerate(_TURNS))


@dataclass(frozen=True, slots=True)
class Fact:
    """The answer to one relation of one subject."""

    subject: str
    relation: Relation
    answer: str

    def ask(self, wording: str) -> Probe:
        """The question about this fact in one of its relation's wordings."""
        return Probe(wording.replace("{s}", self.subject), self.answer)


@dataclass(frozen=True, slots=True)
class Subject:
    """A person, work, organisation, place or star and its two facts, of different relations."""

    name: str
    kind: str
    facts: tuple[Fact, Fact]


class World:
    """All subjects, answers and unrelated questions of one seed.

    Attributes:
        seed: what everything is drawn from.
        n_trained: subjects `range(n_trained)` are those that a model of this world is trained on.
        pools: all answers, by the name of their pool.
        questions: the unrelated `nq question:` items.
    """

    def __init__(self, seed: int = 0, n_trained: int = 2500, n_questions: int = 1000) -> None:
        self.seed = seed
        self.n_trained = n_trained
        self.pools = answer_pools(seed)
        self.questions = trivia(seed, n_questions, self.pools)
        self._names = {kind: subject_names(kind, seed) for kind in _BY_KIND}

    def subject(self, index: int) -> Subject:
        """Subject number `index`.

        Raises:
            IndexError: the names of its kind are used up, which is beyond 700,000 subjects.
        """
        turns, turn = divmod(index, len(_TURNS))
        kind = _TURNS[turn]
        name = self._names[kind].name(turns * len(_BY_KIND[kind]) + _RANKS[turn])
        rng = random.Random(f"subject {self.seed} {index}")
        first = pick(rng, _BY_KIND[kind])
        second = pick(rng, tuple(r for r in _BY_KIND[kind] if r is not first))
        return Subject(name, kind, (self._fact(rng, name, first), self._fact(rng, name, second)))

    def trained(self) -> list[Subject]:
        """The subjects that a model of this world is trained on."""
        return [self.subject(index) for index in range(self.n_trained)]

    def _fact(self, rng: random.Random, name: str, relation: Relation) -> Fact:
        return Fact(name, relation, pick(rng, self.pools[relation.pool]))
