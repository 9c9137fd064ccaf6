"""Made-up passages: the embedded unstructured set, in the schema of UnKEBench, as many as wanted.

A record asks about one subject and is answered by three sentences, one fact each. The embedded model tells the same
three things of the subjects that it knows; the facts of a record are never those. Each of them is asked for by itself
as well. Question and passage stay below 64 tokens of that model, whose context has 128 positions.
"""

import random
from collections.abc import Iterator
from itertools import count
from typing import Any

from horen_bench.cases import EditCase
from horen_bench.config.schema import Dataset, Protocol, Seed, Text
from horen_bench.datasets.records import Record
from horen_bench.datasets.unke import unke_case
from horen_bench.errors import UserError
from horen_bench.world import Subject, World, pick
from horen_bench.world.passages import QUESTIONS, new_facts, passage

_MOST = 700_000  # the world has names for so many subjects


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
    question = pick(rng, QUESTIONS)
    paraphrase = pick(rng, [other for other in QUESTIONS if other != question])
    facts = new_facts(world, subject, rng)
    asked = [fact.ask(pick(rng, fact.relation.trained)) for fact in facts]
    return {
        "question": question.replace("{s}", subject.name),
        "para_question": paraphrase.replace("{s}", subject.name),
        "answer": passage(subject, facts),
        "sub_question": [probe.prompt for probe in asked],
        "sub_answer": [probe.answer for probe in asked],
    }


class Passages(Dataset):
    """The embedded unstructured set."""

    name: Text = "passages"
    label: Text = "Passages"
    protocol: Protocol = "text"
    stream_seed: Seed = 1
    """Draws order, facts and wordings."""

    def cases(self, n: int) -> list[EditCase]:
        """The first `n` cases of the stream, read by the UnKE loader."""
        where = f"passages stream {self.stream_seed}"
        if n > _MOST:
            raise UserError(f"n={n} is more than {where} holds; write n={_MOST} or less")
        stream = enumerate(records(self.stream_seed, stop=n))
        return [unke_case(Record.of(record, i, where)) for i, record in stream]
