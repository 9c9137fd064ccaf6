"""The contract between an editing method and the harness; all that the runner sees of a method."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from transformers import PreTrainedModel

from horen_bench.cases import EditCase
from horen_bench.errors import UserError

Action = Literal["inserted", "fine_tuned", "conflict", "failed"]


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
    """

    case_id: str
    action: Action
    entry: int | None
    route: Route | None
    loss: float
    steps: int
    seconds: float
    problem: str | None = None


class Editor(ABC):
    """One editing method bound to one model.

    `edit` may batch, cache and parallelise as it likes, but the state after `edit(a); edit(b)` equals the
    state after `edit(a + b)`. Between calls `model` is an ordinary Hugging Face model that shows the
    edits to `model(...)` and `model.generate(...)` alike.

    Attributes:
        model: the edited model.
        release_mode: how the published evaluation scores this method (`protocol=release`).
        needs_subject: whether a case without a subject cannot be written.
        slice_size: how many cases the editor likes to get at once.
    """

    model: PreTrainedModel
    release_mode: ClassVar[Literal["generate", "teacher_forced"]] = "teacher_forced"
    needs_subject: ClassVar[bool] = False
    slice_size: int = 1

    def expect(self, cases: Sequence[EditCase]) -> None:  # noqa: B027 - most methods take any cases
        """Hear of the whole stream before its first edit; changes nothing.

        Raises:
            UserError: the method's settings do not go with these cases.
        """

    @abstractmethod
    def edit(self, cases: Sequence[EditCase]) -> list[EditRecord]:
        """Write the cases on top of the earlier ones, as if one by one and in order."""

    def settle(self) -> None:  # noqa: B027 - most methods write at once
        """Write what still waits for later cases; called before the model is questioned."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """What the edits so far amount to: enough to go on with the stream after a restart."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state that `state_dict` gave.

        Raises:
            ValueError: the state is not one of this editor's, or does not fit its model.
        """

    @abstractmethod
    def detach(self) -> None:
        """Leave the model bit for bit as it was received; calling it twice is fine."""

    @abstractmethod
    def side_parameters(self) -> int:
        """Numbers stored beside the base model."""

    def side_memory(self) -> dict[str, int]:
        """The same by kind: `keys`, `values`, and `modified`: copies of what is trained, and what goes with them."""
        return {"keys": 0, "values": 0, "modified": self.side_parameters()}

    def routes(self, prompts: Sequence[str]) -> list[Route | None]:
        """What the method's router decides for each prompt; None for a method without one."""
        return [None] * len(prompts)

    def warnings(self) -> list[str]:
        """Sentences that whoever reads the result must know."""
        return []


def check_choice(where: str, value: str, allowed: Sequence[str]) -> None:
    """Refuse a setting, named in full (`method.engine`), whose value is none of those allowed.

    Raises:
        UserError: the sentence.
    """
    if value not in allowed:
        *others, last = (f"'{choice}'" for choice in allowed)
        raise UserError(f"{where} must be {', '.join(others)} or {last}, got '{value}'")
