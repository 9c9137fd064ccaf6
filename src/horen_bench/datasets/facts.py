"""Edits of made-up facts: streams of any length about the world that the embedded model knows.

The first `n_trained` records each change one of the two facts of a subject that the model knows;
later ones tell a first fact about subjects that it does not know. No question asked as a locality
probe is about a fact that another record of the same stream edits.
"""

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from horen_bench.cases import EditCase, Probe
from horen_bench.config.schema import Dataset, Seed, Text
from horen_bench.datasets.records import Record
from horen_bench.datasets.zsre import NqWording, zsre_case
from horen_bench.errors import UserError
from horen_bench.world import Fact, Subject, World, pick

_MOST = 700_000  # the world has names for so many subjects


def records(stream_seed: int, start: int = 0, stop: int | None = None) -> Iterator[dict[str, Any]]:
    """Yields edit records in the published ZsRE schema (`src`, `rephrase`, `alt`, `loc`, ...).

    Two keys are ours: `hard_loc`, questions about the same subject and about the same relation, and
    `extra.held_out`, the edited fact in a wording that the embedded model was not trained on.

    Args:
        stream_seed: draws the order, the edited facts, their new answers and all wordings.
        start: the first record.
        stop: the record to stop before; without it the stream goes on until subjects run out.

    Yields:
        Record k, a function of (`stream_seed`, k) alone.
    """
    stream = Stream.draw(World(), stream_seed)
    for k in count(start) if stop is None else range(start, stop):
        yield stream.record(k)


def to_json(stream: Iterable[dict[str, Any]]) -> str:
    """A JSON list of records with one record per line, the format of `data/facts.json`."""
    lines = (json.dumps(record, separators=(",", ":")) for record in stream)
    return "[\n" + ",\n".join(lines) + "\n]\n"


@dataclass(frozen=True, slots=True)
class Stream:
    """What one seed decides about a stream before its first record.

    Attributes:
        world: where subjects come from.
        seed: the stream's seed.
        order: which trained subject the k-th record is about.
        edited: which of its two facts a trained subject loses, by subject number.
        kept: trained facts that this stream leaves alone, by the name of their relation.
    """

    world: World
    seed: int
    order: tuple[int, ...]
    edited: tuple[int, ...]
    kept: dict[str, list[Fact]]

    @classmethod
    def draw(cls, world: World, seed: int) -> "Stream":
        """The stream of a seed."""
        rng = random.Random(f"stream {seed}")
        order = sorted(range(world.n_trained), key=lambda _: rng.random())
        edited = tuple(int(rng.random() < 0.5) for _ in range(world.n_trained))
        kept: dict[str, list[Fact]] = {}
        for subject, slot in zip(world.trained(), edited, strict=True):
            fact = subject.facts[1 - slot]
            kept.setdefault(fact.relation.name, []).append(fact)
        return cls(world, seed, tuple(order), edited, kept)

    def record(self, k: int) -> dict[str, Any]:
        """Record number `k` of the stream."""
        rng = random.Random(f"record {self.seed} {k}")
        subject, slot = self._edit(rng, k)
        fact, other = subject.facts[slot], subject.facts[1 - slot]
        relation = fact.relation
        src, rephrase = _pair(rng, relation.trained, relation.neighbours)
        alt = pick(rng, [answer for answer in self.world.pools[relation.pool] if answer != fact.answer])
        edit = Fact(fact.subject, relation, alt)
        unrelated = pick(rng, self.world.questions)
        elsewhere = pick(rng, self.kept[relation.name])
        return {
            "subject": subject.name,
            "src": edit.ask(src).prompt,
            "rephrase": edit.ask(rephrase).prompt,
            "alt": alt,
            "answers": [fact.answer],
            "loc": unrelated.prompt,
            "loc_ans": unrelated.answer,
            "hard_loc": {
                "same_subject": _as_json(other.ask(pick(rng, other.relation.trained))),
                "same_relation": _as_json(elsewhere.ask(pick(rng, relation.trained))),
            },
            "extra": {"held_out": _as_json(edit.ask(pick(rng, relation.held_out)))},
        }

    def _edit(self, rng: random.Random, k: int) -> tuple[Subject, int]:
        """The subject of record `k` and which of its facts is edited."""
        if k < len(self.order):
            index = self.order[k]
            return self.world.subject(index), self.edited[index]
        return self.world.subject(k), int(rng.random() < 0.5)


def _pair(rng: random.Random, wordings: Sequence[str], neighbours: Sequence[Sequence[int]]) -> tuple[str, str]:
    """Two different wordings; every second pair is of close ones, as back-translations in ZsRE are."""
    first = int(rng.random() * len(wordings))
    if rng.random() < 0.5:
        return wordings[first], wordings[pick(rng, neighbours[first])]
    return wordings[first], wordings[pick(rng, [i for i in range(len(wordings)) if i != first])]


def _as_json(probe: Probe) -> dict[str, str]:
    return {"prompt": probe.prompt, "answer": probe.answer}


class Facts(Dataset):
    """The embedded dataset: edits of made-up facts, as many as wanted."""

    name: Text = "facts"
    label: Text = "Facts"
    stream_seed: Seed = 1
    """Draws order, new answers and wordings; `data/facts.json` is the head of stream 1."""

    def cases(self, n: int) -> list[EditCase]:
        """The first `n` cases of the stream, read by the ZsRE loader."""
        where = f"facts stream {self.stream_seed}"
        if n > _MOST:
            raise UserError(f"n={n} is more than {where} holds; write n={_MOST} or less")
        stream = enumerate(records(self.stream_seed, stop=n))
        return [zsre_case(Record.of(record, i, where), "alt", NqWording()) for i, record in stream]
