"""What routing comes to: matches of queries, decisions about edits, and how a router is described in figures."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from horen_bench.cases import Action, Route
from horen_bench.editors.codebook.entries import Codebook
from horen_bench.prompts import EncodedEdit

# Whether the target that made an entry agrees with an edit's.
Agreement = Callable[[Codebook, int, EncodedEdit], bool]


@dataclass(frozen=True, slots=True)
class Matches:
    """Decisions for `B` queries, all `(B,)`: best entry, its score, whether it passes the threshold."""

    entries: Tensor
    scores: Tensor
    matched: Tensor


@dataclass(frozen=True, slots=True)
class Decision:
    """Where an edit is written, and the routing that led there (None while the codebook was empty).

    An edit that `failed` has its entry, but no query of its own reaches it: the value stays as it starts. Where
    its training failed, it has no entry, and `entry` is what it would have been. `problem` is the sentence about it.
    """

    action: Action
    entry: int
    route: Route | None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class RouterDescription:
    """How a router compares a query with a key, for readers.

    Attributes:
        stage: what is done to a query before, such as `last 60% pooled, T = 1`.
        measure: of the two; what `CodebookEditor.similarity` gives.
        threshold: of a new entry, in that measure: matched above it, a distance below it.
        rule: the routing rule by name, such as `Hopfield, T = 1`.
    """

    stage: str
    measure: Literal["cosine", "inner product", "distance"]
    threshold: float
    rule: str


def same_tokens(codebook: Codebook, entry: int, edit: EncodedEdit) -> bool:
    """Targets agree if their token ids are equal."""
    return codebook.labels[entry] == edit.target
