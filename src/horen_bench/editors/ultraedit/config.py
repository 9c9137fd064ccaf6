"""Settings of UltraEdit."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from horen_bench.config.schema import Count, MethodConfig, ModulePath, Positive, Section, Text


class UltraEditRegime(Section):
    """What the two published codes do differently."""

    rows: Literal["sentence", "answer"]
    """Token rows that are kept: of the whole sentence, or those that predict a token of the answer."""
    normalizer: Literal["per_turn", "lifelong"]
    """Statistics over the rows of one turn, or over those of all turns."""
    labels: Literal["answer", "alone"]
    """The answer as it follows the prompt, or alone: with leading special tokens, and padding is trained on, too."""
    dtype: Literal["float32", "bfloat16", "float16"]
    """Of the weights that the published numbers were obtained with."""


class UltraEditConfig(MethodConfig):
    """UltraEdit."""

    editor: ClassVar[str] = "horen_bench.editors.ultraedit.editor:UltraEditEditor"

    modules: Annotated[list[ModulePath], Field(min_length=1)]
    """Dotted paths of the edited linear modules; those of one shape share the statistics."""
    learning_rate: Positive
    """eta, the step along the normalised gradient."""
    regime: Text
    """The entry of `regimes` to follow."""
    regimes: dict[str, UltraEditRegime]
    """The published codes, by name."""
    edits_per_turn: Count = 1
    """Cases that are written at once."""
    micro_batch: Count = 1
    """Cases of a turn that run through the model at once; the loss is a mean over them."""
    master_weights: bool = False
    """Float32 values behind a half-precision model's weights; the published codes have none."""

    @model_validator(mode="after")
    def _regime_is_known(self) -> Self:
        if self.regime not in self.regimes:
            raise ValueError(f"method.regime must be one of {', '.join(self.regimes)}, got {self.regime!r}")
        return self

    @property
    def published(self) -> UltraEditRegime:
        """The regime in use."""
        return self.regimes[self.regime]
