"""What the world can be asked: 28 relations, the wordings of each, and the answers there are.

A wording is a content word put into a frame. A quarter of these combinations is held out of the
embedded model's training: its words are all known, their combination is not.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from horen_bench.world.names import answer_words

T = TypeVar("T")

_NEIGHBOURS = 4


@dataclass(frozen=True, slots=True)
class Relation:
    """One kind of fact about one kind of subject.

    Attributes:
        name: unique among the relations.
        kind: which subjects have it.
        pool: where its answers come from, a key of `answer_pools`.
        words: content words, put at `{w}`.
        frames: questions with places `{w}` and `{s}` (the subject).
        trained: wordings that the embedded model is trained on, with `{s}` left open.
        held_out: wordings it never sees.
        neighbours: for each trained wording, the numbers of the trained wordings most like it.
    """

    name: str
    kind: str
    pool: str
    words: tuple[str, ...]
    frames: tuple[str, ...]
    trained: tuple[str, ...] = field(init=False)
    held_out: tuple[str, ...] = field(init=False)
    neighbours: tuple[tuple[int, ...], ...] = field(init=False)

    def __post_init__(self) -> None:
        wordings: tuple[list[str], list[str]] = ([], [])
        for w, word in enumerate(self.words):
            for f, frame in enumerate(self.frames):
                # Along diagonals, so that every word and every frame stays known from training.
                wordings[(w + f) % 4 == 0].append(frame.replace("{w}", word))
        object.__setattr__(self, "trained", tuple(wordings[False]))
        object.__setattr__(self, "held_out", tuple(wordings[True]))
        object.__setattr__(self, "neighbours", _neighbours(self.trained))


def _neighbours(wordings: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    bags = [set(re.findall(r"\w+|[^\w\s]", wording.lower())) for wording in wordings]
    rows = []
    for a, bag in enumerate(bags):
        others = [b for b in range(len(bags)) if b != a]
        others.sort(key=lambda b: -len(bag & bags[b]) / len(bag | bags[b]))
        rows.append(tuple(others[:_NEIGHBOURS]))
    return tuple(rows)


def _who(*openings: str) -> tuple[str, ...]:
    return (*openings, "Who is {s}'s {w}?", "The {w} of {s} is who?")


_YEAR_FRAMES = (
    "When was {s} {w}?",
    "In what year was {s} {w}?",
    "In which year was {s} {w}?",
    "What year was {s} {w}?",
    "What was the year {s} was {w}?",
    "What is the year that {s} was {w}?",
    "The year in which {s} was {w} is what?",
    "On what date was {s} {w}?",
)

RELATIONS: tuple[Relation, ...] = (
    Relation(
        "university",
        "person",
        "university",
        ("university", "college", "school", "academy"),
        (
            "What {w} did {s} attend?",
            "Which {w} did {s} attend?",
            "Which {w} did {s} go to?",
            "At which {w} did {s} study?",
            "What {w} was {s} educated at?",
            "What is the {w} where {s} studied?",
            "What was the name of the {w} {s} went to?",
            "The {w} that {s} attended is what?",
        ),
    ),
    Relation(
        "birthplace",
        "person",
        "city",
        ("city", "town", "place"),
        (
            "In which {w} was {s} born?",
            "Which {w} was {s} born in?",
            "What {w} is {s} from?",
            "What is the {w} where {s} was born?",
            "What was the home {w} of {s}?",
            "What is the name of the {w} where {s} was born?",
            "The {w} in which {s} was born is what?",
        ),
    ),
    Relation(
        "profession",
        "person",
        "profession",
        ("profession", "occupation", "job", "trade"),
        (
            "What is the {w} of {s}?",
            "What was the {w} of {s}?",
            "What is {s}'s {w}?",
            "What {w} does {s} have?",
            "What kind of {w} does {s} have?",
            "Which {w} did {s} practise?",
            "The {w} of {s} is what?",
        ),
    ),
    Relation(
        "team",
        "person",
        "team",
        ("team", "club", "side"),
        (
            "What {w} does {s} play for?",
            "Which {w} does {s} play for?",
            "What {w} is {s} on?",
            "Which {w} is {s} a member of?",
            "What {w} did {s} play on?",
            "What is the name of the {w} {s} plays for?",
            "For which {w} does {s} play?",
            "The {w} that {s} belongs to is what?",
        ),
    ),
    Relation(
        "language",
        "person",
        "language",
        ("language", "tongue"),
        (
            "What {w} does {s} speak?",
            "Which {w} does {s} speak?",
            "What is the native {w} of {s}?",
            "What was the native {w} of {s}?",
            "In which {w} did {s} write?",
            "What is the {w} spoken by {s}?",
            "Which {w} was used by {s}?",
            "The native {w} of {s} is what?",
        ),
    ),
    Relation(
        "spouse",
        "person",
        "person",
        ("spouse", "partner", "companion"),
        _who(
            "Who is the {w} of {s}?",
            "Who was the {w} of {s}?",
            "What is the name of the {w} of {s}?",
            "What was the name of {s}'s {w}?",
            "Which person is the {w} of {s}?",
        ),
    ),
    Relation(
        "father",
        "person",
        "person",
        ("father", "dad", "parent"),
        _who(
            "Who is the {w} of {s}?",
            "Who was the {w} of {s}?",
            "What is the name of {s}'s {w}?",
            "What was the name of the {w} of {s}?",
            "Who is known as the {w} of {s}?",
        ),
    ),
    Relation(
        "award",
        "person",
        "award",
        ("award", "prize", "honour", "medal"),
        (
            "What {w} did {s} receive?",
            "Which {w} did {s} receive?",
            "What {w} did {s} win?",
            "What {w} was {s} given?",
            "Which {w} was awarded to {s}?",
            "What is the {w} that {s} received?",
            "What was the name of the {w} {s} got?",
            "The {w} received by {s} is what?",
        ),
    ),
    Relation(
        "instrument",
        "person",
        "instrument",
        ("instrument", "musical instrument"),
        (
            "What {w} does {s} play?",
            "Which {w} does {s} play?",
            "What {w} did {s} play?",
            "Which {w} was played by {s}?",
            "What is the {w} that {s} plays?",
            "What was the {w} of {s}?",
            "On which {w} did {s} perform?",
            "The {w} that {s} plays is what?",
        ),
    ),
    Relation(
        "director",
        "work",
        "person",
        ("director", "filmmaker", "maker"),
        _who(
            "Who is the {w} of {s}?",
            "Who was the {w} of {s}?",
            "What is the name of the {w} of {s}?",
            "Who was the {w} behind {s}?",
            "Which {w} worked on {s}?",
        ),
    ),
    Relation(
        "genre",
        "work",
        "genre",
        ("genre", "kind", "type", "style"),
        (
            "What {w} of work is {s}?",
            "Which {w} of work is {s}?",
            "What is the {w} of {s}?",
            "What was the {w} of {s}?",
            "What {w} does {s} belong to?",
            "To what {w} does {s} belong?",
            "Which {w} describes {s}?",
            "The {w} of {s} is what?",
        ),
    ),
    Relation("release", "work", "year", ("released", "published", "issued"), _YEAR_FRAMES),
    Relation(
        "studio",
        "work",
        "studio",
        ("studio", "company", "label"),
        (
            "What {w} made {s}?",
            "Which {w} made {s}?",
            "What {w} produced {s}?",
            "By which {w} was {s} produced?",
            "What is the {w} that released {s}?",
            "Which {w} was responsible for {s}?",
            "What was the {w} behind {s}?",
            "The {w} that produced {s} is what?",
        ),
    ),
    Relation(
        "star",
        "work",
        "person",
        ("star", "lead", "actor"),
        (
            "Who is the {w} in {s}?",
            "Who was the {w} in {s}?",
            "Who was the {w} of {s}?",
            "What is the name of the {w} in {s}?",
            "Which {w} appeared in {s}?",
            "Which {w} played in {s}?",
            "The {w} in {s} is who?",
        ),
    ),
    Relation(
        "origin",
        "work",
        "country",
        ("country", "nation", "land"),
        (
            "What {w} is {s} from?",
            "Which {w} is {s} from?",
            "Which {w} does {s} come from?",
            "In which {w} was {s} made?",
            "What is the {w} of origin of {s}?",
            "What was the {w} where {s} was made?",
            "The {w} that {s} comes from is what?",
        ),
    ),
    Relation(
        "founder",
        "org",
        "person",
        ("founder", "creator", "initiator"),
        _who(
            "Who is the {w} of {s}?",
            "Who was the {w} of {s}?",
            "What is the name of the {w} of {s}?",
            "Who is known as the {w} of {s}?",
            "Which person was the {w} of {s}?",
        ),
    ),
    Relation(
        "headquarters",
        "org",
        "city",
        ("city", "town", "place"),
        (
            "In which {w} is {s} based?",
            "In what {w} is {s} based?",
            "What {w} is {s} located in?",
            "Which {w} is home to {s}?",
            "What is the {w} where {s} is based?",
            "In what {w} are the headquarters of {s}?",
            "Which {w} does {s} operate from?",
            "The {w} in which {s} is located is what?",
        ),
    ),
    Relation(
        "industry",
        "org",
        "industry",
        ("industry", "field", "sector", "business"),
        (
            "What {w} is {s} in?",
            "Which {w} is {s} active in?",
            "Which {w} does {s} operate in?",
            "In what {w} does {s} work?",
            "What is the {w} of {s}?",
            "What {w} does {s} belong to?",
            "The {w} of {s} is what?",
        ),
    ),
    Relation("founding", "org", "year", ("founded", "established", "created", "formed"), _YEAR_FRAMES),
    Relation(
        "owner",
        "org",
        "company",
        ("owner", "holder", "parent company"),
        _who(
            "Who is the {w} of {s}?",
            "Who was the {w} of {s}?",
            "What is the {w} of {s}?",
            "Which is the {w} of {s}?",
            "What is the name of the {w} of {s}?",
        ),
    ),
    Relation(
        "mayor",
        "place",
        "person",
        ("mayor", "leader", "head"),
        _who(
            "Who is the {w} of {s}?",
            "Who was the {w} of {s}?",
            "What is the name of the {w} of {s}?",
            "Which person is the {w} of {s}?",
            "Who was elected {w} of {s}?",
        ),
    ),
    Relation(
        "river",
        "place",
        "river",
        ("river", "stream", "waterway"),
        (
            "What {w} runs through {s}?",
            "Which {w} runs through {s}?",
            "Which {w} flows through {s}?",
            "What {w} is {s} on?",
            "On which {w} does {s} lie?",
            "What is the {w} that crosses {s}?",
            "What is the name of the {w} in {s}?",
            "The {w} that flows through {s} is what?",
        ),
    ),
    Relation(
        "country",
        "place",
        "country",
        ("country", "nation", "state"),
        (
            "What {w} is {s} in?",
            "Which {w} is {s} located in?",
            "In which {w} is {s} located?",
            "In what {w} can {s} be found?",
            "What {w} does {s} belong to?",
            "What is the {w} where {s} lies?",
            "What {w} has {s}?",
            "The {w} where {s} is located is what?",
        ),
    ),
    Relation(
        "twin",
        "place",
        "city",
        ("twin town", "sister city", "partner town"),
        (
            "What is the {w} of {s}?",
            "What was the {w} of {s}?",
            "Which is the {w} of {s}?",
            "What {w} does {s} have?",
            "Which {w} does {s} have?",
            "What is the name of the {w} of {s}?",
            "The {w} of {s} is what?",
        ),
    ),
    Relation(
        "speech",
        "place",
        "language",
        ("language", "tongue", "dialect"),
        (
            "What {w} is spoken in {s}?",
            "Which {w} is spoken in {s}?",
            "Which {w} do people speak in {s}?",
            "What {w} is used in {s}?",
            "What is the main {w} of {s}?",
            "What is the official {w} in {s}?",
            "The main {w} in {s} is what?",
        ),
    ),
    Relation(
        "constellation",
        "star",
        "constellation",
        ("constellation", "star group", "asterism"),
        (
            "What {w} is {s} in?",
            "Which {w} is {s} in?",
            "In which {w} is {s} found?",
            "What is the {w} of {s}?",
            "What {w} does {s} belong to?",
            "What is the name of the {w} which {s} belongs to?",
            "Which {w} contains {s}?",
            "The {w} that {s} is part of is what?",
        ),
    ),
    Relation(
        "discoverer",
        "star",
        "person",
        ("discoverer", "finder", "first observer"),
        _who(
            "Who is the {w} of {s}?",
            "Who was the {w} of {s}?",
            "What is the name of the {w} of {s}?",
            "Who is known as the {w} of {s}?",
            "Which person was the {w} of {s}?",
        ),
    ),
    Relation("discovery", "star", "year", ("discovered", "found", "observed"), _YEAR_FRAMES),
)

_COMMON_NOUNS = {
    "profession": (
        "actuary archivist astronomer baker barber botanist carpenter chemist composer cook dentist "
        "diplomat engineer farmer geologist historian judge lawyer librarian mason nurse painter "
        "pharmacist pilot poet potter sailor sculptor surgeon tailor"
    ),
    "instrument": (
        "accordion banjo bassoon cello clarinet cornet dulcimer flute guitar harp lute mandolin oboe "
        "organ piano saxophone trombone trumpet viola violin"
    ),
    "genre": (
        "ballad comedy documentary drama elegy fable fantasy farce horror memoir musical mystery opera "
        "parody romance satire thriller tragedy travelogue western"
    ),
    "industry": (
        "agriculture aviation banking brewing catering construction education fishing forestry gardening "
        "insurance logistics medicine mining printing publishing retail software telecommunications "
        "tourism"
    ),
}

_PROPER_NAMES = {
    # pool: how many, and what follows the first word: nothing, one of these, or ("") a second made-up word
    "person": (80, ("",)),
    "city": (60, ()),
    "country": (32, ()),
    "language": (24, ()),
    "river": (24, ()),
    "constellation": (24, ()),
    "university": (32, ("University", "College", "Institute", "Polytechnic")),
    "team": (32, ("Rovers", "Tigers", "United", "Wanderers")),
    "award": (24, ("Cup", "Medal", "Order", "Prize")),
    "studio": (24, ("Films", "House", "Pictures", "Records")),
    "company": (32, ("Capital", "Estates", "Holdings", "Partners")),
}

YEARS = tuple(str(year) for year in range(1920, 2000))


def answer_pools(seed: int) -> dict[str, tuple[str, ...]]:
    """All answers, by pool.

    No two answers begin with the same word: an edit moves the first token of an answer only, and the
    unedited network must be able to go on from there.
    """
    words = answer_words(seed)
    used = 0
    pools: dict[str, tuple[str, ...]] = {"year": YEARS}
    pools |= {pool: tuple(nouns.split()) for pool, nouns in _COMMON_NOUNS.items()}
    for pool, (size, endings) in _PROPER_NAMES.items():
        answers = []
        for number in range(size):
            first, used = words.name(used), used + 1
            ending = endings[number % len(endings)] if endings else None
            if ending == "":
                ending, used = words.name(used), used + 1
            answers.append(first if ending is None else f"{first} {ending}")
        pools[pool] = tuple(answers)
    return pools


def pick(rng: random.Random, items: Sequence[T]) -> T:
    """One of `items`, by `rng.random()`, the one draw that Python promises never to change."""
    return items[int(rng.random() * len(items))]
