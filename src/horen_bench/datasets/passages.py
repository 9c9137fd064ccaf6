"""Made-up passages: the embedded unstructured set, in the schema of UnKEBench, as many as wanted.

A record asks about one subject of the world that the embedded model knows and answers with three sentences, one fact
each. None of these facts is what the model was trained on, and each of them is asked for by itself as well. Question
and passage stay below 100 tokens of the embedded model, whose context has 128 positions. That model was trained on
short answers only: it has never seen a passage.
"""

import random
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any, TypeVar

from horen_bench.cases import EditCase
from horen_bench.datasets.base import Dataset
from horen_bench.datasets.records import Record
from horen_bench.datasets.unke import unke_case
from horen_bench.errors import UserError
from horen_bench.world import RELATIONS, Fact, Subject, World, pick

T = TypeVar("T")

_MOST = 700_000  # the world has names for so many subjects
_N_FACTS = 3  # as many as there are relations of the kind that has fewest

_QUESTIONS = (
    "What is known about {s}?",
    "What can be said about {s}?",
    "What should one know about {s}?",
    "Can you tell me about {s}?",
    "What do you know of {s}?",
    "Who or what is {s}?",
)

# What follows the subject or its pronoun; simple past throughout, so that "They" and "It" both fit.
_CLAUSES = {
    "university": "studied at {a}",
    "birthplace": "came from the city of {a}",
    "profession": "had the profession of {a}",
    "team": "played for the {a}",
    "language": "spoke {a}",
    "spouse": "married {a}",
    "father": "grew up with {a} as a father",
    "award": "won the {a}",
    "instrument": "played the {a}",
    "director": "had {a} as its director",
    "genre": "belonged to the genre {a}",
    "release": "came out in {a}",
    "studio": "came from the studio {a}",
    "star": "gave its leading part to {a}",
    "origin": "came from the country of {a}",
    "founder": "owed its start to {a}",
    "headquarters": "had its seat in {a}",
    "industry": "worked in {a}",
    "founding": "began in {a}",
    "owner": "belonged to {a}",
    "mayor": "chose {a} as its mayor",
    "river": "lay on the river {a}",
    "country": "lay in the country of {a}",
    "twin": "had the city of {a} as its twin",
    "speech": "spoke {a}",
    "constellation": "belonged to the constellation {a}",
    "discoverer": "owed its discovery to {a}",
    "discovery": "was first seen in {a}",
}


def records(stream_seed: int, start: int = 0, stop: int | None = None) -> Iterator[dict[str, Any]]:
    """Yields records in UnKEBench's schema (`question`, `para_question`, `answer`, `sub_question`, `sub_answer`).

    Args:
        stream_seed: draws the order of the subjects, the facts and all wordings.
        start: the first record.
        stop: the record to stop before; without it the stream goes on until subjects run out.

    Yields:
        Record k, a function of (`stream_seed`, k) alone; the first `World.n_trained` are about subjects that the
        embedded model knows.
    """
    world = World()
    rng = random.Random(f"passages {stream_seed}")
    order = sorted(range(world.n_trained), key=lambda _: rng.random())
    for k in count(start) if stop is None else range(start, stop):
        subject = world.subject(order[k] if k < len(order) else k)
        yield {"id": k, **_told(world, subject, random.Random(f"passage {stream_seed} {k}"))}


def _told(world: World, subject: Subject, rng: random.Random) -> dict[str, Any]:
    question, paraphrase = _several(rng, _QUESTIONS, 2)
    facts = _facts(world, subject, rng)
    asked = [fact.ask(pick(rng, fact.relation.trained)) for fact in facts]
    return {
        "question": question.replace("{s}", subject.name),
        "para_question": paraphrase.replace("{s}", subject.name),
        "answer": _passage(subject, facts),
        "sub_question": [probe.prompt for probe in asked],
        "sub_answer": [probe.answer for probe in asked],
    }


def _facts(world: World, subject: Subject, rng: random.Random) -> list[Fact]:
    """New facts of different relations, none of them what the subject's facts have been so far."""
    old = {(fact.relation.name, fact.answer) for fact in subject.facts}
    relations = _several(rng, tuple(relation for relation in RELATIONS if relation.kind == subject.kind), _N_FACTS)
    return [
        Fact(
            subject.name,
            relation,
            pick(rng, [answer for answer in world.pools[relation.pool] if (relation.name, answer) not in old]),
        )
        for relation in relations
    ]


def _passage(subject: Subject, facts: list[Fact]) -> str:
    pronoun = "They" if subject.kind == "person" else "It"
    clauses = [_CLAUSES[fact.relation.name].replace("{a}", fact.answer) for fact in facts]
    return " ".join(f"{subject.name if i == 0 else pronoun} {clause}." for i, clause in enumerate(clauses))


def _several(rng: random.Random, items: Sequence[T], n: int) -> list[T]:
    """`n` different items in random order."""
    left = list(items)
    return [left.pop(int(rng.random() * len(left))) for _ in range(n)]


class Passages(Dataset):
    """The embedded unstructured set.

    Args:
        stream_seed: draws order, facts and wordings.
    """

    def __init__(self, stream_seed: int) -> None:
        self.stream_seed = stream_seed

    def cases(self, n: int) -> list[EditCase]:
        """The first `n` cases of the stream, read by the UnKE loader."""
        where = f"passages stream {self.stream_seed}"
        if n > _MOST:
            raise UserError(f"n={n} is more than {where} holds; write n={_MOST} or less")
        stream = enumerate(records(self.stream_seed, stop=n))
        return [unke_case(Record.of(record, i, where)) for i, record in stream]
