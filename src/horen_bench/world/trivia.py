"""Questions about nothing in particular: the `nq question:` family that measures locality.

They look like the Natural Questions in ZsRE's `loc` field (lower case, no question mark, a fixed
prefix) and share no subject with any edit.
"""

import random

from horen_bench.cases import Probe
from horen_bench.world.relations import pick

PREFIX = "nq question: "

_WORDS = {
    part: tuple(words.split())
    for part, words in {
        "noun": (
            "anchor apple arrow barrel basket beacon bell blanket bottle bucket button cabin camel "
            "candle castle cannon carpet chapel chimney carriage coat clock copper cottage cradle "
            "desert dragon drum eagle engine falcon feather fiddle forest fountain glacier hammer "
            "helmet jacket kettle kitchen ladder market meadow mill mountain needle orchard palace "
            "parade pepper pillow prison ribbon saddle temple tower tunnel valley wagon"
        ),
        "adjective": (
            "ancient blue brave bright cold crooked dark deep dusty famous fast green grey heavy huge little "
            "lonely long loud narrow orange purple quiet red rusty secret sharp silver tall yellow"
        ),
        "verb": (
            "borrowed buried built carried carved cleaned copied designed filmed invented moved named opened "
            "painted planted played recorded repaired sold wrapped"
        ),
    }.items()
}

_PLACES = {"n": "noun", "m": "noun", "a": "adjective", "v": "verb"}

_FRAMES = (
    # kind of answer, question
    ("person", "who {v} the {a} {n}"),
    ("person", "who {v} the {n} in the {a} {m}"),
    ("person", "who is the owner of the {a} {n}"),
    ("person", "who {v} the first {n} for the {m}"),
    ("year", "when was the {a} {n} {v}"),
    ("year", "when did the {n} come to the {a} {m}"),
    ("year", "what year was the {n} of the {m} {v}"),
    ("city", "where was the {a} {n} {v}"),
    ("city", "where is the {n} with the {a} {m}"),
    ("number", "how many {n}s are in the {a} {m}"),
    ("number", "how many {a} {n}s were {v}"),
    ("phrase", "what do you call the {n} with the {a} {m}"),
    ("phrase", "what is the {n} that {v} the {m}"),
    ("phrase", "which {m} has the {a} {n}"),
)


def trivia(seed: int, count: int, pools: dict[str, tuple[str, ...]]) -> tuple[Probe, ...]:
    """`count` distinct questions with their answers, a function of the seed.

    The first questions of a longer list are those of a shorter one.
    """
    rng = random.Random(f"trivia {seed}")
    asked: dict[str, Probe] = {}
    while len(asked) < count:
        probe = _question(rng, pools)
        asked.setdefault(probe.prompt, probe)
    return tuple(asked.values())


def _question(rng: random.Random, pools: dict[str, tuple[str, ...]]) -> Probe:
    kind, frame = pick(rng, _FRAMES)
    words = {place: pick(rng, _WORDS[part]) for place, part in _PLACES.items()}
    return Probe(PREFIX + frame.format_map(words), _answer(rng, kind, pools))


def _answer(rng: random.Random, kind: str, pools: dict[str, tuple[str, ...]]) -> str:
    if kind == "number":
        return str(2 + int(rng.random() * 98))
    if kind == "phrase":
        return f"the {pick(rng, _WORDS['adjective'])} {pick(rng, _WORDS['noun'])}"
    return pick(rng, pools[kind])
