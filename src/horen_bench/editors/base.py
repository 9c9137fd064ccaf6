"""The contract between an editing method and the harness; all that the runner sees of a method."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Generic, TypeVar

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from horen_bench.cases import EditCase, EditRecord, Route
from horen_bench.config.schema import MethodConfig
from horen_bench.prompts import PromptEncoder

ConfigT = TypeVar("ConfigT", bound=MethodConfig)


class Editor(ABC, Generic[ConfigT]):
    """One editing method bound to one model.

    `edit` may batch, cache and parallelise as it likes, but the state after `edit(a); edit(b)` equals the
    state after `edit(a + b)`. Between calls `model` is an ordinary Hugging Face model that shows the
    edits to `model(...)` and `model.generate(...)` alike. A case that cannot be written has failed, says so in its
    record and leaves nothing behind.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer, or an encoder of prompts under a template.
        config: the method's settings.
        seed: of whatever the method draws.

    Attributes:
        model: the edited model.
        encoder: turns prompts into token ids.
        config: the method's settings.
        slice_size: how many cases the editor likes to get at once.

    Raises:
        UserError: the model lacks a module that the settings name.
    """

    slice_size: int = 1

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | PromptEncoder,
        config: ConfigT,
        *,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.encoder = PromptEncoder.of(tokenizer)
        self.config = config
        self.seed = seed

    def expect(self, cases: Sequence[EditCase]) -> None:
        """Hear of the whole stream before its first edit; changes nothing.

        Raises:
            UserError: the method's settings do not go with these cases.
        """

    @abstractmethod
    def edit(self, cases: Sequence[EditCase]) -> list[EditRecord]:
        """Write the cases on top of the earlier ones, as if one by one and in order.

        Where it is interrupted, or memory runs out, none of at most `slice_size` cases is written: the editor is as it
        was before, and can be saved or go on.
        """

    def flush(self) -> None:
        """Write what still waits for later cases; called before the model is evaluated."""

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
