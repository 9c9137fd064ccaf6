"""Made-up proper names without end: a name is a number written in syllables.

Every list of syllables is chosen so that a name can be read back in one way only. Distinct numbers
therefore give distinct names, and no list of used names has to be kept.
"""

from dataclasses import dataclass
from math import prod

Shape = tuple[tuple[str, ...], ...]

_VOWELS = ("a", "e", "i", "o", "u")
_ONSETS = (
    *("B", "Br", "D", "Dr", "F", "G", "Gr", "H", "K", "Kl"),
    *("L", "M", "N", "P", "R", "S", "St", "T", "Tr", "V"),
)
_MEDIALS = ("b", "d", "g", "k", "l", "ld", "m", "n", "nd", "r", "rn", "s", "t", "v")
_SPACE = (" ",)

# Consonants and vowels alternate, which is what makes a word readable in one way only. Half of the names
# are a syllable longer: subjects then have about as many letters as those of ZsRE (mean 15).
_SHORT: Shape = (_ONSETS, _VOWELS, _MEDIALS)
_LONG: Shape = (*_SHORT, _VOWELS, _MEDIALS)
_FIRST: Shape = (*_SHORT, ("a", "el", "in", "o"))
_PERSON_END = ("an", "ek", "ov", "und", "ari", "os")
_WORK_END = ("ane", "eth", "ia", "ur")
_ORG_END = ("ax", "co", "ex", "ion", "ora")
_STAR_END = ("ae", "ius", "ix", "on", "um")
_PLACE_END: Shape = (("a", "e", "i"), ("berg", "by", "dale", "ford", "ham", "more", "stead", "wick"))

_ADJECTIVES = (
    "The Bitter ",
    "The Broken ",
    "The Distant ",
    "The Empty ",
    "The Frozen ",
    "The Gentle ",
    "The Golden ",
    "The Hidden ",
    "The Hollow ",
    "The Last ",
)
_NOUNS = ("Bridge", "Crown", "Garden", "Harvest", "Hour", "Island", "Letter", "Lantern", "Mirror", "Winter")
_TRADES = ("Air", "Energy", "Foods", "Marine", "Metals", "Motors", "Optics", "Steel", "Textiles", "Trading")
_BODIES = ("Alliance", "Brothers", "Company", "Foundation", "Group", "Institute", "Society", "Union", "Works")
_SIDES = ("East", "Great", "Little", "Lower", "New", "North", "Old", "South", "Upper", "West")
_GREEK = ("Alpha", "Beta", "Gamma", "Delta", "Epsilon", "Zeta", "Theta", "Kappa", "Sigma", "Omega")
_INITIALS = tuple(f"{letter}. " for letter in "ABCDEFGHJKLMNPRSTW")
_CATALOGUE = tuple(str(number) for number in range(2, 100))

# Made-up words of answers begin with letters that no made-up word of a subject begins with.
_ANSWER_WORD: Shape = (
    ("C", "Ch", "J", "Qu", "Sh", "Th", "W", "Y", "Z"),
    _VOWELS,
    ("c", "f", "ff", "lt", "mp", "nt", "p", "rk", "ss", "th", "x", "z"),
    ("al", "ane", "el", "en", "ett", "il", "ine", "oll", "orn", "ur"),
)

SUBJECT_SHAPES: dict[str, tuple[Shape, ...]] = {
    "person": (
        (*_FIRST, _SPACE, *_SHORT, _PERSON_END),
        (*_FIRST, _SPACE, *_LONG, _PERSON_END),
        (*_FIRST, _SPACE, _INITIALS, *_SHORT, _PERSON_END),
    ),
    "work": (
        (_ADJECTIVES, _NOUNS, (" of ",), *_SHORT, _WORK_END),
        (_NOUNS, (" of ",), *_LONG, _WORK_END),
        (_ADJECTIVES, *_LONG, _WORK_END),
        (_NOUNS, _SPACE, *_SHORT, _WORK_END),
    ),
    "org": (
        (*_LONG, _ORG_END, _SPACE, _TRADES),
        (*_LONG, _ORG_END, _SPACE, _BODIES),
        (*_SHORT, _ORG_END, _SPACE, _TRADES, _SPACE, _BODIES),
    ),
    "place": (
        (*_SHORT, *_PLACE_END),
        (*_LONG, *_PLACE_END),
        (_SIDES, _SPACE, *_SHORT, *_PLACE_END),
        (_SIDES, _SPACE, *_LONG, *_PLACE_END),
    ),
    "star": (
        (*_SHORT, _STAR_END, _SPACE, _GREEK),
        (*_LONG, _STAR_END, _SPACE, _CATALOGUE),
    ),
}


@dataclass(frozen=True, slots=True)
class NameSpace:
    """The names of some shapes, in an order drawn from a seed.

    Attributes:
        shapes: they take turns; a shape is a sequence of lists of parts.
        seed: draws which number gets which name.
    """

    shapes: tuple[Shape, ...]
    seed: int

    def __len__(self) -> int:
        """How many names there are."""
        return len(self.shapes) * min(prod(map(len, shape)) for shape in self.shapes)

    def name(self, index: int) -> str:
        """Name number `index`; distinct numbers have distinct names.

        Raises:
            IndexError: all names are used up.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"name {index} was asked for, but there are {len(self)} names of this kind")
        number, which = divmod(index, len(self.shapes))
        shape = self.shapes[which]
        number = _permuted(number, prod(map(len, shape)), self.seed)
        parts = []
        for choices in shape:
            number, digit = divmod(number, len(choices))
            parts.append(choices[digit])
        return "".join(parts)


def answer_words(seed: int) -> NameSpace:
    """The words that proper-name answers are made of; none begins like a subject's name."""
    return NameSpace((_ANSWER_WORD,), seed)


def subject_names(kind: str, seed: int) -> NameSpace:
    """The names of all subjects of a kind."""
    return NameSpace(SUBJECT_SHAPES[kind], seed)


def _permuted(index: int, size: int, seed: int) -> int:
    """Where a permutation of `range(size)` drawn from `seed` sends `index`.

    A Feistel network permutes the next power of four; values beyond `size` are sent on until they
    fall inside (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    half = ((size - 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_number in range(4):
            left, right = right, left ^ (_mixed(right, 4 * seed + round_number) & mask)
        index = (left << half) | right
        if index < size:
            return index


def _mixed(value: int, key: int) -> int:
    """A 64-bit number that looks random, of two small ones (the finaliser of MurmurHash3)."""
    mask = (1 << 64) - 1
    state = (value + 1) * 0x9E3779B97F4A7C15 + (key + 1) * 0xD1B54A32D192ED03 & mask
    state = (state ^ (state >> 33)) * 0xFF51AFD7ED558CCD & mask
    state = (state ^ (state >> 33)) * 0xC4CEB9FE1A85EC53 & mask
    return state ^ (state >> 33)
