"""Settings of the methods that rewrite down-projections in closed form."""

from abc import abstractmethod
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from horen_bench.config.schema import Count, MethodConfig, ModulePath, NonNegative, Positive, Section
from horen_bench.editors.shared.config import Engine, StatisticsConfig

TokensAndTexts = Annotated[list[Count], Field(min_length=2, max_length=2)]
Group = Annotated[list[str], Field(min_length=1)]


class TargetVectorTraining(Section):
    """How the change `delta` of a module's output v0 is trained."""

    n_steps: Count
    """Most forward passes; no step follows the last one."""
    learning_rate: Positive
    """Of Adam."""
    weight_decay: NonNegative
    """omega, on `||delta|| / ||v0||^2`; the norm is not squared."""
    clamp: Positive
    """c; `||delta||` is kept below `c ||v0||`."""
    kl: NonNegative
    """kappa, on the drift of the next-token distribution at the subject in "SUBJECT is a"."""


class LocateEditConfig(MethodConfig):
    """What ROME, MEMIT and AlphaEdit have in common.

    Attributes:
        where: full name of the setting that holds `projections`.
    """

    needs_subject: ClassVar[bool] = True
    where: ClassVar[str]

    hidden: TargetVectorTraining
    """Training of the target vector (v*, z)."""
    statistics: StatisticsConfig
    """General text whose second moment `C` a change has to respect."""
    context_lengths: list[TokensAndTexts]
    """Pairs (tokens, texts) of contexts that the model writes; texts are rounded down to a multiple of 5."""
    contexts: Annotated[list[Group], Field(min_length=1)] | None = None
    """Groups of texts before the prompt, the empty one first; null: the model writes them at the first edit."""
    engine: Engine = "cached"
    """`cached`: upper layers on cached states, small systems; `sequential`: the whole model, systems as published."""

    @model_validator(mode="after")
    def _bare_prompt_comes_first(self) -> Self:
        if self.contexts is not None and self.contexts[0][0] != "":
            raise ValueError(
                f"method.contexts must begin with the empty text, which is the bare prompt; got {self.contexts[0][0]!r}"
            )
        return self

    @property
    @abstractmethod
    def projections(self) -> list[str]:
        """Dotted paths of the down-projections that are rewritten, lowest layer first."""

    @property
    def edits_per_turn(self) -> int:
        """Facts that are written in one turn."""
        return 1


class WindowConfig(LocateEditConfig):
    """What methods have in common that spread a change over a window of layers."""

    where: ClassVar[str] = "method.modules"

    modules: Annotated[list[ModulePath], Field(min_length=1)]
    """Dotted paths of the down-projections, lowest layer first; the target vector is the last one's block's output."""
    batch_size: Count = 1
    """Facts that are written in one turn; release: 1."""

    @property
    def projections(self) -> list[str]:
        """See `LocateEditConfig`."""
        return self.modules

    @property
    def edits_per_turn(self) -> int:
        """See `LocateEditConfig`."""
        return self.batch_size
