"""What can be told about a subject in a few sentences, and the questions that ask for it."""

import random
from collections.abc import Sequence

from horen_bench.world import RELATIONS, Fact, Subject, World, pick

QUESTIONS = (
    "What is known about {s}?",
    "What can be said about {s}?",
    "What should one know about {s}?",
    "Can you tell me about {s}?",
    "What do you know of {s}?",
    "Who or what is {s}?",
)

# Of each kind of subject, the relations that are told, in this order. A network as small as the embedded one can be
# edited to tell other answers, but hardly to tell of other relations.
_SENTENCES = {
    "person": {
        "birthplace": "They came from the city of {a}.",
        "profession": "They had the profession of {a}.",
        "award": "They won the {a}.",
    },
    "work": {
        "director": "It had {a} as its director.",
        "genre": "It belonged to the genre {a}.",
        "release": "It came out in {a}.",
    },
    "org": {
        "founder": "It owed its start to {a}.",
        "headquarters": "It had its seat in {a}.",
        "industry": "It worked in {a}.",
    },
    "place": {
        "mayor": "It chose {a} as its mayor.",
        "river": "It lay on the river {a}.",
        "country": "It lay in the country of {a}.",
    },
    "star": {
        "constellation": "It belonged to the constellation {a}.",
        "discoverer": "It owed its discovery to {a}.",
        "discovery": "It was first seen in {a}.",
    },
}
_RELATIONS = {
    kind: tuple(next(r for r in RELATIONS if (r.kind, r.name) == (kind, name)) for name in sentences)
    for kind, sentences in _SENTENCES.items()
}


def known_facts(world: World, subject: Subject) -> list[Fact]:
    """What a model of this world tells of a subject: its own facts as far as they are told, others made up."""
    rng = random.Random(f"told {world.seed} {subject.name}")
    own = {fact.relation.name: fact for fact in subject.facts}
    return [
        own.get(relation.name, Fact(subject.name, relation, pick(rng, world.pools[relation.pool])))
        for relation in _RELATIONS[subject.kind]
    ]


def new_facts(world: World, subject: Subject, rng: random.Random) -> list[Fact]:
    """The same relations with other answers than the known ones."""
    return [
        Fact(fact.subject, fact.relation, pick(rng, [a for a in world.pools[fact.relation.pool] if a != fact.answer]))
        for fact in known_facts(world, subject)
    ]


def passage(subject: Subject, facts: Sequence[Fact]) -> str:
    """One sentence a fact, about "They" or "It"."""
    return " ".join(_SENTENCES[subject.kind][fact.relation.name].replace("{a}", fact.answer) for fact in facts)
