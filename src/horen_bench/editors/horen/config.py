"""Settings of HoReN (arXiv 2605.08143, sections 2.2-2.4, 3.1 and E.4)."""

from typing import ClassVar, Literal, Self

from pydantic import model_validator

from horen_bench.config.schema import Count, NonNegative, NonNegativeCount, Positive, Section, Share
from horen_bench.editors.codebook.config import CodebookConfig


class HopfieldRetrieval(Section):
    """The damped Hopfield step (Eqs. 2-3)."""

    beta: Positive
    """Inverse temperature."""
    alpha: Share
    """Damping; share of the way to the retrieval."""
    steps: NonNegativeCount
    """T; 0: the nearest key, no retrieval step."""
    eps: NonNegative
    """A query closer than this to its retrieval stays."""


class LoraValue(Section):
    """Values that are a low-rank map of the module's output (Appendix H.3)."""

    learning_rate: Positive
    """Adam's."""
    rank: Count
    """Of the map."""
    scale: float
    """Factor of what the map adds."""


class HorenConfig(CodebookConfig):
    """HoReN: a codebook read by normalized Hopfield retrieval."""

    editor: ClassVar[str] = "horen_bench.editors.horen.editor:HorenEditor"

    threshold: float
    """tau; an entry acts if its score is strictly above; in [-1, 1], a cosine, if `normalize` (Table 3)."""
    hopfield: HopfieldRetrieval
    """How a query is refined."""
    adaptor: Literal["vector", "lora"]
    """The form of a value (Table 11)."""
    lora: LoraValue
    """How LoRA values are made and trained."""
    label_rule: Literal["tokens", "release"]
    """Which targets agree: `tokens`: equal token ids; `release`: equal means of the label row, prompt as -100."""

    @model_validator(mode="after")
    def _threshold_is_a_cosine(self) -> Self:
        if self.normalize and not -1 <= self.threshold <= 1:
            raise ValueError(
                f"method.threshold must be in [-1, 1], got {self.threshold}; scores of unit vectors are cosines"
            )
        return self
